"""FGSM-AT with a random start (Wong et al. 2020, "Fast is better than free"): one long step from inside the ball.

    delta_0 uniform in the ball, then into the box        (Algorithm 3)
    delta = clip(delta_0 + alpha sign(gradient of CE at x + delta_0)), alpha = 1.25 eps
    min over weights of the mean of CE(f(x + delta), y)

Departures from the paper: images stay in [0, 1] before and after the step, as in the authors' `train_fgsm.py`; the text
clips to the ball alone (`clip_to_box=False`). Departures from their code: batch norm in eval mode during the attack
(`attack_mode="train"` is theirs). Their run of 15 epochs moves the momentum against the learning rate
(`cycle_momentum` of the schedule), and ends when PGD accuracy on a batch collapses; here the validation split selects
the epoch, measured by PGD-10 with its own step. Over long runs 1.25 eps overfits to the one step ("catastrophic
overfitting"); Rice et al. take 0.75 or 0.875.
"""

from __future__ import annotations

from math import isclose
from typing import ClassVar

from robustfair.config import NonNegative, Whole, config, require
from robustfair.grammar import format_value
from robustfair.losses import MaximiseCE
from robustfair.objectives.base import AdversarialObjective, label_loss_at_attacked
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Loss, Model

ALPHA_RATIO = 1.25


@OBJECTIVES.register("fgsm-at")
@config
class FGSMAT(AdversarialObjective):
    """min over weights of the mean of CE at one step of alpha_ratio eps from a uniform start.

    Attributes:
        steps: 1; more of them are `pgd-at`.
        alpha_ratio: length of the step in units of eps; None takes 1.25 unless `step_size` is given.
        clip_to_box: keep the images in [0, 1]. False trains beyond it, as the paper's algorithm reads.
    """

    name: ClassVar[str] = "fgsm-at"
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "soft", "shift"})
    steps: Whole = 1
    alpha_ratio: NonNegative | None = None
    clip_to_box: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps == 1, self.name, "steps", allowed="1", got=self.steps, hint="Take pgd-at for more steps")
        if self.alpha_ratio is None:
            return
        agree = self.step_size is None or isclose(self.step_size, self.alpha_ratio * self.radius, rel_tol=1e-6)
        allowed = f"{self.alpha_ratio:g} of eps, or left out"
        hint = "Give a step size for this eps too, or one of the two"
        require(agree, self.name, "step_size", allowed=allowed, got=format_value(self.step_size), hint=hint)

    @property
    def step(self) -> float:
        if self.step_size is not None and self.alpha_ratio is None:
            return self.step_size
        return (ALPHA_RATIO if self.alpha_ratio is None else self.alpha_ratio) * self.radius

    def attack(self, batch: Batch) -> Attack:
        start = "uniform" if self.clip_to_box else "uniform-unclipped"
        return self.attack_with(batch, MaximiseCE(), start, box=self.clip_to_box)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        return label_loss_at_attacked(model, batch)
