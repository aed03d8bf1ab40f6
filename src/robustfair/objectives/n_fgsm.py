"""N-FGSM (de Jorge et al. 2022, "Make some noise"): one step from strong noise, and no way back into the ball.

    eta uniform in the ball of radius k eps, k = 2
    delta = eta + alpha sign(gradient of CE at x + eta), alpha = eps; no projection onto the ball of radius eps
    min over weights of the mean of CE(f(x + delta), y)

The paper finds that stronger noise, and the step taken whole, keep one step from overfitting to itself at radii where
`fgsm-at` does. Training images lie up to (k + 1) eps away; what is audited and validated is eps.

Written from the formula above; the authors' code was not consulted. The formula clips nothing; here images stay in
[0, 1] before and after the step, as in `fgsm-at` (`clip_to_box=False` is the formula), and batch norm is in eval mode
during the attack (`attack_mode`). Under l2, which the paper does not try, noise and step are those of `fgsm-at`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from robustfair.config import NonNegative, Whole, config, require
from robustfair.losses import MaximiseCE
from robustfair.objectives.base import AdversarialObjective, label_loss_at_attacked
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Loss, Model


@OBJECTIVES.register("n-fgsm")
@config
class NFGSM(AdversarialObjective):
    """min over weights of the mean of CE at one step of eps from noise of up to k eps, outside the ball too.

    Attributes:
        step_size: length of the step; None takes eps.
        steps: 1; more of them are `pgd-at`.
        k: radius of the noise in units of eps; 0 is plain FGSM.
        clip_to_box: keep the images in [0, 1]. False trains beyond it, as the formula reads.
    """

    name: ClassVar[str] = "n-fgsm"
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "soft", "shift"})
    steps: Whole = 1
    k: NonNegative = 2.0
    clip_to_box: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps == 1, self.name, "steps", allowed="1", got=self.steps, hint="Take pgd-at for more steps")

    @property
    def step(self) -> float:
        return self.radius if self.step_size is None else self.step_size

    def attack(self, batch: Batch) -> Attack:
        start = "uniform" if self.clip_to_box else "uniform-unclipped"
        one_step = self.attack_with(batch, MaximiseCE(), start, box=self.clip_to_box)
        return replace(one_step, start_radius=self.k, ball=False)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        return label_loss_at_attacked(model, batch)
