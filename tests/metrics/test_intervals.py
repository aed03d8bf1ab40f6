from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import metrics as reference
from robustfair import metrics
from robustfair.errors import ConfigError

NAN = float("nan")
# Per cent, per class: FAAL's official run "wrn-awp-awp" on CIFAR-10 under AutoAttack.
FAAL = np.array([58.9, 72.7, 41.3, 37.0, 40.7, 43.0, 52.4, 58.3, 67.1, 67.9])

common = settings(max_examples=50, deadline=None)


def close(actual, expected, tol=1e-12):
    return np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), rtol=tol, atol=tol)


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
    "10-faal": (FAAL / 100, 1000),
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


def test_the_stratified_interval_is_wilsons_for_one_class_and_for_classes_alike():
    lower, upper = metrics.wilson(37, 80)
    close(metrics.stratified_wilson(np.array([37, 0]), np.array([80, 0]), np.array([5, 0])), (lower, upper))
    lower, upper = metrics.wilson(0, 40)
    close(metrics.stratified_wilson(np.array([0, 0]), np.array([20, 20]), np.array([3, 3])), (lower, upper))
    absent = metrics.stratified_wilson(np.array([5, 0]), np.array([9, 0]), np.array([5, 5]))
    assert np.isnan(absent).all()
    for bad in ([3, 1], [3]):
        with pytest.raises(ConfigError):
            metrics.stratified_wilson(np.array(bad), np.array([2, 2]), np.array([1, 1]))


@pytest.mark.parametrize("acc", [(0.9, 0.2, 0.5, 0.6), (0.02, 0.5, 0.01, 0.99), (0.5, 0.5, 0.5, 0.5)])
@pytest.mark.parametrize("n", [(50, 50, 50, 50), (400, 60, 50, 30)])
def test_coverage_of_the_stratified_intervals(acc, n):
    """Of an average, and of its change between two models: the truth is inside in 93 of 100 samples at least."""
    rng, sizes = np.random.default_rng(1), np.array([5000, 300, 700, 2000])
    weight, n, acc = sizes / sizes.sum(), np.array(n), np.array(acc)
    truth, held, changed, repeats = float(weight @ acc), 0, 0, 400
    better = acc * 0.8 + 0.1
    lost, won = acc * 0.2, better - acc * 0.8
    for _ in range(repeats):
        lower, upper = metrics.stratified_wilson(rng.binomial(n, acc), n, sizes)
        held += lower <= truth <= upper
        cells = np.array([rng.multinomial(m, (a, b, 1 - a - b)) for m, a, b in zip(n, lost, won, strict=True)])
        lower, upper = metrics.stratified_paired_interval(cells[:, 0], cells[:, 1], n, sizes)
        changed += lower <= float(weight @ (better - acc)) <= upper
    assert held / repeats >= 0.93
    assert changed / repeats >= 0.93


def test_the_stratified_interval_of_a_change_is_the_paired_one_for_one_class():
    lower, upper = metrics.paired_interval(4, 9, 60)
    close(
        metrics.stratified_paired_interval(np.array([4]), np.array([9]), np.array([60]), np.array([7])), (lower, upper)
    )
