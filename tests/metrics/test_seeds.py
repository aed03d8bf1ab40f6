"""Several runs on the same images: by hand, against loops, and how often the intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from robustfair.errors import ConfigError
from robustfair.metrics import difference_over_seeds, over_seeds


def drawn(rates: np.ndarray, images: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Hits (S, N) and labels of runs with class rates (S, C), every image as hard for all of them."""
    label = np.repeat(np.arange(rates.shape[1]), images)
    hard = rng.random(len(label))
    return torch.from_numpy(hard < rates[:, label]), torch.from_numpy(label)


def test_by_hand() -> None:
    label = torch.tensor([0, 0, 1, 1])
    hits = torch.tensor([[True, True, False, True], [True, False, True, True]])
    found = over_seeds(hits, label, 2, "average")
    assert found.each == (0.75, 0.75)
    assert found.value == 0.75
    worst = over_seeds(hits, label, 2, "worst")
    assert worst.each == (0.5, 0.5)
    change = difference_over_seeds(hits, torch.ones_like(hits), label, 2, "range")
    assert change.each == (-0.5, -0.5)


def test_the_interval_is_students_with_satterthwaites_freedom() -> None:
    """Against loops that draw images one by one."""
    rng = np.random.default_rng(0)
    hits, label = drawn(np.array([[0.8, 0.4, 0.6], [0.7, 0.5, 0.5], [0.75, 0.3, 0.6]]), 60, rng)
    found = over_seeds(hits, label, 3, "worst", draws=4000)
    rows, each = hits.tolist(), []
    places = [[i for i, c in enumerate(label.tolist()) if c == k] for k in range(3)]

    def worst(row: list[bool], chosen: list[list[int]]) -> float:
        return min(sum(row[i] for i in own) / len(own) for own in chosen)

    each = [worst(row, places) for row in rows]
    means = []
    for _ in range(4000):
        chosen = [[own[k] for k in rng.integers(len(own), size=len(own))] for own in places]
        means.append(sum(worst(row, chosen) for row in rows) / 3)
    a, v = float(np.var(each, ddof=1)) / 3, float(np.var(means, ddof=1))
    half = stats.t.ppf(0.975, 2 * ((a + v) / a) ** 2) * math.sqrt(a + v)
    assert found.each == pytest.approx(each)
    assert found.upper - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.lower == pytest.approx(found.upper - found.value)


def test_the_same_runs_do_not_differ() -> None:
    hits, label = drawn(np.array([[0.8, 0.4], [0.7, 0.5]]), 50, np.random.default_rng(1))
    for statistic in ("average", "worst", "range", "std"):
        found = difference_over_seeds(hits, hits, label, 2, statistic)
        assert (found.value, found.lower, found.upper, found.p) == (0, 0, 0, 1)


def test_runs_that_agree_leave_the_images_alone() -> None:
    """Without spread between seeds the interval is the normal one of the images."""
    hits, label = drawn(np.array([[0.5]]), 400, np.random.default_rng(2))
    found = over_seeds(hits.expand(3, -1), label, 1, "average", draws=4000)
    share = float(hits.double().mean())
    assert found.upper - found.value == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 400), rel=0.05)


def test_one_run_says_nothing_about_seeds() -> None:
    hits, label = drawn(np.array([[0.5, 0.6]]), 40, np.random.default_rng(3))
    found = over_seeds(hits, label, 2, "worst")
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert math.isnan(found.p)


def test_a_class_without_images_is_left_out() -> None:
    hits, label = drawn(np.array([[0.8, 0.4], [0.7, 0.5]]), 30, np.random.default_rng(4))
    assert over_seeds(hits, label, 2, "worst") == over_seeds(hits, 2 * label, 4, "worst")


@pytest.mark.parametrize("statistic", ["average", "worst"])
def test_the_interval_of_a_change_holds_none_as_often_as_it_says(statistic: str) -> None:
    """Two methods alike, three seeds each: zero is inside in 95 of 100 cases or more."""
    rng, inside, cases = np.random.default_rng(5), 0, 200
    for _ in range(cases):
        rates = np.clip(np.array([0.6, 0.3, 0.5]) + 0.04 * rng.standard_normal((6, 3)), 0, 1)
        hits, label = drawn(rates, 100, rng)
        found = difference_over_seeds(hits[:3], hits[3:], label, 3, statistic, draws=200)
        inside += found.lower <= 0 <= found.upper
    assert inside / cases > 0.92


def test_bad_input() -> None:
    hits, label = torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ConfigError, match="one of average, worst, range, std"):
        over_seeds(hits, label, 2, "median")
    with pytest.raises(ConfigError, match=r"bool \(S, N\)"):
        over_seeds(hits.double(), label, 2, "worst")
    with pytest.raises(ConfigError, match="as many runs and images"):
        difference_over_seeds(hits, hits[:1], label, 2, "worst")
    with pytest.raises(ConfigError, match="label"):
        over_seeds(hits, label, 1, "worst")
