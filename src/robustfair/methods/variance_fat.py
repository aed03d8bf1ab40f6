"""Variance-regularised fair AT (Ma, Wang and Liu, NeurIPS 2022, "On the tradeoff between robustness and fairness").

    L = loss of the objective + alpha Var_c(l_c),   l_c the mean attacked cross-entropy of class c in the batch

with the unbiased variance. Its gradient weighs the loss of class c by 2 alpha (l_c - mean l) / (C - 1) more: hard
classes up, easy ones down, summing to 0. Called FAT in its paper, as friendly adversarial training is in its own.

The variance is over the C classes of the paper that are in the batch. The authors' code has a vector of length 100
whatever the data, in which everything that is not there counts as a loss of 0: on CIFAR-10 ninety zeros, so that the
term also lowers the mean loss, and is smaller (`pad_to=100, absent="zero"`). Its option for CIFAR-100 takes the
variance over the means of the 20 super-classes (`superclass`), a missing class 0 in the mean of its five (with
`absent="zero"`). Its TRADES trains on images that PGD found for the cross-entropy (`goal="ce"`); here the objective's
attack is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfair.config import Count, NonNegative, config, require
from robustfair.losses import MaximiseCE, cross_entropy
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, Loss, State


def variance_of_present(means: Tensor, present: Tensor, zeros: int = 0) -> Tensor:
    """() unbiased variance of the entries of `means` (C,) where `present` (C,) is 1, and of so many zeros beside them.

    It is 0, with a gradient of 0, where fewer than two entries are left.

    >>> variance_of_present(torch.tensor([1.0, 7.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    tensor(2.)
    """
    number = present.sum() + zeros
    centre = (present * means).sum() / number.clamp(min=1)
    squares = (present * (means - centre) ** 2).sum() + zeros * centre**2
    return squares / (number - 1).clamp(min=1)


@METHODS.register("variance-fat")
@config
class VarianceFAT(Method):
    """Add alpha times the variance over classes of the mean attacked cross-entropy in the batch.

    Attributes:
        alpha: weight of the variance.
        absent: a class that is not in the batch: "skip" leaves it out, "zero" counts it as a loss of 0.
        pad_to: length of the vector that the variance is over, filled with zeros; None adds none.
        superclass: take the variance over the super-classes of the data set, each the mean of its classes' means.
        goal: what the attack maximises: what the "objective" does, or the cross-entropy ("ce") from a uniform start.
    """

    name: ClassVar[str] = "variance-fat"
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv"})
    alpha: NonNegative = 0.1
    absent: Literal["skip", "zero"] = "skip"
    pad_to: Count | None = None
    superclass: bool = False
    goal: Literal["objective", "ce"] = "objective"

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        attack = {"attack.goal", "attack.start"} if self.goal == "ce" else set()
        return frozenset({"loss.variance", "role.class_weight"} | attack)

    def check_classes(self, counts: Tensor, groups: Sequence[int] | None = None) -> None:
        known = not self.superclass or groups is not None
        require(known, self.name, "superclass", allowed="false on data without super-classes", got=self.superclass)
        over = 1 + max(groups) if self.superclass and groups is not None else len(counts)
        least = f"none, or at least {over}, what the variance is over"
        require(self.pad_to is None or self.pad_to >= over, self.name, "pad_to", allowed=least, got=self.pad_to)

    def at_epoch(self, state: State, run: Run) -> State:
        groups = run.groups if self.superclass else torch.arange(run.num_classes)
        assert groups is not None, "refused before the first step"
        return {"members": F.one_hot(groups).T.double().to(run.device)}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        return attack if self.goal == "objective" else replace(attack, goal=MaximiseCE(), start="uniform")

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        assert loss.out.adv is not None, "compose refuses an objective that does not attack"
        values = cross_entropy(loss.out.adv, batch.y)
        variance = self.variance(values, batch.y, state["members"], run).to(values.dtype)
        return loss.plus("variance", variance, torch.full_like(variance, self.alpha, requires_grad=False))

    def variance(self, values: Tensor, y: Tensor, members: Tensor, run: Run) -> Tensor:
        """() float64, differentiable, of `values` (B,); `members` (G, C) has a 1 where a class is in a group."""
        sums, counts = map(run.total, sums_per_class(values, y, run.num_classes))
        here = (counts > 0).double() if self.absent == "skip" else torch.ones_like(counts)
        size = members @ here
        means = members @ (sums / counts.clamp(min=1)) / size.clamp(min=1)
        zeros = 0 if self.pad_to is None else self.pad_to - len(members)
        return variance_of_present(means, (size > 0).double(), zeros)

    def remark(self, epochs: int) -> str | None:
        return "variance-fat(alpha=0) adds nothing to the loss: it does nothing" if self.alpha == 0 else None
