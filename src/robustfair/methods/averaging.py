"""Averages of the weights along training: EMA.

theta_bar <- d theta_bar + (1 - d) theta, after every optimizer step or after every epoch. The average is never fed back
into training. Forms in use differ in three choices, all named here: the period, the start, and what becomes of batch
norm's running statistics. CFA's own baseline is `ema(decay=0.85, per=epoch, begin=50, buffers=average)`.

Departures from the official codes: the first update copies the weights (one repository starts from an independent
random initialisation); integer counters are copied, never averaged; and batch norm is re-estimated by default.
Averaged weights of a net with batch norm are shorter than the current ones while training still moves, so the current
running statistics do not fit them: in the run under results/ the average with copied statistics stayed at chance to
the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustfair.config import require, require_literals
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import BATCH_NORM, Batch, Loss, State, StateDict


@METHODS.register("ema")
@dataclass(frozen=True, kw_only=True)
class EMA(Method):
    """Exponential moving average of the weights, exported as the candidate "ema".

    Attributes:
        decay: d in [0, 1]; 0 keeps the current weights, 1 keeps the first.
        per: "step" or "epoch".
        begin: first epoch (0-based) whose weights enter.
        buffers: batch norm of the average: "copy" of the model's, "average" like the weights (CFA), or "reestimate" by
            a pass over the augmented clean training images, each batch weighted by its size.
    """

    name: ClassVar[str] = "ema"
    claims: ClassVar[frozenset[str]] = frozenset({"export.ema"})
    decay: float = 0.999
    per: Literal["step", "epoch"] = "step"
    begin: int = 0
    buffers: Literal["copy", "average", "reestimate"] = "reestimate"

    def __post_init__(self) -> None:
        require_literals(self)
        require(0 <= self.decay <= 1, self.name, "decay", allowed="in [0, 1]", got=self.decay)
        require(self.begin >= 0, self.name, "begin", allowed=">= 0", got=self.begin)

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        return self._update(state, run.model) if self.per == "step" and run.epoch >= self.begin else state

    def at_epoch(self, state: State, run: Run) -> State:
        ended = run.epoch - 1
        return self._update(state, run.model) if self.per == "epoch" and ended >= self.begin else state

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        if not state:
            return {}
        weights = {name: tensor.detach() for name, tensor in run.model.state_dict().items()} | dict(state)
        if self.buffers == "reestimate":
            weights = reestimated(run.model, weights, run)
        return {"ema": {name: tensor.clone() for name, tensor in weights.items()}}

    def remark(self, epochs: int) -> str | None:
        if self.begin < epochs:
            return None
        return f"ema begins at epoch {self.begin} and this run ends after {epochs}: it will average nothing"

    @torch.no_grad()
    def _update(self, state: State, model: nn.Module) -> State:
        current = self._averaged_entries(model)
        if not state:
            return {name: tensor.clone() for name, tensor in current.items()}
        torch._foreach_lerp_(list(state.values()), [current[name] for name in state], 1 - self.decay)
        return state

    def _averaged_entries(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return {
            name: tensor.detach()
            for name, tensor in model.state_dict().items()
            if name in parameters or (self.buffers == "average" and tensor.is_floating_point())
        }


@torch.no_grad()
def reestimated(model: nn.Module, weights: StateDict, run: Run) -> dict[str, Tensor]:
    """`weights` with the running statistics of batch norm, where it trains, from one pass over the training images.

    Per layer: the mean of the batch means and of the unbiased batch variances, weighted by batch size.
    """
    copy = deepcopy(model)
    copy.load_state_dict(dict(weights))
    norms = [module for module in copy.modules() if isinstance(module, BATCH_NORM) and module.training]
    copy.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    seen = 0
    for x in run.inputs():
        for norm in norms:
            norm.momentum = x.shape[0] / (seen + x.shape[0])
        copy(x)
        seen += x.shape[0]
    return dict(copy.state_dict())
