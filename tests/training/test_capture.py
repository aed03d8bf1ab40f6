"""What is replayed reads the tensors of the attack at hand, and nothing of the one that was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tape import taped
from robustfair.attacks.pgd import Climbed, FreezeFooled, ascend, pgd, watched_pgd
from robustfair.config import Precision
from robustfair.data import ImageDataset
from robustfair.execution.precision import InPrecision
from robustfair.losses import MaximiseCE, MinimiseCE
from robustfair.methods import AWP, CCM, CCR, EMA, FairARD, FriendlyAT, Method
from robustfair.methods.fair_ard import StillRight
from robustfair.models import create_model
from robustfair.objectives import PGDAT, AdversarialObjective, Trades
from robustfair.training import Schedule, engine, fit
from robustfair.training.capture import MOST, CapturedAscent, Tensors
from robustfair.values import Attack, Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]


recorded: list[object] = []


def record(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """Records on a tape, and counts."""
    recorded.append(run)
    return taped(run)


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    recorded.clear()


def batch_of(count: int, seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=rng).contiguous(memory_format=torch.channels_last)
    return Batch(x=x, y=torch.randint(10, (count,), generator=rng), index=torch.arange(count), seed=seed)


def attack_on(batch: Batch, **changes: Any) -> Attack:
    """An attack whose radii and steps differ from image to image and from batch to batch."""
    rng = torch.Generator().manual_seed(batch.seed + 100)
    eps = 0.02 + 0.1 * torch.rand(len(batch.y), generator=rng)
    step_size = eps * torch.rand(len(batch.y), generator=rng)
    return replace(Attack(eps=eps, step_size=step_size, steps=3, goal=MaximiseCE()), **changes)


def network(name: str = "preact-resnet18") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, width=2).to(memory_format=torch.channels_last).train()


def moved(model: nn.Module) -> None:
    """Other weights in the same places, as an update leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05).add_(0.01)


CASES: dict[str, Callable[[Batch], Attack]] = {
    "linf": attack_on,
    "l2": lambda batch: attack_on(batch, norm="l2"),
    "l2, box first": lambda batch: attack_on(batch, norm="l2", box_first=True),
    "no box": lambda batch: attack_on(batch, box=False),
    "watch": lambda batch: attack_on(batch, watch=StillRight()),
    "no ball": lambda batch: attack_on(batch, ball=False, start_radius=2.0),
    "target": lambda batch: attack_on(batch, goal=MinimiseCE(), target=(batch.y + 1 + batch.seed) % 10),
    "clean logits": lambda batch: replace(Trades(steps=3).attack(batch), eps=attack_on(batch).eps),
    "batch statistics": lambda batch: attack_on(batch, mode="train_frozen"),
    "best point": lambda batch: attack_on(batch, keep="best"),
    "restarts": lambda batch: attack_on(batch, restarts=2),
    "noise": lambda batch: attack_on(batch, noise=0.01),
    "stop rule": lambda batch: attack_on(batch, stop=FreezeFooled()),
    "no step": lambda batch: attack_on(batch, steps=0),
}
RECORDED = ("linf", "l2", "l2, box first", "no box", "no ball", "watch", "target", "clean logits", "batch statistics")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_attack_is_that_of_the_loop_whatever_changes(case: str, precision: Precision) -> None:
    model = network()
    called = InPrecision(model, precision, "cpu", bundled=False)
    captured = CapturedAscent(ascend, model, record=record)
    for seed, count in enumerate((5, 5, 3, 5, 3)):
        batch = batch_of(count, seed)
        attack = CASES[case](batch)
        expected, wanted = watched_pgd(called, batch.x, batch.y, attack, batch.rng("attack"))
        found, seen = watched_pgd(called, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured)
        assert torch.equal(found, expected)
        assert seen is wanted is None if attack.watch is None else torch.equal(seen, wanted)  # type: ignore[arg-type]
        assert attack.steps == 0 or not torch.equal(found, batch.x)
        moved(model)
    assert len(recorded) == (2 if case in RECORDED else 0)  # one for each size


def test_attacks_that_differ_in_what_is_no_tensor_have_recordings_of_their_own() -> None:
    model = network()
    captured = CapturedAscent(ascend, model, record=record)
    batch = batch_of(4, 0)
    variants: tuple[dict[str, Any], ...] = ({}, {"steps": 2}, {"norm": "l2"}, {"box": False}, {"ball": False})
    for attack in (attack_on(batch, **changes) for changes in (*variants, {"watch": StillRight()})):
        for _ in range(2):
            expected = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
            assert torch.equal(pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured), expected)
    assert len(recorded) == len(variants) + 1


def test_an_attack_is_recorded_anew_where_weights_or_modes_have_changed_places() -> None:
    model = network()
    captured = CapturedAscent(ascend, model, record=record)
    batch = batch_of(4, 0)
    attack = attack_on(batch, mode="train_frozen")

    def compare() -> None:
        expected = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
        assert torch.equal(pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured), expected)

    compare()
    first = next(model.parameters())
    first.data = first.data * 2
    compare()
    assert len(recorded) == 2
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()  # frozen from here on
    compare()
    assert len(recorded) == 3


@dataclass(frozen=True)
class Scaled:
    """A goal with a number in it, such as one that changes with the epochs."""

    factor: float
    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return MaximiseCE()(logits * self.factor, clean, y)


def test_recordings_of_goals_that_come_no_more_are_given_up() -> None:
    model = network("small-cnn")
    captured = CapturedAscent(ascend, model, record=record)
    batch = batch_of(2, 0)
    for factor in range(1, MOST + 4):
        attack = attack_on(batch, goal=Scaled(factor), steps=1)
        expected = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
        assert torch.equal(pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured), expected)
    assert len(captured._captured) == MOST


@pytest.mark.parametrize(
    ("objective", "methods", "records"),
    [
        (PGDAT(steps=2), (CCM(begin=1), EMA(decay=0.5)), True),
        (Trades(steps=2, attack_mode="train_frozen"), (CCM(begin=1), CCR(begin=1)), True),
        (Trades(steps=2), (AWP(), EMA(decay=0.5)), True),
        (PGDAT(steps=2), (FairARD(),), True),
        (PGDAT(steps=2), (FriendlyAT(tau=1, omega=0.01),), False),
    ],
    ids=["class-wise radii", "shared clean pass", "perturbed weights", "steps counted", "stop rule and noise"],
)
def test_a_run_with_recordings_is_the_run_without(
    monkeypatch: pytest.MonkeyPatch,
    tiny_net: Net,
    tiny_data: Data,
    objective: AdversarialObjective,
    methods: tuple[Method, ...],
    records: bool,
) -> None:
    def trained() -> dict[str, Tensor]:
        options: dict[str, Any] = {"methods": methods, "schedule": Schedule(epochs=3, batch_size=7)}
        found = fit(tiny_net(), tiny_data(), objective, validation=0, select="last", **options)
        return dict(found.state.weights) | {f"{k}/{n}": t for k, e in found.state.exports.items() for n, t in e.items()}

    plain = trained()
    monkeypatch.setattr(engine, "CapturedAscent", partial(CapturedAscent, record=record))
    monkeypatch.setattr(import_module("robustfair.training.fit"), "Engine", partial(engine.Engine, graphs=True))
    replayed = trained()
    assert bool(recorded) is records
    assert all(torch.equal(replayed[name], tensor) for name, tensor in plain.items())


def test_a_recording_that_holds_a_constant_would_be_found() -> None:
    """The tape is as strict as a graph: a radius that Python read when it recorded stays what it was."""

    def careless(model: Any, x: Any, y: Any, clean: Any, x_adv: Tensor, attack: Attack, *rest: Any) -> Any:
        return Climbed(x_adv + float(attack.eps[0]), rest[0])

    model = network("small-cnn")
    captured = CapturedAscent(careless, model, record=record)
    for seed, same in ((0, True), (1, False)):
        batch = batch_of(3, seed)
        attack = attack_on(batch)
        expected = pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=careless)
        found = pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured)
        assert torch.equal(found, expected) is same
