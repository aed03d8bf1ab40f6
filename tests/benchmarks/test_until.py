"""The simulation of sequential audits: what it reports, and that it is repeated by its seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import until
from benchmarks.until import CASES, audit_of, simulate, truth_of


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("worst.robust=+-2", 0.1),
        ("range.robust=+-2", 0.8),
        ("class.1.robust=+-2", 0.5),
        ("average.robust=+-2", (0.9 * 100 + 0.5 * 300 + 0.1 * 100) / 500),
    ],
)
def test_the_truth_is_that_of_the_given_accuracies(asked: str, expected: float) -> None:
    assert truth_of((0.9, 0.5, 0.1), (100, 300, 100), asked) == pytest.approx(expected)


def test_an_audit_of_counts_has_these_counts() -> None:
    found = audit_of(*map(torch.tensor, ([3, 0], [5, 2])), (50, 20))
    assert (found.correct("attack").tolist(), found.count().tolist()) == ([3, 0], [5, 2])


def test_simulated_audits_repeat_and_the_whole_one_takes_all_images() -> None:
    _, rates, sizes, asked = CASES[0]
    one, two = (simulate(rates, sizes, asked, np.random.default_rng(7)) for _ in range(2))
    assert [(each.images.tolist(), each.lower) for each in one] == [(each.images.tolist(), each.lower) for each in two]
    assert one[0].images.sum() < one[1].images.sum() == sum(sizes)


def test_the_report_has_a_row_a_case() -> None:
    report = until.main(["--audits", "1"])
    rows = report.tables[0].rows
    assert [row["asked"] for row in rows] == [asked for *_, asked in CASES]
    assert all(0 < row["share"] <= 1 and row["held"] in (0, 1) for row in rows)
    assert "| holds the truth |" in report.text()
