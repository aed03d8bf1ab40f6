"""FAIR-TAT in Python floats: scores from predictions one by one, laws of targets label by label."""

from __future__ import annotations

import math


def false_positive_scores(predicted, labels, num_classes):
    """Of all wrong predictions, the share that named class c; None where none is wrong."""
    wrong = [p for p, y in zip(predicted, labels, strict=True) if p != y]
    return [sum(p == c for p in wrong) / len(wrong) for c in range(num_classes)] if wrong else None


def softened(scores, scale):
    exponentials = [math.exp(scale * score) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def law(scores, label):
    """Probabilities of the targets of a label: by score, or equal where no other class has any; 0 for the label."""
    others = [c for c in range(len(scores)) if c != label]
    total = sum(scores[c] for c in others)
    if total == 0:
        return [0.0 if c == label else 1 / len(others) for c in range(len(scores))]
    return [0.0 if c == label else scores[c] / total for c in range(len(scores))]


def laws(scores):
    return [law(scores, label) for label in range(len(scores))]


def radii(robust, lam, eps):
    return [(lam + t_c) * eps for t_c in robust]
