"""Head weight normalisation in plain float64 loops."""

from __future__ import annotations

import math


def row_norm(row: list[float]) -> float:
    total = 0.0
    for value in row:
        total += value * value
    return math.sqrt(total)


def normalised(weight: list[list[float]], target_norm: str) -> list[list[float]]:
    norms = [row_norm(row) for row in weight]
    if target_norm == "unit":
        target = 1.0
    elif target_norm == "mean":
        target = sum(norms) / len(norms)
    else:
        target = math.sqrt(sum(norm * norm for norm in norms) / len(norms))
    return [[value * target / norm for value in row] for row, norm in zip(weight, norms, strict=True)]


def predicted(weight: list[list[float]], bias: list[float], feature: list[float]) -> int:
    """argmax_k W_k . feature + b_k, the lowest index on ties."""
    scores = [sum(w * f for w, f in zip(row, feature, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
    return scores.index(max(scores))
