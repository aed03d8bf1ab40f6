"""DAFA in Python floats: similarity of classes, and the weights pair by pair."""

from __future__ import annotations

import math

from reference import losses


def similarity(logits, y, num_classes):
    """P[i][j]: mean over the images of class i of the probability of class j; zeros for a class without images."""
    rows = []
    for i in range(num_classes):
        own = [losses.softmax(z) for z, label in zip(logits, y, strict=True) if label == i]
        rows.append([math.fsum(p[j] for p in own) / len(own) if own else 0.0 for j in range(num_classes)])
    return rows


def weights(p, lam, *, ties_give=False):
    """Every unordered pair moves weight from the class that is surer of itself to the other."""
    w = [1.0] * len(p)
    for i in range(len(p)):
        for j in range(i):
            if p[i][i] == p[j][j]:
                if ties_give:
                    w[i] -= lam * p[j][i] * p[i][i]
                    w[j] -= lam * p[i][j] * p[j][j]
                continue
            harder, easier = (i, j) if p[i][i] < p[j][j] else (j, i)
            moved = lam * p[harder][easier] * p[easier][easier]
            w[harder] += moved
            w[easier] -= moved
    return w


def loss(label, consistency, y, w, beta):
    """Mean of W_y times the label term, plus beta times the consistency."""
    pairs = zip(label, consistency, y, strict=True)
    return math.fsum(w[c] * value + beta * other for value, other, c in pairs) / len(y)
