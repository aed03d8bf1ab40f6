from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from robustfair.objectives import PGDAT, Standard, Trades
from robustfair.values import Batch

Net = Callable[..., nn.Module]


def batch_of(b: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=(x + 0.1).clamp(0, 1))


def test_the_loss_is_clean_cross_entropy_and_reads_no_attack(tiny_net: Net) -> None:
    batch = batch_of()
    loss = Standard()(tiny_net(), batch)
    expected = nn.functional.cross_entropy(tiny_net()(batch.x), batch.y)
    assert loss.total().item() == expected.item()
    assert Standard().attack(batch) is None
    assert loss.out.adv is None
    assert "x_adv" not in Standard.reads


def test_terms_are_what_the_class_says(tiny_net: Net) -> None:
    for objective in (Standard(), PGDAT(), Trades()):
        assert set(objective(tiny_net(), batch_of()).terms) == objective.terms
