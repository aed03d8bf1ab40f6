from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustfair.evaluate.result import Audit
from robustfair.values import Threat


def build_audit(labels: list[int], predictions: dict[str, list[int]], names: tuple[str, ...], **fields: Any) -> Audit:
    defaults = {
        "model": "net",
        "data": "toy",
        "settings": {name: {"steps": 20 * (name != "clean"), "eps": 8 / 255} for name in predictions},
        "threat": Threat(),
        "fingerprint": "c0ffee",
        "split": "test",
        "provenance": {
            "versions": {"torch": "2.13.0"},
            "seed": 7,
            "command": "robustfair audit runs/x",
            "date": "2026-05-04T10:00:00+00:00",
        },
    }
    return Audit(
        class_names=names,
        index=torch.arange(len(labels)),
        labels=torch.tensor(labels),
        predictions={name: torch.tensor(column) for name, column in predictions.items()},
        **{**defaults, **fields},
    )


@pytest.fixture
def small() -> Audit:
    """Class a: 4 images, 4 right clean, 3 under attack. Class b: 2 images, 2 and 1. Class c: none."""
    return build_audit(
        [0, 0, 0, 0, 1, 1],
        {"clean": [0, 0, 0, 0, 1, 1], "pgd-20": [0, 0, 0, 1, 1, 2]},
        ("a", "b", "c"),
        head_norms=[1.25, 1.0, 0.5],
    )


@pytest.fixture
def small_repaired(small: Audit) -> Audit:
    """The same images after a repair: class b no longer loses its image, class a loses one more."""
    return build_audit(
        small.labels.tolist(),
        {"clean": [0, 0, 0, 0, 1, 1], "pgd-20": [0, 0, 1, 1, 1, 1]},
        ("a", "b", "c"),
        head_norms=[1.0, 1.0, 1.0],
        model="net repaired",
    )


@pytest.fixture
def undecided() -> tuple[Audit, Audit]:
    """Two audits of ten classes of forty images. Class 0 loses six images, which the paired test leaves undecided over
    so many classes, and class 1 all of its forty, which it does not; in the others nothing changes."""
    labels = [c for c in range(10) for _ in range(40)]
    rank = [i % 40 for i in range(len(labels))]
    lost = [9 if r < (6 if c == 0 else 40 if c == 1 else 0) else c for c, r in zip(labels, rank, strict=True)]
    names = tuple(f"class {c}" for c in range(10))
    return build_audit(labels, {"clean": labels}, names), build_audit(labels, {"clean": lost}, names, model="after")


@pytest.fixture
def large() -> Callable[..., Audit]:
    """A factory: `classes` classes of `images` images each, two attacks, errors to the next class."""

    def make(classes: int, images: int = 10, names: tuple[str, ...] | None = None, **fields: Any) -> Audit:
        labels = [c for c in range(classes) for _ in range(images)]
        rank = [i % images for i in range(len(labels))]

        def column(lost: Callable[[int], int]) -> list[int]:
            return [(c + 1) % classes if r < lost(c) else c for c, r in zip(labels, rank, strict=True)]

        predictions = {
            "clean": column(lambda c: c % 2),
            "pgd-20": column(lambda c: 1 + c % (images - 2)),
            "cw-20": column(lambda c: 2 + c % (images - 2)),
        }
        names = names or tuple(f"class {c}" for c in range(classes))
        norms = [1 + 0.01 * c for c in range(classes)]
        return build_audit(labels, predictions, names, **{"head_norms": norms, **fields})

    return make


@pytest.fixture
def history() -> Callable[[int], list[dict[str, Any]]]:
    """A factory of training records for a number of classes, three epochs, two candidates."""

    def make(classes: int) -> list[dict[str, Any]]:
        def tally(n: int, right: int) -> dict[str, list[int]]:
            return {"count": [n] * classes, "clean": [right + 1] * classes, "robust": [right] * classes}

        return [
            {
                "epoch": epoch,
                "lr": 0.1,
                "loss": 2.0 / epoch,
                "train": tally(100, 20 * epoch),
                "per_class": {"eps": [0.1 + 0.01 * c for c in range(classes)], "weight": [1.0] * classes},
                "validation": {"model": tally(10, epoch), "ema": tally(10, epoch + 1)},
                "head_norms": [1.0 + 0.1 * c for c in range(classes)],
            }
            for epoch in (1, 2, 3)
        ]

    return make
