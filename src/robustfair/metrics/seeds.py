"""Several runs that differ in their seed alone: what holds over seeds and test images, and how much of it is chance.

Two things move a measured rate: the seed of the run, and which images were tested. All runs are tested on the same
images, so the seeds' part is read off the spread between runs, and the images' part off a bootstrap that draws whole
images, with what every run makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError
from robustfair.metrics.counts import check_classes
from robustfair.metrics.intervals import check_bootstrap

Statistic = Callable[[np.ndarray], np.ndarray]
"""From class accuracies (..., C) to a number each (...)."""
STATISTICS: dict[str, Statistic] = {
    "average": lambda acc: acc.mean(-1),
    "worst": lambda acc: acc.min(-1),
    "range": lambda acc: acc.max(-1) - acc.min(-1),
    "std": lambda acc: acc.std(-1),
}
"""Of the classes that have images; "average" is the mean of classes, and of images where classes are equally large."""


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """The mean of a statistic over runs, with an interval over seeds and images.

    Attributes:
        value: the mean.
        each: of every run.
        lower, upper: ends of the interval; infinitely wide with one run, whose seeds have no spread to show.
        p: two-sided, of the mean being zero; for differences.
        level: of the interval.
    """

    value: float
    each: tuple[float, ...]
    lower: float
    upper: float
    p: float
    level: float


def over_seeds(
    hits: Tensor, label: Tensor, num_classes: int, statistic: str, *, level: float = 0.95, draws: int = 1000
) -> OverSeeds:
    """The mean of a statistic of class accuracies over S runs that were tested on the same N images.

    Its variance is taken as s^2 / S + v: s^2 the variance between runs with S - 1 degrees of freedom, v that of the
    mean under resampling of the images within each class, runs kept together. What images do to runs differently is in
    both, so that the interval is on the wide side. It is Student's, with Satterthwaite's degrees of freedom.

    Args:
        hits: (S, N) bool.
        label: (N,).
        statistic: a key of `STATISTICS`.

    Raises:
        ConfigError: inputs of other shapes, an unknown statistic, level outside (0, 1), or fewer than 100 draws.
    """
    return _over_seeds(hits[None], label, num_classes, statistic, level, draws)


def difference_over_seeds(
    before: Tensor,
    after: Tensor,
    label: Tensor,
    num_classes: int,
    statistic: str,
    *,
    level: float = 0.95,
    draws: int = 1000,
) -> OverSeeds:
    """The mean change of a statistic, run by run, on the same images: `after` less `before`, both (S, N) bool.

    Run s of both shares its seed, and with it initial weights and the order of images, which takes out a part of what
    the seed does. Otherwise as `over_seeds`.

    Raises:
        ConfigError: as `over_seeds`.
    """
    if before.shape != after.shape:
        raise ConfigError("over_seeds", "hits", allowed="as many runs and images", got=(before.shape, after.shape))
    return _over_seeds(torch.stack([before, after]), label, num_classes, statistic, level, draws)


def _over_seeds(hits: Tensor, label: Tensor, num_classes: int, statistic: str, level: float, draws: int) -> OverSeeds:
    """Of hits (1, S, N) the statistic, of (2, S, N) the second less the first."""
    tail = check_bootstrap(level, draws)
    if hits.dtype != torch.bool or hits.ndim != 3 or hits.shape[2:] != label.shape or 0 in hits.shape:
        raise ConfigError("over_seeds", "hits", allowed="bool (S, N), some of each", got=tuple(hits.shape[1:]))
    if statistic not in STATISTICS:
        raise ConfigError("over_seeds", "statistic", allowed=f"one of {', '.join(STATISTICS)}", got=statistic)
    check_classes(label, num_classes, field="label")
    rng = np.random.default_rng(0)
    once, resampled = [], []
    for c in label.unique().tolist():
        own = hits[:, :, label == c].double().numpy()
        n = own.shape[2]
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
        once.append(own.mean(2))
        resampled.append(np.einsum("dn,ksn->dks", drawn, own))
    each = _change(STATISTICS[statistic](np.stack(once, -1)))
    means = _change(STATISTICS[statistic](np.stack(resampled, -1)).swapaxes(0, 1)).mean(-1)
    runs = len(each)
    of_seeds, of_images = (float(each.var(ddof=1)) / runs if runs > 1 else np.inf), float(means.var(ddof=1))
    value, spread = float(each.mean()), float(np.sqrt(of_seeds + of_images))
    half, p = np.inf, float("nan")
    if runs > 1:
        from scipy import stats

        freedom = (runs - 1) * ((of_seeds + of_images) / of_seeds) ** 2 if of_seeds > 0 else np.inf
        half = float(stats.t.ppf(1 - tail, freedom)) * spread
        p = 1.0 if value == 0 else 0.0 if spread == 0 else float(2 * stats.t.sf(abs(value) / spread, freedom))
    return OverSeeds(value=value, each=tuple(each.tolist()), lower=value - half, upper=value + half, p=p, level=level)


def _change(values: np.ndarray) -> np.ndarray:
    """Of (1, ...) the value, of (2, ...) the second less the first."""
    return values[0] if len(values) == 1 else values[1] - values[0]
