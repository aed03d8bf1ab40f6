"""LfF in Python floats: the averages of every training image, the weights, and both generalised cross-entropies."""

from __future__ import annotations

import math

from reference import losses


class Averages:
    """One moving average a training image; None where the image was not visited."""

    def __init__(self, labels, decay):
        self.labels, self.decay = labels, decay
        self.values = [None] * len(labels)

    def visit(self, index, loss):
        for i, value in zip(index, loss, strict=True):
            old = self.values[i]
            self.values[i] = value if old is None else self.decay * old + (1 - self.decay) * value

    def relative(self, i):
        """The average of image i over the largest of its class in the whole training set."""
        same = [
            v for v, label in zip(self.values, self.labels, strict=True) if label == self.labels[i] and v is not None
        ]
        return self.values[i] / max(same)


def cross_entropies(logits, labels):
    return [losses.cross_entropy(row, y) for row, y in zip(logits, labels, strict=True)]


def weights(biased, debiased, index):
    found = []
    for i in index:
        b, d = biased.relative(i), debiased.relative(i)
        found.append(b / (b + d + 1e-8))
    return found


def probability(row, y):
    return math.exp(row[y]) / sum(math.exp(z) for z in row)


def generalised(row, y, q):
    """(1 - p^q) / q."""
    return (1 - probability(row, y) ** q) / q


def official(row, y, q):
    """q p^q CE, p held constant."""
    return q * probability(row, y) ** q * losses.cross_entropy(row, y)


def generalised_gradient(row, y, q):
    """Derivative of (1 - p^q) / q by the logits: -p^(q - 1) dp/dz."""
    p = [probability(row, k) for k in range(len(row))]
    return [-(p[y] ** (q - 1)) * p[y] * ((k == y) - p[k]) for k in range(len(row))]
