"""Nothing between the first and the last step of an epoch asks a device for a value or hands it one.

Either would have the host wait for the GPU. Here the tensors lie on the `meta` device, which has shapes and no values:
an `.item()` fails there by itself, and what copies from the host is seen by its operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robustfair import values
from robustfair.attacks.pgd import FreezeFooled, pgd
from robustfair.data import ImageDataset
from robustfair.data import loader as loading
from robustfair.data.augment.crops import AUGMENTATIONS
from robustfair.data.loader import Loader
from robustfair.losses import MaximiseCE, MaximiseMargin
from robustfair.methods import (
    ABSLD,
    AWP,
    CCM,
    CCR,
    CSR,
    DAFA,
    EMA,
    FAAL,
    FAWA,
    FRL,
    SWA,
    WAT,
    AVmixup,
    ClassBalanced,
    FairARD,
    FairTAT,
    FriendlyAT,
    LabelSmoothing,
    LfF,
    LogitAdjustment,
    Method,
    VarianceFAT,
)
from robustfair.methods.compose import Plan, compose
from robustfair.methods.fair_ard import StillRight
from robustfair.objectives import (
    ARD,
    BAT,
    FGSMAT,
    MART,
    NFGSM,
    PGDAT,
    RSLAD,
    AdversarialObjective,
    ARoW,
    Standard,
    Trades,
)
from robustfair.objectives.base import Objective
from robustfair.objectives.taught import TaughtObjective
from robustfair.training import Schedule
from robustfair.training import run as running
from robustfair.training.engine import Engine
from robustfair.training.loop import Training
from robustfair.training.run import EpochStatistics
from robustfair.values import Attack

DEVICE = torch.device("meta")
ASKS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "repeat_interleave")
"""Operators whose result depends on values in a way that the host has to know."""
HANDS = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)
"""What makes a tensor out of numbers of the host."""


class Generator(torch.Generator):
    """A generator that says it is on the device; nothing is drawn there."""

    device = DEVICE


class Asked(TorchDispatchMode):
    """Fails where an operator needs the value of a tensor, or copies between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ASKS, f"{func} waits for the device"
        if name in ("_to_copy", "copy_"):
            devices = {value.device for value in args if isinstance(value, Tensor)} | {kwargs.get("device") or DEVICE}
            assert devices == {DEVICE}, f"{func} copies between host and device"
        return func(*args, **kwargs)


class Handed(TorchFunctionMode):
    """Fails where numbers of the host become a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HANDS, f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[None]:
    """Within it nothing may wait for the device."""
    with Handed(), Asked():
        yield


@pytest.fixture(autouse=True)
def generators(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(device: torch.device | str, *keys: object) -> torch.Generator:
        made = Generator() if torch.device(device) == DEVICE else torch.Generator()
        return made.manual_seed(values.derive_seed(*keys))

    for module in (values, loading, running):
        monkeypatch.setattr(module, "seeded_generator", seeded)


def network(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    return tiny_net().to(DEVICE)


def test_the_watch_sees_every_kind_of_wait() -> None:
    x = torch.empty(3, device=DEVICE)
    for waits in (
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0], device=DEVICE),
        lambda: torch.zeros(3).to(DEVICE),
    ):
        with pytest.raises((AssertionError, RuntimeError)), watched():
            waits()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_wait_for_nothing(name: str) -> None:
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    rng = Generator()
    with watched():
        assert AUGMENTATIONS[name](images, rng).shape == images.shape


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "l2"},
        {"norm": "l2", "box_first": True},
        {"keep": "best"},
        {"restarts": 3, "goal": MaximiseMargin()},
        {"stop": FreezeFooled()},
        {"stop": FreezeFooled(), "keep": "inside"},
        {"watch": StillRight()},
        {"watch": StillRight(), "stop": FreezeFooled()},
        {"noise": 0.01},
        {"start": "input-gradient"},
        {"start": "gauss001-clipped"},
        {"ball": False, "start_radius": 2.0},
    ],
    ids=str,
)
def test_attacks_wait_for_nothing(tiny_net: Callable[..., nn.Module], changes: dict[str, Any]) -> None:
    model, x = network(tiny_net), torch.empty(5, 1, 6, 6, device=DEVICE)
    y, eps = torch.empty(5, dtype=torch.int64, device=DEVICE), torch.empty(5, device=DEVICE)
    rng = Generator()
    with watched():
        attack = Attack(**{"eps": eps, "step_size": eps / 4, "steps": 3, "goal": MaximiseCE()} | changes)
        assert pgd(model, x, y, attack, rng).shape == x.shape


COMPOSITIONS: list[tuple[Objective, tuple[Method, ...]]] = [
    (Standard(), (LabelSmoothing(),)),
    (Standard(), (LogitAdjustment(), LfF(), EMA())),
    (PGDAT(steps=2), (ClassBalanced(kind="focal"),)),
    (PGDAT(steps=2), (CCM(begin=1), LabelSmoothing(), EMA(ramp=True))),
    (PGDAT(steps=2), (FriendlyAT(tau=1, omega=0.01), EMA())),
    (Trades(steps=2), (FairTAT(), FAWA())),
    (PGDAT(steps=2), (FairTAT(compat="official"), FriendlyAT(tau=1))),
    (PGDAT(steps=2), (FriendlyAT(variant="cfa"), SWA(begin=0, per="step"))),
    (PGDAT(steps=2), (AVmixup(),)),
    (PGDAT(steps=2), (FAAL(), AWP())),
    (PGDAT(steps=2), (FAAL(over="class", measure="cross-entropy"),)),
    (Trades(steps=2), (DAFA(begin=1),)),
    (Trades(steps=2), (VarianceFAT(goal="ce"),)),
    (Trades(steps=2), (AWP(), EMA())),
    (Trades(steps=2, attack_mode="train_frozen"), (CCM(begin=1), CCR(begin=1))),
    (MART(steps=2), (AWP(mode="inplace"),)),
    (ARoW(steps=2), ()),
    (FGSMAT(), ()),
    (Trades(steps=2), (FRL(), EMA())),
    (PGDAT(steps=2), (WAT(),)),
    (RSLAD(steps=2), (ABSLD(), FairARD())),
    (ARD(steps=2, alpha=0.5), (FairARD(), FriendlyAT(tau=1))),
    (NFGSM(), (CSR(mode="paper", gamma=0.1, adversary="training"), EMA())),
    (Trades(steps=2), (CSR(), AWP())),
    (Standard(), (CSR(keep_base_weight=True),)),
    (BAT(steps=2), (CSR(), CCM(begin=1))),
]


def on_device(data: ImageDataset) -> ImageDataset:
    """The data set without the look at its labels that making one takes."""
    for name in ("images", "labels"):
        object.__setattr__(data, name, getattr(data, name).to(DEVICE))
    return data


def name_of(part: object) -> str:
    if isinstance(part, Objective):
        return part.name
    return "+".join(method.name for method in part) or "alone" if isinstance(part, tuple) else str(part)


@pytest.mark.parametrize(("objective", "methods"), COMPOSITIONS, ids=name_of)
def test_steps_of_training_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
    tiny_net: Callable[..., nn.Module],
    tiny_data: Callable[..., ImageDataset],
    objective: AdversarialObjective,
    methods: tuple[Method, ...],
) -> None:
    model = network(tiny_net).train()
    if isinstance(objective, TaughtObjective):
        objective = replace(objective, teacher=network(tiny_net))
    schedule = Schedule(batch_size=4, epochs=2)
    beside = {name: net.to(DEVICE) for name, net in compose(objective, methods).networks(tiny_net(), 0).items()}
    monkeypatch.setattr(Plan, "networks", lambda plan, model, seed: beside)
    training = Training(
        model=model,
        engine=Engine(model, device=DEVICE),
        plan=compose(objective, methods),
        schedule=schedule,
        loader=Loader(on_device(tiny_data()), 4, augment="crop-flip", seed=0),
        held=on_device(tiny_data()),
        select="last",
        seed=0,
    )
    with monkeypatch.context() as patch:  # boundaries may wait, and count labels
        patch.setattr(torch, "equal", lambda a, b: True)
        patch.setattr(torch, "bincount", lambda labels, minlength: torch.arange(minlength) + 1)
        training.begin(None)
    statistics = EpochStatistics(3, DEVICE)
    batches = training.loader.epoch(0)
    training._step(next(batches), statistics, 0)
    with watched():
        for step, batch in enumerate(batches, 1):
            training._step(batch, statistics, step)
    assert training.run.step == training.loader.steps_per_epoch > 2
