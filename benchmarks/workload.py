"""What the benchmarks run: a network, images, and our own step of adversarial training without anything around it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.config import Precision
from robustfair.data import ImageDataset, evaluation_batches, load_dataset
from robustfair.execution.live import live_program
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import numerics
from robustfair.models.build import create_model
from robustfair.models.head import laid_out
from robustfair.objectives import Objective
from robustfair.training.engine import Engine
from robustfair.training.schedule import Schedule
from robustfair.values import Batch, derive_seed

SYNTHETIC = "synthetic"
CHEAP = ("small-cnn", 8)
"""Name and width of a network for measurements over many images, where the network is not the point."""
LR = 0.01
"""Small enough that repeated steps on few or random images stay finite; the cost of a step does not depend on it."""


def build(name: str, width: int | None, *, device: torch.device | str = "cpu", in_channels: int = 3) -> nn.Module:
    """A network for ten classes with weights that are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(name, width=width, in_channels=in_channels).to(device)


def initialised(name: str, width: int | None, data: ImageDataset, seed: int) -> nn.Module:
    """A network for the classes and channels of `data`, with the weights that a run of this seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        return create_model(name, num_classes=data.num_classes, in_channels=data.images.shape[1], width=width)


def default_data() -> str:
    """CIFAR-10 where `ROBUSTFAIR_DATA` tells of a copy, else random images."""
    return "cifar10" if os.environ.get("ROBUSTFAIR_DATA") else SYNTHETIC


def load(data: str, part: str, count: int | None = None) -> ImageDataset:
    """The first `count` images of a part of a data set, or random 32x32 images with random labels.

    Raises:
        RobustFairError: as `robustfair.load_dataset`.
    """
    if data == SYNTHETIC:
        return synthetic(count or 1000)
    found = load_dataset(data).parts[part]
    return found if count is None else found.subset(torch.arange(min(count, len(found))))


def synthetic(count: int) -> ImageDataset:
    """Random 32x32 colour images of ten classes, augmented as CIFAR-10 is."""
    draw = torch.Generator().manual_seed(0)
    return ImageDataset(
        images=torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw),
        labels=torch.randint(10, (count,), generator=draw),
        class_names=tuple(str(label) for label in range(10)),
        name=SYNTHETIC,
        augment="crop-flip",
    )


def one_batch(size: int, device: torch.device | str) -> Batch:
    """A batch of random images on `device`, in the memory format that our loader gives."""
    return next(evaluation_batches(synthetic(size).to(device), size))


@contextmanager
def as_in_fit(device: torch.device | str) -> Iterator[None]:
    """The scope in which `fit` runs its steps."""
    with kept_memory(device), numerics(deterministic=False):
        yield


@contextmanager
def as_usual(device: torch.device | str) -> Iterator[None]:
    """The scope of everybody else, in a process of their own: timed convolutions on CUDA as well."""
    with numerics(deterministic=False):
        yield


class Step:
    """Attack, loss, backward pass and update: what `fit` does per batch, and nothing else that it does.

    Args:
        model: copied; the copy is trained.
        kernels: attack on our kernels where they can be had, as `fit` does.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        precision: Precision,
        compile: bool,
        device: torch.device | str,
        batch_size: int,
        kernels: bool = True,
    ) -> None:
        self.model = deepcopy(model)
        x = one_batch(2, device).x
        called = laid_out(self.model, x).train()
        program = live_program(called, x)[0] if kernels and precision == "fp32" and x.device.type == "cpu" else None
        self.objective = objective
        given: dict[str, Any] = {"precision": precision, "compile": compile, "program": program}
        self.engine = Engine(called, device=device, batch_size=batch_size, **given)
        self.optimizer = Schedule(lr=LR).build_optimizer(self.model.parameters())

    def __call__(self, batch: Batch) -> Tensor:
        """One step on `batch`; its loss, before the update, still on the device."""
        attack = self.objective.attack(batch)
        if attack is not None:
            batch = replace(batch, x_adv=self.engine.attack(batch, attack))
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch that is attacked already."""
        return self.objective(self.engine, batch).total()


def ways(precisions: Sequence[Precision], *, compiled: bool) -> dict[str, tuple[Precision, bool]]:
    """Name -> (precision, compile): how ours runs.

    >>> list(ways(["fp32", "bf16"], compiled=True))
    ['ours fp32', 'ours fp32 compiled', 'ours bf16', 'ours bf16 compiled']
    """
    found = {}
    for precision in precisions:
        found[f"ours {precision}"] = (precision, False)
        if compiled:
            found[f"ours {precision} compiled"] = (precision, True)
    return found
