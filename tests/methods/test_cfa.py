from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reference import cfa as reference
from robustfair.attacks.pgd import pgd
from robustfair.methods import CCM, CCR
from robustfair.methods.cfa import calibration
from robustfair.objectives import PGDAT, Standard, Trades
from robustfair.values import Batch, Loss

Net = Callable[..., nn.Module]
Run = Callable[..., object]

NO_RUN: Any = None
T = (0.2, 0.5, 0.8)
VECTOR = {"hits": (2, 5, 8), "count": (10, 10, 10)}


def batch_of(b: int = 9, *, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=dtype)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=dtype)).clamp(0, 1)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x_adv)


def test_the_published_vector_of_radii(stand_in_run: Run) -> None:
    state = CCM(lam=0.5, begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    batch = batch_of(3)
    attack = PGDAT(norm="l2", eps=8.0).attack(batch)
    edited = CCM(lam=0.5, begin=1).attack(attack, batch, state, NO_RUN)
    assert edited.eps.tolist() == pytest.approx([5.6, 8.0, 10.4])
    assert edited.eps.tolist() == pytest.approx(reference.radii(T, 0.5, 8.0))
    assert replace(edited, eps=attack.eps) == attack, "nothing but the radius moves"


def test_the_published_vector_of_shares(stand_in_run: Run) -> None:
    method, batch = CCR(begin=1), batch_of(3)
    state = method.at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    six = torch.full((3,), 6.0)
    loss = Loss(out=None, terms={}, coef={"label": torch.ones(3), "consistency": six}, weight=torch.ones(3))  # type: ignore[arg-type]
    coef = method.loss(loss, batch, state, NO_RUN).coef
    assert (coef["consistency"] / coef["label"]).tolist() == pytest.approx([4.2, 6.0, 7.8])
    assert coef["consistency"].tolist() == pytest.approx([0.807692, 0.857143, 0.886364], abs=1e-6)
    assert coef["consistency"].tolist() == pytest.approx(reference.shares(T, 0.5, 6.0))
    assert (coef["label"] + coef["consistency"]).tolist() == pytest.approx([1.0] * 3)


def test_the_loss_is_the_loop_over_examples(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    state = CCR(begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    loss = CCR(begin=1).loss(Trades(beta=6)(model, batch), batch, state, NO_RUN)
    with torch.no_grad():
        clean, adv = model(batch.x).tolist(), model(batch.x_adv).tolist()
    expected = reference.loss(clean, adv, batch.y.tolist(), reference.shares(T, 0.5, 6.0))
    assert loss.total().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_equal_accuracies_are_trades_over_one_plus_beta(tiny_net: Net, stand_in_run: Run, beta: float) -> None:
    """Value and gradient, for t = 0.75 and so beta' = 1.25 beta; and for the code path before `begin`, beta' = beta."""
    batch, method = batch_of(), CCR(begin=1)
    for run, factor in (
        (stand_in_run(epoch=1, hits=(3, 3, 3), count=(4, 4, 4)), 1.25),
        (stand_in_run(epoch=0), 1.0),
    ):
        model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
        state = method.at_epoch({}, run)
        ours = method.loss(Trades(beta=beta)(model, batch), batch, state, NO_RUN).total()
        plain = Trades(beta=factor * beta)(twin, batch).total() / (1 + factor * beta)
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
        pairs = zip(
            torch.autograd.grad(ours, list(model.parameters())),
            torch.autograd.grad(plain, list(twin.parameters())),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_loss_that_is_divided_already_is_not_divided_again(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    state = CCR(begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    plain, divided = (
        CCR(begin=1).loss(Trades(beta=6, normalise_beta=n)(model, batch), batch, state, NO_RUN).per_example()
        for n in (False, True)
    )
    torch.testing.assert_close(plain, divided, rtol=1e-6, atol=0)


def test_accuracies_are_over_the_true_class_counts(stand_in_run: Run) -> None:
    run = stand_in_run(epoch=3, hits=(1, 30, 7), count=(2, 120, 7))
    for method in (CCM(lam=0.5, begin=1), CCR(lam=0.5, begin=1)):
        assert method.at_epoch({}, run)["scale"].tolist() == pytest.approx([1.0, 0.75, 1.5])


@pytest.mark.parametrize("method", [CCM(begin=2), CCR(begin=2)])
def test_nothing_is_calibrated_before_begin(stand_in_run: Run, method: CCM | CCR) -> None:
    for epoch, calibrated in ((0, False), (1, False), (2, True), (3, True)):
        run = stand_in_run(epoch=epoch, **({} if epoch == 0 else VECTOR))
        assert (method.at_epoch({}, run)["scale"].tolist() != [1.0] * 3) == calibrated


def test_before_begin_the_attack_is_the_scalar_one(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(), batch_of(dtype=torch.float32)
    for objective in (PGDAT(), Trades()):
        scalar = objective.attack(batch)
        per_class = CCM().attack(scalar, batch, CCM().at_epoch({}, stand_in_run(epoch=9, **VECTOR)), NO_RUN)
        ends = [pgd(model, batch.x, batch.y, attack, batch.rng("attack")) for attack in (scalar, per_class)]
        assert torch.equal(*ends)


@pytest.mark.parametrize(("objective", "lam"), [(PGDAT(), 0.5), (Trades(), 0.3), (Standard(), 0.5)])
def test_lambda_is_the_papers_for_the_base_loss(stand_in_run: Run, objective: object, lam: float) -> None:
    run = stand_in_run(epoch=1, objective=objective, **VECTOR)
    assert CCM(begin=1).at_epoch({}, run)["scale"].tolist() == pytest.approx([lam + t for t in T])
    assert CCM(begin=1, lam=0.0).at_epoch({}, run)["scale"].tolist() == pytest.approx(T)


def test_the_factor_is_bounded_and_monotone() -> None:
    t = torch.linspace(0, 1, 11)
    factor = calibration(0.3, t)
    assert float(factor.min()) == pytest.approx(0.3)
    assert float(factor.max()) == pytest.approx(1.3)
    assert bool((factor.diff() > 0).all())
    assert calibration(0.5, torch.tensor([0.5])).item() == 1.0


def test_a_class_without_images_does_not_disturb_the_others(stand_in_run: Run) -> None:
    state = CCM(lam=0.5, begin=1).at_epoch({}, stand_in_run(epoch=1, hits=(2, 0, 8), count=(10, 0, 10)))
    batch = replace(batch_of(4), y=torch.tensor([0, 2, 2, 0]))
    edited = CCM(lam=0.5).attack(PGDAT(eps=0.1).attack(batch), batch, state, NO_RUN)
    assert edited.eps.tolist() == pytest.approx([0.07, 0.13, 0.13, 0.07])


def test_a_run_too_short_is_remarked_upon() -> None:
    for method in (CCM(), CCR()):
        assert method.remark(11) is None
        remark = method.remark(10)
        assert remark is not None
        assert f"lower {method.name}(begin)" in remark
