"""Two models on the same images: tests of a change, and its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError
from robustfair.metrics.counts import Array, check_classes, check_pair
from robustfair.metrics.intervals import (
    Interval,
    Statistic,
    check_bootstrap,
    check_hits,
    scarce_floor,
    tied_accuracy,
    two_sided_z,
)
from robustfair.metrics.rates import NAN, class_vector


def paired_table(before: Tensor, after: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts (C, 2, 2) int64 of two models' hits (N,) bool on the same images: [class, right before, right after].

    Raises:
        ConfigError: inputs of different or wrong shape, or a label outside [0, num_classes).

    >>> before, after = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    >>> paired_table(before, after, torch.tensor([0, 0, 0]), 1).tolist()
    [[[1, 0], [1, 1]]]
    """
    for hits in (before, after):
        check_pair(hits, label, owner="paired_table")
    check_classes(label, num_classes, field="label")
    cell = label.long() * 4 + before.long() * 2 + after.long()
    return torch.bincount(cell, minlength=4 * num_classes).view(num_classes, 2, 2)


def mcnemar(lost: Array | int, won: Array | int) -> Tensor:
    """Exact two-sided p of McNemar's test, element by element, from the images that only one of two models gets right.

    `lost` are right before only, `won` after only. If the models are equally good, each such image falls on either
    side with probability 1/2: p is twice the smaller tail of Binomial(lost + won, 1/2), at most 1. Summed in whole
    numbers and rounded once, so no count is too large for it.

    Raises:
        ConfigError: counts that are negative or no whole numbers, or of different shapes.

    >>> mcnemar(torch.tensor([1, 0, 3]), torch.tensor([5, 0, 3])).tolist()
    [0.21875, 1.0, 1.0]
    """
    losses, wins = _check_discordant(lost, won)
    pairs = zip(losses.flatten().tolist(), wins.flatten().tolist(), strict=True)
    return torch.tensor([_sign_test(a, b) for a, b in pairs], dtype=torch.float64).view(losses.shape)


def holm(p: Array) -> Tensor:
    """Holm's (1979) adjustment of p-values (M,): those at most alpha are rejected, with at most alpha for any error.

    The i-th smallest of M is multiplied by M - i + 1, and none ends below a smaller one. nan stays and is not counted.

    Raises:
        ConfigError: a value outside [0, 1], or no vector.

    >>> holm(np.array([0.01, 0.04, float("nan"), 0.03])).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    values = class_vector(p, owner="holm")
    if bool(((values < 0) | (values > 1)).any()):
        raise ConfigError("holm", "p", allowed="probabilities in [0, 1]", got=values.tolist())
    kept = (~values.isnan()).nonzero().squeeze(1)
    order = kept[values[kept].argsort()]
    factors = torch.arange(len(order), 0, -1, dtype=values.dtype, device=values.device)
    return values.index_copy(0, order, (values[order] * factors).clamp(max=1).cummax(0).values)


def paired_interval(lost: Array | int, won: Array | int, n: Array | int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Interval of (won - lost) / n, the change of a hit rate on the same n images, element by element: (lower, upper).

    The Wald interval of the paired table with half an image added to each of its four cells, after Agresti and Min
    (2005). nan where n is 0.

    Raises:
        ConfigError: counts that do not fit n, or level outside (0, 1).

    >>> lower, upper = paired_interval(0, 8, 10)
    >>> round(float(lower), 3), round(float(upper), 3)
    (0.354, 0.979)
    """
    z = two_sided_z(level)
    losses, wins = _check_discordant(lost, won)
    differing, images = check_hits(losses + wins, n)
    m = images.double() + 2
    centre = (wins - losses) / m
    half = z * (((differing + 1) / m - centre**2) / m).sqrt()
    lower, upper = (centre - half).clamp(min=-1), (centre + half).clamp(max=1)
    return torch.where(images == 0, NAN, lower), torch.where(images == 0, NAN, upper)


def stratified_paired_interval(
    lost: Array, won: Array, n: Array, sizes: Array, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the change of the average of a sample that was drawn class by class: (lower, upper).

    The change is sum_c w_c (won_c - lost_c) / n_c, w_c the share of class c in `sizes` (C,). The ends are w-weighted
    means of those of `paired_interval`, at a smaller z, as in `stratified_wilson`; of one class they are its ends.

    Returns:
        nan where a class with images has none in the sample.

    Raises:
        ConfigError: counts that do not fit n, or level outside (0, 1).
    """
    losses, wins = _check_discordant(lost, won)
    images, share = torch.as_tensor(n), torch.as_tensor(sizes).double()
    kept = share > 0
    losses, wins, images, w = losses[kept], wins[kept], images[kept], share[kept] / share.sum()
    m = images.double() + 2
    spread = w * (((losses + wins + 1) / m - ((wins - losses) / m) ** 2) / m).sqrt()
    z = two_sided_z(level) * float(spread.norm() / spread.sum())
    lower, upper = paired_interval(losses, wins, images, 2 * NormalDist().cdf(z) - 1)
    return float((w * lower).sum()), float((w * upper).sum())


def bootstrap_difference(
    table: Array, statistic: str, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Tie-aware bootstrap interval of the change of a statistic, after less before, on the same images of each class.

    Resampling. As in `bootstrap_statistic`, with the two hits of an image kept together: the four cells of a class are
    drawn from their multinomial, so what both models share cancels.

    Interval. The worst class is biased low for either model, by an amount that depends on its ties, so the biases need
    not cancel. The error is simulated from four extremes, and the interval spans the basic intervals of all: the
    classes of both models in their measured order; those of the first model tied as far as its counts permit, with the
    second at its measured distance, class by class; the same the other way round; and both tied. It covers the
    difference of the two true minima, whichever classes these are, and is cautious as that of `bootstrap_statistic` is.
    The tests measure the coverage for two models alike, with ties in one or both, and apart, closely paired or not.

    Args:
        table: (C, 2, 2) counts of `paired_table`; a class without images is left out.
        statistic, level, draws, seed: see `bootstrap_statistic`.

    Raises:
        ConfigError: counts that do not fit, an unknown statistic, level outside (0, 1), fewer than 100 draws.
    """
    (interval,) = bootstrap_differences(table, (statistic,), level=level, draws=draws, seed=seed)
    return interval


def bootstrap_differences(
    table: Array, statistics: Sequence[str], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> list[Interval]:
    """`bootstrap_difference` of several statistics, to the bit: all from the same draws, in the time of one."""
    counts = torch.as_tensor(table)
    if counts.ndim != 3 or counts.shape[1:] != (2, 2) or bool((counts < 0).any()):
        raise ConfigError("bootstrap", "table", allowed="counts (C, 2, 2), see paired_table", got=tuple(counts.shape))
    tail = check_bootstrap(level, draws)
    cells = counts[counts.sum((1, 2)) > 0].cpu().numpy()
    n, hits = cells.sum((1, 2)), _margins(cells)
    measures = [Statistic.parse(statistic, n) for statistic in statistics]
    if len(n) == 0:
        return [Interval(estimate=NAN, corrected=NAN, lower=NAN, upper=NAN, level=level) for _ in statistics]

    resample = _pair_resampler(np.random.default_rng(seed), n, draws)
    acc = hits / n
    inside = (cells + 0.25) / (n + 1)[:, None, None]  # as in `bootstrap_statistic`: half an image right, half wrong
    errors: list[list[np.ndarray]] = [[] for _ in statistics]
    apart = resample(inside) - _margins(inside)
    for found, measure in zip(errors, measures, strict=True):
        weights = np.stack([-measure.weights(acc[0]), measure.weights(acc[1])])
        found.append((apart * weights).sum((1, 2)))
    tied, change = [tied_accuracy(k, n, level) for k in hits], acc[1] - acc[0]
    for centre in ([tied[0], tied[0] + change], [tied[1] - change, tied[1]], tied):
        moved = _moved(inside, np.clip(centre, 0, 1))
        drawn = resample(moved)
        for found, measure in zip(errors, measures, strict=True):
            found.append(np.diff(measure(drawn) - measure(_margins(moved)))[:, 0])
    drawn = resample(cells / n[:, None, None])

    intervals = []
    for statistic, measure, found in zip(statistics, measures, errors, strict=True):
        before, after = (float(value) for value in measure(acc))
        estimate = after - before
        bias = float(np.diff(measure(drawn)).mean()) - estimate
        low, high = np.quantile(np.stack(found), [tail, 1 - tail], axis=1)
        lower, upper = estimate - max(0.0, float(high.max())), estimate - min(0.0, float(low.min()))
        if statistic == "worst":
            lower = min(lower, scarce_floor(hits[1], n, level) - before)
            upper = max(upper, after - scarce_floor(hits[0], n, level))
        interval = Interval(
            estimate=estimate,
            corrected=_difference(estimate - bias),
            lower=_difference(lower),
            upper=_difference(upper),
            level=level,
        )
        intervals.append(interval)
    return intervals


# Parts


def _margins(cells: np.ndarray) -> np.ndarray:
    """Of cells (..., C, 2, 2), what the two models have right: (..., 2, C)."""
    return np.stack([cells[..., 1, 0] + cells[..., 1, 1], cells[..., 0, 1] + cells[..., 1, 1]], axis=-2)


def _pair_resampler(rng: np.random.Generator, n: np.ndarray, draws: int) -> Callable[[np.ndarray], np.ndarray]:
    """From shares (C, 2, 2) to accuracies (draws, 2, C) of two models on test sets resampled within each class."""

    def resample(shares: np.ndarray) -> np.ndarray:
        drawn = rng.multinomial(n, shares.reshape(-1, 4), size=(draws, len(n)))
        return _margins(drawn.reshape(draws, -1, 2, 2)) / n

    return resample


def _moved(shares: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """Shares (C, 2, 2) with the accuracies (2, C): as few images change as must, whatever the other model says."""
    for model, rate in enumerate(acc):
        own = np.moveaxis(shares, model + 1, 1)
        stay = own * np.minimum(1, np.stack([1 - rate, rate], axis=1) / own.sum(2))[..., None]
        shares = np.moveaxis(stay + (own - stay)[:, ::-1], 1, model + 1)
    return shares


def _difference(value: float) -> float:
    return min(1.0, max(-1.0, value))


def _sign_test(a: int, b: int) -> float:
    """Probability that a fair coin thrown a + b times splits at least as unevenly as a to b."""
    term = tail = 1
    for k in range(min(a, b)):
        term = term * (a + b - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2 ** (a + b))


def _check_discordant(lost: Array | int, won: Array | int) -> tuple[Tensor, Tensor]:
    losses, wins = torch.as_tensor(lost), torch.as_tensor(won)
    if losses.shape != wins.shape:
        shapes = (tuple(losses.shape), tuple(wins.shape))
        raise ConfigError("paired test", "shapes of lost and won", allowed="equal", got=shapes)
    for name, counts in (("lost", losses), ("won", wins)):
        if counts.is_floating_point() or bool((counts < 0).any()):
            raise ConfigError("paired test", name, allowed="whole numbers, 0 or more", got=counts.tolist())
    return losses, wins
