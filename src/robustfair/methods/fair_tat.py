"""FAIR-TAT (Medi et al. 2025): train on attacks towards the classes that others are taken for.

    CFPS(c) = #{i: f(x_i) = c, y_i != c} / #{i: f(x_i) != y_i}                                 eq. (8)
    y_t ~ P(c) proportional to CFPS(c) for c != y, 0 for c = y
    x' descends CE(f(x'), y_t) within the ball of radius eps_y = (lambda_1 + t_y) eps          algorithm, lines 20, 27
    the loss is the objective's on (x, x', y)

CFPS and the robust accuracy t_y come from the forward passes that trained in the last epoch, so under this attack; t_y
is higher than under an untargeted one. In epoch 0 targets are uniform and radii eps. The radii are those of `ccm`.

The attack is the paper's on every objective: a uniform start and descent on the cross-entropy to the target. It takes
the place of the objective's goal whole, since a target beside the KL of TRADES, which reads no label, would change
nothing. What is neither in the paper nor in code that can be had: on `trades`, `mart` and `arow` their losses are taken
at that x'; under `friendly-at` the stop rule counts predictions other than y, as ever.

Departures from the authors' code: it draws from softmax(2 CFPS), which is nearly uniform (`sampling="softmax"`), it
excludes the label by drawing again, which is the same law as leaving it out, and it attacks in train mode
(`attack_mode="train"` of the objective). `compat="official"` has two slips of it: a target that is the label stays one
where no other image of the batch drew its own, and without calibrated radii targets stay uniform. The equation counts
errors on validation images, the algorithm and the code on training ones (`cfps_source`). Two slips of the paper: ascent
on the cross-entropy to the target (eq. 4), and one radius for all (algorithm, line 20). Its beta on TRADES is 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.config import Bounds, NonNegative, config, require
from robustfair.losses import MinimiseCE
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, ClassTally, State


def target_laws(scores: Tensor) -> Tensor:
    """(C, C) rows: the law of the target of each label, proportional to `scores` (C,) with the label left out.

    A row without any mass is uniform over the other classes.

    >>> target_laws(torch.tensor([0.1, 0.2, 0.3, 0.4]))[[0, 3]]
    tensor([[0.0000, 0.2222, 0.3333, 0.4444],
            [0.1667, 0.3333, 0.5000, 0.0000]])
    """
    others = 1 - torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    mass = scores * others
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, others)
    return mass / mass.sum(1, keepdim=True)


def drawn(law: Tensor, rng: torch.Generator) -> Tensor:
    """(B,) a class for each row of `law` (B, C), never one of probability 0; nothing waits for the device.

    Of C clocks that ring after exponential times of rates `law`, each is the first with its probability.
    """
    times = -torch.log1p(-torch.rand(law.shape, dtype=law.dtype, device=law.device, generator=rng))
    return (law / times.clamp(min=torch.finfo(law.dtype).tiny)).argmax(1)


@METHODS.register("fair-tat")
@config
class FairTAT(Method):
    """Fair targeted adversarial training: attack towards classes drawn by how often others are taken for them.

    Attributes:
        sampling: the law of targets: "cfps", "softmax" (of softmax_scale times CFPS), or "uniform", without the label.
        softmax_scale: >= 0; the code's is 2.
        cfps_source: errors that are counted: of "training" in the last epoch, or on "validation" images under PGD-10.
        adaptive_eps: calibrate radii by class as `ccm` does.
        lam: lambda_1 of the radii.
        begin: first epoch (0-based) whose targets and radii follow from counts.
        compat: "official" keeps two slips of the authors' code, see above.
    """

    name: ClassVar[str] = "fair-tat"
    until_begin: ClassVar[str] = "targets stay uniform, and radii equal"
    sampling: Literal["cfps", "softmax", "uniform"] = "cfps"
    softmax_scale: NonNegative = 2.0
    cfps_source: Literal["training", "validation"] = "training"
    adaptive_eps: bool = True
    lam: NonNegative = 0.5
    begin: Annotated[int, Bounds(ge=1, allowed=">= 1 (the first epoch has no counts)")] = 1
    compat: Literal["intended", "official"] = "intended"

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        targeted = {"attack.goal", "attack.start", "attack.target"}
        return frozenset(targeted | ({"attack.eps"} if self.adaptive_eps else set()))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        measures = self.cfps_source == "validation" and not self._stays_uniform
        return frozenset({"x_adv"} | ({"validation"} if measures else set()))

    def at_epoch(self, state: State, run: Run) -> State:
        require(run.num_classes > 1, self.name, "classes", allowed="at least 2, to have a target", got=run.num_classes)
        prior = scale = torch.ones(run.num_classes, dtype=torch.float64)
        if run.train is not None and run.epoch >= self.begin:
            if not self._stays_uniform:
                prior = self._scores(run.validate() if self.cfps_source == "validation" else run.train)
            if self.adaptive_eps:
                scale = self.lam + run.train.robust
        found = {"prior": prior, "law": target_laws(prior), "scale": scale}
        return {name: value.to(run.device, torch.float32) for name, value in found.items()}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        rng = batch.rng(self.name)
        target = drawn(state["law"][batch.y], rng)
        if self.compat == "official":
            first = drawn(state["prior"].expand(len(batch.y), -1), rng)
            hit = first == batch.y
            target = torch.where(hit & (run.total(hit.sum()) > 1), target, first)
        targeted = replace(attack, goal=MinimiseCE(), start="uniform", target=target)
        return replace(targeted, eps=attack.eps * state["scale"][batch.y]) if self.adaptive_eps else targeted

    def remark(self, epochs: int) -> str | None:
        if self._stays_uniform and self.sampling != "uniform":
            return "fair-tat(compat=official) draws uniform targets to the end where adaptive_eps is false"
        counts = self.adaptive_eps or self.sampling != "uniform"
        return super().remark(epochs) if counts else None

    @property
    def _stays_uniform(self) -> bool:
        return self.sampling == "uniform" or (self.compat == "official" and not self.adaptive_eps)

    def _scores(self, counted: ClassTally) -> Tensor:
        """(C,) what targets are drawn by; ones where nothing went wrong."""
        assert counted.robust_pred_true is not None, "an objective with an attack counts predictions under it"
        scores = metrics.cfps(counted.robust_pred_true)
        if self.sampling == "softmax":
            scores = torch.softmax(self.softmax_scale * scores, 0)
        return scores.nan_to_num(1)
