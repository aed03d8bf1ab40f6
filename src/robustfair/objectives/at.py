"""PGD adversarial training (Madry et al. 2018): cross-entropy at the attacked image alone.

Departures from the authors' code: ten steps, the value of their configuration file (the paper's text has seven); batch
norm in eval mode during the attack by default (`attack_mode="train"` is theirs); no clean pass, so no clean tally.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from robustfair.config import config
from robustfair.losses import MaximiseCE
from robustfair.objectives.base import AdversarialObjective, label_loss_at_attacked
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Loss, Model


@OBJECTIVES.register("pgd-at")
@config
class PGDAT(AdversarialObjective):
    """min over weights of the mean of max over the ball of CE(f(x'), y).

    Attributes:
        start: "uniform" inside the ball, clipped to [0, 1]; "zero" starts at x; "gauss001" at x plus 0.001 Gaussian
            noise, as in the code of DAFA; "input-gradient" at x plus the gradient of the batch's mean loss, which is
            what the public code of IDBH trains from.
    """

    name: ClassVar[str] = "pgd-at"
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "soft", "shift"})
    start: Literal["uniform", "zero", "gauss001", "input-gradient"] = "uniform"

    def attack(self, batch: Batch) -> Attack:
        return self.attack_with(batch, MaximiseCE(), self.start)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        return label_loss_at_attacked(model, batch)
