"""The run as methods see it, and the counters it keeps on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustfair.attacks.sweep import tally
from robustfair.objectives.base import Objective
from robustfair.values import Attack, Batch, ClassTally, Loss


@dataclass
class TrainingRun:
    """Implements `robustfair.methods.base.Run` for `fit`; its fields advance as training does."""

    model: nn.Module
    objective: Objective
    num_classes: int
    epochs: int
    measure: Callable[[], ClassTally]
    inputs: Callable[[], Iterator[Tensor]]
    weight_decay: float = 0.0
    epoch: int = 0
    step: int = 0
    train: ClassTally | None = None
    _validated: tuple[tuple[int, ...], ClassTally] | None = field(default=None, repr=False)

    def validate(self) -> ClassTally:
        written = tuple(tensor._version for tensor in self.model.state_dict(keep_vars=True).values())
        if self._validated is None or self._validated[0] != written:
            self._validated = (written, self.measure())
        return self._validated[1]


class Meter:
    """Sums of one epoch, per class, on the device: nothing here waits for it.

    Everything comes from what the step computed anyway: the logits of the loss, the attack's radii, the loss's
    coefficients.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.tally = ClassTally()
        self._count = torch.zeros(num_classes, device=device)
        self._sums: dict[str, Tensor] = {}
        self._loss = torch.zeros((), device=device, dtype=torch.float64)
        self._first_bad_step = torch.full((), -1, device=device, dtype=torch.int64)

    def add(self, batch: Batch, attack: Attack | None, loss: Loss, total: Tensor, step: int) -> None:
        """Count one step; `total` is the scalar loss, `step` its 0-based number within the epoch."""
        out = loss.out
        clean = None if out.clean is None else out.clean.detach().argmax(1)
        robust = None if out.adv is None else out.adv.detach().argmax(1)
        self.tally = self.tally + tally(clean, robust, batch.y, self.num_classes)
        values = {f"coef.{name}": coef for name, coef in loss.coef.items()} | {"weight": loss.weight}
        if attack is not None:
            values["eps"] = attack.eps
        ones = torch.ones_like(batch.y, dtype=self._count.dtype)
        self._count.index_add_(0, batch.y, ones)
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(self._count)
            self._sums[name].index_add_(0, batch.y, value.detach().to(self._count.dtype))
        total = total.detach().double()
        self._loss += total * batch.y.shape[0]
        bad = ~torch.isfinite(total) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def first_bad_step(self) -> int | None:
        """0-based step of the first loss that was not finite; waits for the device."""
        step = int(self._first_bad_step)
        return None if step < 0 else step

    def loss(self) -> float:
        """Mean loss per image."""
        return float(self._loss / self._count.sum())

    def per_class(self) -> dict[str, list[float | None]]:
        """Means per class of radius, coefficients and weight; None for a class that was not seen."""
        return {name: finite_or_none(sums / self._count) for name, sums in sorted(self._sums.items())}


def finite_or_none(values: Tensor) -> list[float | None]:
    """Values as JSON has them: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
