from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import losses
from robustfair.losses import (
    MaximiseCE,
    MaximiseJS,
    MaximiseKL,
    MaximiseReverseKL,
    floored_kl_divergence,
    true_probability,
)
from robustfair.objectives import ARoW, Standard, Trades
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Gradients = Callable[..., list[Tensor]]
Check = Callable[..., None]
TermsOn = Callable[..., dict[str, Tensor]]


@pytest.fixture
def batch(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> Batch:
    """Images under the attack of ARoW at 0.1."""
    return attacked(tiny_net(dtype=torch.float64), ARoW(eps=0.1), batch_of())


def test_defaults_are_those_of_the_readme(batch_of: BatchOf) -> None:
    arow = ARoW()
    assert (arow.lam, arow.label_smoothing, arow.weighting, arow.eps_log) == (7, 0.2, "anti-robust", 1e-12)
    attack = arow.attack(batch_of(2))
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "uniform", "eval", MaximiseKL())


@pytest.mark.parametrize("perturb_loss", ["kl", "ce", "revkl", "js"])
@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "step_size"), [("linf", "linf", 0.1, 0.025), ("l2", "l2-rice", 0.8, 0.8 * 15 / 128)]
)
def test_the_attack_is_the_loop_over_pixels_from_the_same_start(
    assert_attack_is_the_pixel_loop: Check, norm: str, geometry: str, eps: float, step_size: float, perturb_loss: str
) -> None:
    objective = ARoW(norm=norm, eps=eps, steps=4, perturb_loss=perturb_loss)  # type: ignore[arg-type]
    settings = {"eps": eps, "step_size": step_size, "steps": 4, "geometry": geometry}
    assert_attack_is_the_pixel_loop(objective, goal=perturb_loss, start="uniform", **settings)


def test_the_attack_may_start_at_gaussian_noise_too(assert_attack_is_the_pixel_loop: Check) -> None:
    settings = {"eps": 0.1, "step_size": 0.025, "steps": 3, "geometry": "linf"}
    assert_attack_is_the_pixel_loop(ARoW(eps=0.1, steps=3, start="gauss001"), goal="kl", start="gauss001", **settings)


def test_the_words_for_the_attack_are_the_goals(batch_of: BatchOf) -> None:
    goals = {"kl": MaximiseKL(), "ce": MaximiseCE(), "revkl": MaximiseReverseKL(), "js": MaximiseJS()}
    for word, goal in goals.items():
        assert ARoW(perturb_loss=word).attack(batch_of(1)).goal == goal  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", ["anti-robust", "confidence", "constant"])
@pytest.mark.parametrize(("smoothing", "eps_log"), [(0.2, 1e-12), (0.0, 1e-12), (1.0, 1e-2)])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_and_gradients_are_the_formulas(
    tiny_net: Net,
    batch_of: BatchOf,
    attacked: Attacked,
    assert_loss_is_the_formula: Check,
    classes: int,
    smoothing: float,
    eps_log: float,
    weighting: str,
) -> None:
    settings = {"label_smoothing": smoothing, "eps_log": eps_log, "weighting": weighting}
    objective = ARoW(eps=0.1, **settings)  # type: ignore[arg-type]
    batch = attacked(tiny_net(dtype=torch.float64, classes=classes), objective, batch_of(classes=classes))
    assert_loss_is_the_formula(objective, batch, partial(losses.arow, lam=7.0, **settings), classes=classes)


def test_without_weight_and_smoothing_it_is_clean_training(tiny_net: Net, batch: Batch, gradients: Gradients) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    ours, standard = ARoW(lam=0.0, label_smoothing=0.0)(model, batch).total(), Standard()(twin, batch).total()
    assert ours.item() == pytest.approx(standard.item(), abs=1e-12)
    torch.testing.assert_close(gradients(model, ours), gradients(twin, standard), rtol=0, atol=1e-12)


def test_without_weighting_and_smoothing_it_is_trades(tiny_net: Net, batch: Batch, gradients: Gradients) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    ours = ARoW(lam=6.0, weighting="constant", label_smoothing=0.0)(model, batch).total()
    trades = Trades(beta=6.0)(twin, batch).total()
    assert ours.item() == pytest.approx(trades.item(), abs=1e-9)
    torch.testing.assert_close(gradients(model, ours), gradients(twin, trades), rtol=0, atol=1e-9)


def test_the_label_term_is_torchs_own_smoothing(tiny_net: Net, batch: Batch) -> None:
    loss = ARoW(label_smoothing=0.3)(tiny_net(dtype=torch.float64), batch)
    assert loss.out.clean is not None
    built_in = F.cross_entropy(loss.out.clean, batch.y, label_smoothing=0.3)
    torch.testing.assert_close(loss.terms["label"].mean(), built_in, rtol=1e-12, atol=0)


def test_radius_zero_is_smoothed_clean_training(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> None:
    model, batch = tiny_net(dtype=torch.float64), batch_of()
    batch = attacked(model, ARoW(eps=0.0), batch)
    loss = ARoW(eps=0.0)(model, batch)
    assert loss.out.clean is not None
    assert float(loss.terms["consistency"].detach().abs().max()) < 1e-11
    smoothed = F.cross_entropy(loss.out.clean, batch.y, label_smoothing=0.2)
    assert loss.total().item() == pytest.approx(smoothed.item(), abs=1e-9)


def test_a_detached_weight_is_another_gradient(tiny_net: Net, batch: Batch) -> None:
    loss = ARoW()(tiny_net(dtype=torch.float64), batch)
    clean, adv = loss.out.clean, loss.out.adv
    assert clean is not None
    assert adv is not None
    held = floored_kl_divergence(clean, adv) * (1 - true_probability(adv, batch.y)).detach()
    torch.testing.assert_close(held, loss.terms["consistency"], rtol=0, atol=1e-12)
    live, dead = (torch.autograd.grad(v.mean(), adv, retain_graph=True)[0] for v in (loss.terms["consistency"], held))
    assert float((live - dead).abs().max()) > 1e-3


def test_the_weight_reads_the_attacked_image_and_falls_where_it_is_still_right(batch: Batch, terms_on: TermsOn) -> None:
    batch = replace(batch, y=torch.zeros(6, dtype=torch.long))
    clean = torch.zeros(6, 3, dtype=torch.float64)
    right, wrong = (clean + 2 * torch.eye(3)[c] for c in (0, 1))
    for weighting, factor in (("constant", 1.0), ("confidence", 1.0), ("anti-robust", None)):
        objective = ARoW(weighting=weighting)  # type: ignore[arg-type]
        kept, lost = (terms_on(objective, batch, clean, adv)["consistency"][0].item() for adv in (right, wrong))
        q = losses.softmax(right[0].tolist())
        expected = (1 - q[1]) / (1 - q[0]) if factor is None else factor
        assert lost / kept == pytest.approx(expected), weighting
