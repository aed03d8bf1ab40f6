from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import losses
from reference import n_fgsm as reference
from robustfair.attacks.pgd import pgd
from robustfair.errors import ConfigError
from robustfair.losses import MaximiseCE
from robustfair.methods import CCM
from robustfair.objectives import FGSMAT, NFGSM
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]


def test_defaults_are_one_step_of_eps_from_noise_of_two_eps(batch_of: BatchOf) -> None:
    attack = NFGSM().attack(batch_of(2))
    assert attack.eps.tolist() == attack.step_size.tolist() == [8 / 255] * 2
    assert (attack.steps, attack.start, attack.start_radius, attack.mode) == (1, "uniform", 2.0, "eval")
    assert (attack.goal, attack.ball, attack.box) == (MaximiseCE(), False, True)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize(
    ("norm", "eps", "k"), [("linf", 0.1, 2.0), ("linf", 0.1, 0.5), ("linf", 0.1, 0.0), ("l2", 0.8, 2.0)]
)
def test_the_attack_is_the_step_from_the_noise_pixel_by_pixel(
    tiny_net: Net,
    batch_of: BatchOf,
    attacked: Attacked,
    start_of: Callable[..., Tensor],
    norm: Any,
    eps: float,
    k: float,
    box: bool,
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    start = start_of(batch, "uniform", norm, k * eps, box=box)
    slow = reference.attack(model, batch.x, batch.y, start, step_size=eps, norm=norm, box=box)
    ours = attacked(model, NFGSM(norm=norm, eps=eps, k=k, clip_to_box=box), batch).x_adv
    assert ours is not None
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)


def test_it_leaves_the_ball_and_reaches_no_further_than_noise_and_step(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked
) -> None:
    model, batch = tiny_net(dtype=torch.float64), batch_of(64)
    for k in (0.0, 0.5, 2.0):
        free = attacked(model, NFGSM(eps=0.1, k=k, clip_to_box=False), batch).x_adv
        assert free is not None
        farthest = float((free - batch.x).abs().max())
        assert 0.95 * (k + 1) * 0.1 < farthest <= (k + 1) * 0.1 + 1e-12
        boxed = attacked(model, NFGSM(eps=0.1, k=k), batch).x_adv
        assert boxed is not None
        assert bool(((boxed >= 0) & (boxed <= 1)).all())
        assert bool(((free < 0) | (free > 1)).any())


def test_without_noise_it_is_plain_fgsm(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    x = batch.x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), batch.y), x)
    ours = attacked(model, NFGSM(eps=0.1, k=0.0), batch).x_adv
    torch.testing.assert_close(ours, (batch.x + 0.1 * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_noise_of_one_eps_projected_back_is_fgsm_at(tiny_net: Net, batch_of: BatchOf) -> None:
    """It differs from `fgsm-at` in three numbers and the projection, and in nothing else."""
    batch = batch_of()
    ours = replace(NFGSM(eps=0.1, step_size=0.125, k=1.0).attack(batch), ball=True)
    assert ours == replace(FGSMAT(eps=0.1).attack(batch), eps=ours.eps, step_size=ours.step_size)
    ends = [pgd(tiny_net(), batch.x, batch.y, a, batch.rng("attack")) for a in (ours, FGSMAT(eps=0.1).attack(batch))]
    assert torch.equal(*ends)


@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradients_are_the_formula_at_the_attacked_images(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, assert_loss_is_the_formula: Callable[..., None], soft: bool
) -> None:
    batch = attacked(tiny_net(dtype=torch.float64), NFGSM(eps=0.1), batch_of(soft=soft))
    labels = batch.soft.tolist() if batch.soft is not None else None
    assert_loss_is_the_formula(NFGSM(eps=0.1), batch, partial(losses.mean_cross_entropy, soft=labels))


def test_a_radius_of_a_class_scales_its_noise(
    tiny_net: Net, batch_of: BatchOf, stand_in_run: Callable[..., Any]
) -> None:
    """Under `ccm`, which sets the radius alone; the step stays what it is, as in every attack."""
    batch, run = (
        batch_of(9),
        stand_in_run(objective=NFGSM(eps=0.1, step_size=0.0), epoch=1, hits=(0, 2, 4), count=(4,) * 3),
    )
    ccm = CCM(lam=0.5, begin=1)
    attack = ccm.attack(run.objective.attack(batch), batch, ccm.at_epoch({}, run), run)
    away = (
        pgd(tiny_net(), batch.x, batch.y, replace(attack, box=False, start="uniform-unclipped"), batch.rng("a"))
        - batch.x
    )
    reach = away.flatten(1).abs().amax(1)
    for label, scale in enumerate((0.5, 1.0, 1.5)):
        of_class = float(reach[batch.y == label].max())
        assert 0.9 * 0.2 * scale < of_class <= 0.2 * scale


def test_the_step_is_eps_or_the_given_length() -> None:
    assert NFGSM(eps=0.1).step == 0.1
    assert NFGSM(eps=0.1, step_size=0.02).step == 0.02
    assert NFGSM(norm="l2").step == pytest.approx(128 / 255)


def test_more_than_one_step_is_another_objective() -> None:
    with pytest.raises(ConfigError, match=r"n-fgsm: steps must be 1, got 2\. Take pgd-at for more steps"):
        NFGSM(steps=2)
