"""Train and eval mode, and what batch norm does in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from robustfair.values import BATCH_NORM, Mode, Model


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within it batch norm reads the statistics of the batch, where it trains, and leaves its running ones alone."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def attacking(model: Model, mode: Mode) -> Iterator[None]:
    """Put a module into the attack's batch-norm mode with its parameters frozen; restore every flag on leaving.

    "train_frozen" uses batch statistics and leaves the running ones untouched. Modules that are in eval mode while the
    model trains are frozen, and stay so. A plain function passes through.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    frozen = [module for module, training in modes if model.training and not training]
    grads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(_restore, modes, grads)
        model.train(mode != "eval")
        for module in frozen:
            module.training = False
        for parameter in grads:
            parameter.requires_grad_(False)
        if mode == "train_frozen":
            stack.enter_context(still_statistics(model))
        yield


def _restore(modes: Iterable[tuple[nn.Module, bool]], grads: Iterable[nn.Parameter]) -> None:
    for parameter in grads:
        parameter.requires_grad_(True)
    for module, training in modes:
        module.training = training
