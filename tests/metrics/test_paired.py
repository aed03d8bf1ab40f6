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
from robustfair.metrics import paired

NAN = float("nan")
# Per cent, per class: FAAL's official run "wrn-awp-awp" on CIFAR-10 under AutoAttack.
FAAL = np.array([58.9, 72.7, 41.3, 37.0, 40.7, 43.0, 52.4, 58.3, 67.1, 67.9])

common = settings(max_examples=50, deadline=None)


def close(actual, expected, tol=1e-12):
    return np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), rtol=tol, atol=tol)


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
    assert [interval] * 2 == metrics.bootstrap_differences(PAIRS, ["worst_20pct", statistic, statistic], seed=3)[1:]
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
    resample = paired._pair_resampler(rng, n, 2000)
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
    "alike, close": (FAAL / 100, FAAL / 100, 0.9),
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
    for statistic, number in (("worst", np.min), ("range", np.ptp)):
        truth = number(after) - number(before)
        held = 0
        for seed in range(repeats):
            table = rng.multinomial(1000 if len(before) == 10 else 100, cells).reshape(-1, 2, 2)
            interval = metrics.bootstrap_difference(table, statistic, draws=300, seed=seed)
            held += interval.lower <= truth <= interval.upper
        assert held / repeats >= 0.9, (statistic, held)
