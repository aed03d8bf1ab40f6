"""Averages of weights in closed form, and batch-norm statistics of batches, in Python floats."""

from __future__ import annotations


def ema(values, decay):
    """After the first value is copied and the others enter: d^n v_0 + (1 - d) sum_k d^(n - k) v_k."""
    n = len(values) - 1
    return decay**n * values[0] + (1 - decay) * sum(decay ** (n - k) * values[k] for k in range(1, n + 1))


def ramped_ema(values, decay):
    """Value number n, counted from 0, enters with the decay min(d, (1 + n) / (10 + n)); number 0 is copied."""
    average = values[0]
    for n, value in enumerate(values[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return average


def mean(values):
    return sum(values) / len(values)


def mean_and_unbiased_variance(values):
    centre = mean(values)
    return centre, sum((v - centre) ** 2 for v in values) / (len(values) - 1)


def pooled_by_size(batches, sizes):
    """Weighted means over batches of their means and of their unbiased variances."""
    statistics = [mean_and_unbiased_variance(values) for values in batches]
    total = sum(sizes)
    centre = sum(size * m for size, (m, _) in zip(sizes, statistics, strict=True)) / total
    variance = sum(size * v for size, (_, v) in zip(sizes, statistics, strict=True)) / total
    return centre, variance
