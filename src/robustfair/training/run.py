"""The run as methods see it, and the counters it keeps on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from robustfair.attacks.predict import tally, tally_batches
from robustfair.data.datasets import ImageDataset
from robustfair.data.loader import Loader, evaluation_batches
from robustfair.errors import ConfigError
from robustfair.models.modes import attacking
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.training.engine import Engine
from robustfair.values import Attack, AttackOn, AttacksOn, Batch, ClassTally, Loss, Model, seeded_generator

EVALUATION_BATCH = 500


@dataclass
class TrainingRun:
    """Implements `robustfair.methods.base.Run` for `fit`; its counters advance as training does."""

    model: nn.Module
    engine: Engine
    networks: Mapping[str, Model]
    trainable: Mapping[str, nn.Parameter]
    objective: Objective
    methods: tuple[str, ...]
    loader: Loader
    held: ImageDataset | None
    epochs: int
    weight_decay: float
    seed: int
    epoch: int = 0
    step: int = 0
    lr_share: float = 1.0
    train: ClassTally | None = None
    groups: Tensor | None = field(init=False, repr=False)
    device: torch.device = field(init=False)
    labels: Tensor = field(init=False, repr=False)
    num_classes: int = field(init=False)
    _on: Model | None = field(default=None, repr=False)
    _validated: dict[int, tuple[tuple[int, ...], ClassTally]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.labels, self.num_classes = self.loader.dataset.labels, self.loader.dataset.num_classes
        self.device, groups = self.labels.device, self.loader.dataset.groups
        self.groups = None if groups is None else torch.tensor(groups, device=self.device)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.epochs

    def validate(self, steps: int = 10) -> ClassTally:
        written = tuple(tensor._version for tensor in self.model.state_dict(keep_vars=True).values())
        if self._validated.get(steps, ((), None))[0] != written:
            self._validated[steps] = (written, self.measure(steps))
        return self._validated[steps][1]

    def measure(self, steps: int = 10) -> ClassTally:
        """Clean and robust counts of the current weights on the validation split (PGD at the objective's radius)."""
        objective, attack_on = self.objective, None
        if isinstance(objective, AdversarialObjective):

            def attack_on(batch: Batch) -> Attack:
                return replace(objective.evaluation_attack(batch), steps=steps)

        images = self.batches("validation")
        with self.engine.searched() as search:
            counted = tally_batches(self.engine.eager, images, self.num_classes, attack_on, search=search)
        return counted.over(self.total)

    def batches(
        self, split: Literal["train", "validation"], attack: AttackOn | AttacksOn | None = None
    ) -> Iterator[Batch]:
        for batch in self._images(split):
            if attack is None:
                yield batch
                continue
            batch, views = self.objective.prepare(batch, self.networks), {}
            made = attack(batch)
            for name, chosen in ({"x_adv": made} if isinstance(made, Attack) else made).items():
                stream = "measure" if name == "x_adv" else f"measure/{name}"
                views[name] = self.engine.attack(batch, replace(chosen, mode="eval"), stream=stream)
            yield replace(batch, x_adv=views.pop("x_adv", None), views=views)

    def _images(self, split: Literal["train", "validation"]) -> Iterator[Batch]:
        if split == "train":
            return self.loader.epoch(self.epoch)
        if self.held is None:
            raise ConfigError("fit", "validation", allowed="a share of each class: a method measures on it", got=0)
        return evaluation_batches(self.held, EVALUATION_BATCH, memory_format=self.loader.memory_format)

    def attacked(self, batch: Batch, attack: Attack, name: str) -> Tensor:
        return self.engine.attack(batch, attack, stream=f"attack/{name}")

    def forward(self, x: Tensor) -> Tensor:
        return (self.engine if self._on is None else self._on)(x)

    @contextmanager
    def forwarding(self, model: Model) -> Iterator[None]:
        """Within it `forward` calls `model`: a loss that is taken on other weights takes all its passes on them."""
        before, self._on = self._on, model
        try:
            yield
        finally:
            self._on = before

    def predict(self, x: Tensor) -> Tensor:
        with attacking(self.engine.eager, "eval"), torch.no_grad():
            return self.engine.eager(x)

    def total(self, part: Tensor) -> Tensor:
        return part

    def rng(self, name: str) -> torch.Generator:
        return seeded_generator(self.device, self.seed, "run", self.epoch, self.step, name)


class EpochStatistics:
    """Sums of one epoch, per class, on the device: adding to them never waits for it.

    Everything comes from what the step computed anyway: the logits of the loss, the attack's radii, the loss's
    coefficients.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.tally = ClassTally()
        self._count = torch.zeros(num_classes, device=device)
        self._sums: dict[str, Tensor] = {}
        self._loss = torch.zeros((), device=device, dtype=torch.float64)
        self._first_bad_step = torch.full((), -1, device=device, dtype=torch.int64)

    def add(self, batch: Batch, attack: Attack | None, loss: Loss, total: Tensor, step: int) -> None:
        """Count one step; `total` is the scalar loss, `step` its 0-based number within the epoch."""
        out = loss.out
        clean = None if out.clean is None else out.clean.detach().argmax(1)
        robust = None if out.adv is None else out.adv.detach().argmax(1)
        self.tally = self.tally + tally(clean, robust, batch.y, self.num_classes)
        values = {f"coef.{name}": coef for name, coef in loss.coef.items() if coef.ndim} | {"weight": loss.weight}
        if attack is not None:
            values["eps"] = attack.eps
        ones = torch.ones_like(batch.y, dtype=self._count.dtype)
        self._count.index_add_(0, batch.y, ones)
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(self._count)
            self._sums[name].index_add_(0, batch.y, value.detach().to(self._count.dtype))
        total = total.detach().double()
        self._loss += total * batch.y.shape[0]
        bad = ~torch.isfinite(total) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def first_bad_step(self) -> int | None:
        """0-based step of the first loss that was not finite; waits for the device."""
        step = int(self._first_bad_step)
        return None if step < 0 else step

    def loss(self) -> float:
        """Mean loss per image."""
        return float(self._loss / self._count.sum())

    def per_class(self) -> dict[str, list[float | None]]:
        """Means per class of radius, coefficients and weight; None for a class that was not seen."""
        return {name: finite_or_none(sums / self._count) for name, sums in sorted(self._sums.items())}


def finite_or_none(values: Tensor) -> list[float | None]:
    """Values as JSON has them: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
