"""TRADES (Zhang et al. 2019): clean cross-entropy plus beta times KL(f(x) || f(x')).

The loss is `trades.py` line by line: neither side of the KL is detached, the mean is over examples. Departures from the
authors' code: one clean pass instead of two (same value and gradient, one batch-norm update less); eps and step are the
8/255 and 2/255 of the later literature instead of 0.031 and 0.007; under l2 a zero gradient moves nothing, where theirs
draws a random direction, and their start is the second of two draws. The paper's algorithm writes the regulariser as a
surrogate loss between f(x) and f(x'), such as their cross-entropy (`regularizer="ce"`): the same gradient on f(x'),
another on f(x). The TRADES of CFA's code divides the loss by 1 + beta (`normalise_beta`).
"""

from __future__ import annotations

from math import isclose
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import NonNegative, config, require
from robustfair.grammar import format_value
from robustfair.losses import (
    MaximiseKL,
    at_least_float32,
    cross_entropy,
    kl_divergence,
    label_loss,
    soft_cross_entropy,
)
from robustfair.objectives.base import AdversarialObjective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Forward, Loss, Model

Regularizer = Literal["kl", "ce"]


def trades_loss(
    clean: Tensor,
    adv: Tensor,
    y: Tensor,
    beta: float = 6.0,
    *,
    label: Tensor | None = None,
    regularizer: Regularizer = "kl",
    detach_clean: bool = False,
    normalise_beta: bool = False,
) -> Loss:
    """CE(p, y) + beta KL(p || q) per example, with p, q the softmax of the logits `clean`, `adv` (B, C).

    Args:
        y: (B,) labels.
        label: (B,) what stands in place of CE(p, y) where a method set other labels.
        beta, regularizer, detach_clean, normalise_beta: as in `Trades`.

    >>> clean, adv = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    >>> trades_loss(clean, adv, torch.tensor([0]), beta=6).per_example()  # log 2 + 6 (log 4/3) / 2
    tensor([1.5562])
    """
    target = clean.detach() if detach_clean else clean
    if regularizer == "kl":
        consistency = kl_divergence(target, adv)
    else:
        consistency = soft_cross_entropy(adv, torch.softmax(at_least_float32(target), 1))
    label = cross_entropy(clean, y) if label is None else label
    whole = 1 + beta if normalise_beta else 1.0
    return Loss.of(Forward(clean=clean, adv=adv), label=(label, 1 / whole), consistency=(consistency, beta / whole))


@OBJECTIVES.register("trades")
@config
class Trades(AdversarialObjective):
    """mean of CE(f(x), y) + beta KL(f(x) || f(x')), x' maximising the KL from a start of 0.001 Gaussian noise.

    Attributes:
        beta: weight of the consistency term; 6 in the paper's CIFAR-10 runs and in CFA.
        regularizer: "kl", or "ce": -sum_c p_c log q_c, which is the KL plus the entropy of p.
        detach_clean: treat the clean prediction as a constant target; a different method, for ablations.
        normalise_beta: divide the loss by 1 + beta, as CFA's code does in its baseline; it acts on the learning rate.
        l2_step: under l2, "two-eps-over-steps" (their code, which takes no other) or "given".
    """

    name: ClassVar[str] = "trades"
    terms: ClassVar[frozenset[str]] = frozenset({"label", "consistency"})
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "soft", "shift"})
    label_at: ClassVar[str] = "x"
    clean_pass: ClassVar[bool] = True
    beta: NonNegative = 6.0
    regularizer: Regularizer = "kl"
    detach_clean: bool = False
    normalise_beta: bool = False
    l2_step: Literal["two-eps-over-steps", "given"] = "two-eps-over-steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        agrees = self.step_size is None or isclose(self.step_size, self.step, rel_tol=1e-6)
        allowed = f"2 eps / steps = {self.step:.6g} under l2, or left out"
        hint = "Add l2_step=given for a step of your own"
        require(agrees, self.name, "step_size", allowed=allowed, got=format_value(self.step_size), hint=hint)

    @property
    def step(self) -> float:
        if self.norm == "l2" and self.l2_step == "two-eps-over-steps":
            return 2 * self.radius / max(self.steps, 1)
        return super().step

    def attack(self, batch: Batch) -> Attack:
        return self.attack_with(batch, MaximiseKL(), "gauss001", box_first=True)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        clean = model(batch.x)
        adv = model(batch.x_adv)
        return trades_loss(
            clean,
            adv,
            batch.y,
            self.beta,
            label=label_loss(clean, batch),
            regularizer=self.regularizer,
            detach_clean=self.detach_clean,
            normalise_beta=self.normalise_beta,
        )
