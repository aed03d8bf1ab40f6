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
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustfair.config import Share, Whole, config
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import BATCH_NORM, Batch, Loss, State, StateDict

Buffers = Literal["copy", "average", "reestimate"]
UPDATES = "/updates"
"""Key of the state that counts the weights in an average; no tensor of a model has a slash in its name."""


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


def averaged_entries(model: nn.Module, buffers: Buffers) -> dict[str, Tensor]:
    """What is averaged of a model: its parameters, and under "average" its floating-point buffers."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name in parameters or (buffers == "average" and tensor.is_floating_point())
    }


def begun(current: Mapping[str, Tensor], updates: int = 1) -> State:
    """The state of an average that is `current`; `updates` is 0 where these are not weights of the run."""
    first = {name: tensor.clone() for name, tensor in current.items()}
    return {**first, UPDATES: torch.tensor(updates, device=next(iter(first.values())).device)}


def moved_towards(state: State, current: Mapping[str, Tensor], share: Tensor | float) -> State:
    """The state with `share` () of `current` in the average and one update more, written in place."""
    averages = [state[name] for name in current]
    if isinstance(share, Tensor):
        torch._foreach_lerp_(averages, list(current.values()), [share.to(tensor.dtype) for tensor in averages])
    else:
        torch._foreach_lerp_(averages, list(current.values()), share)
    if UPDATES in state:  # an average of a run begun before they were counted has none, and needs none
        state[UPDATES].add_(1)
    return state


def reinitialised(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """A copy of the model with new initial weights where its layers can draw some, by the seed of `rng`."""
    copy = deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.initial_seed())  # no device's stream but the CPU's
        for module in copy.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return copy.to(next(model.parameters()).device)


def exported(name: str, state: State, run: Run, buffers: Buffers) -> Mapping[str, StateDict]:
    """The candidate `name`: averaged entries of `state`, everything else of the model; nothing before it has begun."""
    averaged = {key: tensor for key, tensor in state.items() if key != UPDATES}
    if not averaged:
        return {}
    weights = {key: tensor.detach() for key, tensor in run.model.state_dict().items()} | averaged
    if buffers == "reestimate":
        weights = reestimated(run.model, weights, run)
    return {name: {key: tensor.clone() for key, tensor in weights.items()}}


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
    for batch in run.batches("train"):
        images = len(batch.y)
        for norm in norms:
            norm.momentum = images / (seen + images)
        copy(batch.x)
        seen += images
    return dict(copy.state_dict())
