from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import metrics as reference
from robustfair import metrics
from robustfair.errors import ConfigError

common = settings(max_examples=50, deadline=None)


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
    assert torch.equal(metrics.correct_per_class(pred == label, label, size), counts.diagonal())


@common
@given(st.data())
def test_sums_per_class_match_a_loop_in_float64(data):
    size = data.draw(st.integers(1, 6))
    number = st.floats(-1e6, 1e6, width=32)
    rows = data.draw(st.lists(st.tuples(st.integers(0, size - 1), number, number), min_size=1, max_size=40))
    label = torch.tensor([row[0] for row in rows])
    values = torch.tensor([row[1:] for row in rows], dtype=torch.float32)
    expected = [[sum(row[k] for row in rows if row[0] == c) for k in (1, 2)] for c in range(size)]
    sums, counts = metrics.sums_per_class(values, label, size)
    assert sums.dtype == counts.dtype == torch.float64
    assert counts.tolist() == torch.bincount(label, minlength=size).tolist()
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-8)
    single, _ = metrics.sums_per_class(values[:, 1], label, size)
    torch.testing.assert_close(single, sums[:, 1], rtol=1e-12, atol=1e-8)


def test_the_gradient_of_sums_per_class_reaches_each_value_by_its_class():
    values = torch.ones(4, requires_grad=True)
    label = torch.tensor([2, 0, 2, 1])
    sums, _ = metrics.sums_per_class(values, label, 3)
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [100.0, 1.0, 100.0, 10.0]


def test_counting_needs_no_value_on_the_host():
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    assert [part.shape for part in metrics.sums_per_class(index, index, 3)] == [(3,), (3,)]
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
