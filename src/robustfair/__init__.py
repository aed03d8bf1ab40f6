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
    "ABSLD": "robustfair.methods.absld",
    "ARD": "robustfair.objectives.ard",
    "AVmixup": "robustfair.methods.avmixup",
    "AWP": "robustfair.methods.awp",
    "BAT": "robustfair.objectives.bat",
    "CCM": "robustfair.methods.cfa",
    "CCR": "robustfair.methods.cfa",
    "CFA": "robustfair.methods.cfa",
    "ClassBalanced": "robustfair.methods.class_balanced",
    "CSR": "robustfair.methods.csr",
    "CropFlip": "robustfair.data.augment.crops",
    "CropShift": "robustfair.data.augment.idbh",
    "DAFA": "robustfair.methods.dafa",
    "EMA": "robustfair.methods.averaging",
    "FAWA": "robustfair.methods.cfa",
    "FAAL": "robustfair.methods.faal",
    "FGSMAT": "robustfair.objectives.fgsm",
    "FRL": "robustfair.methods.frl",
    "FairTAT": "robustfair.methods.fair_tat",
    "FairARD": "robustfair.methods.fair_ard",
    "Fitted": "robustfair.training.fit",
    "FriendlyAT": "robustfair.methods.friendly_at",
    "HWNwB": "robustfair.repairs.head_norm",
    "IDBH": "robustfair.data.augment.idbh",
    "ImageDataset": "robustfair.data.datasets",
    "LabelSmoothing": "robustfair.methods.label_smoothing",
    "LfF": "robustfair.methods.lff",
    "LogitAdjustment": "robustfair.methods.logit_adjustment",
    "MART": "robustfair.objectives.mart",
    "NFGSM": "robustfair.objectives.n_fgsm",
    "Method": "robustfair.methods.base",
    "Objective": "robustfair.objectives.base",
    "PGDAT": "robustfair.objectives.at",
    "RSLAD": "robustfair.objectives.rslad",
    "PostHocLogitAdjustment": "robustfair.repairs.logit_adjustment",
    "RobustFairError": "robustfair.errors",
    "SWA": "robustfair.methods.averaging",
    "Schedule": "robustfair.training.schedule",
    "Splits": "robustfair.data.datasets",
    "Standard": "robustfair.objectives.standard",
    "Trades": "robustfair.objectives.trades",
    "WAT": "robustfair.methods.wat",
    "VarianceFAT": "robustfair.methods.variance_fat",
    "audit": "robustfair.evaluate.run",
    "audit_corruptions": "robustfair.evaluate.corruptions",
    "audit_until": "robustfair.evaluate.sequential",
    "compare": "robustfair.evaluate.compare",
    "compose": "robustfair.methods.compose",
    "create_model": "robustfair.models.build",
    "edit": "robustfair.data.edits",
    "find_head": "robustfair.models.head",
    "fit": "robustfair.training.fit",
    "load_audit": "robustfair.evaluate.result",
    "load_model": "robustfair.runs.load",
    "load_plugin": "robustfair.registry",
    "load_dataset": "robustfair.data.datasets",
    "load_weights": "robustfair.models.weights",
    "pgd": "robustfair.attacks.pgd",
    "repair": "robustfair.repairs.base",
    "reported": "robustfair.runs.reported",
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
