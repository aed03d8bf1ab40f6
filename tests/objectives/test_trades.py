from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import losses
from robustfair.errors import ConfigError
from robustfair.losses import MaximiseKL
from robustfair.objectives import Standard, Trades
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Gradients = Callable[..., list[Tensor]]
Check = Callable[..., None]


@pytest.fixture
def batch(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> Batch:
    """Images under the attack of TRADES at 0.1."""
    return attacked(tiny_net(dtype=torch.float64), Trades(eps=0.1), batch_of())


def test_defaults(batch_of: BatchOf) -> None:
    attack = Trades().attack(batch_of(2))
    assert (Trades().beta, Trades().regularizer, Trades().detach_clean) == (6, "kl", False)
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "gauss001", "eval", MaximiseKL())


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_normalised_it_is_the_loss_over_one_plus_beta(tiny_net: Net, batch: Batch, beta: float) -> None:
    model = tiny_net(dtype=torch.float64).eval()
    plain, divided = (Trades(beta=beta, normalise_beta=n)(model, batch) for n in (False, True))
    torch.testing.assert_close(divided.per_example(), plain.per_example() / (1 + beta), rtol=1e-12, atol=0)
    assert torch.equal(divided.weight, plain.weight)


def test_l2_takes_two_eps_over_steps_and_the_box_first(batch_of: BatchOf) -> None:
    attack = Trades(norm="l2", eps=0.5, steps=8).attack(batch_of(2))
    assert attack.step_size.tolist() == [0.125] * 2
    assert attack.box_first
    given = Trades(norm="l2", eps=0.5, steps=8, step_size=0.01, l2_step="given").attack(batch_of(2))
    assert given.step_size.tolist() == pytest.approx([0.01] * 2)
    assert Trades(norm="l2", eps=0.5, steps=8, step_size=0.125).step == 0.125
    with pytest.raises(ConfigError, match=r"step_size must be 2 eps / steps = 0\.125 .*Add l2_step=given"):
        Trades(norm="l2", eps=0.5, steps=8, step_size=0.01)


@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "step_size"),
    [
        ("linf", "linf", 0.1, 0.025),
        ("l2", "l2-trades", 0.5, 0.25),
    ],
)
def test_the_attack_is_the_loop_over_pixels_from_the_same_start(
    assert_attack_is_the_pixel_loop: Check, norm: str, geometry: str, eps: float, step_size: float
) -> None:
    objective = Trades(norm=norm, eps=eps, steps=4)  # type: ignore[arg-type]
    settings = {"eps": eps, "step_size": step_size, "steps": 4, "geometry": geometry}
    assert_attack_is_the_pixel_loop(objective, goal="kl", start="gauss001", **settings)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("regularizer", ["kl", "ce"])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_and_gradients_are_the_formulas(
    tiny_net: Net,
    batch_of: BatchOf,
    attacked: Attacked,
    assert_loss_is_the_formula: Check,
    classes: int,
    regularizer: str,
    soft: bool,
) -> None:
    objective = Trades(eps=0.1, regularizer=regularizer)  # type: ignore[arg-type]
    model = tiny_net(dtype=torch.float64, classes=classes)
    batch = attacked(model, objective, batch_of(classes=classes, soft=soft))
    labels = batch.soft.tolist() if batch.soft is not None else None
    slow = partial(losses.trades, beta=6.0, regularizer=regularizer, soft=labels)
    assert_loss_is_the_formula(objective, batch, slow, classes=classes)


def test_cross_entropy_between_the_branches_is_kl_plus_the_entropy_of_the_clean_one(
    tiny_net: Net, batch: Batch
) -> None:
    by_kl, by_ce = (Trades(regularizer=r)(tiny_net(dtype=torch.float64), batch) for r in ("kl", "ce"))  # type: ignore[arg-type]
    clean = by_kl.out.clean
    assert clean is not None
    entropy = torch.tensor([losses.entropy(z) for z in clean.tolist()], dtype=torch.float64)
    assert float(entropy.min()) > 0.01
    assert float(entropy.max()) <= log(3)
    difference = by_ce.terms["consistency"] - by_kl.terms["consistency"]
    torch.testing.assert_close(difference, entropy, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(loss.total(), (loss.out.adv, loss.out.clean)) for loss in (by_kl, by_ce)]
    torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=0, atol=1e-12)
    assert float((slopes[0][1] - slopes[1][1]).abs().max()) > 1e-3


def test_torchs_mean_reduction_is_one_part_in_k_of_the_regulariser(tiny_net: Net, batch: Batch) -> None:
    loss = Trades()(tiny_net(dtype=torch.float64), batch)
    assert loss.out.clean is not None
    assert loss.out.adv is not None
    per_entry = F.kl_div(F.log_softmax(loss.out.adv, 1), F.softmax(loss.out.clean, 1), reduction="none").mean()
    torch.testing.assert_close(loss.terms["consistency"].mean() / 3, per_entry, rtol=1e-10, atol=0)
    swapped = F.kl_div(F.log_softmax(loss.out.clean, 1), F.softmax(loss.out.adv, 1), reduction="batchmean")
    assert abs(swapped.item() - loss.terms["consistency"].mean().item()) > 1e-4


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_the_form_of_cfa_is_this_loss_over_one_plus_beta(tiny_net: Net, batch: Batch, beta: float) -> None:
    loss = Trades(beta=beta)(tiny_net(dtype=torch.float64), batch)
    share = beta / (1 + beta)
    theirs = ((1 - share) * loss.terms["label"] + share * loss.terms["consistency"]).mean()
    torch.testing.assert_close((1 + beta) * theirs, loss.total(), rtol=1e-12, atol=0)
    logits = (loss.out.clean, loss.out.adv)
    ours = torch.autograd.grad(loss.total(), logits, retain_graph=True)
    for a, b in zip(torch.autograd.grad((1 + beta) * theirs, logits), ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_beta_zero_is_clean_cross_entropy(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, gradients: Gradients
) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    batch = attacked(model, Trades(beta=0.0, eps=0.1), batch_of())
    ours, standard = Trades(beta=0.0)(model, batch).total(), Standard()(twin, batch).total()
    assert ours.item() == pytest.approx(standard.item(), abs=1e-12)
    for a, b in zip(gradients(model, ours), gradients(twin, standard), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_loss_is_linear_in_beta_for_a_fixed_attack(tiny_net: Net, batch: Batch) -> None:
    at = {b: Trades(beta=b)(tiny_net(dtype=torch.float64), batch).total().item() for b in (0.0, 1.0, 3.0, 6.0)}
    assert at[1.0] > at[0.0]
    for b in (3.0, 6.0):
        assert at[b] - at[0.0] == pytest.approx(b * (at[1.0] - at[0.0]), rel=1e-10)


def test_radius_zero_leaves_no_consistency_loss(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> None:
    model = tiny_net()
    batch = attacked(model, Trades(eps=0.0), batch_of(dtype=torch.float32))
    assert torch.equal(Trades(eps=0.0)(model, batch).terms["consistency"], torch.zeros(6))


def test_detaching_the_clean_side_is_another_gradient(tiny_net: Net, batch: Batch, gradients: Gradients) -> None:
    for regularizer in ("kl", "ce"):
        models = [tiny_net(dtype=torch.float64) for _ in range(2)]
        pairs = zip((False, True), models, strict=True)
        live, held = (Trades(detach_clean=d, regularizer=regularizer)(m, batch).total() for d, m in pairs)  # type: ignore[arg-type]
        assert live.item() == held.item()
        difference = [a - b for a, b in zip(gradients(models[0], live), gradients(models[1], held), strict=True)]
        assert max(float(d.abs().max()) for d in difference) > 1e-3
