"""Variance-regularised fair training in Python floats: means per class and per super-class, variance and its slope."""

from __future__ import annotations

import math


def entries(values, y, num_classes, *, groups=None, absent="skip", pad_to=None):
    """What the variance is over: mean of `values` per class, or mean of those means per group, and zeros up to
    `pad_to` where it is given."""
    means = {}
    for c in range(num_classes):
        own = [value for value, label in zip(values, y, strict=True) if label == c]
        if own or absent == "zero":
            means[c] = math.fsum(own) / len(own) if own else 0.0
    if groups is None:
        found, whole = list(means.values()), num_classes
    else:
        whole = max(groups) + 1
        members = [[means[c] for c in means if groups[c] == g] for g in range(whole)]
        found = [math.fsum(m) / len(m) for m in members if m]
    return found + [0.0] * (0 if pad_to is None else pad_to - whole)


def variance(found):
    """Unbiased; 0 for fewer than two."""
    if len(found) < 2:
        return 0.0
    centre = math.fsum(found) / len(found)
    return math.fsum((value - centre) ** 2 for value in found) / (len(found) - 1)


def slope(values, y):
    """Of the variance over the classes present, in each of `values`: 2 (l_c - mean) / (C - 1) over the count of c."""
    classes = sorted(set(y))
    means = {c: math.fsum(v for v, label in zip(values, y, strict=True) if label == c) / y.count(c) for c in classes}
    centre = math.fsum(means.values()) / len(classes)
    return [2 * (means[c] - centre) / (len(classes) - 1) / y.count(c) for c in y]
