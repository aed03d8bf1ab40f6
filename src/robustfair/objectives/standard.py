"""Standard (clean) training: mean cross-entropy on the images as they are."""

from __future__ import annotations

from typing import ClassVar

from robustfair.config import config
from robustfair.losses import label_loss
from robustfair.objectives.base import Objective
from robustfair.registry import OBJECTIVES
from robustfair.values import Batch, Forward, Loss, Model


@OBJECTIVES.register("standard")
@config
class Standard(Objective):
    """Cross-entropy at x; equals PGD-AT with eps = 0 and TRADES with beta = 0."""

    name: ClassVar[str] = "standard"
    reads: ClassVar[frozenset[str]] = frozenset({"soft", "shift"})
    label_at: ClassVar[str] = "x"
    clean_pass: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch) -> Loss:
        clean = model(batch.x)
        return Loss.of(Forward(clean=clean), label=(label_loss(clean, batch), 1.0))
