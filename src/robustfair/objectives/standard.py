"""Standard (clean) training: mean cross-entropy on the images as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustfair.losses import cross_entropy
from robustfair.objectives.base import Objective
from robustfair.registry import OBJECTIVES
from robustfair.values import Batch, Forward, Loss, Model


@OBJECTIVES.register("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Objective):
    """Cross-entropy at x; equals PGD-AT with eps = 0 and TRADES with beta = 0."""

    name: ClassVar[str] = "standard"
    clean_pass: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch) -> Loss:
        clean = model(batch.x)
        return Loss.of(Forward(clean=clean), label=(cross_entropy(clean, batch.y), 1.0))
