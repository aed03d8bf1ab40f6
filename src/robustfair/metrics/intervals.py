"""Error bars of one model's rates: Wilson's interval, and a bootstrap for numbers over classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError
from robustfair.metrics.counts import Array, check_pair
from robustfair.metrics.rates import NAN, worst_count

FEW_IMAGES = 30
"""A class with fewer images is too small to be left out of a worst-class bound by its measured accuracy."""


def wilson(correct: Array | int, n: Array | int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Wilson score interval of correct / n, element by element: (lower, upper), nan where n is 0.

    The two ends are the p at which |correct / n - p| equals z standard errors sqrt(p (1 - p) / n).

    Raises:
        ConfigError: correct outside [0, n], or level outside (0, 1).

    >>> lower, upper = wilson(0, 10)
    >>> round(float(lower), 4), round(float(upper), 4)
    (0.0, 0.2775)
    """
    return wilson_at(correct, n, two_sided_z(level))


def stratified_wilson(correct: Array, n: Array, sizes: Array, level: float = 0.95) -> tuple[float, float]:
    """Interval of the average of a sample that was drawn class by class: (lower, upper) of sum_c w_c correct_c / n_c.

    w_c = sizes_c / sum(sizes), the share of class c in what was drawn from. The ends are the w-weighted means of the
    ends of the classes' Wilson intervals, at a z smaller by sqrt(sum_c v_c) / sum_c sqrt(v_c), v_c = w_c^2 p_c (1 -
    p_c) / n_c, since the errors of the classes are independent. Of one class it is `wilson`.

    Source: Yan and Su (2010), "Stratified Wilson and Newcombe confidence intervals for multiple binomial proportions".
    They take correct_c / n_c for p_c; here it is the centre of the Wilson interval, so that classes of rate 0 or 1
    have a v too.

    Args:
        correct: (C,) hits per class.
        n: (C,) images per class.
        sizes: (C,) images of each class in what the n were drawn from.

    Returns:
        nan where a class with images has none in the sample.

    Raises:
        ConfigError: counts that do not fit, or level outside (0, 1).

    >>> lower, upper = stratified_wilson(np.array([5, 1]), np.array([10, 10]), np.array([900, 100]))
    >>> round(lower, 4), round(upper, 4)
    (0.229, 0.7107)
    """
    z = two_sided_z(level)
    hits, images = check_hits(correct, n)
    check_pair(hits, images, owner="stratified interval")
    share = torch.as_tensor(sizes).double()
    check_pair(hits, share, owner="stratified interval")
    kept = share > 0
    k, m, w = hits[kept].double(), images[kept].double(), share[kept] / share.sum()
    centre = (k + z * z / 2) / (m + z * z)
    spread = w * (centre * (1 - centre) / m).sqrt()
    lower, upper = wilson_at(hits[kept], images[kept], z * float(spread.norm() / spread.sum()))
    return float((w * lower).sum()), float((w * upper).sum())


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its error bar.

    Attributes:
        estimate: the value of the statistic on the test images.
        corrected: the same less its bootstrap estimate of bias. Where many classes tie for the worst this removes about
            a third of the bias only; to remove all of it would overstate models with one clear worst class.
        lower, upper: ends of the interval.
        level: its nominal coverage.
    """

    estimate: float
    corrected: float
    lower: float
    upper: float
    level: float


def bootstrap_statistic(
    correct: Array, n: Array, statistic: str, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Tie-aware bootstrap interval of a statistic of the class accuracies, over the test images within each class.

    `statistic` is "average", "class_mean", "worst", "best", "range" or "worst_Qpct" (mean of the worst Q per cent).

    Resampling. Images are drawn with replacement within their class, since a test set fixes how many images a class
    has; the hits of class c are then exactly Binomial(n_c, accuracy_c), and no image need be touched. Drawing from the
    whole set would let class sizes vary as well: hardly a difference for hundreds of images a class, but with a few a
    class can come out empty.

    Interval. A minimum over classes is biased low, the more so the more classes come near it, and resampling adds a
    like bias once more: with equal classes percentile intervals miss nearly always, bias-corrected or not, and basic
    ones fall short where classes lie close. So the error (resampled minus resampled-from) is simulated from two
    extremes, and the interval spans the basic intervals of both: the classes in their measured order, too far apart
    for it ever to change, where chance counts most; and the classes tied at the bottom and at the top as far as
    simultaneous Wilson bounds permit, where bias counts most. The price is width: with many classes of few images it
    is cautious. The tests measure the coverage with ties, clusters and a clear worst class, for 10 classes of 1000
    images and 100 of 100.

    A class with fewer than `FEW_IMAGES` images may be the worst whatever it measures: its own simultaneous Wilson bound
    then pulls the lower end of "worst" down.

    Args:
        correct: (C,) hits per class.
        n: (C,) images per class; a class with none is left out.
        statistic: see above.
        level: nominal coverage.
        draws: number of resampled test sets, at least 100.
        seed: the same seed gives the same interval.

    Raises:
        ConfigError: counts that do not fit, an unknown statistic, level outside (0, 1), fewer than 100 draws.
    """
    hits, images = check_hits(correct, n)
    check_pair(hits, images, owner="bootstrap")
    tail = check_bootstrap(level, draws)
    present = images > 0
    k, m = hits[present].cpu().numpy(), images[present].cpu().numpy()
    measure = Statistic.parse(statistic, m)
    if len(m) == 0:
        return Interval(estimate=NAN, corrected=NAN, lower=NAN, upper=NAN, level=level)

    rng = np.random.default_rng(seed)
    acc = k / m
    estimate = float(measure(acc))
    tied = tied_accuracy(k, m, level)
    resample = _resampler(rng, m, draws)
    inside = (k + 0.5) / (m + 1)  # an accuracy of exactly 0 or 1 would be resampled without any spread
    separate_error = (resample(inside) - inside) @ measure.weights(acc)
    tied_error = measure(resample(tied)) - measure(tied)
    bias = float(np.mean(measure(resample(acc)))) - estimate

    low, high = np.quantile(np.stack([separate_error, tied_error]), [tail, 1 - tail], axis=1)
    lower = _unit(estimate - max(0.0, float(high.max())))
    return Interval(
        estimate=estimate,
        corrected=_unit(estimate - bias),
        lower=min(lower, scarce_floor(k, m, level)) if statistic == "worst" else lower,
        upper=_unit(estimate - min(0.0, float(low.min()))),
        level=level,
    )


# Parts, also of the paired bootstrap


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A weighted sum of class accuracies: weights per class, or per rank from the smallest accuracy up."""

    per_rank: bool
    weight: np.ndarray

    @staticmethod
    def parse(name: str, n: np.ndarray) -> Statistic:
        classes = len(n)
        share = re.fullmatch(r"worst_(\d+(?:\.\d+)?)pct", name)
        weight = np.zeros(classes)
        if name == "average":
            return Statistic(per_rank=False, weight=n / max(1, n.sum()))
        if name == "class_mean":
            return Statistic(per_rank=False, weight=np.full(classes, 1 / max(1, classes)))
        if name == "worst":
            weight[:1] = 1
        elif name == "best":
            weight[-1:] = 1
        elif name == "range":
            weight[:1] -= 1
            weight[-1:] += 1
        elif share:
            k = worst_count(float(share[1]) / 100, classes)
            weight[:k] = 1 / k
        else:
            raise ConfigError(
                "bootstrap",
                "statistic",
                allowed="average, class_mean, worst, best, range or worst_Qpct (worst_10pct)",
                got=name,
            )
        return Statistic(per_rank=True, weight=weight)

    def __call__(self, acc: np.ndarray) -> np.ndarray:
        """Value for accuracies (..., C)."""
        return (np.sort(acc, axis=-1) if self.per_rank else acc) @ self.weight

    def weights(self, acc: np.ndarray) -> np.ndarray:
        """(C,) weights of the classes while they keep the order they have in `acc` (C,)."""
        if not self.per_rank:
            return self.weight
        weights = np.empty_like(self.weight)
        weights[np.argsort(acc, kind="stable")] = self.weight
        return weights


def tied_accuracy(correct: np.ndarray, n: np.ndarray, level: float) -> np.ndarray:
    """Accuracies (C,) with the lowest and the highest classes drawn together as far as the counts leave it possible.

    Every class may truly lie anywhere between its simultaneous bounds: those measured below the lowest upper bound may
    all share it, those above the highest lower bound may all share that. Where the two cross, all classes may be equal.
    """
    z = NormalDist().inv_cdf(level ** (1 / len(n)))
    lower, upper = (bound.numpy() for bound in wilson_at(correct, n, z))
    bottom, top = upper.min(), lower.max()
    if bottom > top:
        bottom = top = correct.sum() / n.sum()
    return np.clip(correct / n, bottom, top)


def scarce_floor(correct: np.ndarray, n: np.ndarray, level: float) -> float:
    """Lowest simultaneous lower bound among the classes with few images; 1 if no class has few."""
    z = NormalDist().inv_cdf(level ** (1 / len(n)))
    lower, _ = wilson_at(correct, n, z)
    return float(min(lower.numpy()[n < FEW_IMAGES], default=1.0))


def wilson_at(correct: Array | int, n: Array | int, z: float) -> tuple[Tensor, Tensor]:
    hits, images = check_hits(correct, n)
    k, m = hits.double(), images.double()
    p = k / m
    centre = (p + z * z / (2 * m)) / (1 + z * z / m)
    half = z / (1 + z * z / m) * (p * (1 - p) / m + (z / (2 * m)) ** 2).sqrt()
    # The formula is exact at both ends but for rounding, which would leave the estimate outside.
    lower = torch.where(hits == 0, torch.zeros_like(p), centre - half)
    upper = torch.where(hits == images, torch.ones_like(p), centre + half)
    return torch.where(images == 0, NAN, lower), torch.where(images == 0, NAN, upper)


def check_hits(correct: Array | int, n: Array | int) -> tuple[Tensor, Tensor]:
    hits, images = torch.as_tensor(correct), torch.as_tensor(n)
    images = images.to(hits.device)
    if hits.shape != images.shape and hits.ndim and images.ndim:
        raise ConfigError("interval", "shapes", allowed="equal", got=(tuple(hits.shape), tuple(images.shape)))
    if bool(((hits < 0) | (hits > images)).any()):
        raise ConfigError(
            "interval", "correct", allowed="between 0 and n", got=hits.tolist(), hint=f"n is {images.tolist()}."
        )
    return hits, images


def two_sided_z(level: float) -> float:
    return NormalDist().inv_cdf((1 + _check_level(level)) / 2)


def check_bootstrap(level: float, draws: int) -> float:
    """What lies beyond either end of an interval of that level."""
    if draws < 100:
        raise ConfigError("bootstrap", "draws", allowed="at least 100", got=draws)
    return (1 - _check_level(level)) / 2


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError("interval", "level", allowed="a fraction strictly between 0 and 1", got=level)
    return level


def _resampler(rng: np.random.Generator, n: np.ndarray, draws: int) -> Callable[[np.ndarray], np.ndarray]:
    """From accuracies (C,) to accuracies (draws, C) of test sets resampled within each class."""

    def resample(acc: np.ndarray) -> np.ndarray:
        return rng.binomial(n, acc, size=(draws, len(n))) / n

    return resample


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
