"""Slow, plain-Python versions of `robustfair.metrics`: loops, nothing shared with the package."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

NAN = float("nan")


def confusion_pred_true(pred, label, num_classes):
    counts = [[0] * num_classes for _ in range(num_classes)]
    for p, y in zip(pred, label, strict=True):
        counts[p][y] += 1
    return counts


def examples(counts):
    """(predictions, labels) that have these counts."""
    cells = [(p, y) for p, row in enumerate(counts) for y, times in enumerate(row) for _ in range(times)]
    return [p for p, _ in cells], [y for _, y in cells]


def class_accuracy(pred, label, num_classes):
    result = []
    for c in range(num_classes):
        hits = [p == y for p, y in zip(pred, label, strict=True) if y == c]
        result.append(sum(hits) / len(hits) if hits else NAN)
    return result


def average(pred, label):
    return sum(p == y for p, y in zip(pred, label, strict=True)) / len(label)


def present(acc):
    return [a for a in acc if not math.isnan(a)]


def worst_class(acc):
    smallest = None
    for c, a in enumerate(acc):
        if not math.isnan(a) and (smallest is None or a < acc[smallest]):
            smallest = c
    return smallest


def best_class(acc):
    return worst_class([-a for a in acc])


def worst_q(acc, q):
    values = sorted(present(acc))
    k = max(1, math.floor(q * len(values) + 1e-9))
    return sum(values[:k]) / k


def std(acc, ddof=0):
    values = present(acc)
    if len(values) <= ddof:
        return NAN
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def confusion_rates_pred_true(pred, label, num_classes):
    rates = [[0.0] * num_classes for _ in range(num_classes)]
    for j in range(num_classes):
        of_class = [p for p, y in zip(pred, label, strict=True) if y == j]
        for i in range(num_classes):
            if not of_class:
                rates[i][j] = NAN
            elif i != j:
                rates[i][j] = of_class.count(i) / len(of_class)
    return rates


def spectral_norm(rates, iterations=2000):
    """Square root of the top eigenvalue of A^T A by power iteration; nan columns count as zero."""
    a = [[0.0 if math.isnan(v) else v for v in row] for row in rates]
    size = len(a)
    v = [1.0] * size
    scale = 0.0
    for _ in range(iterations):
        u = [sum(a[i][j] * v[j] for j in range(size)) for i in range(size)]
        v = [sum(a[i][j] * u[i] for i in range(size)) for j in range(size)]
        scale = math.sqrt(sum(x * x for x in v))
        if scale == 0.0:
            return 0.0
        v = [x / scale for x in v]
    return math.sqrt(scale)


def cfps(pred, label, num_classes):
    errors = [p for p, y in zip(pred, label, strict=True) if p != y]
    return [errors.count(c) / len(errors) if errors else NAN for c in range(num_classes)]


def cfns(pred, label, num_classes):
    errors = [y for p, y in zip(pred, label, strict=True) if p != y]
    return [errors.count(c) / len(errors) if errors else NAN for c in range(num_classes)]


def one_vs_rest_accuracy(pred, label, num_classes):
    return [
        sum((p == c) == (y == c) for p, y in zip(pred, label, strict=True)) / len(label) for c in range(num_classes)
    ]


def boundary_error(clean_pred, adv_pred, label, num_classes):
    result = []
    for c in range(num_classes):
        broken = [q != c and p == c for p, q, y in zip(clean_pred, adv_pred, label, strict=True) if y == c]
        result.append(sum(broken) / len(broken) if broken else NAN)
    return result


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    var_x, var_y = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return cov / math.sqrt(var_x * var_y)


def kendall_tau_b(x, y):
    concordant = discordant = ties_x = ties_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        product = (x[i] - x[j]) * (y[i] - y[j])
        concordant += product > 0
        discordant += product < 0
        ties_x += x[i] == x[j]
        ties_y += y[i] == y[j]
    return (concordant - discordant) / math.sqrt((len(pairs) - ties_x) * (len(pairs) - ties_y))


def wilson(correct, n, level):
    """The roots of (p_hat - p)^2 = z^2 p (1 - p) / n on either side of p_hat, found numerically."""
    z, p_hat, inside = norm.ppf((1 + level) / 2), correct / n, 1e-12

    def score(p):
        return (p_hat - p) ** 2 - z * z * p * (1 - p) / n

    lower = 0.0 if correct == 0 else brentq(score, 0.0, min(p_hat, 1 - inside), xtol=1e-15)
    upper = 1.0 if correct == n else brentq(score, max(p_hat, inside), 1.0, xtol=1e-15)
    return lower, upper


def resample_images(correct, label, num_classes, rng):
    """Hits per class of one test set drawn image by image, with replacement, within each class."""
    hits = []
    for c in range(num_classes):
        flags = [f for f, y in zip(correct, label, strict=True) if y == c]
        hits.append(sum(flags[rng.integers(len(flags))] for _ in flags))
    return hits


def textbook_intervals(hits, n, statistic, rng, draws):
    """Percentile, basic and bias-corrected percentile bootstrap (95 %), straight from the definitions."""
    acc = hits / n
    value, drawn = statistic(acc), statistic(rng.binomial(n, acc, size=(draws, len(acc))) / n)
    low, high = np.quantile(drawn, [0.025, 0.975])
    below = np.clip(((drawn < value).mean() + (drawn <= value).mean()) / 2, 1 / draws, 1 - 1 / draws)
    shifted = norm.cdf(2 * norm.ppf(below) + norm.ppf([0.025, 0.975]))
    return {
        "percentile": (low, high),
        "basic": (2 * value - high, 2 * value - low),
        "bias-corrected": tuple(np.quantile(drawn, shifted)),
    }


def paired_table(before, after, label, num_classes):
    """Counts by [class][right before][right after]."""
    table = [[[0, 0], [0, 0]] for _ in range(num_classes)]
    for a, b, y in zip(before, after, label, strict=True):
        table[y][int(a)][int(b)] += 1
    return table


def mcnemar(lost, won):
    """Probability of every split of the discordant images at least as uneven as this one, added up as fractions."""
    n = lost + won
    splits = [k for k in range(n + 1) if abs(2 * k - n) >= abs(lost - won)]
    return float(sum(Fraction(math.comb(n, k), 2**n) for k in splits))


def holm(p):
    """Step by step: the smallest p not yet taken, times the number not yet taken, never below one before."""
    left = {i: value for i, value in enumerate(p) if not math.isnan(value)}
    adjusted, floor = [NAN] * len(p), 0.0
    while left:
        i = min(left, key=lambda j: (left[j], j))
        floor = max(floor, min(1.0, left[i] * len(left)))
        adjusted[i] = floor
        del left[i]
    return adjusted


def paired_interval(both, lost, won, neither, level):
    """Wald interval of won - lost from mean and variance of +1, -1 and 0 over images, half an image more a cell."""
    cells = {0: both + neither + 1, -1: lost + 0.5, 1: won + 0.5}
    n = sum(cells.values())
    mean = sum(score * times for score, times in cells.items()) / n
    variance = sum((score - mean) ** 2 * times for score, times in cells.items()) / n
    half = norm.ppf((1 + level) / 2) * math.sqrt(variance / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def resample_pairs(before, after, label, num_classes, rng):
    """Hits per class of two models on one test set drawn image by image, with replacement, within each class."""
    hits = []
    for c in range(num_classes):
        pairs = [(a, b) for a, b, y in zip(before, after, label, strict=True) if y == c]
        drawn = [pairs[rng.integers(len(pairs))] for _ in pairs]
        hits.append((sum(a for a, _ in drawn), sum(b for _, b in drawn)))
    return hits
