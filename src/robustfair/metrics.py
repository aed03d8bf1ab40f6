"""Class-wise metrics: counts that add up over batches, then rates, then one number with its error bar. All pure.

Counts are confusion counts (C, C), rows predicted, columns true; rates are fractions in float64. A class without images
is nan in every vector and left out of every summary: it never shifts another class. Vectors come back as tensors on the
device of their input, single numbers as Python floats.

Sources. Worst class, range, standard deviation, NSD (std / mean, as ABSLD reports it) and mean of the worst q: usage of
the robust-fairness papers, with class counts where their codes assume a balanced set. Zero-diagonal confusion with
row = predicted and its spectral norm: "Enhancing robust fairness via confusional spectral regularization" (CSR).
False-positive score and one-vs-rest accuracy: FAIR-TAT (eq. 7 for the latter). Natural and boundary error: FRL. Head
norm against class accuracy: "Class-wise disparity in adversarial training: implicit bias perspective" (HWNwB).
Intervals: Wilson (1927); the bootstrap is described at `bootstrap_statistic`, for pairs at `bootstrap_difference`.
Paired tests: McNemar (1947) in its exact form, Holm (1979), Agresti and Min (2005).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError, needed

Array = Tensor | np.ndarray

FEW_IMAGES = 30
"""A class with fewer images is too small to be left out of a worst-class bound by its measured accuracy."""

_NAN = float("nan")
_FLAT = 1e-6  # relative spread below which a vector counts as constant: rounding of float32 norms stays under it


# Counts


def check_classes(values: Tensor, num_classes: int, *, field: str) -> None:
    """Refuse class indices outside [0, num_classes). Synchronises with the device.

    Raises:
        ConfigError: an index lies outside.
    """
    if values.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= num_classes:
        raise ConfigError(
            "metrics",
            field,
            allowed=f"class indices from 0 to {num_classes - 1}",
            got=low if low < 0 else high,
            hint="Check num_classes against the labels and the width of the model's output.",
        )


def confusion_pred_true(pred: Tensor, label: Tensor, num_classes: int, *, check: bool = True) -> Tensor:
    """Confusion counts (C, C) int64 of predictions and labels (N,), rows predicted, columns true. Add batches with `+`.

    With `check=False` nothing waits for the device, and the caller vouches for the range of both inputs.

    Raises:
        ConfigError: inputs of different or wrong shape, or (with `check`) an index outside [0, num_classes).

    >>> confusion_pred_true(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    """
    _check_pair(pred, label, owner="confusion_pred_true")
    if check:
        check_classes(pred, num_classes, field="pred")
        check_classes(label, num_classes, field="label")
    cell = pred.long() * num_classes + label.long()
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, cell, torch.ones_like(cell)).view(num_classes, num_classes)


def correct_per_class(correct: Tensor, label: Tensor, num_classes: int, *, check: bool = True) -> Tensor:
    """Hits per class (C,) int64 from flags (N,) bool and labels (N,): the form in which robust hits are kept.

    Raises:
        ConfigError: inputs of different or wrong shape, or (with `check`) a label outside [0, num_classes).

    >>> correct_per_class(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3).tolist()
    [1, 0, 1]
    """
    _check_pair(correct, label, owner="correct_per_class")
    if check:
        check_classes(label, num_classes, field="label")
    counts = torch.zeros(num_classes, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, label.long(), correct.long())


def confusion_true_pred(counts_pred_true: Array) -> Tensor:
    """The same counts with rows true, columns predicted (scikit-learn's order)."""
    return _square(counts_pred_true).T


# Accuracy per class, and numbers that sum it up


def class_accuracy(counts_pred_true: Array) -> Tensor:
    """Accuracy per class (C,), hits / images of that class; nan for a class without images.

    >>> class_accuracy(torch.tensor([[3, 0, 1], [1, 0, 1], [0, 0, 0]])).tolist()
    [0.75, nan, 0.0]
    """
    counts = _square(counts_pred_true)
    return counts.diagonal().double() / counts.sum(0)


def average(counts_pred_true: Array) -> float:
    """Overall accuracy: hits / images, nan without images. Equals `class_mean` on a balanced set only."""
    counts = _square(counts_pred_true)
    return _ratio(float(counts.trace()), float(counts.sum()))


def class_mean(acc: Array) -> float:
    """Mean accuracy (C,) over the classes present, each with equal weight."""
    return float(_present(acc).mean())


def worst(acc: Array) -> float:
    """Smallest class accuracy of (C,), nan if no class is present."""
    return worst_q(acc, 0.0)


def best(acc: Array) -> float:
    """Largest class accuracy of (C,), nan if no class is present."""
    present = _present(acc)
    return float(present.max()) if len(present) else _NAN


def worst_class(acc: Array) -> int:
    """Index of the smallest class accuracy in (C,), the lowest index on ties.

    Raises:
        ConfigError: no class is present.

    >>> worst_class(np.array([float("nan"), 0.5, 0.25, 0.25]))
    2
    """
    return _arg_extreme(acc, sign=1.0, owner="worst_class")


def best_class(acc: Array) -> int:
    """Index of the largest class accuracy in (C,), the lowest index on ties.

    Raises:
        ConfigError: no class is present.
    """
    return _arg_extreme(acc, sign=-1.0, owner="best_class")


def worst_q(acc: Array, q: float) -> float:
    """Mean of the k smallest class accuracies of (C,), k = max(1, floor(q * classes present)).

    Raises:
        ConfigError: q outside [0, 1].

    >>> worst_q(np.array([0.9, 0.2, 0.6, 0.4]), 0.5)
    0.30000000000000004
    """
    present = _present(acc)
    k = _worst_count(q, len(present))
    return float(present.sort().values[:k].mean())


def accuracy_range(acc: Array) -> float:
    """Largest minus smallest class accuracy of (C,), "max - min" in the papers' tables."""
    return best(acc) - worst(acc)


def std(acc: Array, ddof: int = 0) -> float:
    """Standard deviation of the class accuracies (C,); nan if at most `ddof` classes are present.

    The papers do not say which divisor they use. Population (0) is the default of numpy and of the one official
    evaluation that names it; for ten classes the sample value (1) is 1.054 times as large.
    """
    present = _present(acc)
    if len(present) <= ddof:
        return _NAN
    return float(((present - present.mean()).square().sum() / (len(present) - ddof)).sqrt())


def nsd(acc: Array, ddof: int = 0) -> float:
    """Standard deviation of the class accuracies (C,) over their mean; lower is fairer, nan where the mean is 0."""
    return _ratio(std(acc, ddof), class_mean(acc))


@dataclass(frozen=True, kw_only=True)
class Thirds:
    """Mean accuracy over the easy, medium and hard third of the classes."""

    easy: float
    medium: float
    hard: float


def thirds(acc: Array, *, by: Array) -> Thirds:
    """Mean of `acc` (C,) over thirds of the classes, from the largest to the smallest value of `by` (C,).

    `by` is the accuracy of a baseline, so that every model is judged on the same thirds. Where three does not divide
    the classes, the easier thirds take one more; ties go by index; a class missing in either vector is left out.

    Raises:
        ConfigError: vectors of different length.

    >>> thirds(np.array([0.25, 0.5, 0.75]), by=np.array([0.1, 0.9, 0.5]))
    Thirds(easy=0.5, medium=0.75, hard=0.25)
    """
    values, baseline = _paired_present(acc, by, owner="thirds")
    order = torch.argsort(baseline, descending=True, stable=True)
    easy, medium, hard = (float(part.mean()) for part in torch.tensor_split(values[order], 3))
    return Thirds(easy=easy, medium=medium, hard=hard)


# Confusion between classes


def confusion_rates_pred_true(counts_pred_true: Array) -> Tensor:
    """CSR's confusion matrix (C, C): each column divided by its class count, diagonal zero, rows predicted.

    A column sums to the error of its class. The column of a class without images is nan, its diagonal entry too.

    >>> confusion_rates_pred_true(torch.tensor([[3, 0], [1, 2]])).tolist()
    [[0.0, 0.0], [0.25, 0.0]]
    """
    counts = _square(counts_pred_true)
    return _wrong(counts).double() / counts.sum(0)


def spectral_norm_confusion(counts_pred_true: Array) -> float:
    """Largest singular value of `confusion_rates_pred_true`; classes without images contribute nothing.

    The same for either order of the axes; nan without images.
    """
    if not _any(counts_pred_true):
        return _NAN
    return float(torch.linalg.matrix_norm(confusion_rates_pred_true(counts_pred_true).nan_to_num(nan=0.0), ord=2))


def l1_norm_confusion(counts_pred_true: Array) -> float:
    """Largest column sum of `confusion_rates_pred_true`, which is 1 - worst class accuracy; nan without images."""
    return best(confusion_rates_pred_true(counts_pred_true).sum(0))


def cfps(counts_pred_true: Array) -> Tensor:
    """False-positive score per class (C,): the share of all errors that were predicted as this class. Sums to 1.

    Without a single error there is no such share and every entry is nan; a sampler of targets must choose its own law.

    >>> cfps(torch.tensor([[3, 1, 0], [1, 2, 0], [0, 2, 4]])).tolist()
    [0.25, 0.25, 0.5]
    """
    wrong = _wrong(_square(counts_pred_true))
    return wrong.sum(1).double() / wrong.sum()


def cfns(counts_pred_true: Array) -> Tensor:
    """False-negative score per class (C,): the share of all errors that fell on images of this class. Sums to 1.

    Every entry is nan where there is no error, as in `cfps`; a class without images has made none and scores 0.
    """
    wrong = _wrong(_square(counts_pred_true))
    return wrong.sum(0).double() / wrong.sum()


def one_vs_rest_accuracy(counts_pred_true: Array) -> Tensor:
    """FAIR-TAT's class accuracy (C,): (true positives + true negatives) / N. Not the recall of the class.

    Adds up to C - 2 * (1 - average). It is defined for a class without images too; nan only where N is 0.

    >>> one_vs_rest_accuracy(torch.tensor([[3, 0], [1, 0]])).tolist()
    [0.75, 0.75]
    """
    counts = _square(counts_pred_true)
    total = counts.sum()
    return (total - counts.sum(0) - counts.sum(1) + 2 * counts.diagonal()).double() / total


def flip_score(pred_a: Tensor, pred_b: Tensor) -> float:
    """Share of examples whose prediction (N,) differs between two passes, clean and attacked say; nan if N is 0.

    Raises:
        ConfigError: inputs of different or wrong shape.
    """
    _check_pair(pred_a, pred_b, owner="flip_score")
    return float((pred_a != pred_b).double().mean())


def natural_error(clean_pred_true: Array) -> Tensor:
    """Natural error per class (C,), 1 - clean accuracy."""
    return 1 - class_accuracy(clean_pred_true)


def boundary_error(clean_pred_true: Array, robust_correct: Array) -> Tensor:
    """Boundary error per class (C,): the share of images that are right when clean and wrong under attack.

    `robust_correct` (C,) counts images that are right clean *and* under attack, so natural plus boundary error is the
    robust error.

    Raises:
        ConfigError: another number of classes, or more robust hits than clean ones in a class.

    >>> clean = torch.tensor([[8, 1], [2, 9]])
    >>> boundary_error(clean, torch.tensor([4, 9])).tolist()
    [0.4, 0.0]
    """
    counts = _square(clean_pred_true)
    hits, robust = counts.diagonal(), torch.as_tensor(robust_correct, device=counts.device)
    _check_pair(robust, hits, owner="boundary_error")
    if bool((robust > hits).any()):
        raise ConfigError(
            "boundary_error",
            "robust_correct",
            allowed="at most the number of clean hits in every class",
            got=robust.tolist(),
            hint="Count a robust hit only where the clean prediction is right as well.",
        )
    return (hits - robust).double() / counts.sum(0)


# Vectors over classes against each other


def head_norm_ratio(norms: Array) -> float:
    """Largest over smallest row norm (C,) of the head, at least 1; inf where a row is zero.

    >>> head_norm_ratio(np.array([0.5, 1.0, 0.75]))
    2.0
    """
    values = _vector(norms, owner="head_norm_ratio")
    return float(values.max() / values.min()) if len(values) else _NAN


def head_norm_correlation(norms: Array, acc: Array) -> float:
    """Pearson correlation of head row norms (C,) and class accuracies (C,) over the classes present.

    nan with fewer than two classes, or where either is constant up to rounding: after head normalisation the norms
    differ in their last bits only, and a correlation with those says nothing.

    Raises:
        ConfigError: vectors of different length.
    """
    x, y = _paired_present(norms, acc, owner="head_norm_correlation")
    if len(x) < 2 or _is_flat(x) or _is_flat(y):
        return _NAN
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y / (x.norm() * y.norm())).clamp(-1.0, 1.0))


def kendall(a: Array, b: Array) -> float:
    """Kendall's tau-b of two vectors (C,), over the classes present in both; nan below two, or if either is constant.

    CSR compares class-wise robust accuracy on training and test set this way; tau-b, because ties occur.

    Raises:
        ConfigError: vectors of different length.
    """
    with needed("scipy", "Kendall's tau"):
        from scipy.stats import kendalltau

    x, y = _paired_present(a, b, owner="kendall")
    return float(kendalltau(x.cpu().numpy(), y.cpu().numpy(), variant="b").statistic) if len(x) >= 2 else _NAN


# Intervals


def wilson(correct: Array | int, n: Array | int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Wilson score interval of correct / n, element by element: (lower, upper), nan where n is 0.

    The two ends are the p at which |correct / n - p| equals z standard errors sqrt(p (1 - p) / n).

    Raises:
        ConfigError: correct outside [0, n], or level outside (0, 1).

    >>> lower, upper = wilson(0, 10)
    >>> round(float(lower), 4), round(float(upper), 4)
    (0.0, 0.2775)
    """
    return _wilson(correct, n, _two_sided_z(level))


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
    hits, images = _check_hits(correct, n)
    _check_pair(hits, images, owner="bootstrap")
    tail = _check_bootstrap(level, draws)
    present = images > 0
    k, m = hits[present].cpu().numpy(), images[present].cpu().numpy()
    measure = _Statistic.parse(statistic, m)
    if len(m) == 0:
        return Interval(estimate=_NAN, corrected=_NAN, lower=_NAN, upper=_NAN, level=level)

    rng = np.random.default_rng(seed)
    acc = k / m
    estimate = float(measure(acc))
    tied = _tied(k, m, level)
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
        lower=min(lower, _scarce_floor(k, m, level)) if statistic == "worst" else lower,
        upper=_unit(estimate - min(0.0, float(low.min()))),
        level=level,
    )


def bootstrap_worst(
    correct: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the worst class accuracy from flags (N,) bool and labels (N,); see `bootstrap_statistic`.

    Raises:
        ConfigError: shapes that differ, a label outside [0, num_classes), level outside (0, 1), fewer than 100 draws.
    """
    hits = correct_per_class(correct, label, num_classes)
    images = correct_per_class(torch.ones_like(label, dtype=torch.bool), label, num_classes, check=False)
    return bootstrap_statistic(hits, images, "worst", level=level, draws=draws, seed=seed)


# Paired tests


def paired_table(before: Tensor, after: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts (C, 2, 2) int64 of two models' hits (N,) bool on the same images: [class, right before, right after].

    Raises:
        ConfigError: inputs of different or wrong shape, or a label outside [0, num_classes).

    >>> before, after = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    >>> paired_table(before, after, torch.tensor([0, 0, 0]), 1).tolist()
    [[[1, 0], [1, 1]]]
    """
    for hits in (before, after):
        _check_pair(hits, label, owner="paired_table")
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
    values = _vector(p, owner="holm")
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
    z = _two_sided_z(level)
    losses, wins = _check_discordant(lost, won)
    differing, images = _check_hits(losses + wins, n)
    m = images.double() + 2
    centre = (wins - losses) / m
    half = z * (((differing + 1) / m - centre**2) / m).sqrt()
    lower, upper = (centre - half).clamp(min=-1), (centre + half).clamp(max=1)
    return torch.where(images == 0, _NAN, lower), torch.where(images == 0, _NAN, upper)


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
    counts = torch.as_tensor(table)
    if counts.ndim != 3 or counts.shape[1:] != (2, 2) or bool((counts < 0).any()):
        raise ConfigError("bootstrap", "table", allowed="counts (C, 2, 2), see paired_table", got=tuple(counts.shape))
    tail = _check_bootstrap(level, draws)
    cells = counts[counts.sum((1, 2)) > 0].cpu().numpy()
    n, hits = cells.sum((1, 2)), _margins(cells)
    measure = _Statistic.parse(statistic, n)
    if len(n) == 0:
        return Interval(estimate=_NAN, corrected=_NAN, lower=_NAN, upper=_NAN, level=level)

    resample = _pair_resampler(np.random.default_rng(seed), n, draws)
    acc = hits / n
    before, after = (float(value) for value in measure(acc))
    estimate = after - before
    inside = (cells + 0.25) / (n + 1)[:, None, None]  # as in `bootstrap_statistic`: half an image right, half wrong
    weights = np.stack([-measure.weights(acc[0]), measure.weights(acc[1])])
    errors = [((resample(inside) - _margins(inside)) * weights).sum((1, 2))]
    tied, change = [_tied(k, n, level) for k in hits], acc[1] - acc[0]
    for centre in ([tied[0], tied[0] + change], [tied[1] - change, tied[1]], tied):
        moved = _moved(inside, np.clip(centre, 0, 1))
        errors.append(np.diff(measure(resample(moved)) - measure(_margins(moved)))[:, 0])
    bias = float(np.diff(measure(resample(cells / n[:, None, None]))).mean()) - estimate

    low, high = np.quantile(np.stack(errors), [tail, 1 - tail], axis=1)
    lower, upper = estimate - max(0.0, float(high.max())), estimate - min(0.0, float(low.min()))
    if statistic == "worst":
        lower = min(lower, _scarce_floor(hits[1], n, level) - before)
        upper = max(upper, after - _scarce_floor(hits[0], n, level))
    return Interval(
        estimate=estimate,
        corrected=_difference(estimate - bias),
        lower=_difference(lower),
        upper=_difference(upper),
        level=level,
    )


# All at once


def summarise(counts_pred_true: Array, *, q: tuple[float, ...] = (0.05, 0.10)) -> dict[str, float]:
    """Every scalar metric of one confusion matrix, in a key order that does not depend on the data.

    `nsd` is nan where every class accuracy is 0.

    Raises:
        ConfigError: counts that are not square or hold no image, or q outside [0, 1].

    >>> list(summarise(torch.eye(2, dtype=torch.int64)))[:5]
    ['average', 'class_mean', 'worst', 'worst_class', 'best']
    """
    if not _any(counts_pred_true):
        raise ConfigError("summarise", "counts_pred_true", allowed="counts of at least one image", got=0)
    acc = class_accuracy(counts_pred_true)
    return {
        "average": average(counts_pred_true),
        "class_mean": class_mean(acc),
        "worst": worst(acc),
        "worst_class": worst_class(acc),
        "best": best(acc),
        "best_class": best_class(acc),
        "range": accuracy_range(acc),
        "std": std(acc),
        "nsd": nsd(acc),
        **{f"worst_{100 * share:g}pct": worst_q(acc, share) for share in q},
        "spectral_norm": spectral_norm_confusion(counts_pred_true),
        "l1_norm": l1_norm_confusion(counts_pred_true),
    }


# Parts of the bootstrap


@dataclass(frozen=True, kw_only=True)
class _Statistic:
    """A weighted sum of class accuracies: weights per class, or per rank from the smallest accuracy up."""

    per_rank: bool
    weight: np.ndarray

    @staticmethod
    def parse(name: str, n: np.ndarray) -> _Statistic:
        classes = len(n)
        share = re.fullmatch(r"worst_(\d+(?:\.\d+)?)pct", name)
        weight = np.zeros(classes)
        if name == "average":
            return _Statistic(per_rank=False, weight=n / max(1, n.sum()))
        if name == "class_mean":
            return _Statistic(per_rank=False, weight=np.full(classes, 1 / max(1, classes)))
        if name == "worst":
            weight[:1] = 1
        elif name == "best":
            weight[-1:] = 1
        elif name == "range":
            weight[:1] -= 1
            weight[-1:] += 1
        elif share:
            k = _worst_count(float(share[1]) / 100, classes)
            weight[:k] = 1 / k
        else:
            raise ConfigError(
                "bootstrap",
                "statistic",
                allowed="average, class_mean, worst, best, range or worst_Qpct (worst_10pct)",
                got=name,
            )
        return _Statistic(per_rank=True, weight=weight)

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


def _resampler(rng: np.random.Generator, n: np.ndarray, draws: int) -> Callable[[np.ndarray], np.ndarray]:
    """From accuracies (C,) to accuracies (draws, C) of test sets resampled within each class."""

    def resample(acc: np.ndarray) -> np.ndarray:
        return rng.binomial(n, acc, size=(draws, len(n))) / n

    return resample


def _tied(correct: np.ndarray, n: np.ndarray, level: float) -> np.ndarray:
    """Accuracies (C,) with the lowest and the highest classes drawn together as far as the counts leave it possible.

    Every class may truly lie anywhere between its simultaneous bounds: those measured below the lowest upper bound may
    all share it, those above the highest lower bound may all share that. Where the two cross, all classes may be equal.
    """
    z = NormalDist().inv_cdf(level ** (1 / len(n)))
    lower, upper = (bound.numpy() for bound in _wilson(correct, n, z))
    bottom, top = upper.min(), lower.max()
    if bottom > top:
        bottom = top = correct.sum() / n.sum()
    return np.clip(correct / n, bottom, top)


def _margins(cells: np.ndarray) -> np.ndarray:
    """Of cells (..., C, 2, 2), what the two models have right: (..., 2, C)."""
    return np.stack([cells[..., 1, :].sum(-1), cells[..., :, 1].sum(-1)], axis=-2)


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


def _scarce_floor(correct: np.ndarray, n: np.ndarray, level: float) -> float:
    """Lowest simultaneous lower bound among the classes with few images; 1 if no class has few."""
    z = NormalDist().inv_cdf(level ** (1 / len(n)))
    lower, _ = _wilson(correct, n, z)
    return float(min(lower.numpy()[n < FEW_IMAGES], default=1.0))


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _difference(value: float) -> float:
    return min(1.0, max(-1.0, value))


def _sign_test(a: int, b: int) -> float:
    """Probability that a fair coin thrown a + b times splits at least as unevenly as a to b."""
    term = tail = 1
    for k in range(min(a, b)):
        term = term * (a + b - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2 ** (a + b))


# Checks and small parts


def _check_pair(a: Tensor, b: Tensor, *, owner: str) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise ConfigError(owner, "shapes", allowed="two vectors of one length", got=(tuple(a.shape), tuple(b.shape)))


def _square(counts_pred_true: Array) -> Tensor:
    counts = torch.as_tensor(counts_pred_true)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ConfigError("metrics", "counts_pred_true", allowed="a square matrix (C, C)", got=tuple(counts.shape))
    return counts


def _any(counts_pred_true: Array) -> bool:
    return bool(_square(counts_pred_true).any())


def _wrong(counts: Tensor) -> Tensor:
    return counts - torch.diag(counts.diagonal())


def _vector(values: Array, *, owner: str) -> Tensor:
    vector = torch.as_tensor(values).detach().double()
    if vector.ndim != 1:
        raise ConfigError(owner, "values per class", allowed="a vector (C,)", got=tuple(vector.shape))
    return vector


def _present(acc: Array) -> Tensor:
    vector = _vector(acc, owner="metrics")
    return vector[~vector.isnan()]


def _paired_present(a: Array, b: Array, *, owner: str) -> tuple[Tensor, Tensor]:
    x, y = _vector(a, owner=owner), _vector(b, owner=owner)
    y = y.to(x.device)
    _check_pair(x, y, owner=owner)
    keep = ~(x.isnan() | y.isnan())
    return x[keep], y[keep]


def _is_flat(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= _FLAT * values.abs().max())


def _arg_extreme(acc: Array, *, sign: float, owner: str) -> int:
    vector = _vector(acc, owner=owner)
    if not len(_present(vector)):
        raise ConfigError(owner, "acc", allowed="at least one class with images", got=vector.tolist())
    # A host argmin: torch leaves open which index wins a tie, numpy promises the first.
    return int(np.nanargmin((sign * vector).cpu().numpy()))


def _worst_count(q: float, classes: int) -> int:
    if not 0 <= q <= 1:
        raise ConfigError("worst_q", "q", allowed="a fraction in [0, 1]", got=q)
    return max(1, int(q * classes + 1e-9))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else _NAN


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError("interval", "level", allowed="a fraction strictly between 0 and 1", got=level)
    return level


def _check_bootstrap(level: float, draws: int) -> float:
    """What lies beyond either end of an interval of that level."""
    if draws < 100:
        raise ConfigError("bootstrap", "draws", allowed="at least 100", got=draws)
    return (1 - _check_level(level)) / 2


def _check_discordant(lost: Array | int, won: Array | int) -> tuple[Tensor, Tensor]:
    losses, wins = torch.as_tensor(lost), torch.as_tensor(won)
    if losses.shape != wins.shape:
        shapes = (tuple(losses.shape), tuple(wins.shape))
        raise ConfigError("paired test", "shapes of lost and won", allowed="equal", got=shapes)
    for name, counts in (("lost", losses), ("won", wins)):
        if counts.is_floating_point() or bool((counts < 0).any()):
            raise ConfigError("paired test", name, allowed="whole numbers, 0 or more", got=counts.tolist())
    return losses, wins


def _two_sided_z(level: float) -> float:
    return NormalDist().inv_cdf((1 + _check_level(level)) / 2)


def _check_hits(correct: Array | int, n: Array | int) -> tuple[Tensor, Tensor]:
    hits, images = torch.as_tensor(correct), torch.as_tensor(n)
    images = images.to(hits.device)
    if hits.shape != images.shape and hits.ndim and images.ndim:
        raise ConfigError("interval", "shapes", allowed="equal", got=(tuple(hits.shape), tuple(images.shape)))
    if bool(((hits < 0) | (hits > images)).any()):
        raise ConfigError(
            "interval", "correct", allowed="between 0 and n", got=hits.tolist(), hint=f"n is {images.tolist()}."
        )
    return hits, images


def _wilson(correct: Array | int, n: Array | int, z: float) -> tuple[Tensor, Tensor]:
    hits, images = _check_hits(correct, n)
    k, m = hits.double(), images.double()
    p = k / m
    centre = (p + z * z / (2 * m)) / (1 + z * z / m)
    half = z / (1 + z * z / m) * (p * (1 - p) / m + (z / (2 * m)) ** 2).sqrt()
    # The formula is exact at both ends but for rounding, which would leave the estimate outside.
    lower = torch.where(hits == 0, torch.zeros_like(p), centre - half)
    upper = torch.where(hits == images, torch.ones_like(p), centre + half)
    return torch.where(images == 0, _NAN, lower), torch.where(images == 0, _NAN, upper)
