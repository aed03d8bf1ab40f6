"""Losses and attack goals, one value per example (B,), nothing reduced, no side effect.

All of them read logits (B, C). Logits in half precision are raised to float32 first: a softmax in bf16 keeps two
digits, and the KL of nearly equal distributions is all rounding there. float64 stays float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfair.values import Batch


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` unchanged if float32 or float64, else as float32."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(logits)_y, (B,), or the same to labels (1 - s) e_y + s / C under `label_smoothing` s.

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
    tensor([1.3863])
    """
    return F.cross_entropy(at_least_float32(logits), y, reduction="none", label_smoothing=label_smoothing)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """-sum_c soft_c log softmax(logits)_c, (B,), for targets `soft` (B, C) whose rows sum to 1.

    >>> soft_cross_entropy(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]))  # (log 4 + log 4/3) / 2
    tensor([0.8370])
    """
    return -(soft * F.log_softmax(at_least_float32(logits), dim=1)).sum(1)


def label_loss(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) cross-entropy to the soft labels of a batch where a method set them, else to its labels; logits shifted."""
    logits = logits if batch.shift is None else logits + batch.shift
    return cross_entropy(logits, batch.y) if batch.soft is None else soft_cross_entropy(logits, batch.soft)


def boosted_cross_entropy(logits: Tensor, y: Tensor, margin: float = 1.0001, eps_log: float = 1e-12) -> Tensor:
    """-log q_y - log(margin - max_{k != y} q_k + eps_log) with q = softmax(logits), (B,). Needs C >= 2.

    Source: MART (Wang et al. 2020), eq. (7) with the constants of its `mart.py`; the maximum is a constant index.

    >>> boosted_cross_entropy(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0]), margin=1.0)  # 2 log 4
    tensor([2.7726])
    """
    logits = at_least_float32(logits)
    q = F.softmax(logits, dim=1)
    strongest = q.detach().masked_fill(F.one_hot(y, logits.shape[1]).bool(), -1).argmax(1, keepdim=True)
    runner_up = q.gather(1, strongest).squeeze(1)
    return cross_entropy(logits, y) - torch.log(margin - runner_up + eps_log)


def floored_kl_divergence(clean: Tensor, adv: Tensor, eps_log: float = 1e-12) -> Tensor:
    """sum_c p_c (log p_c - log(q_c + eps_log)), (B,), with p, q the softmax of `clean`, `adv`; both carry gradient.

    It is `kl_divergence` but for the floor under the logarithm, and below zero by up to C eps_log where p = q.

    Source: `mart.py` of MART and `loss.py` of ARoW.

    >>> certain = torch.tensor([[1000.0, 0.0]])
    >>> floored_kl_divergence(certain, certain.flip(1), eps_log=0.25)  # -log 0.25
    tensor([1.3863])
    """
    log_p = F.log_softmax(at_least_float32(clean), dim=1)
    q = F.softmax(at_least_float32(adv), dim=1)
    return (log_p.exp() * (log_p - torch.log(q + eps_log))).sum(1)


def true_probability(logits: Tensor, y: Tensor) -> Tensor:
    """softmax(logits)_y, (B,).

    >>> true_probability(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
    tensor([0.7500])
    """
    return F.softmax(at_least_float32(logits), dim=1).gather(1, y[:, None]).squeeze(1)


def kept_mass_labels(kept: float, num_classes: int) -> Tensor:
    """(C, C) float64: row y has `kept` at y and the rest spread evenly over the other classes, if there are any.

    >>> kept_mass_labels(0.5, 3).tolist()
    [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    """
    if num_classes == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    others = (1 - kept) / (num_classes - 1)
    return torch.full((num_classes, num_classes), others, dtype=torch.float64).fill_diagonal_(kept)


def kl_divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c), (B,), with p, q the softmax of `clean`, `adv`; both carry gradient.

    Source: TRADES (Zhang et al. 2019), eq. (5) as its `trades.py` computes it: the clean side is not detached.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log())  # (log 4/3) / 2
    tensor([0.1438])
    """
    log_p = F.log_softmax(at_least_float32(clean), dim=1)
    log_q = F.log_softmax(at_least_float32(adv), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def distillation_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0, eps_log: float = 0.0) -> Tensor:
    """sum_c q_c (log(q_c + eps_log) - log p_c), (B,), q and p the softmax of `teacher` / T and `student` / T.

    It is KL(q || p), but for the floor under the logarithm, which adds less than C eps_log and no gradient.

    Args:
        temperature: T.

    Source: `rslad_loss.py` of RSLAD (eps_log 1e-5, temperature 1); ARD (eps_log 0).

    >>> teacher, student = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    >>> distillation_divergence(teacher, student), distillation_divergence(teacher, 2 * student, temperature=2)
    (tensor([0.1438]), tensor([0.1438]))
    """
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    q = log_q.exp()
    return (q * ((torch.log(q + eps_log) if eps_log else log_q) - log_p)).sum(1)


def js_divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, (B,), p, q as in `kl_divergence`; both carry gradient.

    >>> certain = torch.tensor([[1000.0, 0.0]])
    >>> js_divergence(certain, certain.flip(1))  # log 2: nothing in common
    tensor([0.6931])
    """
    log_p = F.log_softmax(at_least_float32(clean), dim=1)
    log_q = F.log_softmax(at_least_float32(adv), dim=1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1)


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
class MaximiseReverseKL:
    """Attack goal: KL(f(x') || f(x)), the other direction. Zero gradient at x itself."""

    needs_clean = True

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        assert clean is not None, "an attack computes clean logits when its goal needs them"
        return kl_divergence(logits, clean)


@dataclass(frozen=True)
class MaximiseJS:
    """Attack goal: Jensen-Shannon divergence to the clean prediction. Zero gradient at x itself."""

    needs_clean = True

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        assert clean is not None, "an attack computes clean logits when its goal needs them"
        return js_divergence(clean, logits)


@dataclass(frozen=True)
class MaximiseSoftCE:
    """Attack goal: cross-entropy to the distributions (B, C) that `Attack.target` holds, of which KL has the gradient.

    It replaces a whole goal, as `MinimiseCE` does.
    """

    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return soft_cross_entropy(logits, y)


@dataclass(frozen=True)
class MaximiseMargin:
    """Attack goal: the CW margin on logits (CW-k)."""

    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return margin(logits, y)


@dataclass(frozen=True)
class MinimiseCE:
    """Attack goal: towards the class that `Attack.target` holds, as ascent on the negative cross-entropy to it.

    It replaces a whole goal: a target beside TRADES's KL, which reads no label, would change nothing.
    """

    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return -cross_entropy(logits, y)
