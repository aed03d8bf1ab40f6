from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reference import attacks, losses
from robustfair.attacks.pgd import pgd
from robustfair.losses import MaximiseKL
from robustfair.objectives import Standard, Trades
from robustfair.values import Batch

Net = Callable[..., nn.Module]


def batch_of(b: int = 6, *, dtype: torch.dtype = torch.float64) -> Batch:
    x = torch.rand(b, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1)


def attacked(model: nn.Module, objective: Trades, batch: Batch) -> Batch:
    return replace(batch, x_adv=pgd(model, batch.x, batch.y, objective.attack(batch), batch.rng("attack")))


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def test_defaults() -> None:
    attack = Trades().attack(batch_of(2))
    assert Trades().beta == 6
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "gauss001", "eval", MaximiseKL())


def test_l2_takes_two_eps_over_steps_and_the_box_first() -> None:
    attack = Trades(norm="l2", eps=0.5, steps=8, step_size=0.01).attack(batch_of(2))
    assert attack.step_size.tolist() == [0.125] * 2
    assert attack.box_first
    given = Trades(norm="l2", eps=0.5, steps=8, step_size=0.01, l2_step="given").attack(batch_of(2))
    assert given.step_size.tolist() == pytest.approx([0.01] * 2)


@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "step_size"),
    [
        ("linf", "linf", 0.1, 0.025),
        ("l2", "l2-trades", 0.5, 0.25),
    ],
)
def test_the_attack_is_the_loop_over_pixels_from_the_same_start(
    tiny_net: Net, norm: str, geometry: str, eps: float, step_size: float
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    objective = Trades(norm=norm, eps=eps, steps=4)  # type: ignore[arg-type]
    start = batch.x + 0.001 * torch.empty_like(batch.x).normal_(generator=batch.rng("attack"))
    radii, step_sizes = [eps] * 6, [step_size] * 6
    paths = attacks.pgd(
        model, batch.x, batch.y, start, eps=radii, step_size=step_sizes, steps=4, goal="kl", geometry=geometry
    )
    ours = pgd(model, batch.x, batch.y, objective.attack(batch), batch.rng("attack"))
    torch.testing.assert_close(ours, attacks.last(paths, batch.x), rtol=0, atol=1e-9)
    assert float((ours - batch.x).abs().max()) > 0.05


def test_value_and_weight_gradients_are_the_formulas(tiny_net: Net) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    batch = attacked(model, Trades(eps=0.1), batch_of())
    loss = Trades(eps=0.1)(model, batch)
    clean, adv = twin(batch.x), twin(batch.x_adv)
    value, at_clean, at_adv = losses.trades(clean.tolist(), adv.tolist(), batch.y.tolist(), 6.0)
    assert loss.total().item() == pytest.approx(value, abs=1e-10)
    upstream = [torch.tensor(g, dtype=torch.float64) for g in (at_clean, at_adv)]
    expected = torch.autograd.grad([clean, adv], list(twin.parameters()), upstream)
    for ours, slow in zip(gradients(model, loss.total()), expected, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-10)


def test_beta_zero_is_clean_cross_entropy(tiny_net: Net) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    batch = attacked(model, Trades(beta=0.0, eps=0.1), batch_of())
    ours, standard = Trades(beta=0.0)(model, batch).total(), Standard()(twin, batch).total()
    assert ours.item() == pytest.approx(standard.item(), abs=1e-12)
    for a, b in zip(gradients(model, ours), gradients(twin, standard), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_loss_is_linear_in_beta_for_a_fixed_attack(tiny_net: Net) -> None:
    batch = attacked(tiny_net(dtype=torch.float64), Trades(eps=0.1), batch_of())
    at = {b: Trades(beta=b)(tiny_net(dtype=torch.float64), batch).total().item() for b in (0.0, 1.0, 3.0, 6.0)}
    assert at[1.0] > at[0.0]
    for b in (3.0, 6.0):
        assert at[b] - at[0.0] == pytest.approx(b * (at[1.0] - at[0.0]), rel=1e-10)


def test_radius_zero_leaves_no_consistency_loss(tiny_net: Net) -> None:
    model = tiny_net()
    batch = attacked(model, Trades(eps=0.0), batch_of(dtype=torch.float32))
    assert torch.equal(batch.x_adv, batch.x)
    assert torch.equal(Trades(eps=0.0)(model, batch).terms["consistency"], torch.zeros(6))


def test_a_step_updates_batch_norm_exactly_twice(tiny_net: Net) -> None:
    model = tiny_net()
    Trades()(model, attacked(model, Trades(), batch_of(dtype=torch.float32)))
    assert int(model.norm.num_batches_tracked) == 2


def test_detaching_the_clean_side_is_another_gradient(tiny_net: Net) -> None:
    batch = attacked(tiny_net(dtype=torch.float64), Trades(eps=0.1), batch_of())
    models = [tiny_net(dtype=torch.float64) for _ in range(2)]
    live, held = (Trades(detach_clean=d)(m, batch).total() for d, m in zip((False, True), models, strict=True))
    assert live.item() == held.item()
    difference = [a - b for a, b in zip(gradients(models[0], live), gradients(models[1], held), strict=True)]
    assert max(float(d.abs().max()) for d in difference) > 1e-3


def test_one_gaussian_draw_and_nothing_from_the_global_stream(tiny_net: Net) -> None:
    batch, before = batch_of(), torch.get_rng_state()
    rng, twin = batch.rng("attack"), batch.rng("attack")
    pgd(tiny_net(dtype=torch.float64), batch.x, batch.y, Trades().attack(batch), rng)
    torch.empty_like(batch.x).normal_(generator=twin)
    assert torch.equal(rng.get_state(), twin.get_state())
    assert torch.equal(torch.get_rng_state(), before)
