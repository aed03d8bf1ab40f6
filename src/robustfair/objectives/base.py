"""What an objective is: a frozen config with an attack to train on and a loss of named terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from robustfair.config import Norm, Whole, config
from robustfair.losses import MaximiseCE, label_loss
from robustfair.values import Attack, Batch, Forward, Goal, Loss, Mode, Model, default_eps, default_step


@config
class Objective(ABC):
    """Base of all objectives.

    Class attributes:
        name: the registered name.
        terms: names of the loss terms it yields ("label", "consistency", ...).
        reads: fields of the batch that it reads beyond x and y ("x_adv", "soft", "shift", "teacher"). A method that
            writes what nobody reads is refused.
        owns: fields of the attack that make it what it is ("attack.stop"): no method may set them.
        clean_pass: whether the loss runs the model on x itself; an attack that makes the same pass then shares it.
        label_at: the images whose label its term "label" asks for: "x", "x_adv", or a view by its name. Soft labels
            that belong to attacked images need "x_adv" here.
    """

    name: ClassVar[str]
    terms: ClassVar[frozenset[str]] = frozenset({"label"})
    reads: ClassVar[frozenset[str]] = frozenset()
    clean_pass: ClassVar[bool] = False
    label_at: ClassVar[str] = "x_adv"
    owns: ClassVar[frozenset[str]] = frozenset()

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Networks beside the model that label the images, such as a frozen teacher: (B, C, H, W) in [0, 1] to logits
        (B, C) of the classes of the run. That they do is checked before the first step, and they are saved with it."""
        return {}

    def prepare(self, batch: Batch, networks: Mapping[str, Model]) -> Batch:
        """The batch with what attack and loss read of `networks` ("objective/name"), before any method edits it."""
        return batch

    def attack(self, batch: Batch) -> Attack | None:
        """The attack to train on, before any method edits it; None trains on clean images."""
        return None

    def attacks(self, batch: Batch) -> dict[str, Attack]:
        """All attacks to train on, by what they make: "x_adv", and further views of the batch by their name."""
        attack = self.attack(batch)
        return {} if attack is None else {"x_adv": attack}

    def evaluation_attack(self, batch: Batch) -> Attack | None:
        """The attack to measure with, whatever is trained on; None measures clean images."""
        return None

    @abstractmethod
    def __call__(self, model: Model, batch: Batch) -> Loss:
        """The loss of a batch, per example and per term; `model` is in training mode."""


def label_loss_at_attacked(model: Model, batch: Batch) -> Loss:
    """The loss of objectives that train on the attacked images alone."""
    assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
    adv = model(batch.x_adv)
    return Loss.of(Forward(adv=adv), label=(label_loss(adv, batch), 1.0))


@config
class AdversarialObjective(Objective):
    """An objective that trains on attacked images within one threat model.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel units, at most 1 under linf; None becomes 8/255 under linf and 128/255 under l2.
        step_size: length of an attack step; None takes the default of the norm (see `step`).
        steps: attack steps.
        attack_mode: batch norm during the attack. "eval" is what TRADES, MART, ARoW and FAAL use and what the
            bag-of-tricks study found at least as good; the codes of Rice et al., CFA and FAIR-TAT use "train".
    """

    norm: Norm = "linf"
    eps: float | None = None
    step_size: float | None = None
    steps: Whole = 10
    attack_mode: Mode = "eval"

    reads: ClassVar[frozenset[str]] = frozenset({"x_adv"})

    def __post_init__(self) -> None:
        if self.eps is None:
            object.__setattr__(self, "eps", default_eps(self.norm))

    @property
    def radius(self) -> float:
        """eps, resolved."""
        assert self.eps is not None
        return self.eps

    @property
    def step(self) -> float:
        """Step in force: the given one, else eps/4 for linf (2/255 at 8/255) and 15/128 eps for l2 (Rice et al.)."""
        return default_step(self.norm, self.radius) if self.step_size is None else self.step_size

    def attack_with(self, batch: Batch, goal: Goal, start: str, **rest: Any) -> Attack:
        """This threat model as an attack on `batch`; `rest` are further fields of it."""
        return Attack(
            eps=torch.full_like(batch.x[:, 0, 0, 0], self.radius),
            step_size=torch.full_like(batch.x[:, 0, 0, 0], self.step),
            steps=self.steps,
            goal=goal,
            norm=self.norm,
            start=start,
            mode=self.attack_mode,
            **rest,
        )

    def evaluation_attack(self, batch: Batch) -> Attack:
        """PGD-10 on cross-entropy at this radius with the default step: for the validation split.

        A training attack may be one long step; measured by that, overfitting to it would look like robustness.
        """
        return Attack(
            eps=torch.full_like(batch.x[:, 0, 0, 0], self.radius),
            step_size=torch.full_like(batch.x[:, 0, 0, 0], default_step(self.norm, self.radius)),
            steps=10,
            goal=MaximiseCE(),
            norm=self.norm,
        )
