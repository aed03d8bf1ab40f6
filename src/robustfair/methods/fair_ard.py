"""Fair-ARD (Yue et al., NeurIPS 2023): weigh classes in distillation by how few attack steps their images withstand.

    kappa_i = number of the K steps of the training attack that leave a point which the student still classifies right
    kappa_c = mean over the images of class c in the epoch
    w_c     = (1 / (kappa_c + 1e-5))^beta, scaled to sum C, then clipped to [5/6, 5/2]; one in the first epoch
    loss    = mean of w_y times the loss of the objective

Source: the authors' code; of the paper only its abstract was at hand. On `ard` it is their Fair-ARD, on `rslad` their
Fair-RSLAD, whose code leaves the 1e-5 out; beside those it weighs any attacked objective. Departures: kappa_c is over
the images seen of a class, where the code divides by N / C; a class without images has the weight one and no share in
the sum. The clipped weights no longer sum to C, as in the code, so that the loss grows or shrinks with them
(`renormalise`). Their attack runs on batch statistics, which are counted too: `ard(attack_mode=train)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, Loss, State

NO_STEP = 1e-5
"""What stands in for kappa 0."""


@dataclass(frozen=True)
class StillRight:
    """Watch: the number of steps that left a point which is classified right (B,)."""

    def start(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def __call__(self, seen: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return seen + (logits.argmax(1) == y).to(seen.dtype)


def class_weights(kappa: Tensor, beta: float, lowest: float, highest: float, renormalise: bool = False) -> Tensor:
    """(kappa + 1e-5)^-beta scaled to mean one and clipped, (C,); one where kappa is nan, a class without images.

    >>> class_weights(torch.tensor([8.0, 4.0, 2.0]), beta=2, lowest=5 / 6, highest=5 / 2)
    tensor([0.8333, 0.8333, 2.2857])
    """
    least = kappa.nan_to_num(torch.inf).min() + NO_STEP
    weight = ((kappa + NO_STEP) / least) ** -beta  # at most 1, so that no beta makes it infinite
    weight = (weight / weight.nanmean()).clamp(lowest, highest)
    weight = weight / weight.nanmean() if renormalise else weight
    return weight.nan_to_num(1)


@METHODS.register("fair-ard")
@config
class FairARD(Method):
    """Weight classes by (steps that their images withstand in the training attack)^-beta.

    Attributes:
        beta: how strongly; 0 gives every class the weight one.
        lowest, highest: what the weights are clipped to.
        renormalise: scale the clipped weights to mean one again.
    """

    name: ClassVar[str] = "fair-ard"
    claims: ClassVar[frozenset[str]] = frozenset({"attack.watch", "loss.weight", "role.class_weight"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv"})
    beta: NonNegative = 2.0
    lowest: Annotated[float, Bounds(ge=0, le=1)] = 5 / 6
    highest: Annotated[float, Bounds(ge=1)] = 5 / 2
    renormalise: bool = False

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        return replace(attack, watch=StillRight())

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        return loss.weighted(state["weight"].to(loss.weight.dtype)[batch.y])

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        assert batch.watched is not None, "the attack was told to count"
        steps, count = sums_per_class(batch.watched, batch.y, run.num_classes)
        return {**state, "steps": state["steps"] + steps, "count": state["count"] + count}

    def at_epoch(self, state: State, run: Run) -> State:
        none = torch.zeros(run.num_classes, dtype=torch.float64, device=run.device)
        fresh = {"steps": none, "count": none}
        if not state:
            return {**fresh, "weight": none + 1}
        kappa = run.total(state["steps"]) / run.total(state["count"])
        return {**fresh, "weight": class_weights(kappa, self.beta, self.lowest, self.highest, self.renormalise)}
