from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

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


# Counts


@common
@given(st.data())
def test_confusion_counts_match_a_loop_and_add_over_batches(data):
    size = data.draw(st.integers(1, 6))
    classes = st.integers(0, size - 1)
    pairs = data.draw(st.lists(st.tuples(classes, classes), max_size=40))
    cut = data.draw(st.integers(0, len(pairs)))
    pred, label = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    counts = metrics.confusion_pred_true(pred, label, size)
    parts = [metrics.confusion_pred_true(pred[part], label[part], size) for part in (slice(cut), slice(cut, None))]
    assert counts.dtype == torch.int64
    assert counts.tolist() == reference.confusion_pred_true(pred.tolist(), label.tolist(), size)
    assert torch.equal(counts, parts[0] + parts[1])
    assert torch.equal(metrics.confusion_true_pred(counts), metrics.confusion_pred_true(label, pred, size))
    assert torch.equal(metrics.correct_per_class(pred == label, label, size), counts.diagonal())


def test_counting_needs_no_value_on_the_host():
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    assert metrics.confusion_pred_true(index, index, 3, check=False).shape == (3, 3)
    assert metrics.correct_per_class(index == 0, index, 3, check=False).shape == (3,)


@pytest.mark.parametrize(("pred", "label"), [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [0, 3]), ([0, 1], [-1, 0])])
def test_indices_outside_the_classes_are_refused(pred, label):
    with pytest.raises(ConfigError, match=r"class indices from 0 to 2, got (3|-1)"):
        metrics.confusion_pred_true(torch.tensor(pred), torch.tensor(label), 3)


def test_wrong_shapes_are_refused():
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: metrics.confusion_pred_true(one, two, 3),
        lambda: metrics.confusion_pred_true(one[None], one[None], 3),
        lambda: metrics.flip_score(one, two),
        lambda: metrics.class_accuracy(torch.zeros(2, 3)),
        lambda: metrics.boundary_error(torch.eye(2), two[:1]),
        lambda: metrics.worst(torch.zeros(2, 2)),
        lambda: metrics.thirds(np.zeros(3), by=np.zeros(4)),
        lambda: metrics.head_norm_correlation(np.zeros(3), np.zeros(4)),
        lambda: metrics.wilson(np.zeros(3), np.ones(4)),
        lambda: metrics.bootstrap_statistic(np.zeros(3), np.ones(4), "worst"),
        lambda: metrics.paired_table(one > 0, two > 0, one, 3),
        lambda: metrics.mcnemar(one, two),
        lambda: metrics.holm(np.zeros((2, 2))),
        lambda: metrics.bootstrap_difference(np.zeros((3, 4)), "worst"),
    ):
        with pytest.raises(ConfigError):
            call()


# Rates


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
    assert metrics.flip_score(clean, adv) == sum(c != a for c, a, _ in triples) / len(triples)


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
        metrics.flip_score(none, none),
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
        easy=pytest.approx((1.0 + 0.8 + 0.6) / 3), medium=pytest.approx(0.35), hard=pytest.approx(0.1)
    )


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


# Intervals


@common
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_solves_the_score_equation(n, share, level):
    correct = round(share * n)
    lower, upper = (float(bound) for bound in metrics.wilson(correct, n, level))
    close((lower, upper), reference.wilson(correct, n, level), tol=1e-9)
    assert 0 <= lower <= correct / n <= upper <= 1


def test_wilson_of_vectors_and_of_no_images():
    lower, upper = metrics.wilson(torch.tensor([0, 5, 0]), torch.tensor([10, 10, 0]))
    close(lower, [0.0, 0.2365931, NAN], tol=1e-7)
    close(upper, [0.2775328, 0.7634069, NAN], tol=1e-7)
    for bad in ({"correct": 3, "n": 2}, {"correct": -1, "n": 2}, {"correct": 1, "n": 2, "level": 1.0}):
        with pytest.raises(ConfigError):
            metrics.wilson(**bad)


@pytest.mark.parametrize("statistic", ["average", "class_mean", "worst", "best", "range", "worst_50pct"])
def test_bootstrap_is_seeded_contains_its_estimate_and_ignores_absent_classes(statistic):
    correct, n = np.array([60, 9, 0, 31, 55]), np.array([100, 20, 0, 100, 80])
    interval = metrics.bootstrap_statistic(correct, n, statistic, seed=3)
    counts = torch.diag(torch.tensor(correct)) + torch.diag(torch.tensor(n - correct)).roll(1, dims=0)
    expected = metrics.summarise(counts, q=(0.5,))[statistic]
    assert interval.estimate == pytest.approx(expected)
    assert 0 <= interval.lower < interval.estimate < interval.upper <= 1
    assert interval == metrics.bootstrap_statistic(torch.tensor(correct), torch.tensor(n), statistic, seed=3)
    assert interval != metrics.bootstrap_statistic(correct, n, statistic, seed=4)
    assert interval == metrics.bootstrap_statistic(correct[n > 0], n[n > 0], statistic, seed=3)
    wider = metrics.bootstrap_statistic(correct, n, statistic, seed=3, level=0.99)
    assert wider.upper - wider.lower > interval.upper - interval.lower


def test_bootstrap_of_one_class_is_near_its_wilson_interval():
    interval = metrics.bootstrap_statistic(np.array([400]), np.array([1000]), "worst", draws=20000)
    lower, upper = metrics.wilson(400, 1000)
    assert (interval.lower, interval.upper) == pytest.approx((float(lower), float(upper)), abs=0.003)
    assert interval.corrected == pytest.approx(0.4, abs=0.001)


def test_binomial_draws_stand_for_images_drawn_within_classes():
    rng = np.random.default_rng(0)
    label = [0] * 30 + [1] * 12 + [2] * 20
    correct = [i % 3 != 0 for i in range(62)]
    n = np.array([30, 12, 20])
    hits = metrics.correct_per_class(torch.tensor(correct), torch.tensor(label), 3).numpy()
    by_image = np.array([reference.resample_images(correct, label, 3, rng) for _ in range(2000)])
    by_class = rng.binomial(n, hits / n, size=(2000, 3))
    error = 4 * np.sqrt(hits * (1 - hits / n) / 2000)
    assert (abs(by_image.mean(0) - by_class.mean(0)) < 2 * error).all()
    np.testing.assert_allclose(by_image.var(0), by_class.var(0), rtol=0.15)
    worst = [draws.min(1).mean() for draws in (by_image / n, by_class / n)]
    assert worst[0] == pytest.approx(worst[1], abs=0.01)


def test_bootstrap_worst_counts_and_delegates():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 3
    correct = torch.rand(300, generator=generator) < torch.tensor([0.9, 0.3, 0.6])[label]
    hits = metrics.correct_per_class(correct, label, 3)
    expected = metrics.bootstrap_statistic(hits, np.full(3, 100), "worst", draws=500, seed=1)
    assert metrics.bootstrap_worst(correct, label, 3, draws=500, seed=1) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": np.array([3, 1])}, "between 0 and n"),
        ({"statistic": "wrost"}, "worst_Qpct"),
        ({"statistic": "worst_200pct"}, "fraction in"),
        ({"draws": 10}, "at least 100"),
        ({"level": 95}, "strictly between"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_read(changes, message):
    arguments = {"correct": np.array([1, 1]), "n": np.array([2, 2]), "statistic": "worst", **changes}
    with pytest.raises(ConfigError, match=message):
        metrics.bootstrap_statistic(**arguments)


# True accuracies per class, images per class. "clear": one class well below the rest; "clusters": two groups of ties.
COVERAGE = {
    "10-ties": (np.full(10, 0.5), 1000),
    "10-clusters": (np.repeat([0.37, 0.65], 5), 1000),
    "10-faal": (np.array(FAAL["wrn-awp-awp"][0]) / 100, 1000),
    "10-clear": (np.r_[0.3, np.linspace(0.45, 0.8, 9)], 1000),
    "100-ties": (np.full(100, 0.25), 100),
    "100-clusters": (np.repeat([0.2, 0.6], 50), 100),
    "100-clear": (np.r_[0.1, np.linspace(0.3, 0.8, 99)], 100),
}
STATISTICS = {
    "class_mean": lambda acc: acc.mean(-1),
    "worst": lambda acc: acc.min(-1),
    "range": lambda acc: acc.max(-1) - acc.min(-1),
    "worst_10pct": lambda acc: np.sort(acc, -1)[..., : max(1, acc.shape[-1] // 10)].mean(-1),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_coverage_of_the_bootstrap(name):
    """Nominal 95 % intervals hold the truth in at least nine of ten test sets, for every statistic."""
    acc, n = COVERAGE[name]
    rng = np.random.default_rng(5)
    repeats = 100
    for statistic, value in STATISTICS.items():
        truth = value(acc)
        held, bias = 0, []
        for seed in range(repeats):
            interval = metrics.bootstrap_statistic(
                rng.binomial(n, acc), np.full(len(acc), n), statistic, draws=300, seed=seed
            )
            held += interval.lower <= truth <= interval.upper
            bias.append((interval.estimate - truth, interval.corrected - truth))
        assert held / repeats >= 0.9, (statistic, held)
        if name.endswith("ties") and statistic != "class_mean":
            plain, corrected = np.mean(bias, 0)
            assert 0.5 * abs(plain) < abs(corrected) < 0.75 * abs(plain)


def test_textbook_bootstraps_do_not_cover_the_worst_of_tied_classes():
    """Why the interval is built otherwise: each textbook one fails somewhere, percentile ones with any ties."""
    rng = np.random.default_rng(0)
    held = {}
    for name in ("10-ties", "10-clusters", "10-faal", "100-ties"):
        acc, n = COVERAGE[name]
        for _ in range(100):
            intervals = reference.textbook_intervals(rng.binomial(n, acc), n, STATISTICS["worst"], rng, draws=300)
            for kind, (lower, upper) in intervals.items():
                held[kind, name] = held.get((kind, name), 0) + (lower <= acc.min() <= upper)
    assert held["percentile", "10-ties"] <= 5
    assert held["bias-corrected", "10-ties"] <= 25
    assert held["basic", "10-faal"] < 90
    assert max(held[kind, "100-ties"] for kind in ("percentile", "basic", "bias-corrected")) <= 40


def test_a_class_of_few_images_bounds_the_worst_class_although_it_measures_perfect() -> None:
    scarce = metrics.bootstrap_statistic(torch.tensor([40, 40, 2]), torch.tensor([40, 40, 2]), "worst")
    ample = metrics.bootstrap_statistic(torch.tensor([40, 40, 40]), torch.tensor([40, 40, 40]), "worst")
    alone, _ = metrics.wilson(2, 2)
    assert scarce.lower <= float(alone)
    assert ample.lower > 0.8


# Paired tests


@common
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_paired_counts_match_a_loop_and_hold_both_models(triples):
    before, after, label = zip(*triples, strict=True)
    flags = [torch.tensor(hits) for hits in (before, after)]
    table = metrics.paired_table(*flags, torch.tensor(label), 4)
    assert table.tolist() == reference.paired_table(before, after, label, 4)
    assert torch.equal(table[:, 1].sum(1), metrics.correct_per_class(flags[0], torch.tensor(label), 4))
    assert torch.equal(table[:, :, 1].sum(1), metrics.correct_per_class(flags[1], torch.tensor(label), 4))


@common
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6))
def test_mcnemar_matches_sums_of_fractions_and_scipy(pairs):
    lost, won = (torch.tensor(counts) for counts in zip(*pairs, strict=True))
    p = metrics.mcnemar(lost, won)
    close(p, [reference.mcnemar(a, b) for a, b in pairs], tol=1e-15)
    close(p, [binomtest(a, a + b).pvalue if a + b else 1.0 for a, b in pairs], tol=1e-9)
    assert torch.equal(p, metrics.mcnemar(won, lost))


def test_mcnemar_by_hand_and_of_large_counts():
    assert float(metrics.mcnemar(0, 5)) == 2 / 2**5
    assert float(metrics.mcnemar(4, 4)) == 1
    assert float(metrics.mcnemar(4600, 5400)) == pytest.approx(binomtest(4600, 10000).pvalue, rel=1e-9)
    assert float(metrics.mcnemar(0, 5000)) == 0
    for bad in ((-1, 2), (1, -2), (0.5, 1)):
        with pytest.raises(ConfigError, match="whole numbers, 0 or more"):
            metrics.mcnemar(*bad)


@common
@given(st.lists(st.one_of(st.just(NAN), st.integers(0, 40).map(lambda k: k / 40)), max_size=8))
def test_holm_matches_a_loop(p):
    close(metrics.holm(np.array(p)), reference.holm(p), tol=0)


def test_holm_by_hand_in_any_order():
    p = np.array([0.04, 0.005, 0.6, 0.011, 0.03])
    assert metrics.holm(p).tolist() == pytest.approx([0.09, 0.025, 0.6, 0.044, 0.09])
    with pytest.raises(ConfigError, match="probabilities"):
        metrics.holm(np.array([0.5, 1.2]))


def test_holm_keeps_the_chance_of_any_false_alarm():
    rng = np.random.default_rng(0)
    alarms = [bool((metrics.holm(rng.random(10)) <= 0.05).any()) for _ in range(2000)]
    assert 0.035 < np.mean(alarms) < 0.065


@common
@given(*[st.integers(0, 50)] * 4, st.sampled_from([0.8, 0.95, 0.99]))
def test_paired_interval_is_the_wald_interval_with_half_an_image_a_cell(both, lost, won, neither, level):
    n = both + lost + won + neither
    ends = [float(end) for end in metrics.paired_interval(lost, won, n, level)]
    if n:
        close(ends, reference.paired_interval(both, lost, won, neither, level), tol=1e-9)
        assert ends[0] <= (won - lost) / n <= ends[1]
    else:
        assert all(map(math.isnan, ends))
    if lost + won:
        with pytest.raises(ConfigError):
            metrics.paired_interval(lost, won, lost + won - 1)


PAIRS = torch.tensor([[[30, 15], [5, 50]], [[4, 2], [8, 6]], [[0, 0], [0, 0]], [[50, 20], [10, 20]]])


@pytest.mark.parametrize("statistic", ["average", "class_mean", "worst", "best", "range", "worst_50pct"])
def test_the_paired_bootstrap_is_seeded_contains_its_estimate_and_ignores_absent_classes(statistic):
    interval = metrics.bootstrap_difference(PAIRS, statistic, seed=3)
    n = PAIRS.sum((1, 2))
    single = [metrics.bootstrap_statistic(hits, n, statistic) for hits in (PAIRS[:, 1].sum(1), PAIRS[:, :, 1].sum(1))]
    assert interval.estimate == pytest.approx(single[1].estimate - single[0].estimate)
    assert -1 <= interval.lower < interval.estimate < interval.upper <= 1
    assert interval == metrics.bootstrap_difference(PAIRS.numpy(), statistic, seed=3)
    assert interval != metrics.bootstrap_difference(PAIRS, statistic, seed=4)
    assert interval == metrics.bootstrap_difference(PAIRS[n > 0], statistic, seed=3)
    wider = metrics.bootstrap_difference(PAIRS, statistic, seed=3, level=0.99)
    assert wider.upper - wider.lower > interval.upper - interval.lower


def test_the_paired_bootstrap_of_one_class_is_near_its_paired_interval():
    interval = metrics.bootstrap_difference(torch.tensor([[[300, 90], [60, 550]]]), "worst", draws=20000)
    lower, upper = metrics.paired_interval(60, 90, 1000)
    assert (interval.lower, interval.upper) == pytest.approx((float(lower), float(upper)), abs=0.003)
    assert interval.corrected == pytest.approx(0.03, abs=0.001)


def test_the_better_paired_two_models_are_the_narrower_the_interval():
    tables = [torch.tensor([[[60, k], [k, 140 - 2 * k]]] * 5) for k in (1, 20, 40)]
    widths = [found.upper - found.lower for found in (metrics.bootstrap_difference(table, "worst") for table in tables)]
    assert widths[0] < 0.5 * widths[1] < 0.5 * widths[2]


def test_draws_from_the_table_stand_for_pairs_of_images_drawn_within_classes():
    rng = np.random.default_rng(0)
    label = [0] * 30 + [1] * 12
    before, after = [i % 3 != 0 for i in range(42)], [i % 3 == 1 or i % 4 == 0 for i in range(42)]
    by_image = np.array([reference.resample_pairs(before, after, label, 2, rng) for _ in range(2000)])
    table = metrics.paired_table(torch.tensor(before), torch.tensor(after), torch.tensor(label), 2).numpy()
    n = np.array([30, 12])
    resample = metrics._pair_resampler(rng, n, 2000)
    by_table = np.swapaxes(resample(table / n[:, None, None]), 1, 2) * n[:, None]
    for c in (0, 1):
        one, two = (np.cov(hits[:, c].T) for hits in (by_image, by_table))
        error = np.sqrt((np.outer(one.diagonal(), one.diagonal()) + one**2) / 2000)
        assert (abs(one - two) < 4 * math.sqrt(2) * error).all()
        assert (abs((by_image - by_table)[:, c].mean(0)) < 4 * np.sqrt(2 * one.diagonal() / 2000)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": PAIRS - 1}, "see paired_table"),
        ({"statistic": "wrost"}, "worst_Qpct"),
        ({"draws": 10}, "at least 100"),
        ({"level": 95}, "strictly between"),
    ],
)
def test_the_paired_bootstrap_refuses_what_it_cannot_read(changes, message):
    with pytest.raises(ConfigError, match=message):
        metrics.bootstrap_difference(**{"table": PAIRS, "statistic": "worst", **changes})


def test_a_class_of_few_images_leaves_the_worst_class_open_in_both_models():
    scarce = torch.tensor([[[0, 0], [0, 40]], [[0, 0], [0, 2]]])
    ample = torch.tensor([[[0, 0], [0, 40]], [[0, 0], [0, 40]]])
    open_, shut = (metrics.bootstrap_difference(table, "worst") for table in (scarce, ample))
    assert open_.lower < -0.3
    assert open_.upper > 0.3
    assert -0.2 < shut.lower < shut.upper < 0.2


# True accuracies before and after, and how far the models agree: 0 by chance alone, 1 as far as they can.
RISING = np.linspace(0.45, 0.8, 9)
PAIRED_COVERAGE = {
    "alike, tied": (np.full(10, 0.5), np.full(10, 0.5), 0.6),
    "alike, close": (np.array(FAAL["wrn-awp-awp"][0]) / 100, np.array(FAAL["wrn-awp-awp"][0]) / 100, 0.9),
    "tied, then clear": (np.full(10, 0.5), np.r_[0.3, RISING], 0.6),
    "clear, then tied": (np.r_[0.3, RISING], np.full(10, 0.5), 0.0),
    "another worst": (np.r_[0.3, RISING], np.r_[RISING, 0.35], 0.9),
    "100, tied, then clear": (np.full(100, 0.25), np.r_[0.1, np.linspace(0.3, 0.8, 99)], 0.6),
}


@pytest.mark.parametrize("name", PAIRED_COVERAGE)
def test_coverage_of_the_paired_bootstrap(name):
    """Nominal 95 % intervals hold the true difference in at least nine of ten test sets."""
    before, after, agreement = PAIRED_COVERAGE[name]
    both = before * after + agreement * (np.minimum(before, after) - before * after)
    cells = np.stack([1 - before - after + both, after - both, before - both, both], -1)
    rng = np.random.default_rng(7)
    repeats = 100 if len(before) == 10 else 20
    for statistic in ("worst", "range"):
        truth = STATISTICS[statistic](after) - STATISTICS[statistic](before)
        held = 0
        for seed in range(repeats):
            table = rng.multinomial(1000 if len(before) == 10 else 100, cells).reshape(-1, 2, 2)
            interval = metrics.bootstrap_difference(table, statistic, draws=300, seed=seed)
            held += interval.lower <= truth <= interval.upper
        assert held / repeats >= 0.9, (statistic, held)
