"""DAFA (Lee et al., ICLR 2024): distance-aware fair adversarial training, one move of weight to the harder classes.

    P_ij = mean over the training images of class i of p_j(x'), in the last epoch of the warm-up
    W_i  = 1 + lam sum_{j != i}   P_ij P_jj   where P_ii < P_jj   (class i is the harder one: it gains)
                                - P_ji P_ii   where P_ii > P_jj   (it is the easier one: it gives)

so that each pair moves weight from the easier to the harder class by how often the harder is taken for the easier,
times how sure the easier is of itself. From epoch `begin` on the radius is W_y eps, the step W_y times as long, and the
label term weighs W_y; W stays as it is. A consistency term is not weighted, as in the authors' code. P comes from the
passes that trained (batch statistics, weights before the step), as theirs does.

Departures: a tie P_ii = P_jj moves nothing, and the sum of W is C; in their code both classes give
(`compat="official"`). A weight below 0, which their code does not guard, goes with a radius of 0 here, and with a
warning. Their attack on plain adversarial training adds a second step, without weights, and projects onto the
unweighted ball, which undoes the radii. Down to W = eps / (eps + a), a the step, that is one step of (1 + W) a in the
ball of eps; below it is one step in no ball, so that reading is refused there.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config, require
from robustfair.errors import RobustFairWarning
from robustfair.losses import at_least_float32
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, Loss, State

WARM_UP = 70 / 110
"""Share of the run: the authors' 70 of 110 epochs."""


def distance_weights(similarity: Tensor, lam: float, *, ties_give: bool = False) -> Tensor:
    """W (C,) from P (C, C): row the true class, column the mean probability of each.

    Args:
        ties_give: let both classes of a tie P_ii = P_jj give weight.

    >>> P = torch.tensor([[0.70, 0.20, 0.10], [0.15, 0.80, 0.05], [0.30, 0.10, 0.60]])
    >>> distance_weights(P, 1.0)
    tensor([0.9500, 0.7600, 1.2900])
    """
    own = similarity.diagonal()
    gained, given = similarity * own, similarity.T * own[:, None]
    mine, other = own[:, None], own[None, :]
    gives = mine >= other if ties_give else mine > other
    moved = torch.where(mine < other, gained, torch.where(gives, -given, 0.0))
    return 1 + lam * moved.fill_diagonal_(0).sum(1)


@METHODS.register("dafa")
@config
class DAFA(Method):
    """Distance-aware fair AT: once, after a warm-up, move radius and label weight to the harder class of similar pairs.

    Attributes:
        lam: lambda; None takes 1.0 with ten classes (the paper's on CIFAR-10) and 1.5 with any other number (its on
            CIFAR-100). On STL-10, which has ten, the paper has 1.5.
        begin: first weighted epoch, 0-based, and length of the warm-up; None takes 70/110 of the run.
        min_weight: least W; None has no floor.
        compat: "official" lets ties give weight, as the authors' code does; on trades only, see above.
    """

    name: ClassVar[str] = "dafa"
    claims: ClassVar[frozenset[str]] = frozenset({"attack.eps", "attack.step_size", "loss.label", "role.class_weight"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv", "label"})
    lam: NonNegative | None = None
    begin: Annotated[int, Bounds(ge=1, allowed=">= 1 (P is measured in the epoch before)")] | None = None
    min_weight: Annotated[float, Bounds(gt=0, le=1)] | None = None
    compat: Literal["official"] | None = None

    def first(self, epochs: int) -> int:
        """The first weighted epoch, 0-based, of a run of `epochs`."""
        return max(1, round(WARM_UP * epochs)) if self.begin is None else self.begin

    def at_epoch(self, state: State, run: Run) -> State:
        classes = run.num_classes
        if not state:
            ones = torch.ones(classes, dtype=torch.float64, device=run.device)
            return {"weights": ones, "sums": ones.new_zeros(classes, classes), "counts": ones.new_zeros(classes)}
        if run.epoch != self.first(run.epochs):
            return state
        sums, counts = run.total(state["sums"]), run.total(state["counts"])
        similarity = sums / counts.clamp(min=1)[:, None]  # 0 in the row of a class without images, which moves nothing
        lam = (1.0 if classes == 10 else 1.5) if self.lam is None else self.lam
        weights = distance_weights(similarity, lam, ties_give=self.compat == "official")
        if self.min_weight is not None:
            weights = weights.clamp(min=self.min_weight)
        _warn_of_negative(weights)
        return {"weights": weights, "sums": sums, "counts": counts}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        factor = state["weights"].clamp(min=0).to(attack.eps.dtype)[batch.y]
        return replace(attack, eps=attack.eps * factor, step_size=attack.step_size * factor)

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        return loss.scaled("label", state["weights"].to(loss.weight.dtype)[batch.y])

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        if run.epoch != self.first(run.epochs) - 1:
            return state
        assert loss.out.adv is not None, "compose refuses an objective that does not attack"
        probabilities = torch.softmax(at_least_float32(loss.out.adv.detach()), 1)
        sums, counts = sums_per_class(probabilities, batch.y, run.num_classes)
        return {**state, "sums": state["sums"] + sums, "counts": state["counts"] + counts}

    def remark(self, epochs: int) -> str | None:
        first = self.first(epochs)
        if first < epochs:
            return None
        return (
            f"dafa warms up until epoch {first} and this run ends after {epochs}: it will never act; "
            "train longer or lower dafa(begin)"
        )

    def check_objective(self, objective: str) -> None:
        """Refuse the authors' reading where it is not known, or not a step that the attacks here can take."""
        known = self.compat is None or objective == "trades"
        hint = "Their attack on pgd-at takes two steps in one, with two radii, see the card of dafa"
        require(known, self.name, "compat", allowed=f"none on {objective}", got=self.compat, hint=hint)


def _warn_of_negative(weights: Tensor) -> None:
    lowest = int(weights.argmin())
    if weights[lowest] < 0:
        warnings.warn(
            f"dafa: the weight of class {lowest} is {float(weights[lowest]):.3g}: it trains away from its label and "
            "without an attack; set dafa(min_weight=0.1), lower dafa(lam), or warm up longer with dafa(begin)",
            RobustFairWarning,
            stacklevel=3,
        )
