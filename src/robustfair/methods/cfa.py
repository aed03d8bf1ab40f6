"""CFA (Wei et al., CVPR 2023): class-wise calibrated margin (CCM) and regularisation (CCR).

t_c is the training robust accuracy of class c in the last epoch, from the forward passes that trained (batch
statistics, weights before the step), exactly as the authors' `train.py` counts it - but over the true class counts,
where their code assumes balanced classes.

Departures: lambda_1 defaults to the paper's value for the base loss (0.5 AT, 0.3 TRADES; their code has 0.5 for all).
Both wait until epoch `begin` = 10 as their code does; the paper's Algorithm 1 calibrates from the second epoch
(`begin=1`). The paper's beta line multiplies by eps, a slip; beta is meant and used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, Loss, State

PAPER_LAMBDA1 = {"pgd-at": 0.5, "trades": 0.3}
"""Section 5.1 of the paper, per base loss; objectives the paper does not try take 0.5."""
Begin = Annotated[int, Bounds(ge=1, allowed=">= 1 (the first epoch has no counts)")]


def calibration(lam: float, robust: Tensor) -> Tensor:
    """lam + t_c, (C,): the factor of a class's radius (eq. 5) and of its beta (eq. 7).

    >>> calibration(0.5, torch.tensor([0.2, 0.5, 0.8])) * 8
    tensor([ 5.6000,  8.0000, 10.4000])
    """
    return lam + robust


@METHODS.register("ccm")
@config
class CCM(Method):
    """Class-wise calibrated margin: eps_c = (lam + t_c) eps, so that a class trains on the radius it can bear.

    Attributes:
        lam: lambda_1; None takes the paper's value for the objective of the run.
        begin: first calibrated epoch, 0-based.
    """

    name: ClassVar[str] = "ccm"
    claims: ClassVar[frozenset[str]] = frozenset({"attack.eps"})
    lam: NonNegative | None = None
    begin: Begin = 10

    def at_epoch(self, state: State, run: Run) -> State:
        lam = PAPER_LAMBDA1.get(run.objective.name, 0.5) if self.lam is None else self.lam
        return {"scale": _scale(lam, self.begin, run)}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        return replace(attack, eps=attack.eps * state["scale"][batch.y])


@METHODS.register("ccr")
@config
class CCR(Method):
    """Class-wise calibrated regularisation: [CE + beta_c KL] / (1 + beta_c) with beta_c = (lam + t_c) beta (eq. 8).

    Before `begin` beta_c is beta, and the division by 1 + beta already holds, as in the authors' code: the loss keeps
    one scale throughout the run.

    Attributes:
        lam: lambda_2.
        begin: first calibrated epoch, 0-based.
    """

    name: ClassVar[str] = "ccr"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.label", "loss.consistency", "role.class_weight"})
    needs: ClassVar[frozenset[str]] = frozenset({"label", "consistency"})
    until_begin: ClassVar[str] = "it will only divide the loss by 1 + beta"
    lam: NonNegative = 0.5
    begin: Begin = 10

    def at_epoch(self, state: State, run: Run) -> State:
        return {"scale": _scale(self.lam, self.begin, run)}

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        scale = state["scale"][batch.y]
        share = 1 / (loss.coef["label"] + loss.coef["consistency"] * scale)
        return loss.scaled("label", share).scaled("consistency", scale * share)


def _scale(lam: float, begin: int, run: Run) -> Tensor:
    """(C,) calibration of the coming epoch; ones until `begin`."""
    device = next(run.model.parameters()).device
    if run.epoch < begin or run.train is None:
        return torch.ones(run.num_classes, device=device)
    return calibration(lam, run.train.robust.to(device, torch.float32))
