"""The difference of two hit rates, against its formula and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robustfair.evaluate.diagnostics.base import paired_difference


def test_paired_difference_against_its_formula_and_its_coverage() -> None:
    a, b = (
        torch.tensor([True] * 30 + [False] * 70),
        torch.tensor([True] * 10 + [False] * 10 + [True] * 5 + [False] * 75),
    )
    only_a, only_b = 15, 0
    centre = (only_a - only_b) / 102
    deviation = math.sqrt(((only_a + 0.5) + (only_b + 0.5)) / 102 - centre**2)
    value, lower, upper = paired_difference(a, b)
    assert value == pytest.approx(0.15)
    assert (lower, upper) == pytest.approx(
        (centre - 1.96 * deviation / math.sqrt(102), centre + 1.96 * deviation / math.sqrt(102)), abs=1e-4
    )

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cell = torch.from_numpy(rng.choice(4, size=120, p=[0.5, 0.12, 0.04, 0.34]))
        _, lower, upper = paired_difference(cell <= 1, (cell == 0) | (cell == 2))
        covered += lower <= 0.08 <= upper
    assert 0.92 < covered / 400 < 0.98
