"""Averages of the weights along training: EMA and SWA.

EMA: theta_bar <- d theta_bar + (1 - d) theta, after every optimizer step or after every epoch.
SWA (Izmailov et al. 2018): theta_bar = the mean of the weights after every epoch from a late one on.

The average is never fed back into training. Forms in use differ in the period, the start, and what becomes of batch
norm's running statistics, all named here. CFA's own baseline is `ema(decay=0.85, per=epoch, begin=50,
buffers=average)`, the average of the IDBH repository `ema(decay=0.999)`, ARoW's `swa(begin=50)` or `ema(decay=0.995,
init=random, buffers=copy)`, that of the PyTorch port of Gowal et al. `ema(decay=0.995, ramp=true, begin=5,
buffers=copy)` in 200 epochs.

Departures from the official codes: the first update copies the weights (`init="random"` starts from an independent
random initialisation, as ARoW's does); integer counters are copied, never averaged; copied buffers are copies, where
two repositories share them with the model; and batch norm is re-estimated by default, with batches weighted by size.
Averaged weights of a net with batch norm are shorter than the current ones while training still moves, so the current
running statistics do not fit them: in the run under results/ the average with copied statistics stayed at chance to
the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from robustfair.config import Share, Whole, config
from robustfair.methods.base import Method, Run
from robustfair.models.averages import (
    UPDATES,
    Buffers,
    averaged_entries,
    begun,
    completed,
    moved_towards,
    reinitialised,
    without_updates,
)
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State, StateDict


@METHODS.register("ema")
@config
class EMA(Method):
    """Exponential moving average of the weights, exported as the candidate "ema".

    Attributes:
        decay: d in [0, 1]; 0 keeps the current weights, 1 keeps the first.
        per: "step" or "epoch".
        begin: first epoch (0-based) whose weights enter.
        buffers: batch norm of the average: "copy" of the model's, "average" like the weights (CFA), or "reestimate" by
            a pass over the augmented clean training images, each batch weighted by its size.
        init: what the first weights are averaged with: nothing ("copy"), or an independent "random" initialisation,
            which biases the average by decay ** updates.
        ramp: let the decay of update n (0-based) be at most (1 + n) / (10 + n).
    """

    name: ClassVar[str] = "ema"
    claims: ClassVar[frozenset[str]] = frozenset({"export.ema"})
    decay: Share = 0.999
    per: Literal["step", "epoch"] = "step"
    begin: Whole = 0
    buffers: Buffers = "reestimate"
    init: Literal["copy", "random"] = "copy"
    ramp: bool = False

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        return self._update(state, run) if due(self, "step", run.epoch) else state

    def at_epoch(self, state: State, run: Run) -> State:
        return self._update(state, run) if due(self, "epoch", run.epoch - 1) else state

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        return exported("ema", state, run, self.buffers)

    @torch.no_grad()
    def _update(self, state: State, run: Run) -> State:
        current = averaged_entries(run.model, self.buffers)
        if not state:
            if self.init == "copy":
                return begun(current)
            drawn = reinitialised(run.model, run.rng("ema"))
            state = begun(averaged_entries(drawn, self.buffers), updates=0)
        if not self.ramp:
            return moved_towards(state, current, 1 - self.decay)
        updates = state[UPDATES].double()
        return moved_towards(state, current, 1 - ((1 + updates) / (10 + updates)).clamp(max=self.decay))


@METHODS.register("swa")
@config
class SWA(Method):
    """Mean of the weights at the end of every epoch (or step) from `begin` on, exported as the candidate "swa".

    Attributes:
        begin: first epoch (0-based) whose weights enter; ARoW's 50 of 120.
        per: "epoch" or "step".
        buffers: batch norm of the mean, as in `EMA`.
    """

    name: ClassVar[str] = "swa"
    claims: ClassVar[frozenset[str]] = frozenset({"export.swa"})
    begin: Whole = 50
    per: Literal["step", "epoch"] = "epoch"
    buffers: Buffers = "reestimate"

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        return self._update(state, run.model) if due(self, "step", run.epoch) else state

    def at_epoch(self, state: State, run: Run) -> State:
        return self._update(state, run.model) if due(self, "epoch", run.epoch - 1) else state

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        return exported("swa", state, run, self.buffers)

    @torch.no_grad()
    def _update(self, state: State, model: nn.Module) -> State:
        current = averaged_entries(model, self.buffers)
        return moved_towards(state, current, 1 / (state[UPDATES].double() + 1)) if state else begun(current)


def due(average: EMA | SWA, tick: Literal["step", "epoch"], epoch: int) -> bool:
    """Whether an average takes the weights of this tick in 0-based `epoch`."""
    return average.per == tick and epoch >= average.begin


def exported(name: str, state: State, run: Run, buffers: Buffers) -> Mapping[str, StateDict]:
    """The candidate `name`: averaged entries of `state`, everything else of the model; nothing before it has begun."""
    average = without_updates(state)
    return {name: completed(average, run.model, buffers, run.batches("train"))} if average else {}
