from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from reference import distillation as reference
from robustfair.errors import ConflictError
from robustfair.losses import MaximiseCE, cross_entropy
from robustfair.methods import LabelSmoothing, compose
from robustfair.objectives import ARD
from robustfair.objectives.ard import ard_loss
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Check = Callable[..., None]


def test_defaults(batch_of: BatchOf) -> None:
    attack = ARD().attack(batch_of(2))
    assert (ARD().alpha, ARD().temperature, ARD().kl_over) == (1, 30, "mean")
    assert attack.eps.tolist() == [8 / 255] * 2
    assert (attack.steps, attack.start, attack.mode) == (10, "uniform-unclipped", "eval")
    assert (attack.goal, attack.target) == (MaximiseCE(), None)


def test_the_attack_is_pgd_from_a_start_that_is_not_clipped(
    assert_attack_is_the_pixel_loop: Check, start_of: Callable[..., torch.Tensor], batch_of: BatchOf
) -> None:
    start = start_of(batch_of(), "uniform", "linf", 0.1, box=False)
    assert float(start.min()) < 0
    settings = {"eps": 0.1, "step_size": 0.02, "steps": 4, "geometry": "linf", "start": start}
    assert_attack_is_the_pixel_loop(ARD(eps=0.1, step_size=0.02, steps=4), goal="ce", **settings)


@pytest.mark.parametrize("over", ["mean", "sum"])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 30.0), (0.5, 30.0), (0.9, 1.0), (0.0, 5.0)])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_and_gradients_are_the_formulas(
    batch_of: BatchOf, assert_loss_is_the_formula: Check, over: Any, alpha: float, temperature: float, classes: int
) -> None:
    batch = batch_of(classes=classes)
    batch = replace(batch, x_adv=batch.x.flip(0))
    settings = {"alpha": alpha, "temperature": temperature}
    slow = partial(reference.ard, teacher=batch.teacher["distil"].tolist(), over=over, **settings)
    objective = ARD(kl_over=over, **settings)
    if alpha == 1:  # the clean pass moves batch norm, and nothing else
        batch_loss = objective(lambda x: x.flatten(1)[:, :classes], batch)
        assert set(batch_loss.terms) == {"distil"}
        assert batch_loss.out.clean is not None
        clean, adv = (x.flatten(1)[:, :classes].tolist() for x in (batch.x, batch.x_adv))
        assert batch_loss.total().item() == pytest.approx(slow(clean, adv, batch.y.tolist())[0], abs=1e-12)
        return
    assert_loss_is_the_formula(objective, batch, slow, classes=classes)


def test_without_distillation_it_is_standard_training_at_the_clean_image(batch_of: BatchOf) -> None:
    z = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = batch_of().y
    loss = ard_loss(z[0], z[1], z[1], cross_entropy(z[0], y), alpha=0)
    assert torch.equal(loss.per_example(), cross_entropy(z[0], y))


def test_a_label_term_without_weight_is_none_that_a_method_may_set() -> None:
    with pytest.raises(ConflictError, match=r"label-smoothing sets batch\.soft, but ard does not read soft"):
        compose(ARD(), [LabelSmoothing()])
    assert compose(ARD(alpha=0.9), [LabelSmoothing()]).objective.terms == {"distil", "label"}
    assert ARD().terms == {"distil"}
    assert ARD.terms == {"distil", "label"}
