from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from reference import attacks, losses
from robustfair.attacks.pgd import pgd
from robustfair.errors import ConfigError
from robustfair.losses import MaximiseCE
from robustfair.objectives import FGSMAT, PGDAT
from robustfair.runs.composition import read_composition
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Gradients = Callable[..., list[Tensor]]
Check = Callable[..., None]


def test_defaults_are_one_step_of_ten_levels_from_a_uniform_start(batch_of: BatchOf) -> None:
    attack = FGSMAT().attack(batch_of(2))
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([10 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (1, "uniform", "eval", MaximiseCE())
    assert attack.box


def test_the_attack_is_the_step_on_the_offset_pixel_by_pixel(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, start_of: Callable[..., Tensor]
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    outside = {}
    for box in (True, False):
        start = start_of(batch, "uniform", "linf", 0.2, box=box)
        slow = attacks.fgsm(model, batch.x, batch.y, start, eps=0.2, alpha=0.25, box=box)
        ours = attacked(model, FGSMAT(eps=0.2, clip_to_box=box), batch).x_adv
        assert ours is not None
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
        assert float((ours - batch.x).abs().max()) == pytest.approx(0.2, abs=1e-12)
        outside[box] = int(((ours < 0) | (ours > 1)).sum())
    assert outside[True] == 0
    assert outside[False] > 10


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "alpha_ratio"),
    [("linf", "linf", 0.1, 1.25), ("linf", "linf", 0.1, 0.75), ("l2", "l2-rice", 0.8, 1.25)],
)
def test_the_attack_is_the_loop_over_pixels_run_once(
    assert_attack_is_the_pixel_loop: Check, norm: str, geometry: str, eps: float, alpha_ratio: float, box: bool
) -> None:
    objective = FGSMAT(norm=norm, eps=eps, alpha_ratio=alpha_ratio, clip_to_box=box)  # type: ignore[arg-type]
    settings = {"eps": eps, "step_size": alpha_ratio * eps, "steps": 1, "geometry": geometry, "box": box}
    assert_attack_is_the_pixel_loop(objective, goal="ce", **settings)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_pgd_at_with_one_step_of_five_quarters_of_the_radius(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, gradients: Gradients, norm: str
) -> None:
    one_step = PGDAT(norm=norm, eps=0.08, steps=1, step_size=1.25 * 0.08)  # type: ignore[arg-type]
    found = []
    for objective in (FGSMAT(norm=norm, eps=0.08), one_step):  # type: ignore[arg-type]
        model = tiny_net()
        batch = attacked(model, objective, batch_of(dtype=torch.float32))
        loss = objective(model, batch).total()
        found.append([batch.x_adv, loss, *gradients(model, loss)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("box", [True, False])
def test_value_and_gradients_are_the_formula_at_the_attacked_images(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, assert_loss_is_the_formula: Check, box: bool, soft: bool
) -> None:
    objective = FGSMAT(eps=0.1, clip_to_box=box)
    batch = attacked(tiny_net(dtype=torch.float64), objective, batch_of(soft=soft))
    labels = batch.soft.tolist() if batch.soft is not None else None
    assert_loss_is_the_formula(objective, batch, partial(losses.mean_cross_entropy, soft=labels))


def test_from_the_image_itself_a_step_of_the_radius_is_plain_fgsm(tiny_net: Net, batch_of: BatchOf) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    x = batch.x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), batch.y), x)
    attack = replace(FGSMAT(eps=0.1, alpha_ratio=1.0).attack(batch), start="zero")
    ours = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
    torch.testing.assert_close(ours, (batch.x + 0.1 * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_the_step_is_the_ratio_or_the_given_length() -> None:
    assert FGSMAT(eps=0.1).step == pytest.approx(0.125)
    assert FGSMAT(eps=0.1, alpha_ratio=0.875).step == pytest.approx(0.0875)
    assert FGSMAT(eps=0.1, alpha_ratio=0.0).step == 0
    assert FGSMAT(eps=0.1, step_size=0.02).step == 0.02
    assert FGSMAT(eps=0.1, step_size=0.02, alpha_ratio=0.2).step == pytest.approx(0.02)
    assert FGSMAT(eps=8 / 255, step_size=10 / 255, alpha_ratio=1.25).step == pytest.approx(10 / 255)


def test_a_ratio_that_contradicts_the_step_is_refused() -> None:
    message = r"fgsm-at: step_size must be 1\.25 of eps, or left out, got "
    with pytest.raises(ConfigError, match=message + r"'0\.02'") as error:
        FGSMAT(eps=0.1, step_size=0.02, alpha_ratio=1.25)
    assert (error.value.owner, error.value.field) == ("fgsm-at", "step_size")
    with pytest.raises(ConfigError, match=message + "'2/255'"):
        read_composition("fgsm-at(alpha=2/255, alpha_ratio=1.25)")


def test_more_than_one_step_is_another_objective() -> None:
    with pytest.raises(ConfigError, match=r"fgsm-at: steps must be 1, got 2\. Take pgd-at for more steps"):
        FGSMAT(steps=2)
