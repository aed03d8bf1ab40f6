from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from reference import attacks, losses
from robustfair.losses import MaximiseCE
from robustfair.objectives import PGDAT, Standard
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Gradients = Callable[..., list[Tensor]]
Check = Callable[..., None]


def test_defaults_are_those_of_the_later_literature(batch_of: BatchOf) -> None:
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


def test_the_attack_is_the_loop_over_pixels_from_the_same_start(assert_attack_is_the_pixel_loop: Check) -> None:
    linf = {"eps": 0.1, "step_size": 0.025, "steps": 4, "geometry": "linf"}
    assert_attack_is_the_pixel_loop(PGDAT(eps=0.1, steps=4), goal="ce", **linf)
    l2 = {"eps": 0.8, "step_size": 0.8 * 15 / 128, "steps": 5, "geometry": "l2-rice"}
    assert_attack_is_the_pixel_loop(PGDAT(norm="l2", eps=0.8, steps=5), goal="ce", **l2)
    assert_attack_is_the_pixel_loop(PGDAT(eps=0.1, steps=4, start="gauss001"), goal="ce", start="gauss001", **linf)


@pytest.mark.parametrize(("norm", "geometry", "step_size"), [("linf", "linf", 0.02), ("l2", "l2-rice", 0.1)])
def test_the_start_of_idbh_is_one_gradient_of_the_mean_loss_uphill(
    tiny_net: Net, batch_of: BatchOf, assert_attack_is_the_pixel_loop: Check, norm: str, geometry: str, step_size: float
) -> None:
    batch = batch_of()
    start = attacks.gradient_start(tiny_net(dtype=torch.float64).eval(), batch.x, batch.y)
    assert 1e-3 < float((start - batch.x).abs().max()) < 0.5
    objective = PGDAT(norm=norm, eps=0.3, step_size=step_size, steps=3, start="input-gradient")  # type: ignore[arg-type]
    settings = {"eps": 0.3, "step_size": step_size, "steps": 3, "geometry": geometry}
    assert_attack_is_the_pixel_loop(objective, goal="ce", start=start, **settings)


@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradients_are_the_formula_at_the_attacked_images(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, assert_loss_is_the_formula: Check, soft: bool
) -> None:
    objective = PGDAT(eps=0.1)
    batch = attacked(tiny_net(dtype=torch.float64), objective, batch_of(soft=soft))
    labels = batch.soft.tolist() if batch.soft is not None else None
    assert_loss_is_the_formula(objective, batch, partial(losses.mean_cross_entropy, soft=labels))


def test_radius_zero_is_standard_training(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, gradients: Gradients
) -> None:
    model, twin = tiny_net(), tiny_net()
    batch = attacked(model, PGDAT(eps=0.0), batch_of(dtype=torch.float32))
    ours, standard = PGDAT(eps=0.0)(model, batch).total(), Standard()(twin, batch).total()
    assert torch.equal(ours, standard)
    for a, b in zip(gradients(model, ours), gradients(twin, standard), strict=True):
        assert torch.equal(a, b)
