"""Small networks and small data sets, built in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.runs import CFA, TINY
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset
from robustfair.models.modes import attacking
from robustfair.objectives import Objective, Trades
from robustfair.runs.recipe import read_recipe
from robustfair.runs.run import train
from robustfair.training.state import TrainState
from robustfair.values import Attack, Batch, ClassTally, seeded_generator


class TinyNet(nn.Module):
    """Convolution, batch norm with statistics that no batch has, ReLU, dropout, 2x2 mean pooling, head."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x.to(self.conv.weight.dtype))))
        return self.head(self.pool(self.dropout(h)).flatten(1))


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., TinyNet]:
    """A function that builds a network from a seed; with `dtype=torch.float64` it computes in float64 on any input."""

    def build(
        *, channels: int = 1, classes: int = 3, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> TinyNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = TinyNet(channels, classes, dropout)
            nn.init.normal_(model.norm.running_mean, std=0.2)
            nn.init.uniform_(model.norm.running_var, 0.5, 1.5)
            nn.init.uniform_(model.norm.weight, 0.5, 1.5)
            nn.init.normal_(model.norm.bias, std=0.3)
            nn.init.normal_(model.head.weight, std=1.0)
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def tiny_data() -> Callable[..., ImageDataset]:
    """A function that builds images of the given class counts: a pattern per class under noise."""

    def build(
        counts: Sequence[int] = (12, 12, 12), *, channels: int = 1, size: int = 6, noise: float = 60.0, seed: int = 0
    ) -> ImageDataset:
        rng = torch.Generator().manual_seed(seed)
        shape = (channels, size, size)
        patterns = torch.randint(40, 216, (len(counts), *shape), generator=rng).float()
        labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
        labels = labels[torch.randperm(len(labels), generator=rng)]
        images = patterns[labels] + noise * torch.randn(len(labels), *shape, generator=rng)
        return ImageDataset(
            images=images.clamp(0, 255).to(torch.uint8),
            labels=labels,
            class_names=tuple(f"class {c}" for c in range(len(counts))),
            name="tiny",
        )

    return build


HELD = ClassTally(torch.tensor([[4, 1, 0], [0, 3, 0], [0, 0, 4]]), torch.tensor([[1, 1, 2], [2, 2, 0], [1, 1, 2]]))
"""What a run that is none measures: four images of each class, of which 4, 3, 4 are right, under attack 1, 2, 2."""


@dataclass
class StandInRun:
    """What a method may see of a run, without one."""

    model: nn.Module
    objective: Objective
    num_classes: int
    epochs: int = 10
    epoch: int = 0
    step: int = 0
    train: ClassTally | None = None
    methods: tuple[str, ...] = ()
    groups: Tensor | None = None
    images: tuple[Tensor, ...] = ()
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0
    validation: ClassTally = HELD
    lr_share: float = 1.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def labels(self) -> Tensor:
        return torch.cat([batch.y for batch in self.batches("train")])

    @property
    def finished(self) -> bool:
        return self.epoch >= self.epochs

    def validate(self, steps: int = 10) -> ClassTally:
        return self.validation

    def batches(self, split: str, attack: Callable[[Batch], Any] | None = None) -> Iterator[Batch]:
        """`images` with the classes in turn, in either split; under several attacks, they are other images of it."""
        for x in self.images:
            y = torch.arange(len(x)) % self.num_classes
            batch = Batch(x=x, y=y, index=torch.arange(len(x)), seed=0)
            if attack is not None:
                batch = self.objective.prepare(batch, self.networks)
                made = attack(batch)
                if isinstance(made, Attack):
                    chosen = replace(made, mode="eval")
                    batch = replace(batch, x_adv=pgd(self.model, x, y, chosen, batch.rng("measure")))
                else:
                    views = {name: x.flip(0) for name in made}
                    batch = replace(batch, x_adv=views.pop("x_adv"), views=views)
            yield batch

    def predict(self, x: Tensor) -> Tensor:
        with attacking(self.model, "eval"), torch.no_grad():
            return self.model(x)

    def total(self, part: Tensor) -> Tensor:
        return part

    def rng(self, name: str) -> torch.Generator:
        return seeded_generator("cpu", self.seed, self.epoch, self.step, name)


@pytest.fixture(scope="session")
def stand_in_run(tiny_net: Callable[..., TinyNet]) -> Callable[..., StandInRun]:
    """A function that builds a run of three classes; `hits` and `count` per class make its tally."""

    def build(
        *,
        model: nn.Module | None = None,
        objective: Objective | None = None,
        hits: Sequence[int] | None = None,
        count: Sequence[int] = (),
        **rest: object,
    ) -> StandInRun:
        train = None
        if hits is not None:
            right = torch.diag(torch.tensor(hits))
            train = ClassTally(robust_pred_true=right + torch.diag(torch.tensor(count) - right.diagonal()).roll(1, 0))
        return StandInRun(model or tiny_net(), objective or Trades(), 3, train=train, **rest)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def differences() -> Callable[[TrainState, TrainState], list[str]]:
    """A function that names what is not bit for bit the same in two states of a run; clock times do not count."""

    def flat(state: TrainState) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": state.epoch, "step": state.step}
        groups: dict[str, Mapping[str, Tensor]] = {"weights": state.weights, "optimizer": state.optimizer}
        groups |= {f"method {name}": values for name, values in state.methods.items()}
        groups |= {f"network {name}": values for name, values in {**state.networks, **state.frozen}.items()}
        groups |= {f"export {name}": values for name, values in state.exports.items()}
        if state.best is not None:
            groups["best"] = state.best.weights
            found["chosen"] = (state.best.candidate, state.best.epoch, state.best.score)
        found |= {f"{group}/{name}": tensor for group, values in groups.items() for name, tensor in values.items()}
        clock = ("seconds", "images_per_second")
        found["history"] = [{k: v for k, v in record.items() if k not in clock} for record in state.history]
        return found

    def compare(a: TrainState, b: TrainState) -> list[str]:
        one, two = flat(a), flat(b)
        missing = one.keys() ^ two.keys()
        return sorted(missing | {key for key in one.keys() & two.keys() if not _same(one[key], two[key])})

    return compare


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(read_recipe(CFA, TINY), out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run that a test may write into; decoded images are cached elsewhere."""
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(trained, tmp_path / "run")
