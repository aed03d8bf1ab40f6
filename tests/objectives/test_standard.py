from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from reference import losses
from robustfair.objectives import Standard
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]


def test_the_loss_is_clean_cross_entropy_and_reads_no_attack(tiny_net: Net, batch_of: BatchOf) -> None:
    batch = batch_of(dtype=torch.float32)
    batch = replace(batch, x_adv=(batch.x + 0.1).clamp(0, 1))
    loss = Standard()(tiny_net(), batch)
    expected = nn.functional.cross_entropy(tiny_net()(batch.x), batch.y)
    assert loss.total().item() == expected.item()
    assert Standard().attack(batch) is None
    assert loss.out.adv is None
    assert "x_adv" not in Standard.reads


@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradients_are_the_formula(
    batch_of: BatchOf, assert_loss_is_the_formula: Callable[..., None], soft: bool
) -> None:
    batch = batch_of(soft=soft)
    labels = batch.soft.tolist() if batch.soft is not None else None
    assert_loss_is_the_formula(Standard(), batch, partial(losses.mean_cross_entropy, soft=labels))
