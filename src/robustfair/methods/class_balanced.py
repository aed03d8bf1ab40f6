"""The class-balanced loss (Cui et al. 2019): a class counts by the effective number of its training images.

    E_n = (1 - b^n) / (1 - b),   w_c = (1 / E_{n_c}) scaled to sum_c w_c = C          eq. (2), section 4
    L   = mean over the batch of w_y times the loss of the example

The loss of an example is one of three, eqs. (4) to (6), with s_k = 1 for the label and -1 for every other class k:

    softmax   the loss of the objective, as it is
    sigmoid   sum_k -log sigmoid(s_k z_k)                                    in place of the label term
    focal     sum_k -(1 - sigmoid(s_k z_k))^gamma log sigmoid(s_k z_k)       in place of the label term

The mean is over all B examples, as in the authors' code, whose softmax form divides by the examples of non-zero weight
and not by the sum of the weights. On an objective of several terms the weight is that of their sum. b = 0 gives w = 1,
and b -> 1 one over the count; equal counts give w = 1 whatever b is.

Departure: the code starts the bias of the last layer at -log(C - 1) under sigmoid and focal and spares it weight decay.
Here it starts as the network has it and decays with the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config, require
from robustfair.errors import RobustFairWarning
from robustfair.losses import at_least_float32
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State


def effective_weights(counts: Tensor, b: float) -> Tensor:
    """w (C,) float64 from the images of each class (C,), all at least 1, for b in [0, 1).

    >>> effective_weights(torch.tensor([500, 100, 10]), 0.999)
    tensor([0.0672, 0.2776, 2.6552], dtype=torch.float64)
    """
    base = torch.tensor(b, dtype=torch.float64, device=counts.device)
    effective = -torch.expm1(counts.double() * base.log()) / (1 - base)  # 1 - b^n without cancellation
    return len(counts) / effective / (1 / effective).sum()


def focal_loss(logits: Tensor, y: Tensor, gamma: float) -> Tensor:
    """sum_k -(1 - p_k)^gamma log p_k, (B,), p_k the probability that a sigmoid gives to what is true of class k.

    gamma 0 is the sum of the binary cross-entropies of all classes.

    >>> focal_loss(torch.zeros(1, 3), torch.tensor([0]), gamma=1)  # 3 times log(2) / 2
    tensor([1.0397])
    """
    logits = at_least_float32(logits)
    signed = torch.where(F.one_hot(y, logits.shape[1]).bool(), logits, -logits)
    return -(torch.exp(gamma * F.logsigmoid(-signed)) * F.logsigmoid(signed)).sum(1)


@METHODS.register("class-balanced")
@config
class ClassBalanced(Method):
    """Weigh every example by the inverse of the effective number of training images of its class.

    Attributes:
        b: in [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.
        kind: "softmax", "sigmoid" or "focal", see above.
        gamma: power of the focal loss; the paper tries 0.5, 1 and 2.
    """

    name: ClassVar[str] = "class-balanced"
    b: Annotated[float, Bounds(ge=0, lt=1)] = 0.999
    kind: Literal["softmax", "sigmoid", "focal"] = "softmax"
    gamma: NonNegative = 1.0

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"loss.weight", "role.class_weight", *(f"loss.{term}" for term in self.replaces)})

    @property
    def replaces(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.kind == "softmax" else frozenset({"label"})

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.replaces

    def check_classes(self, counts: Tensor, groups: Sequence[int] | None = None) -> None:
        absent = (counts == 0).nonzero().flatten().tolist()
        hint = "Its weight is one over the number of its images: add some, or drop class-balanced"
        got = f"none of class {', '.join(map(str, absent))}"
        require(not absent, self.name, "training images", allowed="at least one of every class", got=got, hint=hint)

    def at_epoch(self, state: State, run: Run) -> State:
        weight = effective_weights(torch.bincount(run.labels, minlength=run.num_classes), self.b)
        if run.epoch == 0 and self.kind == "softmax" and float((weight - 1).abs().max()) < 1e-12:
            why = "b is 0" if self.b == 0 else "all classes have as many training images"
            text = f"class-balanced gives every class the weight 1, since {why}: it changes nothing"
            warnings.warn(text, RobustFairWarning, stacklevel=2)
        return {"weight": weight.to(run.device)}

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        if self.replaces:
            logits = loss.out.at(run.objective.label_at)
            term = focal_loss(logits, batch.y, self.gamma if self.kind == "focal" else 0.0)
            loss = replace(loss, terms={**loss.terms, "label": term})
        return loss.weighted(state["weight"].to(loss.weight.dtype)[batch.y])
