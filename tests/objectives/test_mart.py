from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log

import pytest
import torch
from torch import Tensor, nn

from reference import losses
from robustfair.losses import MaximiseCE, floored_kl_divergence, true_probability
from robustfair.objectives import MART
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Check = Callable[..., None]
TermsOn = Callable[..., dict[str, Tensor]]


@pytest.fixture
def batch(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> Batch:
    """Images under the attack of MART at 0.1."""
    return attacked(tiny_net(dtype=torch.float64), MART(eps=0.1), batch_of())


def test_defaults_are_those_of_the_code_within_the_later_threat_model(batch_of: BatchOf) -> None:
    mart = MART()
    assert (mart.beta, mart.bce_margin, mart.weight_margin, mart.eps_log) == (5, 1.0001, 1.0000001, 1e-12)
    attack = mart.attack(batch_of(2))
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "gauss001", "eval", MaximiseCE())


@pytest.mark.parametrize("start", ["gauss001", "uniform"])
@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "step_size"), [("linf", "linf", 0.1, 0.025), ("l2", "l2-rice", 0.8, 0.8 * 15 / 128)]
)
def test_the_attack_is_the_loop_over_pixels_from_the_same_start(
    assert_attack_is_the_pixel_loop: Check, norm: str, geometry: str, eps: float, step_size: float, start: str
) -> None:
    objective = MART(norm=norm, eps=eps, steps=4, start=start)  # type: ignore[arg-type]
    settings = {"eps": eps, "step_size": step_size, "steps": 4, "geometry": geometry}
    assert_attack_is_the_pixel_loop(objective, goal="ce", start=start, **settings)


def test_the_attack_of_faals_mart_maximises_the_kl(assert_attack_is_the_pixel_loop: Check) -> None:
    objective = MART(eps=0.1, steps=4, perturb_loss="kl")
    settings = {"eps": 0.1, "step_size": 0.025, "steps": 4, "geometry": "linf"}
    assert_attack_is_the_pixel_loop(objective, goal="kl", start="gauss001", **settings)


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"bce_margin": 1.0, "weight_margin": 1.0, "eps_log": 0.0},
        {"bce_margin": 1.5, "weight_margin": 2.0, "eps_log": 1e-2},
    ],
    ids=["code", "paper", "large"],
)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_value_and_gradients_are_the_formulas(
    tiny_net: Net,
    batch_of: BatchOf,
    attacked: Attacked,
    assert_loss_is_the_formula: Check,
    beta: float,
    classes: int,
    constants: dict[str, float],
) -> None:
    objective = MART(eps=0.1, beta=beta, **constants)  # type: ignore[arg-type]
    batch = attacked(tiny_net(dtype=torch.float64, classes=classes), objective, batch_of(classes=classes))
    assert_loss_is_the_formula(objective, batch, partial(losses.mart, beta=beta, **constants), classes=classes)


def test_beta_zero_is_boosted_cross_entropy_and_nothing_of_the_clean_image(tiny_net: Net, batch: Batch) -> None:
    loss = MART(beta=0.0)(tiny_net(dtype=torch.float64), batch)
    assert loss.out.adv is not None
    rows = list(zip(loss.out.adv.tolist(), batch.y.tolist(), strict=True))
    boosted = [losses.cross_entropy(*row) + losses.margin_term(*row) for row in rows]
    assert loss.total().item() == pytest.approx(sum(boosted) / 6, abs=1e-12)
    (at_clean,) = torch.autograd.grad(loss.total(), loss.out.clean)
    assert torch.equal(at_clean, torch.zeros_like(at_clean))


def test_without_a_rival_the_boost_is_a_small_negative_constant(batch: Batch, terms_on: TermsOn) -> None:
    alone = torch.nn.functional.one_hot(batch.y, 3).double() * 2000
    label = terms_on(MART(), batch, alone, alone)["label"]
    torch.testing.assert_close(label, torch.full_like(label, -log(1.0001)), rtol=0, atol=1e-11)


def test_the_regulariser_vanishes_where_nothing_was_attacked(tiny_net: Net, batch_of: BatchOf) -> None:
    batch = batch_of()
    consistency = MART()(tiny_net(dtype=torch.float64), replace(batch, x_adv=batch.x)).terms["consistency"]
    assert float(consistency.detach().abs().max()) < 1e-9


def test_the_weight_of_a_certain_image_is_one_rounding_of_float32(batch: Batch, terms_on: TermsOn) -> None:
    certain = torch.nn.functional.one_hot(batch.y, 3).float() * 200
    doubting = torch.zeros(6, 3)
    consistency = terms_on(MART(), batch, certain, doubting)["consistency"]
    weight = consistency / floored_kl_divergence(certain, doubting)
    assert weight.tolist() == pytest.approx([1.1920929e-7] * 6, rel=1e-5)
    paper = terms_on(MART(weight_margin=1.0), batch, certain, doubting)["consistency"]
    assert torch.equal(paper, torch.zeros(6))


def test_the_weight_is_live_and_reads_the_clean_image(tiny_net: Net, batch: Batch) -> None:
    loss = MART()(tiny_net(dtype=torch.float64), batch)
    clean, adv = loss.out.clean, loss.out.adv
    assert clean is not None
    assert adv is not None
    weight = 1.0000001 - true_probability(clean, batch.y)
    held = floored_kl_divergence(clean, adv) * weight.detach()
    torch.testing.assert_close(held, loss.terms["consistency"], rtol=0, atol=1e-12)
    live, dead = (torch.autograd.grad(v.mean(), clean, retain_graph=True)[0] for v in (loss.terms["consistency"], held))
    assert float((live - dead).abs().max()) > 1e-3
    other = floored_kl_divergence(clean, adv) * (1.0000001 - true_probability(adv, batch.y))
    assert float((other - held).detach().abs().max()) > 1e-3


def test_under_l2_it_attacks_where_the_authors_code_adds_noise_alone(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked
) -> None:
    batch = attacked(tiny_net(), MART(norm="l2", eps=0.5), batch_of(dtype=torch.float32))
    assert batch.x_adv is not None
    assert float((batch.x_adv - batch.x).flatten(1).norm(dim=1).min()) > 0.2
