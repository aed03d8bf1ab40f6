"""Rates per class from counts, and single numbers that sum them up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError, needed
from robustfair.metrics.counts import Array, check_pair, square

NAN = float("nan")

_FLAT = 1e-6  # relative spread below which a vector counts as constant: rounding of float32 norms stays under it


# Accuracy per class, and numbers that sum it up


def class_accuracy(counts_pred_true: Array) -> Tensor:
    """Accuracy per class (C,), hits / images of that class; nan for a class without images.

    >>> class_accuracy(torch.tensor([[3, 0, 1], [1, 0, 1], [0, 0, 0]])).tolist()
    [0.75, nan, 0.0]
    """
    counts = square(counts_pred_true)
    return counts.diagonal().double() / counts.sum(0)


def average(counts_pred_true: Array) -> float:
    """Overall accuracy: hits / images, nan without images. Equals `class_mean` on a balanced set only."""
    counts = square(counts_pred_true)
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
    return float(present.max()) if len(present) else NAN


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
    k = worst_count(q, len(present))
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
        return NAN
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
    the classes, the harder thirds take one more, as in CSR's tables: of ten classes four are hard. Ties go by index; a
    class missing in either vector is left out.

    Raises:
        ConfigError: vectors of different length.

    >>> thirds(np.array([0.25, 0.5, 0.75]), by=np.array([0.1, 0.9, 0.5]))
    Thirds(easy=0.5, medium=0.75, hard=0.25)
    """
    values, baseline = _paired_present(acc, by, owner="thirds")
    third = third_of_class(baseline)
    easy, medium, hard = (float(values[third == number].mean()) for number in range(3))
    return Thirds(easy=easy, medium=medium, hard=hard)


def third_of_class(by: Array) -> Tensor:
    """(C,) int64: 0 for the third of the classes with the largest values of `by` (C,), 1 for the next, 2 for the last.

    Split as `thirds` has it; -1 for a class that is nan.

    >>> third_of_class(np.array([0.1, 0.9, 0.5, 0.4])).tolist()
    [2, 0, 1, 2]
    """
    values = class_vector(by, owner="third_of_class")
    kept = (~values.isnan()).nonzero().squeeze(1)
    order = kept[torch.argsort(values[kept], descending=True, stable=True).flip(0)]
    third = torch.full_like(values, -1, dtype=torch.int64)
    for number, members in enumerate(torch.tensor_split(order, 3)):
        third[members] = 2 - number
    return third


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Mean accuracy over the classes with many, medium and few training images; nan where there is no such class."""

    many: float
    medium: float
    few: float


def shots(acc: Array, counts: Array, *, many: int = 100, few: int = 20) -> Shots:
    """Mean of `acc` (C,) over the classes with more than `many` of `counts` (C,), with fewer than `few`, and between.

    Source: Liu et al. (2019), "Large-scale long-tailed recognition in an open world", whose thresholds are the default.
    A class without test images is left out.

    Raises:
        ConfigError: vectors of different length, or `few` above `many`.

    >>> shots(np.array([0.75, 0.5, 0.25, 0.0]), np.array([500, 100, 20, 19]))
    Shots(many=0.75, medium=0.375, few=0.0)
    """
    values, images = _paired_present(acc, counts, owner="shots")
    shot = shot_of_class(images, many=many, few=few)
    means = (float(values[shot == number].mean()) for number in range(3))
    return Shots(**dict(zip(("many", "medium", "few"), means, strict=True)))


def shot_of_class(counts: Array, *, many: int = 100, few: int = 20) -> Tensor:
    """(C,) int64: 0 for a class with more than `many` of `counts` (C,), 2 with fewer than `few`, else 1.

    Raises:
        ConfigError: `few` above `many`.

    >>> shot_of_class(np.array([500, 100, 20, 19])).tolist()
    [0, 1, 1, 2]
    """
    if not 0 <= few <= many:
        raise ConfigError("shots", "few", allowed=f"from 0 to many, {many}", got=few)
    images = class_vector(counts, owner="shots")
    return (images <= many).long() + (images < few).long()


# Confusion between classes


def confusion_rates_pred_true(counts_pred_true: Array) -> Tensor:
    """CSR's confusion matrix (C, C): each column divided by its class count, diagonal zero, rows predicted.

    A column sums to the error of its class. The column of a class without images is nan, its diagonal entry too.

    >>> confusion_rates_pred_true(torch.tensor([[3, 0], [1, 2]])).tolist()
    [[0.0, 0.0], [0.25, 0.0]]
    """
    counts = square(counts_pred_true)
    return _wrong(counts).double() / counts.sum(0)


def spectral_norm_confusion(counts_pred_true: Array) -> float:
    """Largest singular value of `confusion_rates_pred_true`; classes without images contribute nothing.

    The same for either order of the axes; nan without images.
    """
    if not _any(counts_pred_true):
        return NAN
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
    wrong = _wrong(square(counts_pred_true))
    return wrong.sum(1).double() / wrong.sum()


def cfns(counts_pred_true: Array) -> Tensor:
    """False-negative score per class (C,): the share of all errors that fell on images of this class. Sums to 1.

    Every entry is nan where there is no error, as in `cfps`; a class without images has made none and scores 0.
    """
    wrong = _wrong(square(counts_pred_true))
    return wrong.sum(0).double() / wrong.sum()


def one_vs_rest_accuracy(counts_pred_true: Array) -> Tensor:
    """FAIR-TAT's class accuracy (C,): (true positives + true negatives) / N. Not the recall of the class.

    Adds up to C - 2 * (1 - average). It is defined for a class without images too; nan only where N is 0.

    >>> one_vs_rest_accuracy(torch.tensor([[3, 0], [1, 0]])).tolist()
    [0.75, 0.75]
    """
    counts = square(counts_pred_true)
    total = counts.sum()
    return (total - counts.sum(0) - counts.sum(1) + 2 * counts.diagonal()).double() / total


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
    counts = square(clean_pred_true)
    hits, robust = counts.diagonal(), torch.as_tensor(robust_correct, device=counts.device)
    check_pair(robust, hits, owner="boundary_error")
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
    values = class_vector(norms, owner="head_norm_ratio")
    return float(values.max() / values.min()) if len(values) else NAN


def head_norm_correlation(norms: Array, acc: Array) -> float:
    """Pearson correlation of head row norms (C,) and class accuracies (C,) over the classes present.

    nan with fewer than two classes, or where either is constant up to rounding: after head normalisation the norms
    differ in their last bits only, and a correlation with those says nothing.

    Raises:
        ConfigError: vectors of different length.
    """
    x, y = _paired_present(norms, acc, owner="head_norm_correlation")
    if len(x) < 2 or _is_flat(x) or _is_flat(y):
        return NAN
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
    return float(kendalltau(x.cpu().numpy(), y.cpu().numpy(), variant="b").statistic) if len(x) >= 2 else NAN


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


# Checks and small parts


def class_vector(values: Array, *, owner: str) -> Tensor:
    vector = torch.as_tensor(values).detach().double()
    if vector.ndim != 1:
        raise ConfigError(owner, "values per class", allowed="a vector (C,)", got=tuple(vector.shape))
    return vector


def worst_count(q: float, classes: int) -> int:
    if not 0 <= q <= 1:
        raise ConfigError("worst_q", "q", allowed="a fraction in [0, 1]", got=q)
    return max(1, int(q * classes + 1e-9))


def _any(counts_pred_true: Array) -> bool:
    return bool(square(counts_pred_true).any())


def _wrong(counts: Tensor) -> Tensor:
    return counts - torch.diag(counts.diagonal())


def _present(acc: Array) -> Tensor:
    vector = class_vector(acc, owner="metrics")
    return vector[~vector.isnan()]


def _paired_present(a: Array, b: Array, *, owner: str) -> tuple[Tensor, Tensor]:
    x, y = class_vector(a, owner=owner), class_vector(b, owner=owner)
    y = y.to(x.device)
    check_pair(x, y, owner=owner)
    keep = ~(x.isnan() | y.isnan())
    return x[keep], y[keep]


def _is_flat(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= _FLAT * values.abs().max())


def _arg_extreme(acc: Array, *, sign: float, owner: str) -> int:
    vector = class_vector(acc, owner=owner)
    if not len(_present(vector)):
        raise ConfigError(owner, "acc", allowed="at least one class with images", got=vector.tolist())
    # A host argmin: torch leaves open which index wins a tie, numpy promises the first.
    return int(np.nanargmin((sign * vector).cpu().numpy()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN
