"""Averages of weights along training, as pure functions: what enters, how it moves, and what becomes of the rest.

The state of an average is flat: its tensors by their names in the model, and under `UPDATES` how many weights entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from robustfair.values import BATCH_NORM, Batch, State, StateDict

Buffers = Literal["copy", "average", "reestimate"]
"""Batch norm's running statistics in an average: the model's, averaged as the weights are, or measured anew."""
UPDATES = "/updates"
"""Key of the state that counts the weights in an average; no tensor of a model has a slash in its name."""


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


def without_updates(state: State) -> dict[str, Tensor]:
    """The tensors of an average alone; none before it has begun."""
    return {name: tensor for name, tensor in state.items() if name != UPDATES}


def completed(average: StateDict, model: nn.Module, buffers: Buffers, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Weights of the whole model, copied: those of `average`, everything else as the model has it.

    Args:
        batches: images that running statistics are measured on where `buffers` is "reestimate"; not read elsewhere.
    """
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()} | dict(average)
    if buffers == "reestimate":
        weights = reestimated(model, weights, batches)
    return {name: tensor.clone() for name, tensor in weights.items()}


@torch.no_grad()
def reestimated(model: nn.Module, weights: StateDict, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """`weights` with the running statistics of batch norm, where it trains, from one pass over the images of `batches`.

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
    for batch in batches:
        images = len(batch.y)
        for norm in norms:
            norm.momentum = images / (seen + images)
        copy(batch.x)
        seen += images
    return dict(copy.state_dict())
