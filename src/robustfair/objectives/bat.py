"""BAT (Sun et al. 2023): balance adversarial training, on the two points between which an attack crosses the boundary.

    x_lc  last-clean: the iterate before the first that is misclassified; the start, if that is; the last, if none is
    x_fa  first-adversarial: the iterate tau steps behind the first that is misclassified
    L = mean of CE(f(x_lc), y) + beta KL(p(x) || p(x_fa)) + w [ KL(p(x_lc) || u) + KL(p(x_fa) || u) ],  u uniform

KL(p || u) = log C - H(p), so that both points of the boundary are pushed towards the prediction that favours no class.
Two attacks with starts of their own maximise KL(p(x) || p(x')) and look at the prediction before every step; the last
iterate is not looked at.

Source: the authors' code, which was read; of the paper only descriptions. As in the code the clean image has no
cross-entropy of its own, both uniform terms weigh 1, beta apart, and tau is 1: one step past the first error, where the
word first-adversarial means `tau=0`. An image that is right again before its budget is spent goes on.

Departures: eps and step are 8/255 and 2/255 instead of 0.031 and 0.007; where their attacks return images in the order
they stopped, ours keep the batch's. Their 200 epochs go with drops of the rate at 75, 90 and 100. Under l2, which they
do not try, the step is the usual one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustfair.config import NonNegative, Whole, config
from robustfair.losses import MaximiseKL, at_least_float32, kl_divergence, label_loss
from robustfair.objectives.base import AdversarialObjective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Forward, Loss, Model, StopWhenWrong

LAST_CLEAN = "last-clean"


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(p || u) = log C - H(p), (B,), with p the softmax of `logits` (B, C): 0 where p is uniform, at most log C.

    >>> import torch
    >>> kl_to_uniform(torch.tensor([[1.0, 1.0], [1000.0, 0.0]]))  # 0, log 2
    tensor([0.0000, 0.6931])
    """
    log_p = F.log_softmax(at_least_float32(logits), dim=1)
    return math.log(logits.shape[1]) + (log_p.exp() * log_p).sum(1)


@OBJECTIVES.register("bat")
@config
class BAT(AdversarialObjective):
    """mean of CE at the last clean point, beta KL to the first adversarial one, and both pushed towards uniform.

    Attributes:
        beta: weight of the consistency term.
        tau: steps past the first error at which the first-adversarial point lies; from `steps` on it is the end of the
            whole attack.
        uniform_weight: weight of each of the two uniform terms.
    """

    name: ClassVar[str] = "bat"
    terms: ClassVar[frozenset[str]] = frozenset(
        {"label", "consistency", "uniform_last_clean", "uniform_first_adversarial"}
    )
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "soft", "shift"})
    owns: ClassVar[frozenset[str]] = frozenset({"attack.goal", "attack.target", "attack.stop", "attack.keep"})
    label_at: ClassVar[str] = LAST_CLEAN
    clean_pass: ClassVar[bool] = True
    beta: NonNegative = 6.0
    tau: Whole = 1
    uniform_weight: NonNegative = 1.0

    def attack(self, batch: Batch) -> Attack:
        budget = min(self.tau, self.steps)  # no more than that can be spent
        return replace(self.attack_with(batch, MaximiseKL(), "gauss001-clipped"), stop=StopWhenWrong(budget))

    def attacks(self, batch: Batch) -> dict[str, Attack]:
        first_adversarial = self.attack(batch)
        last_clean = replace(first_adversarial, stop=StopWhenWrong(0), keep="inside")
        return {"x_adv": first_adversarial, LAST_CLEAN: last_clean}

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        last_clean = model(batch.views[LAST_CLEAN])
        adv = model(batch.x_adv)
        clean = model(batch.x)
        return Loss.of(
            Forward(clean=clean, adv=adv, views={LAST_CLEAN: last_clean}),
            label=(label_loss(last_clean, batch), 1.0),
            consistency=(kl_divergence(clean, adv), self.beta),
            uniform_last_clean=(kl_to_uniform(last_clean), self.uniform_weight),
            uniform_first_adversarial=(kl_to_uniform(adv), self.uniform_weight),
        )
