"""FAAL (Zhang et al., CVPR 2024): class weights that are the worst within a KL ball around uniform, in every batch.

    M_c = mean over the images i of class c of  max_{k != y} p_k(x'_i) - p_y(x'_i),   -1 for a class without images
    q   = argmax over the simplex of  sum_c a_c q_c   under  KL(uniform || q) = -(1/C) sum_c log(C q_c) <= r
    L   = (C / B) sum_i q_{y_i} l_i,   q detached, l the loss of the objective

a_c is n_c M_c in the authors' code, which sums over the images of the batch, n_c of them of class c (`over="count"`).
M_c alone is the reading over classes (`over="class"`). Under "count" a class without images has a_c = 0, which is more
than that of a class that is mostly right, so it takes weight that no image then carries.

The maximiser is q_c proportional to 1 / (s + max a - a_c) for one number s > 0, and the KL falls in s (stationarity of
the Lagrangian), so that no conic solver is needed: `worst_weights` finds every q_c to 2e-7 of itself, and waits for no
device. r is the paper's 0.5; their code's default is 1.

Departures: on pgd-at their code runs the clean images through the network as well, which moves the running statistics
of batch norm and nothing else; here it does not. Their MART takes the attack of TRADES and beta = 6, which is
`mart(beta=6, perturb_loss=kl)`. Their AWP perturbs along the unweighted loss, as `awp` does by default, and the margins
are those of the perturbed weights. Any number of classes; their code has 10.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import NonNegative, config
from robustfair.losses import at_least_float32, cross_entropy, margin
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State

POINTS, ROUNDS = 256, 4
"""Each round keeps one of the POINTS - 1 parts of an interval: 255^4 is 4e9."""
LEAST_LOG = -600.0
"""Of s; its reciprocal is still a number. Weights that would be smaller are those at this s, below 1e-260."""


@torch.no_grad()
def worst_weights(a: Tensor, radius: float) -> Tensor:
    """(C,) float64 q that maximises sum_c a_c q_c under KL(uniform || q) <= radius; uniform where all a are equal.

    With d = max a - a, scaled to [0, 1], q_c is proportional to 1 / (s + d_c), and KL(uniform || q) is
    mean log(s + d) + log mean 1/(s + d). It is at least radius at log s = -C (radius + log C), and at most radius where
    log(1 + 1/s) = sqrt(8 radius) (Hoeffding's lemma). Between the two log s is found by sections; an error e of log s
    is one of at most e q_c (1 + e) in q_c.

    >>> worst_weights(torch.tensor([-0.6, 0.5, -2.0, 1.2]), 0.5)
    tensor([0.0846, 0.1820, 0.0503, 0.6831], dtype=torch.float64)
    """
    classes = len(a)
    below = a.max().double() - a.double()
    below = below / below.max().clamp(min=1e-300)
    if radius == 0:
        return torch.full_like(below, 1 / classes)
    root = math.sqrt(8 * radius)
    low = max(-classes * (radius + math.log(classes)), LEAST_LOG)
    high = max(-root - math.log(-math.expm1(-root)), low)
    log_s, part = torch.full_like(below[0], low), (high - low) / (POINTS - 1)
    points = torch.arange(POINTS, dtype=below.dtype, device=below.device)
    for _ in range(ROUNDS):
        shifted = (log_s + part * points).exp()[:, None] + below
        kl = shifted.log().mean(1) + shifted.reciprocal().mean(1).log()
        log_s = log_s + part * ((kl > radius).sum(dtype=below.dtype) - 1).clamp(min=0, max=POINTS - 2)
        part /= POINTS - 1
    unscaled = ((log_s + part * (POINTS - 1) / 2).exp() + below).reciprocal()
    return unscaled / unscaled.sum()


@METHODS.register("faal")
@config
class FAAL(Method):
    """Fairness-aware adversarial learning: weigh each batch by the worst class weights within a KL ball.

    Attributes:
        radius: r of the ball; 0 weighs all classes alike.
        over: what the worst case is over: "count", images, so that the counts of the batch enter, or "class".
        measure: how bad a class is: "margin" of the probabilities, or the attacked "cross-entropy", where a class
            without images has 0.
    """

    name: ClassVar[str] = "faal"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.weight", "role.class_weight"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv"})
    radius: NonNegative = 0.5
    over: Literal["count", "class"] = "count"
    measure: Literal["margin", "cross-entropy"] = "margin"

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        assert loss.out.adv is not None, "compose refuses an objective that does not attack"
        logits = at_least_float32(loss.out.adv.detach())
        if self.measure == "margin":
            values, absent = margin(torch.softmax(logits, 1), batch.y), -1.0
        else:
            values, absent = cross_entropy(logits, batch.y), 0.0
        sums, counts = map(run.total, sums_per_class(values, batch.y, run.num_classes))
        means = torch.where(counts > 0, sums / counts.clamp(min=1), absent)
        q = worst_weights(counts * means if self.over == "count" else means, self.radius)
        return loss.weighted((run.num_classes * q).to(loss.weight.dtype)[batch.y])

    def remark(self, epochs: int) -> str | None:
        return "faal(radius=0) weighs all classes alike: it does nothing" if self.radius == 0 else None
