"""The class-balanced loss in Python floats."""

from __future__ import annotations

import math

from reference import losses


def effective_number(n, b):
    """1 + b + b^2 + ... + b^(n - 1), which is (1 - b^n) / (1 - b)."""
    return sum(b**k for k in range(n))


def weights(counts, b):
    """One over the effective number of every class, scaled to the sum C."""
    inverse = [1 / effective_number(n, b) for n in counts]
    return [len(counts) * w / sum(inverse) for w in inverse]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def of_example(row, y, kind, gamma):
    """Eqs. (4) to (6)."""
    if kind == "softmax":
        return losses.cross_entropy(row, y)
    total = 0.0
    for k, z in enumerate(row):
        p = sigmoid(z if k == y else -z)
        total -= (1 - p) ** (gamma if kind == "focal" else 0) * math.log(p)
    return total


def loss(logits, labels, counts, b, kind="softmax", gamma=1.0):
    """Mean over all examples of the batch, not over the sum of their weights."""
    w = weights(counts, b)
    return sum(w[y] * of_example(row, y, kind, gamma) for row, y in zip(logits, labels, strict=True)) / len(labels)
