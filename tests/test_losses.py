from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import losses as reference
from robustfair.losses import (
    MaximiseCE,
    MaximiseKL,
    MaximiseMargin,
    Targeted,
    at_least_float32,
    cross_entropy,
    kl_divergence,
    margin,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def logits(dtype: torch.dtype, *, rows: int = 7, classes: int = 5, seed: int = 0, scale: float = 2.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_(True)


def labels(rows: int = 7, classes: int = 5) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, slow: list, dtype: torch.dtype) -> None:
    expected = torch.tensor(slow, dtype=torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.detach().double(), expected, rtol=tolerance, atol=tolerance)


@DTYPES
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    z, y = logits(dtype), labels()
    value = cross_entropy(z, y)
    assert value.dtype == dtype
    (gradient,) = torch.autograd.grad(value.sum(), z)
    rows = list(zip(z.tolist(), y.tolist(), strict=True))
    close(value, [reference.cross_entropy(*row) for row in rows], dtype)
    close(gradient, [reference.cross_entropy_gradient(*row) for row in rows], dtype)


@DTYPES
def test_kl_is_clean_first_and_live_on_both_sides(dtype: torch.dtype) -> None:
    clean, adv = logits(dtype, seed=2), logits(dtype, seed=3)
    value = kl_divergence(clean, adv)
    at_clean, at_adv = torch.autograd.grad(value.sum(), (clean, adv))
    pairs = list(zip(clean.tolist(), adv.tolist(), strict=True))
    close(value, [reference.kl(*pair) for pair in pairs], dtype)
    close(at_clean, [reference.kl_gradient_clean(*pair) for pair in pairs], dtype)
    close(at_adv, [reference.kl_gradient_adv(*pair) for pair in pairs], dtype)


def test_kl_by_torch_with_log_q_as_input_and_p_as_target() -> None:
    clean, adv = logits(torch.float64, seed=2), logits(torch.float64, seed=3)
    theirs = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="batchmean")
    torch.testing.assert_close(kl_divergence(clean, adv).mean(), theirs, rtol=1e-12, atol=0)


def test_torchs_mean_reduction_and_swapped_arguments_are_other_numbers() -> None:
    clean, adv = logits(torch.float64, seed=2), logits(torch.float64, seed=3)
    ours = kl_divergence(clean, adv).mean()
    per_entry = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="none").mean()
    torch.testing.assert_close(ours / 5, per_entry, rtol=1e-12, atol=0)
    assert abs(kl_divergence(adv, clean).mean() - ours) > 1e-2


@DTYPES
def test_margin_and_its_gradient(dtype: torch.dtype) -> None:
    z, y = logits(dtype), labels()
    value = margin(z, y)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    rows = list(zip(z.tolist(), y.tolist(), strict=True))
    close(value, [reference.margin(*row) for row in rows], dtype)
    close(gradient, [reference.margin_gradient(*row) for row in rows], dtype)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000), st.floats(-50, 50))
@settings(max_examples=50, deadline=None)
def test_margin_is_positive_exactly_where_wrong_and_ignores_a_shift(k: int, b: int, seed: int, shift: float) -> None:
    z, y = logits(torch.float64, rows=b, classes=k, seed=seed), labels(b, k)
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)
    torch.testing.assert_close(margin(z + shift, y), margin(z, y), rtol=0, atol=1e-9)


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0.01, 500))
@settings(max_examples=50, deadline=None)
def test_kl_is_never_negative_and_finite_for_large_logits(k: int, seed: int, scale: float) -> None:
    clean = logits(torch.float32, classes=k, seed=seed, scale=scale)
    adv = logits(torch.float32, classes=k, seed=seed + 1, scale=scale)
    value = kl_divergence(clean, adv)
    gradients = torch.autograd.grad(value.sum(), (clean, adv))
    assert bool((value >= -1e-6).all())
    assert all(bool(torch.isfinite(t).all()) for t in (value, *gradients))
    assert torch.equal(kl_divergence(clean, clean), torch.zeros(len(clean)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [cross_entropy, margin, lambda z, y: kl_divergence(z, z.flip(0))])
def test_half_precision_is_raised_to_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    z, y = logits(torch.float32).detach().to(dtype), labels()
    assert loss(z, y).dtype == torch.float32
    assert torch.equal(loss(z, y), loss(z.float(), y))


def test_single_and_double_precision_pass_as_they_are() -> None:
    for dtype in TOLERANCE:
        z = logits(dtype)
        assert at_least_float32(z) is z


def test_goals_are_what_an_attack_ascends() -> None:
    z, clean, y = logits(torch.float64, seed=4), logits(torch.float64, seed=5), labels()
    target = (y + 1) % 5
    assert torch.equal(MaximiseCE()(z, None, y), cross_entropy(z, y))
    assert torch.equal(MaximiseKL()(z, clean, y), kl_divergence(clean, z))
    assert torch.equal(MaximiseMargin()(z, None, y), margin(z, y))
    assert torch.equal(Targeted(target)(z, None, y), -cross_entropy(z, target))
    assert [goal.needs_clean for goal in (MaximiseCE(), MaximiseKL(), MaximiseMargin(), Targeted(target))] == [
        False,
        True,
        False,
        False,
    ]


def test_losses_leave_their_inputs_alone() -> None:
    z, y = logits(torch.float32).detach(), labels()
    kept = z.clone(), y.clone()
    cross_entropy(z, y), margin(z, y), kl_divergence(z, z.flip(0))
    assert torch.equal(z, kept[0])
    assert torch.equal(y, kept[1])


def test_the_trades_test_vector_has_both_gradients() -> None:
    clean, adv, y = logits(torch.float64, seed=6), logits(torch.float64, seed=7), labels()
    value, at_clean, at_adv = reference.trades(clean.tolist(), adv.tolist(), y.tolist(), 6.0)
    total = (cross_entropy(clean, y) + 6.0 * kl_divergence(clean, adv)).mean()
    ours = torch.autograd.grad(total, (clean, adv))
    assert total.item() == pytest.approx(value, abs=1e-10)
    close(ours[0], at_clean, torch.float64)
    close(ours[1], at_adv, torch.float64)
    held = (cross_entropy(clean, y) + 6.0 * kl_divergence(clean.detach(), adv)).mean()
    (held_at_clean,) = torch.autograd.grad(held, clean)
    assert held.item() == total.item()
    assert float((held_at_clean - ours[0]).abs().max()) > 1e-2
