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


Weighting = Literal["anti-robust", "confidence", "constant"]


def arow_loss(
    clean: Tensor,
    adv: Tensor,
    y: Tensor,
    lam: float = 7.0,
    *,
    label_smoothing: float = 0.2,
    weighting: Weighting = "anti-robust",
    eps_log: float = 1e-12,
) -> Loss:
    """CE_s(p, y) + lam KL(p || q) (1 - q_y) per example, with p, q the softmax of the logits `clean`, `adv` (B, C).

    Args:
        y: (B,) labels.
        lam, label_smoothing, weighting, eps_log: as in `ARoW`.

    >>> import torch
    >>> clean, adv, y = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])
    >>> arow_loss(clean, adv, y, lam=7).per_example()  # log 2 + 7 (log 4/3) / 2 (1 - 1/4)
    tensor([1.4483])
    """
    weight: Tensor | float = 1.0
    if weighting == "anti-robust":
        weight = 1 - true_probability(adv, y)
    elif weighting == "confidence":
        weight = true_probability(clean, y)
    return Loss.of(
        Forward(clean=clean, adv=adv),
        label=(cross_entropy(clean, y, label_smoothing), 1.0),
        consistency=(floored_kl_divergence(clean, adv, eps_log) * weight, lam),
    )


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
    label_at: ClassVar[str] = "x"
    clean_pass: ClassVar[bool] = True
    lam: NonNegative = 7.0
    label_smoothing: Share = 0.2
    perturb_loss: Literal["kl", "ce", "revkl", "js"] = "kl"
    start: Literal["uniform", "gauss001"] = "uniform"
    weighting: Weighting = "anti-robust"
    eps_log: Annotated[float, Bounds(ge=0, lt=1)] = 1e-12

    def attack(self, batch: Batch) -> Attack:
        return self.attack_with(batch, GOALS[self.perturb_loss], self.start)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        clean = model(batch.x)
        adv = model(batch.x_adv)
        return arow_loss(
            clean,
            adv,
            batch.y,
            self.lam,
            label_smoothing=self.label_smoothing,
            weighting=self.weighting,
            eps_log=self.eps_log,
        )
