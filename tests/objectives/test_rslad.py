from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from reference import distillation as reference
from robustfair.losses import MaximiseSoftCE
from robustfair.objectives import RSLAD
from robustfair.objectives.rslad import rslad_loss
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Check = Callable[..., None]


def test_defaults(batch_of: BatchOf) -> None:
    batch = batch_of(2)
    attack = RSLAD().attack(batch)
    assert attack.eps.tolist() == [8 / 255] * 2
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
    assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "gauss001", "eval", MaximiseSoftCE())
    assert attack.target is not None
    assert torch.equal(attack.target, torch.softmax(batch.teacher["distil"], 1))


@pytest.mark.parametrize(
    ("norm", "geometry", "eps", "step"), [("linf", "linf", 0.1, 0.02), ("l2", "l2-rice", 0.5, 0.1)]
)
def test_the_attack_climbs_the_divergence_from_the_teacher(
    assert_attack_is_the_pixel_loop: Check, batch_of: BatchOf, norm: Any, geometry: str, eps: float, step: float
) -> None:
    labels = torch.softmax(batch_of().teacher["distil"], 1)
    objective = RSLAD(norm=norm, eps=eps, step_size=step, steps=4)
    settings = {"eps": eps, "step_size": step, "steps": 4, "geometry": geometry, "target": labels}
    assert_attack_is_the_pixel_loop(objective, goal="soft", start="gauss001", **settings)


@pytest.mark.parametrize("over", ["mean", "sum"])
@pytest.mark.parametrize(("share", "eps_log"), [(1 / 6, 1e-5), (0.5, 0.0), (0.0, 1e-5), (1.0, 0.1)])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_and_gradients_are_the_formulas(
    batch_of: BatchOf, assert_loss_is_the_formula: Check, over: Any, share: float, eps_log: float, classes: int
) -> None:
    batch = batch_of(classes=classes)
    batch = replace(batch, x_adv=batch.x.flip(0))
    teacher = {"teacher_adv": batch.teacher["distil"].tolist(), "teacher_clean": batch.teacher["distil_clean"].tolist()}
    slow = partial(reference.rslad, **teacher, clean_share=share, eps_log=eps_log, over=over)
    objective = RSLAD(clean_share=share, eps_log=eps_log, kl_over=over)
    assert_loss_is_the_formula(objective, batch, slow, classes=classes)


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adv = z.clone().requires_grad_(True)
    loss = rslad_loss(z, adv, z, z, eps_log=0)
    assert loss.per_example().abs().max() < 1e-15
    assert torch.autograd.grad(loss.total(), adv)[0].abs().max() < 1e-15


def test_the_floor_moves_no_gradient_and_the_mean_is_the_sum_over_the_classes() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, adv, teacher = (torch.randn(4, 5, generator=rng, dtype=torch.float64).requires_grad_(True) for _ in range(3))
    plain, floored, summed = (
        rslad_loss(clean, adv, teacher.detach(), teacher.detach(), **given).total()
        for given in ({"eps_log": 0}, {}, {"kl_over": "sum"})
    )
    assert 0 < float(floored - plain) < 1e-5
    assert float(summed) == pytest.approx(5 * float(floored))
    one, two = (torch.autograd.grad(value, (clean, adv)) for value in (plain, floored))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_hard_labels_of_the_teacher_are_cross_entropy() -> None:
    """The limit of a teacher that is sure: D is the cross-entropy to its class, over the number of classes."""
    z, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.tensor([0, 1, 3])
    sure = 1e3 * nn.functional.one_hot(y, 4).double()
    loss = rslad_loss(z, z, sure, sure, eps_log=0).per_example()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(z, y, reduction="none") / 4)
