"""What may be wrong with a model or with its audit, and the measure of a difference that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from robustfair import metrics


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """What a reader of an audit should know.

    Attributes:
        code: what it is about, stable: "flattered-attack", "unconfirmed-gain", "gain-unchecked", "clean-near-chance",
            "no-images", "few-images", "weak-attacks", "masked-gradient", "square-beats-gradients", "not-finite",
            "cut-short", and those of `diagnostics.masking` and `diagnostics.inputs`.
        severity: "warn" where a number misleads, "note" where it needs care.
        text: what was found, with the numbers.
        advice: what to do.
    """

    code: str
    severity: Literal["warn", "note"]
    text: str
    advice: str


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Difference of two hit rates on the same images, mean(a) - mean(b), with its 95 % interval: (value, lower, upper).

    `a` and `b` are flags (N,); the interval is `metrics.paired_interval`.

    >>> import torch
    >>> value, lower, upper = paired_difference(torch.tensor([True] * 8 + [False] * 2), torch.tensor([False] * 10))
    >>> round(value, 3), round(lower, 3), round(upper, 3)
    (0.8, 0.354, 0.979)
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    lower, upper = metrics.paired_interval(only_b, only_a, len(a))
    return (only_a - only_b) / len(a), float(lower), float(upper)
