"""Audits whose predictions are written down, so that every number of them is known."""

from __future__ import annotations

from typing import Any

import torch

from robustfair.evaluate.result import Audit
from robustfair.values import Threat


def made_audit(
    labels: list[int],
    predictions: dict[str, list[int]],
    names: tuple[str, ...] = ("cat", "dog", "car"),
    **fields: Any,
) -> Audit:
    """`predictions[attack]` are the predicted classes, "clean" first."""
    usual = {
        "model": "net",
        "data": "toy",
        "settings": {name: {"steps": 20} if name != "clean" else {} for name in predictions},
        "threat": Threat(),
        "fingerprint": "c0ffee",
    }
    return Audit(
        class_names=names,
        index=torch.arange(len(labels)),
        labels=torch.tensor(labels),
        predictions={name: torch.tensor(column) for name, column in predictions.items()},
        **{**usual, **fields},
    )


def random_audit(seed: int, *, classes: int = 4, images: int = 60, keeps: float = 0.6, **fields: Any) -> Audit:
    """Predictions at random on labels that do not depend on the seed; the last class has no images."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % (classes - 1)
    columns = {"clean": torch.where(torch.rand(images, generator=rng) < 0.9, labels, (labels + 1) % classes)}
    for attack in ("pgd-20", "cw-50(restarts=5)"):
        kept = (torch.rand(images, generator=rng) < keeps) | (columns["clean"] != labels)
        columns[attack] = torch.where(kept, columns["clean"], (labels + 2) % classes)
    names = tuple(f"class {c}" for c in range(classes))
    return made_audit(labels.tolist(), {name: column.tolist() for name, column in columns.items()}, names, **fields)
