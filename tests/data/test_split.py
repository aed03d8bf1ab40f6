from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.data.split import split_hash, stratified_split
from robustfair.errors import ConfigError

LABELS = st.lists(st.integers(0, 5), max_size=80).map(lambda values: torch.tensor(values, dtype=torch.int64))
FRACTIONS = st.floats(0.01, 0.99)


@given(labels=LABELS, fraction=FRACTIONS, seed=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_parts_are_sorted_disjoint_and_complete(labels: torch.Tensor, fraction: float, seed: int) -> None:
    train, held = stratified_split(labels, fraction, seed=seed)
    assert train.tolist() == sorted(train.tolist())
    assert held.tolist() == sorted(held.tolist())
    assert sorted(train.tolist() + held.tolist()) == list(range(len(labels)))


@given(labels=LABELS, fraction=FRACTIONS)
@settings(max_examples=50, deadline=None)
def test_every_class_gives_its_share_but_never_all(labels: torch.Tensor, fraction: float) -> None:
    _, held = stratified_split(labels, fraction)
    for label in set(labels.tolist()):
        n = labels.tolist().count(label)
        expected = 0 if n == 1 else min(n - 1, max(1, round(fraction * n)))
        assert labels[held].tolist().count(label) == expected


@given(labels=LABELS, fraction=FRACTIONS, extra=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_images_of_one_class_never_move_the_draw_of_another(labels: torch.Tensor, fraction: float, extra: int) -> None:
    _, held = stratified_split(labels, fraction)
    longer = torch.cat([labels, torch.full((extra,), 5)])
    _, held_longer = stratified_split(longer, fraction)
    assert held[labels[held] != 5].tolist() == held_longer[longer[held_longer] != 5].tolist()


def test_depends_on_labels_fraction_and_seed_alone() -> None:
    labels = torch.arange(200) % 4
    torch.manual_seed(1)
    np.random.seed(1)
    first = stratified_split(labels, 0.3, seed=7)
    torch.manual_seed(2)
    np.random.seed(2)
    again = stratified_split(labels, 0.3, seed=7)
    other = stratified_split(labels, 0.3, seed=8)
    assert split_hash(first[1]) == split_hash(again[1]) != split_hash(other[1])


def test_classes_of_equal_size_draw_differently() -> None:
    labels = torch.arange(100) // 50
    _, held = stratified_split(labels, 0.2)
    assert held[labels[held] == 0].tolist() != (held[labels[held] == 1] - 50).tolist()


def test_hash_reads_order_and_values_but_not_the_type() -> None:
    index = torch.tensor([3, 1, 2])
    assert split_hash(index) == split_hash(index.to(torch.int16))
    assert split_hash(index) != split_hash(index.sort().values)
    assert len(split_hash(index)) == 64


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_fraction_outside_zero_to_one(fraction: float) -> None:
    with pytest.raises(ConfigError, match="stratified_split: fraction must be above 0 and below 1"):
        stratified_split(torch.tensor([0, 1]), fraction)
