"""What no perturbation can change about a linear classifier, image by image, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def survives(
    pixels: Sequence[float],
    label: int,
    weight: Sequence[Sequence[float]],
    bias: Sequence[float],
    eps: float,
    norm: str,
) -> bool:
    """Whether every point within eps of `pixels` is classified as `label`, for pixels at least eps inside [0, 1]."""
    return margin_left(pixels, label, weight, bias, eps, norm) > 0


def margin_left(
    pixels: Sequence[float],
    label: int,
    weight: Sequence[Sequence[float]],
    bias: Sequence[float],
    eps: float,
    norm: str,
) -> float:
    """Smallest z_y - z_k over classes k != y after the worst perturbation: clean margin - eps * dual norm (Hoelder)."""
    left = math.inf
    for k in range(len(weight)):
        if k == label:
            continue
        difference = [a - b for a, b in zip(weight[label], weight[k], strict=True)]
        clean = bias[label] - bias[k]
        for w, pixel in zip(difference, pixels, strict=True):
            clean += w * pixel
        dual = {"linf": sum(map(abs, difference)), "l2": math.hypot(*difference)}[norm]
        left = min(left, clean - eps * dual)
    return left
