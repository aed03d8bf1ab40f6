from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import avmixup, losses
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import soft_cross_entropy
from robustfair.methods import EMA, LabelSmoothing, compose
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.values import Batch, Loss

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

BETA = 6.0
OBJECTIVES = (Standard(), PGDAT(eps=0.1), FGSMAT(eps=0.1), Trades(eps=0.1, beta=BETA))


def uniform(y: int, amount: float, num_classes: int) -> list[float]:
    return [(1 - amount) * (c == y) + amount / num_classes for c in range(num_classes)]


def off_class(y: int, amount: float, num_classes: int) -> list[float]:
    return [1 - amount if c == y else amount / (num_classes - 1) for c in range(num_classes)]


KINDS = {"uniform": uniform, "off-class": off_class}


@pytest.fixture
def batch(tiny_net: Net, tiny_data: Data) -> Batch:
    clean = next(evaluation_batches(tiny_data((4, 3, 2)), 9))
    clean = replace(clean, x=clean.x.double())
    x_adv = pgd(tiny_net(dtype=torch.float64), clean.x, clean.y, PGDAT(eps=0.1).attack(clean), clean.rng("attack"))
    return replace(clean, x_adv=x_adv)


def smoothed(run: Run, model: nn.Module, objective: Objective, batch: Batch, method: LabelSmoothing) -> Loss:
    plan = compose(objective, [method])
    stand_in = run(objective=objective)
    states = plan.at_epoch({}, stand_in)
    return plan.loss(model, plan.examples(batch, states, stand_in), states, stand_in)


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.3, 1.0])
def test_value_and_gradient_are_the_formula(
    tiny_net: Net, stand_in_run: Run, batch: Batch, objective: Objective, kind: Any, amount: float
) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    ours = smoothed(stand_in_run, model, objective, batch, LabelSmoothing(amount=amount, kind=kind)).total()
    labels = [KINDS[kind](y, amount, 3) for y in batch.y.tolist()]
    on_clean = objective.name in ("standard", "trades")
    passes = [twin(batch.x if on_clean else batch.x_adv)]
    value, at_logits = avmixup.loss(passes[0].tolist(), labels)
    at_passes = [torch.tensor(at_logits, dtype=torch.float64)]
    if objective.name == "trades":
        passes.append(twin(batch.x_adv))
        rows = list(zip(passes[0].tolist(), passes[1].tolist(), strict=True))
        share = BETA / len(rows)
        value += share * sum(losses.kl(*row) for row in rows)
        at_passes[0] += share * torch.tensor([losses.kl_gradient_clean(*row) for row in rows], dtype=torch.float64)
        at_passes.append(share * torch.tensor([losses.kl_gradient_adv(*row) for row in rows], dtype=torch.float64))
    assert ours.item() == pytest.approx(value, rel=1e-6)
    expected = torch.autograd.grad(passes, list(twin.parameters()), at_passes)
    for found, slow in zip(gradients(model, ours), expected, strict=True):
        torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("kind", KINDS)
def test_amount_zero_is_hard_labels(
    tiny_net: Net, stand_in_run: Run, batch: Batch, objective: Objective, kind: Any
) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    ours = smoothed(stand_in_run, model, objective, batch, LabelSmoothing(amount=0.0, kind=kind)).total()
    hard = objective(twin, batch).total()
    assert torch.equal(ours, hard)
    for found, expected in zip(gradients(model, ours), gradients(twin, hard), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def labels_of(run: Run, num_classes: int, **config: Any) -> Tensor:
    """(C, C): the soft label of every class."""
    stand_in = run()
    stand_in.num_classes = num_classes
    return LabelSmoothing(**config).at_epoch({}, stand_in)["labels"]


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 1.0])
def test_uniform_is_the_smoothing_built_into_pytorch(stand_in_run: Run, num_classes: int, amount: float) -> None:
    labels = labels_of(stand_in_run, num_classes, amount=amount)
    logits = torch.randn(num_classes, num_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    built_in = F.cross_entropy(logits, torch.arange(num_classes), reduction="none", label_smoothing=amount)
    torch.testing.assert_close(soft_cross_entropy(logits, labels.double()), built_in, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5])
def test_off_class_is_uniform_with_more(stand_in_run: Run, num_classes: int, amount: float) -> None:
    off = labels_of(stand_in_run, num_classes, amount=amount, kind="off-class")
    more = labels_of(stand_in_run, num_classes, amount=amount * num_classes / (num_classes - 1))
    torch.testing.assert_close(off, more, rtol=0, atol=1e-6)
    torch.testing.assert_close(off.sum(1), torch.ones(num_classes, dtype=torch.float64))
    torch.testing.assert_close(off[1], torch.tensor(off_class(1, amount, num_classes), dtype=torch.float64))


def test_the_attack_and_its_images_stay_as_they_are(stand_in_run: Run, batch: Batch) -> None:
    plan = compose(PGDAT(), [LabelSmoothing()])
    run = stand_in_run()
    states = plan.at_epoch({}, run)
    assert replace(plan.examples(batch, states, run), soft=None) == batch
    assert LabelSmoothing().hooks() == ["examples", "at_epoch"]


@pytest.mark.parametrize("objective", [MART(), ARoW()], ids=lambda objective: objective.name)
def test_it_is_refused_where_soft_labels_are_not_read(objective: Objective) -> None:
    reason = f"label-smoothing sets batch.soft, but {objective.name} does not read soft: drop label-smoothing"
    with pytest.raises(ConflictError, match=reason):
        compose(objective, [EMA(), LabelSmoothing()])


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("amount", -0.1), ("amount", 1.5), ("amount", float("nan")), ("kind", "off")],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^label-smoothing: {field} must be"):
        LabelSmoothing(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^label-smoothing: {field} must be"):
        read_composition(f"pgd-at + label-smoothing({field}={wrong})")
