"""CFA (Wei et al., CVPR 2023): class-wise margins (CCM) and regularisation (CCR), an average of fair weights (FAWA).

    CCM   eps_c = (lambda_1 + t_c) eps                                     eq. (6)
    CCR   beta_c = (lambda_2 + t_c) beta, [CE + beta_y KL] / (1 + beta_y)  eqs. (7), (8)
    FAWA  theta_bar <- alpha theta_bar + (1 - alpha) theta after an epoch whose weights have min_c R_c >= delta

t_c is the training robust accuracy of class c in the last epoch, from the forward passes that trained (batch
statistics, weights before the step), exactly as the authors' `train.py` counts it - but over the true class counts,
where their code assumes balanced classes. R_c is that of the trained weights on the validation images, under PGD-10.

Departures: lambda_1 defaults to the paper's value for the base loss (0.5 AT, 0.3 TRADES, 0.7 friendly AT; their code
has 0.5 for all). CCM and CCR wait until epoch `begin` = 10 as their code does; the paper's Algorithm 1 calibrates from
the second epoch (`begin=1`). The paper's beta line multiplies by eps, a slip; beta is meant and used.

FAWA has the paper's settings, alpha 0.85 and delta 0.2 from epoch 50 on. The code has 0.88 and 0.24 (its README 0.2)
from the first epoch that passes: `fawa(decay=0.88, threshold=0.24, begin=0)`. The first weights that pass are copied,
as in the code; the algorithm starts from the initial ones. Running statistics are averaged as the weights are, which is
the code's way too; EMA measures them anew by default, since copied ones do not fit (`averaging.py`), and so does
`buffers="reestimate"` here, for a pass over the training images at each epoch that passes. All that is not averaged is
kept from the last weights that passed, so that a rejected epoch changes nothing. Their counters are averaged and cut to
whole numbers; here they are copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.config import Bounds, NonNegative, Share, Whole, config
from robustfair.errors import RobustFairWarning
from robustfair.methods.base import Bundle, Method, Run
from robustfair.models.averages import Buffers, averaged_entries, begun, completed, moved_towards, without_updates
from robustfair.registry import BUNDLES, METHODS
from robustfair.values import Attack, Batch, ClassTally, Loss, State, StateDict

PAPER_LAMBDA1 = {"pgd-at": 0.5, "trades": 0.3}
"""Section 5.1 of the paper, per base loss; objectives the paper does not try take 0.5."""
FRIENDLY_LAMBDA1 = 0.7
"""Beside friendly AT, on any objective: its attack is the weaker one, and hard classes would see too little of it."""
Begin = Annotated[int, Bounds(ge=1, allowed=">= 1 (the first epoch has no counts)")]


def calibration(lam: float, robust: Tensor) -> Tensor:
    """lam + t_c, (C,): the factor of a class's radius (eq. 6) and of its beta (eq. 7).

    >>> calibration(0.5, torch.tensor([0.2, 0.5, 0.8])) * 8
    tensor([ 5.6000,  8.0000, 10.4000])
    """
    return lam + robust


def passes(validated: ClassTally, threshold: float) -> bool:
    """The gate of FAWA: whether every class that has images reaches `threshold` in robust accuracy.

    >>> passes(ClassTally(robust_pred_true=torch.tensor([[2, 1], [8, 9]])), 0.2)
    True
    """
    assert validated.robust_pred_true is not None, "an attacked objective is validated under an attack"
    return metrics.worst(metrics.class_accuracy(validated.robust_pred_true)) >= threshold


@METHODS.register("ccm")
@config
class CCM(Method):
    """Class-wise calibrated margin: eps_c = (lam + t_c) eps, so that a class trains on the radius it can bear.

    Attributes:
        lam: lambda_1; None takes the paper's value: 0.7 beside friendly-at, else that of the run's objective.
        begin: first calibrated epoch, 0-based.
    """

    name: ClassVar[str] = "ccm"
    claims: ClassVar[frozenset[str]] = frozenset({"attack.eps"})
    lam: NonNegative | None = None
    begin: Begin = 10

    def at_epoch(self, state: State, run: Run) -> State:
        lam = self.lam
        if lam is None:
            friendly = "friendly-at" in run.methods
            lam = FRIENDLY_LAMBDA1 if friendly else PAPER_LAMBDA1.get(run.objective.name, 0.5)
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
    """(C,) float32, the calibration of the coming epoch; ones until `begin`."""
    if run.epoch < begin or run.train is None:
        return torch.ones(run.num_classes, device=run.device)
    return calibration(lam, run.train.robust.to(run.device, torch.float32))


@METHODS.register("fawa")
@config
class FAWA(Method):
    """Fairness-aware weight average: an EMA of those epochs whose worst validation class withstands PGD often enough.

    Exported as the candidate "fawa". Its state is that candidate whole; an epoch that is rejected leaves it as it is.

    Attributes:
        decay: alpha in [0, 1]; 0 keeps the last weights that passed, 1 the first.
        threshold: delta in [0, 1], the robust accuracy that every class must reach; 0 accepts every epoch.
        begin: first epoch (0-based) whose weights may enter.
        buffers: batch norm of the average, as in `EMA`.
    """

    name: ClassVar[str] = "fawa"
    claims: ClassVar[frozenset[str]] = frozenset({"export.fawa"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv", "validation"})
    decay: Share = 0.85
    threshold: Share = 0.2
    begin: Whole = 50
    buffers: Buffers = "average"

    @torch.no_grad()
    def at_epoch(self, state: State, run: Run) -> State:
        if run.epoch - 1 < self.begin:
            return state
        if not passes(run.validate(), self.threshold):
            if run.finished and not state:
                warnings.warn(_never_passed(self.threshold), RobustFairWarning, stacklevel=2)
            return state
        current = averaged_entries(run.model, self.buffers)
        state = moved_towards(state, current, 1 - self.decay) if state else begun(current)
        average = {name: state[name] for name in current}
        return {**state, **completed(average, run.model, self.buffers, run.batches("train"))}

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        candidate = {name: tensor.clone() for name, tensor in without_updates(state).items()}
        return {"fawa": candidate} if candidate else {}


def _never_passed(threshold: float) -> str:
    return (
        f"fawa has no average: after no epoch did every validation class reach a robust accuracy of {threshold:g}; "
        "lower fawa(threshold)"
    )


@BUNDLES.register("cfa")
@config
class CFA(Bundle):
    """CFA whole: ccm, fawa, and ccr where the loss has a consistency term, with the paper's settings.

    Attributes:
        lambda1: `lam` of ccm; None takes the paper's value.
        lambda2: `lam` of ccr.
        begin: first epoch (0-based) that ccm and ccr calibrate.
        decay, threshold: of fawa.
        avg_start: `begin` of fawa.
    """

    name: ClassVar[str] = "cfa"
    sets: ClassVar[Mapping[str, str]] = {
        "ccm(lam)": "lambda1",
        "ccr(lam)": "lambda2",
        "ccm(begin)": "begin",
        "ccr(begin)": "begin",
        "fawa(decay)": "decay",
        "fawa(threshold)": "threshold",
        "fawa(begin)": "avg_start",
    }
    lambda1: NonNegative | None = None
    lambda2: NonNegative = 0.5
    begin: Begin = 10
    decay: Share = 0.85
    avg_start: Whole = 50
    threshold: Share = 0.2

    def parts(self) -> tuple[Method, ...]:
        return (
            CCM(lam=self.lambda1, begin=self.begin),
            CCR(lam=self.lambda2, begin=self.begin),
            FAWA(decay=self.decay, threshold=self.threshold, begin=self.avg_start),
        )
