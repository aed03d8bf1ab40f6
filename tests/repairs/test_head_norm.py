from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.head_norm import normalised, predicted, row_norm
from robustfair.errors import ConfigError, ModelError
from robustfair.models import create_model, find_head, head_norms
from robustfair.repairs import HWNwB
from robustfair.repairs.head_norm import normalise_rows

TARGETS = ["unit", "mean", "keep-frobenius"]
ROUNDING = 1.2e-7  # one step of float32


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = create_model("preact-resnet18", width=4)
    with torch.no_grad():
        model.head.weight.mul_(torch.linspace(0.5, 3.0, 10)[:, None])
        model.head.bias.normal_()
    return model


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 8), width=st.integers(1, 9), target=st.sampled_from(TARGETS))
def test_rows_match_the_reference(seed, classes, width, target):
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor(normalised(weight.double().tolist(), target), dtype=torch.float32)
    torch.testing.assert_close(normalise_rows(weight, target), expected, rtol=ROUNDING, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), scales=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5))
def test_unit_rows_ignore_positive_scales_of_the_rows(seed, scales):
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    scaled = weight * torch.tensor(scales)[:, None]
    torch.testing.assert_close(normalise_rows(scaled), normalise_rows(weight), rtol=4 * ROUNDING, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_norms_are_equal_and_have_the_target(model, target):
    before = [row_norm(row) for row in model.head.weight.double().tolist()]
    expected = {"unit": 1.0, "mean": sum(before) / 10, "keep-frobenius": math.sqrt(sum(n * n for n in before) / 10)}
    norms = head_norms(HWNwB(target_norm=target)(model))
    assert norms.tolist() == pytest.approx([expected[target]] * 10, rel=1e-6)
    assert (norms.max() / norms.min()).item() == pytest.approx(1, rel=1e-6)


def test_keep_frobenius_keeps_the_norm_of_the_whole_weight(model):
    repaired = HWNwB(target_norm="keep-frobenius")(model)
    torch.testing.assert_close(repaired.head.weight.norm(), model.head.weight.norm())


@pytest.mark.parametrize("target", TARGETS)
def test_directions_stay(model, target):
    cosine = torch.cosine_similarity(HWNwB(target_norm=target)(model).head.weight, model.head.weight)
    torch.testing.assert_close(cosine, torch.ones(10))


@pytest.mark.parametrize("target", TARGETS)
def test_repairing_twice_is_repairing_once(model, target):
    once = HWNwB(target_norm=target)(model)
    twice = HWNwB(target_norm=target)(once)
    torch.testing.assert_close(twice.head.weight, once.head.weight, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("keep_bias", [True, False])
def test_all_but_the_head_is_bit_identical_and_the_input_is_untouched(model, keep_bias):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repaired = HWNwB(keep_bias=keep_bias)(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    edited = {"head.weight"} if keep_bias else {"head.weight", "head.bias"}
    after = repaired.state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == edited
    assert repaired.training
    assert repaired.head.weight.requires_grad
    assert repaired.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_without_the_bias_it_is_set_to_zero(model):
    assert HWNwB(keep_bias=False)(model).head.bias.eq(0).all()


def test_predictions_match_the_reference(model):
    features = torch.randn(40, 32)
    head = HWNwB()(model).head
    weight, bias = normalised(model.head.weight.double().tolist(), "unit"), model.head.bias.double().tolist()
    expected = [predicted(weight, bias, feature) for feature in features.double().tolist()]
    assert head(features).argmax(1).tolist() == expected


def test_without_a_bias_it_is_tau_normalisation_with_tau_one():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    x = torch.randn(20, 6)
    expected = x @ (model[0].weight / model[0].weight.norm(dim=1, keepdim=True) ** 1.0).T
    torch.testing.assert_close(HWNwB()(model)(x), expected)


def test_only_the_last_map_of_an_mlp_head_changes():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    repaired = HWNwB()(model)
    assert torch.equal(repaired[0].weight, model[0].weight)
    torch.testing.assert_close(repaired[2].weight.norm(dim=1), torch.ones(4))


def test_one_by_one_convolution_heads():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    repaired = HWNwB()(model)
    assert repaired[2].weight.shape == (5, 8, 1, 1)
    torch.testing.assert_close(head_norms(repaired), torch.ones(5))
    assert torch.equal(repaired[2].bias, model[2].bias)


def test_wrapped_models_come_back_wrapped(model):
    repaired = HWNwB()(nn.DataParallel(model))
    assert isinstance(repaired, nn.DataParallel)
    torch.testing.assert_close(find_head(repaired).weight.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rows_without_a_direction_are_refused(model, value):
    with torch.no_grad():
        model.head.weight[[2, 7]] = value
    with pytest.raises(ModelError, match=r"head rows of classes \[2, 7\] are zero or not finite"):
        HWNwB()(model)


def test_tiny_rows_do_not_underflow():
    weight = torch.tensor([[3e-30, 4e-30], [3e30, 4e30]])
    torch.testing.assert_close(normalise_rows(weight), torch.tensor([[0.6, 0.8], [0.6, 0.8]]))


def test_half_precision_stays_half_precision(model):
    repaired = HWNwB()(model.to(torch.bfloat16))
    assert repaired.head.weight.dtype == torch.bfloat16


def test_unknown_target_norm():
    with pytest.raises(ConfigError, match="hwnwb: target_norm must be 'unit' or 'mean' or 'keep-frobenius', got 'two'"):
        HWNwB(target_norm="two")


def test_description_says_what_changes():
    assert HWNwB().describe() == "HWNwB: head rows scaled to norm 1, bias kept"
    assert HWNwB(keep_bias=False).describe().endswith("bias set to 0")
