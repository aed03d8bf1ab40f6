from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import metrics as reference
from robustfair import metrics
from robustfair.errors import ConfigError

NAN = float("nan")
CSR_COUNTS = torch.tensor([[0, 10, 30], [20, 0, 5], [40, 15, 0]])

# FAAL's official runs on CIFAR-10 under AutoAttack, per cent: accuracy per class, population std, range, worst class.
FAAL = {
    "prn-at-pgd": ([52.4, 67.8, 31.1, 31.8, 33.9, 36.9, 37.6, 46.8, 59.2, 57.6], 12.44, 36.7, 2),
    "prn-at-trades": ([55.2, 69.2, 31.6, 28.8, 29.9, 36.3, 38.4, 48.8, 54.6, 58.2], 13.27, 40.4, 3),
    "prn-awp-trades": ([57.9, 68.8, 36.6, 33.6, 30.7, 36.3, 40.0, 50.6, 61.1, 60.6], 13.05, 38.1, 4),
    "wrn-awp-pgd": ([60.3, 69.9, 36.9, 37.2, 39.0, 41.4, 49.4, 55.7, 66.7, 68.2], 12.71, 33.0, 2),
    "wrn-awp-awp": ([58.9, 72.7, 41.3, 37.0, 40.7, 43.0, 52.4, 58.3, 67.1, 67.9], 12.28, 35.7, 3),
}

common = settings(max_examples=50, deadline=None)


@st.composite
def counts_of(draw, *, min_images=1, max_classes=6):
    """Confusion counts, absent classes included, with at least `min_images` images."""
    size = draw(st.integers(1, max_classes))
    flat = draw(st.lists(st.integers(0, 6), min_size=size * size, max_size=size * size))
    if sum(flat) < min_images:
        flat[draw(st.integers(0, size * size - 1))] += min_images
    return torch.tensor(flat).view(size, size)


accuracies = st.lists(
    st.one_of(st.just(NAN), st.integers(0, 20).map(lambda k: k / 20)), min_size=1, max_size=12
).filter(lambda acc: any(not math.isnan(a) for a in acc))


def close(actual, expected, tol=1e-12):
    return np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), rtol=tol, atol=tol)


@common
@given(counts_of())
def test_rates_match_loops_over_examples(counts):
    size = len(counts)
    pred, label = reference.examples(counts.tolist())
    rates = reference.confusion_rates_pred_true(pred, label, size)
    close(metrics.class_accuracy(counts), reference.class_accuracy(pred, label, size))
    close(metrics.average(counts), reference.average(pred, label))
    close(metrics.natural_error(counts), [1 - a for a in reference.class_accuracy(pred, label, size)])
    close(metrics.confusion_rates_pred_true(counts), rates)
    close(metrics.spectral_norm_confusion(counts), reference.spectral_norm(rates), tol=1e-6)
    close(metrics.cfps(counts), reference.cfps(pred, label, size))
    close(metrics.cfns(counts), reference.cfns(pred, label, size))
    close(metrics.one_vs_rest_accuracy(counts), reference.one_vs_rest_accuracy(pred, label, size))


@common
@given(counts_of())
def test_identities(counts):
    acc, rates = metrics.class_accuracy(counts), metrics.confusion_rates_pred_true(counts).nan_to_num(nan=0.0)
    l1, linf = float(rates.sum(0).max()), float(rates.sum(1).max())
    spectral = metrics.spectral_norm_confusion(counts)
    assert metrics.worst(acc) <= metrics.average(counts) + 1e-12
    assert metrics.average(counts) <= metrics.best(acc) + 1e-12
    close(metrics.l1_norm_confusion(counts), 1 - metrics.worst(acc))
    assert spectral <= math.sqrt(l1 * linf) + 1e-9
    assert l1 <= math.sqrt(len(counts)) * spectral + 1e-9
    close(spectral, np.linalg.norm(rates.T.numpy(), 2))
    close(metrics.one_vs_rest_accuracy(counts).sum(), len(counts) - 2 * (1 - metrics.average(counts)))
    if l1 > 0:
        close(metrics.cfps(counts).sum(), 1)
        close(metrics.cfns(counts).sum(), 1)
    else:
        assert metrics.cfps(counts).isnan().all()
        assert metrics.cfns(counts).isnan().all()


@common
@given(counts_of(), st.randoms(use_true_random=False))
def test_renaming_classes_permutes_vectors_and_keeps_numbers(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    moved = counts[order][:, order]
    for per_class in (metrics.class_accuracy, metrics.cfps, metrics.cfns, metrics.one_vs_rest_accuracy):
        close(per_class(moved), per_class(counts)[order])
    close(metrics.confusion_rates_pred_true(moved), metrics.confusion_rates_pred_true(counts)[order][:, order])
    before, after = metrics.summarise(counts), metrics.summarise(moved)
    assert list(before) == list(after)
    close(*([v for k, v in part.items() if not k.endswith("_class")] for part in (after, before)), tol=1e-9)


@common
@given(counts_of(max_classes=5), st.integers(0, 5))
def test_an_absent_class_is_nan_and_shifts_nobody(counts, at):
    size = len(counts)
    at = min(at, size)
    others = [c for c in range(size + 1) if c != at]
    wider = torch.zeros(size + 1, size + 1, dtype=torch.int64)
    wider[torch.tensor(others)[:, None], torch.tensor(others)] = counts
    acc = metrics.class_accuracy(wider)
    assert math.isnan(acc[at])
    assert metrics.confusion_rates_pred_true(wider)[:, at].isnan().all()
    close(acc[others], metrics.class_accuracy(counts))
    narrow, wide = metrics.summarise(counts), metrics.summarise(wider)
    assert others[int(narrow.pop("worst_class"))] == wide.pop("worst_class")
    assert others[int(narrow.pop("best_class"))] == wide.pop("best_class")
    close(list(wide.values()), list(narrow.values()), tol=1e-9)


@common
@given(accuracies, st.floats(0, 1), st.integers(0, 1))
def test_summaries_of_an_accuracy_vector_match_loops(acc, q, ddof):
    vector, present = np.array(acc), reference.present(acc)
    close(metrics.worst(vector), min(present))
    close(metrics.best(vector), max(present))
    close(metrics.accuracy_range(vector), max(present) - min(present))
    close(metrics.class_mean(vector), sum(present) / len(present))
    close(metrics.worst_q(vector, q), reference.worst_q(acc, q))
    assert metrics.worst_class(vector) == reference.worst_class(acc)
    assert metrics.best_class(vector) == reference.best_class(acc)
    expected = reference.std(acc, ddof)
    mean = sum(present) / len(present)
    close(metrics.std(vector, ddof), expected)
    close(metrics.nsd(torch.tensor(acc, dtype=torch.float64), ddof), expected / mean if mean else NAN)


def test_an_unbalanced_set_separates_average_from_class_mean():
    counts = torch.tensor([[90, 1], [10, 0]])
    assert metrics.average(counts) == pytest.approx(90 / 101)
    assert metrics.class_mean(metrics.class_accuracy(counts)) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("classes", "q", "k"), [(65, 0.05, 3), (100, 0.1, 10), (10, 0.1, 1), (10, 0.05, 1), (10, 0.3, 3)]
)
def test_worst_q_counts_classes_as_the_papers_do(classes, q, k):
    acc = np.linspace(0, 1, classes)
    assert metrics.worst_q(acc, q) == pytest.approx(acc[:k].mean())
    with pytest.raises(ConfigError, match="fraction in"):
        metrics.worst_q(acc, 1.5)


@pytest.mark.parametrize("run", FAAL)
def test_faal_logs(run):
    acc, population, spread, worst_class = FAAL[run]
    vector = np.array(acc) / 100
    assert 100 * metrics.std(vector) == pytest.approx(population, abs=0.005)
    assert 100 * metrics.accuracy_range(vector) == pytest.approx(spread)
    assert metrics.worst_class(vector) == worst_class
    assert metrics.nsd(vector) == pytest.approx(metrics.std(vector) / vector.mean())


def test_faal_sample_deviation_and_average():
    vector = np.array(FAAL["wrn-awp-awp"][0]) / 100
    assert 100 * metrics.std(vector, ddof=1) == pytest.approx(12.94, abs=0.005)
    assert 100 * metrics.class_mean(vector) == pytest.approx(53.93)


def test_csr_vector():
    """Columns of equal class count: the raw counts' singular value, divided by that count."""
    images = 100
    counts = CSR_COUNTS + torch.diag(images - CSR_COUNTS.sum(0))
    assert metrics.spectral_norm_confusion(counts) == pytest.approx(47.121064 / images, abs=1e-8)
    assert metrics.l1_norm_confusion(counts) == pytest.approx(0.6)
    assert torch.equal((metrics.confusion_rates_pred_true(counts) * images).round().long(), CSR_COUNTS)
    close(metrics.cfps(counts), np.array([40, 25, 55]) / 120)
    close(metrics.cfns(counts), np.array([60, 25, 35]) / 120)


@common
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_natural_and_boundary_error_make_up_the_robust_error(triples):
    clean, adv, label = (torch.tensor(column) for column in zip(*triples, strict=True))
    counts = metrics.confusion_pred_true(clean, label, 4)
    robust = metrics.correct_per_class((clean == label) & (adv == label), label, 4)
    boundary = metrics.boundary_error(counts, robust)
    close(boundary, reference.boundary_error(clean.tolist(), adv.tolist(), label.tolist(), 4))
    close(metrics.natural_error(counts) + boundary, 1 - robust / counts.sum(0).double())


def test_robust_hits_beyond_the_clean_ones_are_refused():
    with pytest.raises(ConfigError, match="only where the clean prediction is right"):
        metrics.boundary_error(torch.tensor([[3, 0], [1, 4]]), torch.tensor([4, 4]))


def test_nothing_counted_is_nan():
    empty, none = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    acc = metrics.class_accuracy(empty)
    numbers = [
        metrics.average(empty),
        metrics.spectral_norm_confusion(empty),
        metrics.l1_norm_confusion(empty),
        *(f(acc) for f in (metrics.worst, metrics.best, metrics.class_mean, metrics.accuracy_range, metrics.std)),
        metrics.nsd(acc),
        metrics.worst_q(acc, 0.1),
        metrics.bootstrap_statistic(none, none, "worst").estimate,
    ]
    assert all(math.isnan(number) for number in numbers)
    for call in (lambda: metrics.summarise(empty), lambda: metrics.worst_class(acc), lambda: metrics.best_class(acc)):
        with pytest.raises(ConfigError, match="at least one"):
            call()


def test_summary_holds_the_single_functions_under_fixed_keys():
    counts = torch.tensor([[8, 1, 0], [1, 5, 0], [1, 4, 0]])
    acc = metrics.class_accuracy(counts)
    assert metrics.summarise(counts, q=(0.05, 0.125)) == pytest.approx(
        {
            "average": 13 / 20,
            "class_mean": 0.65,
            "worst": 0.5,
            "worst_class": 1,
            "best": 0.8,
            "best_class": 0,
            "range": 0.3,
            "std": 0.15,
            "nsd": 0.15 / 0.65,
            "worst_5pct": 0.5,
            "worst_12.5pct": 0.5,
            "spectral_norm": metrics.spectral_norm_confusion(counts),
            "l1_norm": 1 - metrics.worst(acc),
        }
    )
    assert list(metrics.summarise(counts)) == [
        *("average", "class_mean", "worst", "worst_class", "best", "best_class", "range", "std", "nsd"),
        *("worst_5pct", "worst_10pct", "spectral_norm", "l1_norm"),
    ]


# Vectors over classes


def test_thirds_follow_the_baseline_and_leave_absent_classes_out():
    by = np.array([0.1, 0.9, 0.5, 0.5, NAN, 0.8, 0.2, 0.3])
    acc = np.array([0.0, 1.0, 0.6, 0.4, 0.9, 0.8, 0.2, 0.3])
    assert metrics.thirds(acc, by=by) == metrics.Thirds(
        easy=pytest.approx(0.9), medium=pytest.approx((0.6 + 0.4) / 2), hard=pytest.approx((0.0 + 0.2 + 0.3) / 3)
    )


def test_thirds_of_ten_classes_are_those_of_csr():
    acc = np.array(FAAL["prn-at-pgd"][0])
    assert metrics.thirds(acc, by=acc) == metrics.Thirds(
        easy=pytest.approx(61.533, abs=5e-4), medium=pytest.approx(45.6), hard=pytest.approx(33.425)
    )


@pytest.mark.parametrize("classes", [0, 1, 2, 3, 4, 10, 65, 100])
def test_every_class_is_in_one_third_and_hard_ones_are_no_fewer(classes):
    by = torch.rand(classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    third = metrics.third_of_class(by)
    sizes = [int((third == number).sum()) for number in range(3)]
    assert sum(sizes) == classes
    assert sizes == sorted(sizes)
    assert sizes[2] - sizes[0] <= 1
    for easier, harder in ((0, 1), (1, 2)):
        if sizes[easier]:
            assert by[third == easier].min() >= by[third == harder].max()
    assert metrics.third_of_class(torch.full((4,), NAN)).tolist() == [-1] * 4


@pytest.mark.parametrize(("many", "few"), [(100, 20), (5, 5), (0, 0), (1000, 0)])
def test_shots_are_means_over_the_classes_of_a_loop(many, few):
    rng = torch.Generator().manual_seed(many)
    counts = torch.randint(0, 200, (40,), generator=rng)
    counts[:4] = torch.tensor([many, many + 1, few, max(few - 1, 0)])
    acc = torch.rand(40, generator=rng, dtype=torch.float64)
    acc[5] = NAN
    groups = {"many": [], "medium": [], "few": []}
    for value, count in zip(acc.tolist(), counts.tolist(), strict=True):
        if not math.isnan(value):
            groups["many" if count > many else "few" if count < few else "medium"].append(value)
    found = metrics.shots(acc, counts, many=many, few=few)
    for name, values in groups.items():
        mean = sum(values) / len(values) if values else NAN
        assert getattr(found, name) == pytest.approx(mean, nan_ok=True)


@pytest.mark.parametrize("few", [-1, 101])
def test_thresholds_that_cross_are_refused(few):
    with pytest.raises(ConfigError, match="shots: few must be from 0 to many, 100"):
        metrics.shots(np.array([0.5]), np.array([3]), few=few)
    with pytest.raises(ConfigError, match="shots: "):
        metrics.shots(np.array([0.5, 0.5]), np.array([3]))


vectors = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=2, max_size=10)


@common
@given(vectors, st.booleans())
def test_correlations_match_loops(pairs, with_absent):
    x, y = [a / 8 for a, _ in pairs], [b / 8 for _, b in pairs]
    given_x, given_y = ([*x, 0.7], [*y, NAN]) if with_absent else (x, y)
    pearson = metrics.head_norm_correlation(np.array(given_x), np.array(given_y))
    tau = metrics.kendall(np.array(given_x), torch.tensor(given_y, dtype=torch.float64))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(pearson)
        assert math.isnan(tau)
    else:
        close(pearson, reference.pearson(x, y), tol=1e-9)
        close(tau, reference.kendall_tau_b(x, y), tol=1e-9)
    assert metrics.head_norm_ratio(np.array(x)) == max(x) / min(x)


def test_norms_equal_but_for_rounding_have_no_correlation():
    weight = torch.randn(10, 512, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(weight).norm(dim=1)
    assert unit.unique().numel() > 1
    assert math.isnan(metrics.head_norm_correlation(unit, torch.linspace(0.2, 0.8, 10)))
    assert math.isnan(metrics.head_norm_correlation(np.array([1.0, 2.0]), np.array([0.5, NAN])))
    assert math.isnan(metrics.kendall(np.array([1.0]), np.array([0.5])))
    assert metrics.head_norm_ratio(np.array([0.0, 2.0])) == math.inf
