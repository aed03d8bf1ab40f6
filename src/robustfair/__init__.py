"""robustfair: train, audit and repair image classifiers that stay robust in every class.

    import robustfair as rf
    data = rf.load_dataset("digits")
    model = rf.create_model("small-cnn", in_channels=1)
    run = rf.fit(model, data.train, rf.PGDAT(eps=0.2), schedule=rf.Schedule(epochs=40), select="last")
    audit = rf.audit(run.model, data.test, attacks=["clean", "pgd-20"], eps=0.2)
    fixed = rf.repair(run.model, "hwnwb")

`rf.compare` holds two audits of the same images against each other. A method, an objective or a repair of your own is a
class that these functions take; `rf.load_plugin` gives those of a file their names in compositions.

Names are imported on first use, so that `import robustfair` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Audit": "robustfair.evaluate.result",
    "Comparison": "robustfair.evaluate.compare",
    "ARoW": "robustfair.objectives.arow",
    "AVmixup": "robustfair.methods.avmixup",
    "AWP": "robustfair.methods.awp",
    "BAT": "robustfair.objectives.bat",
    "CCM": "robustfair.methods.cfa",
    "CCR": "robustfair.methods.cfa",
    "CSR": "robustfair.methods.csr",
    "CropFlip": "robustfair.data.augment.crops",
    "CropShift": "robustfair.data.augment.idbh",
    "EMA": "robustfair.methods.averaging",
    "FGSMAT": "robustfair.objectives.fgsm",
    "Fitted": "robustfair.training.fit",
    "FriendlyAT": "robustfair.methods.friendly_at",
    "HWNwB": "robustfair.repairs.head_norm",
    "IDBH": "robustfair.data.augment.idbh",
    "ImageDataset": "robustfair.data.datasets",
    "LabelSmoothing": "robustfair.methods.label_smoothing",
    "MART": "robustfair.objectives.mart",
    "NFGSM": "robustfair.objectives.n_fgsm",
    "Method": "robustfair.methods.base",
    "Objective": "robustfair.objectives.base",
    "PGDAT": "robustfair.objectives.at",
    "RobustFairError": "robustfair.errors",
    "SWA": "robustfair.methods.averaging",
    "Schedule": "robustfair.training.schedule",
    "Splits": "robustfair.data.datasets",
    "Standard": "robustfair.objectives.standard",
    "Trades": "robustfair.objectives.trades",
    "audit": "robustfair.evaluate.run",
    "audit_corruptions": "robustfair.evaluate.corruptions",
    "audit_until": "robustfair.evaluate.sequential",
    "compare": "robustfair.evaluate.compare",
    "compose": "robustfair.methods.compose",
    "create_model": "robustfair.models.build",
    "find_head": "robustfair.models.head",
    "fit": "robustfair.training.fit",
    "load_audit": "robustfair.evaluate.result",
    "load_plugin": "robustfair.registry",
    "load_dataset": "robustfair.data.datasets",
    "load_weights": "robustfair.models.weights",
    "pgd": "robustfair.attacks.pgd",
    "repair": "robustfair.repairs.base",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'robustfair' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
