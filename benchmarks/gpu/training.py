"""Checks of training: losses and gradients, whole runs, runs that go on, images, and that nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.check import (
    FACTOR,
    UNIT,
    Check,
    Setting,
    apart,
    data_of,
    moved,
    shaken,
    starts_from_cpu,
)
from benchmarks.gpu.passes import ATTACKS, attack_on
from benchmarks.workload import build
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.data.augment.crops import AUGMENTATIONS, CropFlip, Identity, crop_flip, to_unit
from robustfair.data.augment.idbh import IDBH, CropShift, Draws, Shifts, apply, crop_shift
from robustfair.data.loader import Loader
from robustfair.methods import AWP, CCM, CCR, EMA, SWA, FriendlyAT, LabelSmoothing, Method
from robustfair.objectives import FGSMAT, MART, PGDAT, AdversarialObjective, ARoW, Objective, Trades
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch

OBJECTIVES: tuple[AdversarialObjective, ...] = (PGDAT(), Trades(), MART(), ARoW(), FGSMAT())
RUNS: dict[str, tuple[Objective, tuple[Method, ...]]] = {
    "pgd-at, ccm, ema": (PGDAT(steps=3), (CCM(begin=1), EMA(decay=0.5))),
    "pgd-at, smoothing, swa": (PGDAT(steps=3), (LabelSmoothing(), SWA(begin=0))),
    "trades, ccm, ccr": (Trades(steps=3), (CCM(begin=1), CCR(begin=1))),
    "trades, batch statistics": (Trades(steps=3, attack_mode="train_frozen"), ()),
    "trades, awp, ema": (Trades(steps=3), (AWP(), EMA(decay=0.5))),
    "mart, friendly-at": (MART(steps=3), (FriendlyAT(tau=1),)),
    "arow": (ARoW(steps=3), ()),
}


def objectives(setting: Setting) -> list[Check]:
    """Loss and gradient of the weights on given attacked images, in float64."""
    size, checks = 8, []
    model = build("preact-resnet18", 2).double().train()
    batch = next(evaluation_batches(data_of(size), size))
    batch = replace(batch, x=batch.x.double(), x_adv=(batch.x.double() + 0.03).clamp(0, 1))
    for objective in OBJECTIVES:

        def taken(model: nn.Module, batch: Batch, objective: Objective = objective) -> Tensor:
            total = objective(model, batch).total()
            parts = torch.autograd.grad(total, list(model.parameters()))
            return torch.cat([total.detach().view(1), *(part.flatten() for part in parts)])

        wanted, nudged = taken(deepcopy(model), batch), taken(shaken(model), batch)
        found = taken(deepcopy(model).to(setting.device), moved(batch, setting.device))
        tolerance = FACTOR * max(apart(nudged, wanted), UNIT["float64"])
        checks.append(Check(f"loss and gradient, {objective.name}", "CPU float64", apart(found, wanted), tolerance))
    return checks


class Doubled(nn.Module):
    """A network that computes in float64 on float32 images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


def runs(setting: Setting) -> list[Check]:
    """What two epochs of several compositions do to weights and averages, a network in float64 on float32 images."""
    checks = []
    for name, (objective, methods) in RUNS.items():

        def change(
            model: nn.Module, device: str, objective: Objective = objective, methods: Sequence[Method] = methods
        ) -> Tensor:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with starts_from_cpu():
                state = trained(model, objective, methods, device)
            left = [(key, tensor) for part in (state.weights, *state.exports.values()) for key, tensor in part.items()]
            return torch.cat([(tensor.cpu() - before[key]).double().flatten() for key, tensor in left])

        first = Doubled(build("preact-resnet18", 2))
        wanted, nudged = change(deepcopy(first), "cpu"), change(shaken(first, "float32"), "cpu")
        found = change(deepcopy(first), setting.device)
        tolerance = FACTOR * max(apart(nudged, wanted), UNIT["float32"])
        checks.append(Check(f"what 6 steps change, {name}", "CPU float64", apart(found, wanted), tolerance))
    return checks


def resumes(setting: Setting) -> list[Check]:
    """A run that stops after an epoch and goes on against the whole one, bit for bit."""
    checks = []
    for name in ("pgd-at, ccm, ema", "trades, awp, ema"):
        states: list[TrainState] = []
        given = *RUNS[name], setting.device
        whole = trained(build("preact-resnet18", 2), *given, save=states.append)
        resumed = trained(build("preact-resnet18", 2), *given, resume=states[0])
        differ = sum(int((value != resumed.weights[key]).sum()) for key, value in whole.weights.items())
        differ += sum(int((value != resumed.exports["ema"][key]).sum()) for key, value in whole.exports["ema"].items())
        checks.append(Check(f"resumed, {name}: numbers", "the whole run", differ))
    return checks


def trained(model: nn.Module, objective: Objective, methods: Sequence[Method], device: str, **more: Any) -> TrainState:
    """The state after two epochs of three steps on the deterministic path."""
    options = {"schedule": Schedule(epochs=2, batch_size=8, lr=0.01), "validation": 0, "select": "last"}
    options |= {"augment": Identity(), "deterministic": True, "device": device, "methods": methods}
    return fit(model, data_of(24), objective, **options | more).state  # type: ignore[arg-type]


def images(setting: Setting) -> list[Check]:
    """Batches and augmentations with draws of the CPU, bit for bit."""
    data, size, checks = data_of(40), 16, []
    loaders = [Loader(data.to(device), size, augment=Identity(), seed=3) for device in ("cpu", setting.device)]
    differ = sum(
        int((one.x != two.x.cpu()).sum()) + int((one.y != two.y.cpu()).sum())
        for one, two in zip(*(loader.epoch(1) for loader in loaders), strict=True)
    )
    checks.append(Check("loader: pixels and labels", "CPU", differ))
    pixels, there = data.images, data.images.to(setting.device)
    for name, augmentation in AUGMENTATIONS.items():
        rng = torch.Generator().manual_seed(1)
        if isinstance(augmentation, CropFlip):
            draws = augmentation.draw(len(pixels), rng)
            given = [(draws[0] - 4, draws[1] - 4, draws[2], augmentation.pad_mode)]
            given.append(tuple(on(part, setting.device) for part in given[0]))
            wanted, found = to_unit(crop_flip(pixels, *given[0])), to_unit(crop_flip(there, *given[1]))
        elif isinstance(augmentation, CropShift):
            shifts = augmentation.draw(len(pixels), rng)
            wanted = to_unit(crop_shift(pixels, shifts))
            found = to_unit(crop_shift(there, on(shifts, setting.device)))
        elif isinstance(augmentation, IDBH):
            drawn = augmentation.draw(len(pixels), pixels.shape[2], pixels.shape[3], rng)
            wanted, found = apply(pixels, drawn), apply(there, on(drawn, setting.device))
        else:
            wanted, found = augmentation(pixels, rng), augmentation(there, rng)
        checks.append(Check(f"augmentation {name}: pixels", "CPU", int((wanted != found.cpu()).sum())))
    return checks


def on(value: Any, device: str) -> Any:
    """Draws on a device."""
    if isinstance(value, Shifts | Draws):
        return replace(value, **{name: on(part, device) for name, part in vars(value).items()})
    return value.to(device) if isinstance(value, Tensor) else value


def waits(setting: Setting) -> list[Check]:
    """Attacks, augmentations and steps of training under torch's error for whatever waits for the device."""
    size = 8 if setting.small else 64
    data = data_of(6 * size)
    model = build("preact-resnet18", 2 if setting.small else 16, device=setting.device)
    batch = next(evaluation_batches(data.to(setting.device), size))
    pixels = data.images[:size].to(setting.device)
    quiet, checks = torch.Generator(setting.device), []
    against = "none" if setting.cuda else "none, and a CPU is never waited for"

    def watched(name: str, run: Callable[[], object], scope: Callable[[], AbstractContextManager[None]]) -> None:
        reason = ""
        try:
            run()  # whatever is made once is made here
            with scope():
                run()
        except RuntimeError as error:
            reason = f" ({str(error).splitlines()[0]})"
        checks.append(Check(f"waits for the device, {name}{reason}", against, float(bool(reason))))

    for case in (*ATTACKS, "target"):
        attack = attack_on(batch, case)
        watched(case, lambda attack=attack: pgd(model, batch.x, batch.y, attack, quiet), no_waits(setting))  # type: ignore[misc]
    for name, augmentation in AUGMENTATIONS.items():
        watched(name, lambda change=augmentation: change(pixels, quiet), no_waits(setting))  # type: ignore[misc]
    for name, (objective, methods) in RUNS.items():
        watched(name, steps_without_waits(setting, data, size, objective, methods), nullcontext)
    return checks


def no_waits(setting: Setting) -> Callable[[], AbstractContextManager[None]]:
    """A scope in which what waits for the device is an error; on a CPU nothing is."""

    @contextmanager
    def scope() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return scope if setting.cuda else nullcontext


def steps_without_waits(
    setting: Setting, data: ImageDataset, size: int, objective: Objective, methods: Sequence[Method]
) -> Callable[[], object]:
    """Two epochs of `fit`, the last of them watched between its first step and its last, as it is run in earnest."""
    steps = len(data) // size

    def on_step(epoch: int, step: int) -> None:
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("error" if epoch == 1 and step < steps - 2 else "default")

    def run() -> object:
        options = {"schedule": Schedule(epochs=2, batch_size=size, lr=0.01), "validation": 0, "select": "last"}
        options |= {"device": setting.device, "on_step": on_step, "methods": methods}
        compiled = setting.compiled and not methods
        if compiled:
            options |= {"precision": "bf16", "compile": True}
        try:
            model = build("small-cnn", 16) if compiled else build("preact-resnet18", 2)
            return fit(model, data, objective, **options)  # type: ignore[arg-type]
        finally:
            if setting.cuda:
                torch.cuda.set_sync_debug_mode("default")

    return run
