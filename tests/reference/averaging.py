"""Averages of weights in closed form, and batch-norm statistics of batches, in Python floats."""

from __future__ import annotations


def ema(values, decay):
    """After the first value is copied and the others enter: d^n v_0 + (1 - d) sum_k d^(n - k) v_k."""
    n = len(values) - 1
    return decay**n * values[0] + (1 - decay) * sum(decay ** (n - k) * values[k] for k in range(1, n + 1))


def mean_and_unbiased_variance(values):
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def pooled_by_size(batches, sizes):
    """Weighted means over batches of their means and of their unbiased variances."""
    statistics = [mean_and_unbiased_variance(values) for values in batches]
    total = sum(sizes)
    mean = sum(size * m for size, (m, _) in zip(sizes, statistics, strict=True)) / total
    variance = sum(size * v for size, (_, v) in zip(sizes, statistics, strict=True)) / total
    return mean, variance
