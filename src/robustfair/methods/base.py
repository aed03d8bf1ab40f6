"""The protocol by which methods compose: networks, four edits, one scope, two ticks, one export.

A method is a frozen dataclass, its config. What changes over time is a flat dict of tensors that the trainer owns,
saves and hands back. Edits take a value and return a value. `compose` refuses what cannot act together before any
step is taken; while training, every edit is checked against the method's claims, so that claims cannot rot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from robustfair.objectives.base import Objective
from robustfair.values import Attack, AttackOn, AttacksOn, Batch, ClassTally, Loss, Model, State, StateDict


class LossAt(Protocol):
    """The loss of the current batch, evaluated on another model or on the same one with other weights."""

    def __call__(self, model: Model, *, edited: bool = True) -> Loss:
        """With the edits of all methods, or as the objective has it."""
        ...


class Run(Protocol):
    """What a method may see of the training run, and what it may have the run do."""

    model: nn.Module
    networks: Mapping[str, Model]
    """What objective and methods asked for in `networks`, as "method/name"; in the run's precision, with gradient."""
    objective: Objective
    methods: tuple[str, ...]
    """Names of the methods that act in the run, in list order."""
    device: torch.device
    """Where model and images are, and what a tick makes has to be."""
    labels: Tensor
    """(N,) of the training images; `batch.index` are rows of it."""
    num_classes: int
    groups: Tensor | None
    """(C,) super-class of each class, numbered from 0, where the data set has them, as CIFAR-100 does."""
    epochs: int
    epoch: int
    """Epochs completed, which is also the 0-based number of the epoch about to start."""
    step: int
    """Optimizer steps completed."""
    lr_share: float
    """Learning rate of the last step as a share of the schedule's largest; 1 before the first."""
    weight_decay: float
    """What the optimizer adds to the gradient, in units of the weights."""
    trainable: Mapping[str, nn.Parameter]
    """The parameters that the optimizer moves, by name; those of `networks` as "method/name//parameter"."""
    train: ClassTally | None
    """Counts of the epoch just completed, from the forward passes of training itself; None before the first."""

    @property
    def finished(self) -> bool:
        """Whether no epoch follows this boundary: a tick that prepares the next one has nothing to do."""
        ...

    def validate(self, steps: int = 10) -> ClassTally:
        """Clean and robust counts of the current weights on the validation split under PGD of so many steps.

        Computed once per boundary and number of steps. For methods that have "validation" in `needs`.
        """
        ...

    def batches(
        self, split: Literal["train", "validation"], attack: AttackOn | AttacksOn | None = None
    ) -> Iterator[Batch]:
        """The images of a split: those to train on as the coming epoch will see them, the held out ones as they are.

        Args:
            attack: gives `x_adv`, attacked in eval mode, and `views` too where it names several attacks, such as those
                of the objective; None leaves them out.
        """
        ...

    def attacked(self, batch: Batch, attack: Attack, name: str) -> Tensor:
        """(B, C, H, W) a further attack on a training batch, made as the trainer makes its own.

        Args:
            name: of the random stream that it draws from.
        """
        ...

    def forward(self, x: Tensor) -> Tensor:
        """(B, K) logits with gradient, of the model that the loss is being taken on, in the run's precision."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """(B, K) logits of the current weights in eval mode, without gradient."""
        ...

    def total(self, part: Tensor) -> Tensor:
        """The sum over all processes of a statistic of this one's images; differentiable.

        Every statistic of a batch or an epoch goes through it. With one process it is `part` itself.
        """
        ...

    def rng(self, name: str) -> torch.Generator:
        """A random stream on the run's device, keyed by seed, epoch, step and `name`; for ticks, as `Batch.rng`."""
        ...


class Method:
    """Base of all methods: every hook does nothing. A method overrides a few of them and nothing else.

    Class attributes:
        name: the registered name.
        claims: fields it edits ("attack.eps", "loss.label", "batch.soft", "gradient", "model", "export.ema") and roles
            it plays ("role.class_weight"). A property where the config decides. `extra` and `views` under its own name
            need no claim; `batch.teacher` is claimed whole.
        replaces: terms of the loss that it computes anew, so that what they were computed from is lost.
        needs: loss terms that must exist, "x_adv" for attacked images, "validation" for held out ones.
        labels_of: images that the soft labels it sets belong to; None for labels that hold for either.
        until_begin: what holds in the epochs before `begin`, for a method that has one; shown where it never comes.
        second_stage: whether it is made for a model that is robust already; a run from scratch then says so.
    """

    name: ClassVar[str]
    claims: ClassVar[frozenset[str]] = frozenset()
    replaces: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    labels_of: ClassVar[Literal["x", "x_adv"] | None] = None
    until_begin: ClassVar[str] = "it will never act"
    second_stage: ClassVar[bool] = False

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Networks beside the model, saved with the run: those with `requires_grad` train with it, others stay.

        Called with torch's own stream seeded by the run and the name of the method: starting weights come from there.
        """
        return {}

    def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
        """Edit, before the attack: x, y, soft labels, labels of a teacher, shift, extra."""
        return batch

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        """Edit: radius, step, goal, target, stop rule, watch (what it reads is `batch.watched` from then on)."""
        return attack

    def examples(self, batch: Batch, state: State, run: Run) -> Batch:
        """Edit, after the attack: x_adv, views, soft labels, shift, extra."""
        return batch

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        """Edit: coefficients, weight, an extra term."""
        return loss

    def around_gradient(self, run: Run, batch: Batch, loss_at: LossAt, state: State) -> AbstractContextManager[None]:
        """Scope of forward and backward; may move weights inside (restored from a copy) and edit .grad at the end."""
        return nullcontext()

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        """Tick after every optimizer step."""
        return state

    def at_epoch(self, state: State, run: Run) -> State:
        """Tick at every boundary: before the first epoch with {}, then after each."""
        return state

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        """Named weights to validate and save beside the raw ones, such as an average."""
        return {}

    def check_objective(self, objective: str) -> None:
        """Refuse an objective, by its name, that it cannot act on with its settings; called by `compose`.

        Raises:
            ConfigError: which setting the objective does not allow.
        """

    def check_classes(self, counts: Tensor, groups: Sequence[int] | None = None) -> None:
        """Refuse training images that it cannot act on; called before the first step.

        Args:
            counts: (C,) images of each class.
            groups: (C,) super-class of each, where the data set has them.

        Raises:
            ConfigError: a class that it needs has none, or its settings are for other classes.
        """

    def remark(self, epochs: int) -> str | None:
        """A sentence for the user if this config will do nothing, or something surprising, in a run of `epochs`."""
        begin = getattr(self, "begin", 0)
        if begin < epochs:
            return None
        return (
            f"{self.name} begins at epoch {begin} and this run ends after {epochs}: {self.until_begin}; "
            f"lower {self.name}(begin)"
        )

    def hooks(self) -> list[str]:
        """Names of the hooks this method overrides, in protocol order."""
        return [hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Method, hook)]


class Bundle(ABC):
    """A name for several methods that belong together: each of them acts where it can.

    A frozen dataclass, its config. `compose` puts the parts in its place, without those that the objective has no use
    for and those that set what another listed method sets already.

    Class attributes:
        name: the registered name.
        sets: setting of a part, as "fawa(begin)" -> the bundle's own that gives it, which a user is told of instead.
    """

    name: ClassVar[str]
    sets: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def parts(self) -> tuple[Method, ...]:
        """All of them, with the settings of the bundle."""


HOOKS = ("networks", "prepare", "attack", "examples", "loss", "around_gradient", "after_step", "at_epoch", "export")
