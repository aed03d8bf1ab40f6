"""What a check is, and the parts that checks are made of: tolerances, moved batches, weights moved by a rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row
from benchmarks.workload import synthetic
from robustfair.attacks.pgd import STARTS
from robustfair.data import ImageDataset
from robustfair.values import Attack, Batch

FACTOR = 8
"""Three bits: kernels add up in other orders, and round in other places."""
UNIT = {"float64": 2.0**-52, "float32": 2.0**-23}
"""One rounding, relative."""
OUTSIDE = 1e-6
"""By how much `pgd` lets a point lie outside the ball: what its docstring promises."""
HALF = 0.5
"""No tolerance is above it: two directions that have nothing in common are more than 1 apart."""


@dataclass(frozen=True)
class Check:
    """One comparison. A difference that is no number does not pass."""

    name: str
    against: str
    difference: float
    tolerance: float = 0.0

    def row(self) -> Row:
        """As a line of a table."""
        passes = "yes" if self.difference <= self.tolerance else "NO"
        return {"check": self.name, "passes": passes, **{k: v for k, v in vars(self).items() if k != "name"}}


@dataclass(frozen=True)
class Setting:
    """Where checks run: the device, in which sizes, and whether compiled ways are among them."""

    device: str
    small: bool = False
    compiled: bool = True

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


def data_of(count: int) -> ImageDataset:
    """Random images, of one class after another."""
    return replace(synthetic(count), labels=torch.arange(count) % 10)


def moved(batch: Batch, device: str) -> Batch:
    """The batch on a device."""
    there: dict[str, Any] = {key: value.to(device) for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **there)


def nudge(model: nn.Module, by: float) -> None:
    """Multiply every weight by 1 + `by`, up or down as it was drawn, in place."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            sign = 2 * torch.randint(2, parameter.shape, generator=draw) - 1
            parameter.mul_(1 + by * sign.to(parameter))


def shaken(model: nn.Module, dtype: str = "float64") -> nn.Module:
    """A copy with every weight moved by one rounding of the type."""
    copy = deepcopy(model)
    nudge(copy, UNIT[dtype])
    return copy


@contextmanager
def starts_from_cpu() -> Iterator[None]:
    """Within it random starts are drawn on the CPU in float64 and moved, by the seed of the given stream."""
    before = dict(STARTS)

    def drawn(start: Callable[[Tensor, Attack, torch.Generator], Tensor]) -> Any:
        def draw(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
            stream = torch.Generator().manual_seed(rng.initial_seed())
            here = replace(attack, eps=attack.eps.cpu().double())
            return start(x.cpu().double(), here, stream).to(x)

        return draw

    STARTS.update({name: drawn(start) for name, start in before.items()})
    try:
        yield
    finally:
        STARTS.update(before)


def apart(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    wanted = wanted.detach().cpu().double()
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())


def middle(found: Tensor, wanted: Tensor) -> float:
    """The same of the median image."""
    parts = zip(found.detach().cpu().double(), wanted.detach().cpu().double(), strict=True)
    return float(torch.stack([(one - two).norm() / two.norm() for one, two in parts]).median())


def largest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of a pixel."""
    return float((found.cpu().double() - wanted.cpu().double()).abs().max())


def patterns(count: int) -> ImageDataset:
    """16x16 colour images of ten classes: one pattern a class and as much noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    coarse = 0.6 * (torch.rand(10, 3, 4, 4, generator=draw) - 0.5)
    means = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = 0.5 * (torch.rand(count, 3, 16, 16, generator=draw) - 0.5)
    images = (255 * (0.5 + means[labels] + noise).clamp(0, 1)).byte()
    names = tuple(str(label) for label in range(10))
    return ImageDataset(images=images, labels=labels, class_names=names, name="patterns", augment="none")
