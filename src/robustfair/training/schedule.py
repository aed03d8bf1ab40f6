"""How long, how fast and in what batches: epochs, learning rate over time, the optimizer and its constants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import nn

from robustfair.config import FAST_SCHEDULE, Bounds, Count, Curve, NonNegative, config, require
from robustfair.errors import ConfigError
from robustfair.models.head import find_head

MOMENTUM_CYCLE = 0.1
Fraction = Annotated[float, Bounds(gt=0, lt=1)]
HEAD_PARTS = {"head": ("weight", "bias"), "head.weight": ("weight",), "head.bias": ("bias",)}


@config
class Schedule:
    """An optimizer under one of four learning-rate curves.

    Attributes:
        epochs: passes over the training images.
        lr: largest learning rate.
        kind: "multistep" as in the papers (times `gamma` at each milestone, whole epochs, 0-based), "cosine" to 0,
            "one-cycle" (linear up over the first `warmup` part of the run, linear down to 0), or "constant"; the middle
            two move every step.
        milestones: fractions of the run (0.5, 0.75: epochs 100 and 150 of 200).
        gamma: factor at a milestone.
        warmup: share of the steps on which a one-cycle curve rises.
        batch_size: images per step.
        optimizer: "sgd", as in all the papers, or "adam" (betas 0.9 and 0.999).
        momentum, nesterov: of SGD.
        cycle_momentum: under a one-cycle curve, SGD's momentum falls by 0.1 while the rate rises and comes back while
            it falls, as PyTorch's cyclic scheduler does unless told otherwise, and so the code of FGSM-AT.
        weight_decay: added to the gradient of every parameter, as in the papers' codes.
        only: names of the parameters to train, "head" for those of the last linear map, "head.weight" and "head.bias"
            for one of them; everything else, batch norm included, stays as it is.
    """

    epochs: Count = 200
    lr: NonNegative = 0.1
    kind: Curve = "multistep"
    milestones: Annotated[
        tuple[Annotated[float, Bounds(gt=0, lt=1)], ...], Bounds(allowed="fractions of the run in (0, 1)")
    ] = (0.5, 0.75)
    gamma: NonNegative = 0.1
    warmup: Fraction = 0.4
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    nesterov: bool = False
    cycle_momentum: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        no_momentum = self.nesterov and self.momentum == 0
        require(not no_momentum, "schedule", "nesterov", allowed="false where momentum is 0", got=self.nesterov)
        cycles = self.kind == "one-cycle" and self.lr > 0
        cycles = cycles and self.optimizer == "sgd" and self.momentum >= MOMENTUM_CYCLE
        allowed = f"false, or one-cycle and sgd with a rate above 0 and a momentum of at least {MOMENTUM_CYCLE}"
        require(cycles or not self.cycle_momentum, "schedule", "cycle_momentum", allowed=allowed, got=True)

    @classmethod
    def fast(cls, **changes: Any) -> Schedule:
        """The schedule that a recipe calls `fast`, with some of its fields changed.

        >>> Schedule.fast(epochs=15).kind
        'one-cycle'
        """
        values = {"kind" if key == "schedule" else key: value for key, value in FAST_SCHEDULE.items()}
        return cls(**values | changes)

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer on `parameters`, at the largest rate; SGD as one kernel on CUDA."""
        parameters = list(parameters)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True if parameters and parameters[0].is_cuda else None,
        )

    def lr_at(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """Learning rate of 0-based `step` within 0-based `epoch`.

        >>> [Schedule(epochs=200).lr_at(epoch, 0, 1) for epoch in (99, 100, 149, 150)]
        [0.1, 0.010000000000000002, 0.010000000000000002, 0.0010000000000000002]
        """
        if self.kind == "constant":
            return self.lr
        if self.kind == "multistep":
            rounding = 1e-9
            passed = sum(epoch >= milestone * self.epochs - rounding for milestone in self.milestones)
            return self.lr * self.gamma**passed
        progress = (epoch * steps_per_epoch + step + 1) / (self.epochs * steps_per_epoch)
        if self.kind == "cosine":
            before = progress - 1 / (self.epochs * steps_per_epoch)
            return self.lr * 0.5 * (1 + math.cos(math.pi * before))
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))

    def momentum_at(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """SGD's momentum at 0-based `step` within 0-based `epoch`.

        >>> cyclic = Schedule(epochs=5, kind="one-cycle", cycle_momentum=True)
        >>> [round(cyclic.momentum_at(epoch, 0, 1), 2) for epoch in range(5)]
        [0.85, 0.8, 0.83, 0.87, 0.9]
        """
        if not self.cycle_momentum:
            return self.momentum
        return self.momentum - MOMENTUM_CYCLE * self.lr_at(epoch, step, steps_per_epoch) / self.lr

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters to train by name.

        Raises:
            ConfigError: `only` names a parameter the model does not have.
            ModelError: it names the head, and the model has no linear one.
        """
        parameters = dict(model.named_parameters())
        if not self.only:
            return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        chosen: set[str] = set()
        for name in self.only:
            if name in parameters:
                chosen.add(name)
            elif name in HEAD_PARTS:
                wanted = [getattr(find_head(model), part) for part in HEAD_PARTS[name]]
                chosen |= {known for known, parameter in parameters.items() if any(parameter is w for w in wanted)}
            else:
                known = ", ".join(["head", *list(parameters)[-4:]])
                raise ConfigError("schedule", "only", allowed=f"names of parameters, such as {known}", got=name)
        return {name: parameter for name, parameter in parameters.items() if name in chosen}
