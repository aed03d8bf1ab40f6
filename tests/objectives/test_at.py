from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reference import attacks, losses
from robustfair.attacks.pgd import pgd
from robustfair.losses import MaximiseCE
from robustfair.objectives import PGDAT, Standard
from robustfair.values import Batch

Net = Callable[..., nn.Module]


def batch_of(b: int = 6, *, dtype: torch.dtype = torch.float64) -> Batch:
    x = torch.rand(b, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1)


def attacked(model: nn.Module, objective: PGDAT, batch: Batch) -> Batch:
    return replace(batch, x_adv=pgd(model, batch.x, batch.y, objective.attack(batch), batch.rng("attack")))


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def test_defaults_are_those_of_the_later_literature() -> None:
    attack = PGDAT().attack(batch_of(2))
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.norm, attack.start, attack.mode, attack.keep) == (
        10,
        "linf",
        "uniform",
        "eval",
        "last",
    )
    assert attack.goal == MaximiseCE()
    l2 = PGDAT(norm="l2", eps=128 / 255).attack(batch_of(2))
    assert l2.step_size.tolist() == pytest.approx([15 / 255] * 2)


def test_the_attack_is_the_loop_over_pixels_from_the_same_start(tiny_net: Net) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    objective = PGDAT(eps=0.1, steps=4)
    attack = objective.attack(batch)
    noise = torch.empty_like(batch.x).uniform_(-1, 1, generator=batch.rng("attack"))
    start = (batch.x + 0.1 * noise).clamp(0, 1)
    paths = attacks.pgd(
        model, batch.x, batch.y, start, eps=[0.1] * 6, step_size=[0.025] * 6, steps=4, goal="ce", geometry="linf"
    )
    ours = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
    torch.testing.assert_close(ours, attacks.last(paths, batch.x), rtol=0, atol=1e-9)


def test_value_and_gradient_are_the_formula_at_the_attacked_images(tiny_net: Net) -> None:
    model = tiny_net(dtype=torch.float64)
    batch = attacked(model, PGDAT(eps=0.1), batch_of())
    loss = PGDAT(eps=0.1)(model, batch)
    logits = tiny_net(dtype=torch.float64)(batch.x_adv)
    rows = list(zip(logits.tolist(), batch.y.tolist(), strict=True))
    assert loss.total().item() == pytest.approx(sum(losses.cross_entropy(*row) for row in rows) / 6, abs=1e-10)
    at_logits = torch.tensor([losses.cross_entropy_gradient(*row) for row in rows], dtype=torch.float64) / 6
    twin = tiny_net(dtype=torch.float64)
    expected = torch.autograd.grad(twin(batch.x_adv), list(twin.parameters()), at_logits)
    for ours, slow in zip(gradients(model, loss.total()), expected, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-10)


def test_radius_zero_is_standard_training(tiny_net: Net) -> None:
    model = tiny_net()
    batch = attacked(model, PGDAT(eps=0.0), batch_of(dtype=torch.float32))
    twin = tiny_net()
    ours, standard = PGDAT(eps=0.0)(model, batch).total(), Standard()(twin, batch).total()
    assert torch.equal(ours, standard)
    for a, b in zip(gradients(model, ours), gradients(twin, standard), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("mode", "updates"), [("eval", 1), ("train_frozen", 1), ("train", 11)])
def test_the_batch_norm_ledger_of_a_step(tiny_net: Net, mode: str, updates: int) -> None:
    model, objective = tiny_net(), PGDAT(attack_mode=mode)  # type: ignore[arg-type]
    objective(model, attacked(model, objective, batch_of(dtype=torch.float32)))
    assert int(model.norm.num_batches_tracked) == updates


def test_fgsm_at_is_one_step_of_it(tiny_net: Net) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    objective = PGDAT(eps=0.08, steps=1, step_size=0.1)
    noise = torch.empty_like(batch.x).uniform_(-1, 1, generator=batch.rng("attack"))
    start = (batch.x + 0.08 * noise).clamp(0, 1).requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(start), batch.y), start)
    delta = (start.detach() + 0.1 * g.sign() - batch.x).clamp(-0.08, 0.08)
    expected = batch.x + torch.minimum(torch.maximum(delta, -batch.x), 1 - batch.x)
    ours = pgd(model, batch.x, batch.y, objective.attack(batch), batch.rng("attack"))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
