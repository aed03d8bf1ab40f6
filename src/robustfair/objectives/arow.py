"""ARoW (Yang et al. 2023): anti-robust weighted regularisation.

    L = mean of CE_s(f(x), y) + lam mean of [ KL(p || q) (1 - q_y) ],  p = softmax(f(x)), q = softmax(f(x'))

CE_s is cross-entropy to labels smoothed by s: (1 - s) e_y + s / C. The weight reads the attacked image, where MART's
reads the clean one, and it is not detached. q enters the KL as log(q + 1e-12), as in the authors' `loss.py`.

`lam` is on the scale of the code, which is twice the paper's lambda: the paper's 3.5 is 7 here. The code's own default
is 6, its README runs 7. Departures from the code: the attack takes every goal for every loss (its argument parser
refuses some of the README's own commands), and any number of classes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from robustfair.config import Bounds, NonNegative, Share, config
from robustfair.losses import (
    MaximiseCE,
    MaximiseJS,
    MaximiseKL,
    MaximiseReverseKL,
    cross_entropy,
    floored_kl_divergence,
    true_probability,
)
from robustfair.objectives.base import AdversarialObjective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Forward, Goal, Loss, Model

GOALS: dict[str, Goal] = {
    "kl": MaximiseKL(),
    "ce": MaximiseCE(),
    "revkl": MaximiseReverseKL(),
    "js": MaximiseJS(),
}


@OBJECTIVES.register("arow")
@config
class ARoW(AdversarialObjective):
    """mean of smoothed CE at x plus lam times KL(f(x) || f(x')), weighted by how wrong f is about x'.

    Attributes:
        lam: weight of the consistency term, on the scale of the code (twice the paper's).
        label_smoothing: s in [0, 1].
        perturb_loss: what the attack maximises: "kl", "ce", "revkl" (KL(q || p)) or "js".
        start: "uniform", clipped to [0, 1], or "gauss001".
        weighting: "anti-robust" (1 - q_y), "confidence" (p_y: the code's `cow`) or "constant" (1), which is TRADES on
            smoothed labels.
        eps_log: floor under the logarithm; 0 is the paper's, and not finite where a probability underflows.
    """

    name: ClassVar[str] = "arow"
    terms: ClassVar[frozenset[str]] = frozenset({"label", "consistency"})
    label_at: ClassVar[Literal["x", "x_adv"]] = "x"
    clean_pass: ClassVar[bool] = True
    lam: NonNegative = 7.0
    label_smoothing: Share = 0.2
    perturb_loss: Literal["kl", "ce", "revkl", "js"] = "kl"
    start: Literal["uniform", "gauss001"] = "uniform"
    weighting: Literal["anti-robust", "confidence", "constant"] = "anti-robust"
    eps_log: Annotated[float, Bounds(ge=0, lt=1)] = 1e-12

    def attack(self, batch: Batch) -> Attack:
        return self.attack_with(batch, GOALS[self.perturb_loss], self.start)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        clean = model(batch.x)
        adv = model(batch.x_adv)
        consistency = floored_kl_divergence(clean, adv, self.eps_log)
        return Loss.of(
            Forward(clean=clean, adv=adv),
            label=(cross_entropy(clean, batch.y, self.label_smoothing), 1.0),
            consistency=(consistency * self._weight(clean, adv, batch.y), self.lam),
        )

    def _weight(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor | float:
        if self.weighting == "anti-robust":
            return 1 - true_probability(adv, y)
        return true_probability(clean, y) if self.weighting == "confidence" else 1.0
