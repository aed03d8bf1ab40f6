from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import distillation
from reference import losses as reference
from robustfair.losses import (
    MaximiseCE,
    MaximiseJS,
    MaximiseKL,
    MaximiseMargin,
    MaximiseReverseKL,
    MaximiseSoftCE,
    MinimiseCE,
    at_least_float32,
    boosted_cross_entropy,
    cross_entropy,
    distillation_divergence,
    floored_kl_divergence,
    js_divergence,
    kept_mass_labels,
    kl_divergence,
    margin,
    soft_cross_entropy,
    true_probability,
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


@DTYPES
def test_soft_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    z, soft = logits(dtype), logits(dtype, seed=8).detach().softmax(1)
    value = soft_cross_entropy(z, soft)
    assert value.dtype == dtype
    (gradient,) = torch.autograd.grad(value.sum(), z)
    rows = list(zip(z.tolist(), soft.tolist(), strict=True))
    close(value, [reference.soft_cross_entropy(*row) for row in rows], dtype)
    close(gradient, [reference.soft_cross_entropy_gradient(*row) for row in rows], dtype)


@pytest.mark.parametrize("amount", [0.0, 0.2, 1.0])
def test_smoothed_cross_entropy_is_that_to_mixed_labels_and_torchs_own(amount: float) -> None:
    z, y = logits(torch.float64), labels()
    value = cross_entropy(z, y, label_smoothing=amount)
    soft = [reference.smoothed(label, 5, amount) for label in y.tolist()]
    close(value, [reference.soft_cross_entropy(*row) for row in zip(z.tolist(), soft, strict=True)], torch.float64)
    (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
    slow = [reference.soft_cross_entropy_gradient(*row) for row in zip(z.tolist(), soft, strict=True)]
    close(gradient, slow, torch.float64)
    torch.testing.assert_close(value, soft_cross_entropy(z, torch.tensor(soft, dtype=z.dtype)), rtol=1e-12, atol=0)
    assert value.mean().item() == pytest.approx(F.cross_entropy(z, y, label_smoothing=amount).item(), rel=1e-12)
    if amount == 0:
        assert torch.equal(value, cross_entropy(z, y))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("removed", [0.0, 0.1, 0.5, 1.0])
def test_kept_mass_is_off_class_smoothing_which_is_uniform_smoothing_by_more(classes: int, removed: float) -> None:
    table = kept_mass_labels(1 - removed, classes).double()
    off_class = [reference.smoothed_off_class(y, classes, removed) for y in range(classes)]
    uniform = [reference.smoothed(y, classes, removed * classes / (classes - 1)) for y in range(classes)]
    for slow in (off_class, uniform):
        close(table, slow, torch.float32)
    torch.testing.assert_close(table.sum(1), torch.ones(classes).double(), rtol=0, atol=1e-6)


@DTYPES
@pytest.mark.parametrize(("minuend", "eps_log"), [(1.0001, 1e-12), (1.0, 1e-30), (1.5, 1e-2)])
def test_boosted_cross_entropy_and_its_gradient(dtype: torch.dtype, minuend: float, eps_log: float) -> None:
    z, y = logits(dtype), labels()
    value = boosted_cross_entropy(z, y, minuend, eps_log)
    assert value.dtype == dtype
    (gradient,) = torch.autograd.grad(value.sum(), z)
    rows = [(*row, minuend, eps_log) for row in zip(z.tolist(), y.tolist(), strict=True)]
    close(value, [reference.boosted_cross_entropy(*row) for row in rows], dtype)
    close(gradient, [reference.boosted_cross_entropy_gradient(*row) for row in rows], dtype)


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0, 500))
@settings(max_examples=50, deadline=None)
def test_the_boost_is_bounded_and_never_reads_the_true_class(k: int, seed: int, scale: float) -> None:
    z, y = logits(torch.float64, classes=k, seed=seed, scale=scale), labels(7, k)
    value = boosted_cross_entropy(z, y)
    boost = (value - cross_entropy(z, y)).detach()
    assert bool((boost >= -1.0001e-4).all())
    assert bool((boost <= 9.2104).all())
    raised = z.detach() + 100_000 * F.one_hot(y, k)
    certain = boosted_cross_entropy(raised, y)
    torch.testing.assert_close(certain, torch.full_like(certain, -math.log(1.0001)), rtol=0, atol=1e-11)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert bool(torch.isfinite(gradient).all())


def test_the_constants_of_the_boost_in_single_precision() -> None:
    y = torch.tensor([0])
    certain, lost = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert boosted_cross_entropy(certain, y).item() == pytest.approx(-1.00012e-4, abs=1e-9)
    boost = boosted_cross_entropy(lost, y) - cross_entropy(lost, y)
    assert 9.2101 < boost.item() <= 9.2103
    doubled = boosted_cross_entropy(lost.double(), y) - cross_entropy(lost.double(), y)
    assert doubled.item() == pytest.approx(-math.log(1e-4), abs=1e-6)


def test_equal_rivals_share_nothing_and_one_of_them_counts() -> None:
    z, y = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2])
    (gradient,) = torch.autograd.grad(boosted_cross_entropy(z, y).sum(), z)
    close(gradient, [reference.boosted_cross_entropy_gradient([0.0] * 4, label) for label in (0, 2)], torch.float64)


@DTYPES
@pytest.mark.parametrize("eps_log", [1e-12, 1e-2])
def test_floored_kl_and_its_gradients(dtype: torch.dtype, eps_log: float) -> None:
    clean, adv = logits(dtype, seed=2), logits(dtype, seed=3)
    value = floored_kl_divergence(clean, adv, eps_log)
    assert value.dtype == dtype
    at_clean, at_adv = torch.autograd.grad(value.sum(), (clean, adv))
    rows = [(*pair, eps_log) for pair in zip(clean.tolist(), adv.tolist(), strict=True)]
    close(value, [reference.floored_kl(*row) for row in rows], dtype)
    close(at_clean, [reference.floored_kl_gradient_clean(*row) for row in rows], dtype)
    close(at_adv, [reference.floored_kl_gradient_adv(*row) for row in rows], dtype)


def test_the_floor_under_the_logarithm_shows_only_where_a_probability_is_lost() -> None:
    clean, adv = logits(torch.float64, seed=2), logits(torch.float64, seed=3)
    ordinary = kl_divergence(clean, adv)
    torch.testing.assert_close(floored_kl_divergence(clean, adv), ordinary, rtol=0, atol=1e-9)
    same = floored_kl_divergence(clean, clean).detach()
    torch.testing.assert_close(same, torch.full_like(same, -5e-12), rtol=0, atol=1e-15)
    for dtype in TOLERANCE:
        p, q = torch.tensor([[0.0, 900.0]], dtype=dtype), torch.tensor([[900.0, 0.0]], dtype=dtype, requires_grad=True)
        value = floored_kl_divergence(p, q)
        assert value.item() == pytest.approx(-math.log(1e-12), rel=1e-6)
        assert kl_divergence(p, q).item() == pytest.approx(900)
        (gradient,) = torch.autograd.grad(value, q)
        assert bool(torch.isfinite(gradient).all())


@DTYPES
def test_jensen_shannon_and_its_gradients(dtype: torch.dtype) -> None:
    clean, adv = logits(dtype, seed=2), logits(dtype, seed=3)
    value = js_divergence(clean, adv)
    at_clean, at_adv = torch.autograd.grad(value.sum(), (clean, adv))
    pairs = list(zip(clean.tolist(), adv.tolist(), strict=True))
    close(value, [reference.js(*pair) for pair in pairs], dtype)
    close(at_adv, [reference.js_gradient_adv(*pair) for pair in pairs], dtype)
    close(at_clean, [reference.js_gradient_adv(*pair[::-1]) for pair in pairs], dtype)
    close(js_divergence(adv, clean), value.tolist(), dtype)


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0.01, 500))
@settings(max_examples=50, deadline=None)
def test_jensen_shannon_lies_between_nothing_and_log_two(k: int, seed: int, scale: float) -> None:
    clean = logits(torch.float32, classes=k, seed=seed, scale=scale)
    adv = logits(torch.float32, classes=k, seed=seed + 1, scale=scale)
    value = js_divergence(clean, adv)
    gradients = torch.autograd.grad(value.sum(), (clean, adv))
    assert bool(((value >= -1e-6) & (value <= math.log(2) + 1e-6)).all())
    assert all(bool(torch.isfinite(t).all()) for t in gradients)
    assert float(js_divergence(clean, clean).detach().abs().max()) < 1e-6


@DTYPES
def test_the_probability_of_the_true_class_and_its_gradient(dtype: torch.dtype) -> None:
    z, y = logits(dtype), labels()
    value = true_probability(z, y)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    rows = list(zip(z.tolist(), y.tolist(), strict=True))
    close(value, [reference.softmax(row)[label] for row, label in rows], dtype)
    close(gradient, [reference.probability_gradient(*row) for row in rows], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        margin,
        boosted_cross_entropy,
        true_probability,
        lambda z, y: cross_entropy(z, y, label_smoothing=0.2),
        lambda z, y: soft_cross_entropy(z, F.one_hot(y, 5).float()),
        lambda z, y: kl_divergence(z, z.flip(0)),
        lambda z, y: floored_kl_divergence(z, z.flip(0)),
        lambda z, y: js_divergence(z, z.flip(0)),
        lambda z, y: distillation_divergence(z, z.flip(0), 2.0, 1e-5),
    ],
)
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
    assert torch.equal(MaximiseReverseKL()(z, clean, y), kl_divergence(z, clean))
    assert torch.equal(MaximiseJS()(z, clean, y), js_divergence(z, clean))
    assert torch.equal(MaximiseMargin()(z, None, y), margin(z, y))
    assert torch.equal(MinimiseCE()(z, None, target), -cross_entropy(z, target))
    soft = torch.softmax(clean, 1)
    assert torch.equal(MaximiseSoftCE()(z, None, soft), soft_cross_entropy(z, soft))
    without = (MaximiseCE(), MaximiseMargin(), MinimiseCE(), MaximiseSoftCE())
    assert not any(goal.needs_clean for goal in without)
    assert all(goal.needs_clean for goal in (MaximiseKL(), MaximiseReverseKL(), MaximiseJS()))


@pytest.mark.parametrize(("temperature", "eps_log"), [(1.0, 0.0), (1.0, 1e-5), (30.0, 0.0), (0.5, 0.1)])
def test_the_divergence_from_a_teacher_is_the_formula(temperature: float, eps_log: float) -> None:
    teacher, student = logits(torch.float64, seed=8), logits(torch.float64, seed=9)
    ours = distillation_divergence(teacher.detach(), student, temperature, eps_log)
    settings = {"temperature": temperature, "over": "sum"}
    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    expected = [distillation.divergence(*row, eps_log=eps_log, **settings) for row in rows]
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)
    slopes = [distillation.divergence_gradient(*row, **settings) for row in rows]
    close(torch.autograd.grad(ours.sum(), student)[0], slopes, torch.float64)
    if temperature == 1 and eps_log == 0:
        torch.testing.assert_close(ours, kl_divergence(teacher, student), rtol=1e-14, atol=1e-15)


def test_the_divergence_from_a_teacher_that_is_sure_is_finite() -> None:
    certain = torch.tensor([[1e4, 0.0]])
    for eps_log in (0.0, 1e-5):
        assert bool(distillation_divergence(certain, certain.flip(1), 1.0, eps_log).isfinite().all())


def test_losses_leave_their_inputs_alone() -> None:
    z, y = logits(torch.float32).detach(), labels()
    kept = z.clone(), y.clone()
    cross_entropy(z, y), margin(z, y), boosted_cross_entropy(z, y), true_probability(z, y)
    kl_divergence(z, z.flip(0)), floored_kl_divergence(z, z.flip(0)), js_divergence(z, z.flip(0))
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
