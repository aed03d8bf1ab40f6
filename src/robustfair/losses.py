"""Losses and attack goals, one value per example (B,), nothing reduced, no side effect.

All of them read logits (B, C). Logits in half precision are raised to float32 first: a softmax in bf16 keeps two
digits, and the KL of nearly equal distributions is all rounding there. float64 stays float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` unchanged if float32 or float64, else as float32."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)_y, (B,).

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == torch.tensor(4.0).log().item()
    True
    """
    return F.cross_entropy(at_least_float32(logits), y, reduction="none")


def kl_divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(adv)), (B,): clean first, and both arguments carry gradient.

    Source: TRADES (Zhang et al. 2019), eq. (5) as its `trades.py` computes it: the clean side is not detached.
    """
    log_p = F.log_softmax(at_least_float32(clean), dim=1)
    log_q = F.log_softmax(at_least_float32(adv), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """CW margin max_{k != y} z_k - z_y, (B,): positive exactly where the prediction is wrong. Needs C >= 2.

    >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
    tensor([1.])
    """
    logits = at_least_float32(logits)
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


@dataclass(frozen=True)
class MaximiseCE:
    """Attack goal: cross-entropy to the true label (PGD)."""

    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return cross_entropy(logits, y)


@dataclass(frozen=True)
class MaximiseKL:
    """Attack goal: KL from the clean prediction (TRADES). Reads no label; zero gradient at x itself."""

    needs_clean = True

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        assert clean is not None, "an attack computes clean logits when its goal needs them"
        return kl_divergence(clean, logits)


@dataclass(frozen=True)
class MaximiseMargin:
    """Attack goal: the CW margin on logits (CW-k)."""

    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return margin(logits, y)


@dataclass(frozen=True, eq=False)
class Targeted:
    """Attack goal: towards `target` (B,), as ascent on the negative cross-entropy to it.

    It replaces a whole goal: setting a target beside TRADES's KL, which reads no label, would turn that attack around.
    """

    target: Tensor
    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return -cross_entropy(logits, self.target)
