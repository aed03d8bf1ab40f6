"""FRL (Xu et al., ICML 2021): fair robust learning, a second stage from a model that TRADES made robust.

Robust error is taken apart into natural and boundary error, A and R being clean and robust accuracy:

    g_nat(c) = (1 - A_c) - (1 - A) - tau1        g_bdy(c) = (A_c - R_c) - (A - R) - tau2

A multiplier per class and kind of error rises where its constraint g <= 0 is violated, max over multipliers against min
over weights. Reweight (RW) makes class weights of them, remargin (RM) a class-wise radius, RWRM both. Their code, which
is followed, does before every epoch, the first too, on the current weights and the validation images:

    lam_nat <- P(lam_nat + rate1 g_nat)          lam_bdy <- P(lam_bdy + 2 rate1 g_bdy)
    lam_eps <- lam_eps + rate2 g_bdy             P: max(., 0), then scaled down where the sum exceeds lim
    w(c) = 1 / C + lam(c) - mean of lam          eps_c = eps min(max(exp(2 lam_eps(c)), smallest), largest)
    L = sum_i w_nat(y_i) CE_i / sum_i w_nat(y_i) + beta sum_i w_bdy(y_i) KL_i / sum_i w_bdy(y_i)   over a batch

with the step of the attack at a quarter of the largest radius of the batch under RWRM.

Departures. The paper's Lagrangian has the positive part of g (`positive_part`). The code's class weights are those of
ten classes; here of C. The step is the objective's times the largest factor of the batch, so that factors of 1 leave
the objective's attack as it is: a quarter of the largest radius where the step is a quarter of eps, as it is by
default. RM alone has no script: here lam_bdy stays at 0, remargin being what stands in its place, and lam_nat plays.

Validation is PGD-20 from a uniform start within [0, 1] on cross-entropy in eval mode, as their evaluation. It differs
in this: the radius is the objective's and the step a quarter of it (8/255 and 2/255 by default, which is theirs);
random starts are the same at every boundary, where theirs are drawn anew; and the images are those that the run holds
out, 2 % of each class by default, where theirs are the last 6 % (`--validation 0.06` for as many).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import Bounds, Count, NonNegative, Share, config, require
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, ClassTally, Loss, State

PLAYED = {"rw": ("lam_nat", "lam_bdy"), "rm": ("lam_nat", "lam_eps"), "rwrm": ("lam_nat", "lam_bdy", "lam_eps")}
"""Multipliers of each variant."""
TERMS = {"lam_nat": "label", "lam_bdy": "consistency"}
"""Terms of the loss that multipliers weigh."""


def violations(tallied: ClassTally, tau1: float, tau2: float) -> tuple[Tensor, Tensor]:
    """(g_nat, g_bdy), each (C,) float64: by how much a class exceeds the average error and the threshold; signed.

    >>> counts = ClassTally(torch.tensor([[4, 3], [0, 1]]), torch.tensor([[2, 3], [2, 1]]))
    >>> [g.tolist() for g in violations(counts, 0.125, 0.25)]
    [[-0.5, 0.25], [0.0, -0.5]]
    """
    clean, robust = tallied.clean_pred_true, tallied.robust_pred_true
    assert clean is not None
    assert robust is not None, "an attacked objective is measured under attack"
    average_clean, average_robust = (counts.trace().double() / counts.sum() for counts in (clean, robust))
    natural = average_clean - tallied.clean - tau1
    boundary = (tallied.clean - tallied.robust) - (average_clean - average_robust) - tau2
    return natural, boundary


def projected(lam: Tensor, lim: float) -> Tensor:
    """Multipliers (C,) without negative entries, scaled so that their sum is at most `lim`.

    >>> projected(torch.tensor([-0.5, 0.5, 1.5]), 0.5).tolist()
    [0.0, 0.125, 0.375]
    """
    lam = lam.clamp(min=0)
    return lam * (lim / lam.sum().clamp(min=lim))


def class_weights(lam: Tensor) -> Tensor:
    """w(c) = 1 / C + lam(c) - mean of lam, (C,): sums to 1, and is at least (1 - lim) / C where lam sums to `lim`.

    >>> class_weights(torch.tensor([0.0, 0.5])).tolist()
    [0.25, 0.75]
    """
    return 1 / len(lam) + lam - lam.mean()


def radius_factors(lam: Tensor, smallest: float, largest: float) -> Tensor:
    """exp(2 lam(c)) within bounds, (C,).

    >>> radius_factors(torch.tensor([-1.0, 0.0, 1.0]), 0.5, 3.0).tolist()
    [0.5, 1.0, 3.0]
    """
    return torch.exp(2 * lam).clamp(smallest, largest)


@METHODS.register("frl")
@config
class FRL(Method):
    """Fair robust learning: reweight and remargin the classes whose error exceeds the average by too much.

    Attributes:
        variant: "rw" weighs, "rm" sets radii and weighs the label term, "rwrm" does all.
        tau1: by how much the natural error of a class may exceed the average, a fraction.
        tau2: the same of boundary error.
        rate1: ascent rate of lam_nat, and half of that of lam_bdy.
        rate2: ascent rate of lam_eps.
        halve_every: halve rate1 at the start of every epoch, counted from 1, that this divides; None never does.
        lim: what lam_nat, and lam_bdy, add up to at most.
        smallest_radius: of a class, in units of eps.
        largest_radius: of a class, in units of eps.
        positive_part: ascend on violations alone: multipliers do not fall where a constraint is met.
        freeze_natural: under "rm", leave the label term alone too.
    """

    name: ClassVar[str] = "frl"
    needs: ClassVar[frozenset[str]] = frozenset({"label", "consistency", "x_adv", "validation"})
    second_stage: ClassVar[bool] = True
    variant: Literal["rw", "rm", "rwrm"] = "rwrm"
    tau1: Share = 0.05
    tau2: Share = 0.05
    rate1: NonNegative = 0.05
    rate2: NonNegative = 0.2
    halve_every: Count | None = 40
    lim: Annotated[float, Bounds(gt=0, le=1)] = 0.5
    smallest_radius: Annotated[float, Bounds(gt=0, le=1)] = 0.98
    largest_radius: Annotated[float, Bounds(ge=1)] = 3.0
    positive_part: bool = False
    freeze_natural: bool = False

    def __post_init__(self) -> None:
        usable = self.variant == "rm" or not self.freeze_natural
        require(usable, self.name, "freeze_natural", allowed="false unless variant is rm", got=self.freeze_natural)

    @property
    def played(self) -> tuple[str, ...]:
        """Names of the multipliers, which are those of the state."""
        return tuple(name for name in PLAYED[self.variant] if not (self.freeze_natural and name == "lam_nat"))

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        terms = {f"loss.{TERMS[name]}" for name in self.played if name in TERMS}
        radius = {"attack.eps", "attack.step_size"} if "lam_eps" in self.played else set()
        return frozenset(terms | ({"role.class_weight"} if terms else set()) | radius)

    def at_epoch(self, state: State, run: Run) -> State:
        if run.finished:
            return state
        natural, boundary = violations(run.validate(steps=20), self.tau1, self.tau2)
        if self.positive_part:
            natural, boundary = natural.clamp(min=0), boundary.clamp(min=0)
        rate1 = self.rate1 if self.halve_every is None else self.rate1 * 0.5 ** ((run.epoch + 1) // self.halve_every)
        steps = {"lam_nat": rate1 * natural, "lam_bdy": 2 * rate1 * boundary, "lam_eps": self.rate2 * boundary}
        ascended = {name: state.get(name, 0) + steps[name] for name in self.played}
        return {name: projected(lam, self.lim) if name in TERMS else lam for name, lam in ascended.items()}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        if "lam_eps" not in state:
            return attack
        factors = radius_factors(state["lam_eps"], self.smallest_radius, self.largest_radius).to(attack.eps.dtype)
        seen = run.total(torch.zeros_like(factors).index_add_(0, batch.y, torch.ones_like(attack.eps)))
        largest = torch.where(seen > 0, factors, 0).amax()
        return replace(attack, eps=attack.eps * factors[batch.y], step_size=attack.step_size * largest)

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        for name, term in TERMS.items():
            if name in state:
                weights = class_weights(state[name])[batch.y]
                total, images = run.total(torch.stack([weights.sum(), torch.ones_like(weights).sum()]))
                share = torch.where(total > 0, images / total, 0.0)  # with lim 1 a batch may be without any weight
                loss = loss.scaled(term, (weights * share).to(loss.weight.dtype))
        return loss
