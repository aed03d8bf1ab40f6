"""What all results say of their classes, from hits and from shares of hits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustfair import metrics
from robustfair.evaluate.rates import ClassRates


class Given(ClassRates):
    """Of two cells: hits, and their mean with a cell where everything is wrong."""

    class_names = ("a", "b", "none")
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    kind = "groups"

    def hits(self, cell: str) -> Tensor:
        """(N,) bool for "hits", float64 for "shares"."""
        right = torch.tensor([True, False, True, False, False, False])
        return right if cell == "hits" else right.double() / 2


def test_counts_are_whole_for_hits_and_not_for_shares() -> None:
    rates = Given()
    assert (rates.num_classes, rates.count().tolist()) == (3, [2, 4, 0])
    assert rates.correct("hits").tolist() == [1, 1, 0]
    assert rates.correct("hits").dtype == torch.int64
    assert rates.correct("shares").tolist() == [0.5, 0.5, 0]
    assert rates.rate("hits")[:2].tolist() == [0.5, 0.25]
    assert rates.rate("hits").isnan().tolist() == [False, False, True]
    assert (rates.average("hits"), rates.average("shares")) == (2 / 6, 1 / 6)


@pytest.mark.parametrize(("cell", "right"), [("hits", 1.0), ("shares", 0.5)])
def test_error_bars_are_those_of_the_counts(cell: str, right: float) -> None:
    rates, n = Given(), torch.tensor([2, 4, 0])
    correct = torch.tensor([right, right, 0], dtype=torch.float64)
    for found, expected in zip(rates.interval(cell, level=0.9), metrics.wilson(correct, n, 0.9), strict=True):
        assert torch.equal(found.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert rates.average_interval(cell) == tuple(float(end) for end in metrics.wilson(correct.sum(), 6))
    bootstrap = metrics.bootstrap_statistic(correct, n, "worst", level=0.9)
    assert rates.worst_interval(cell, level=0.9) == (bootstrap.lower, bootstrap.upper)


def test_the_worst_class_bears_the_name_of_its_kind() -> None:
    assert Given().worst("hits").words == "b"
    even = Given()
    even.labels = torch.tensor([0, 0, 1, 1, 2, 2])
    even.class_names = ("a", "b", "c")
    even.hits = lambda cell: torch.zeros(6, dtype=torch.bool)  # type: ignore[method-assign]
    assert even.worst("hits").words == "all groups"
