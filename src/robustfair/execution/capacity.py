"""How many images a model can take at a time within a budget of memory, measured on the model itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustfair.losses import cross_entropy
from robustfair.models.head import no_gradient
from robustfair.models.modes import attacking

CPU_BUDGET = 2 << 30
"""Bytes of activations on a CPU: fixed, so that the same audit runs in the same batches on every machine."""
CUDA_SHARE = 0.6
"""Of the free memory of a GPU."""
PASS_FLOPS, WEIGHT_FLOPS = 3e8, 800.0
"""Additions and multiplications that are done in the time that a pass costs whatever its images, some milliseconds, and
in the time that it takes to read the four to nine numbers that a weight is transformed to."""
UNCOUNTED = 1.0
"""What a pass costs, in images, where a model does not let them be counted."""
SPENT_WELL = 0.1
"""Share of the time of a pass that may go into that."""
FEWEST, MOST = 64, 2048
"""Images of a pass, whatever the model: fewer waste what a pass costs, more leave the caches."""
HEADROOM = 1.5
"""Workspaces and gradients, as a factor on what a pass saves for its backward pass."""


def images_that_fit(model: nn.Module, example: Tensor, *, gradient: bool = True) -> int:
    """Images (at least 1) whose forward and backward pass stays within the budget of their device.

    Arguments and errors as for `bytes_per_image`.
    """
    device = example.device
    budget = CUDA_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_BUDGET
    return max(1, int(budget / (HEADROOM * bytes_per_image(model, example, gradient=gradient))))


def bytes_per_image(model: nn.Module, example: Tensor, *, gradient: bool = True) -> int:
    """What autograd keeps for the gradient of one image, weights left out.

    Args:
        example: (1, C, H, W) on the device of the model.
        gradient: whether it must be possible to take it. Where it is not and need not be, what all layers return
            counts, which is at least what a pass holds at a time.

    Raises:
        ModelError: the gradient cannot be taken, and must.
    """
    x = example[:1].detach().clone()
    with attacking(model, "eval"):
        try:
            kept = _kept_for_gradient(model, x)
        except Exception as error:  # a foreign module may raise anything in a graph that it was not made for
            if gradient:
                raise no_gradient(model, error) from error
            kept = _returned(model, x)
    return max(kept, x.nbytes)


def _kept_for_gradient(model: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of the loss holds; the gradient is taken, to see that it can be."""
    known = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    x = x.clone().requires_grad_(True)
    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            logits = model(x)
            loss = cross_entropy(logits, logits.argmax(1))
        if loss.requires_grad:
            torch.autograd.grad(loss.sum(), x)
    return sum(kept.values())


def _returned(model: nn.Module, x: Tensor) -> int:
    """Bytes of what the modules of a model return in a pass without a graph."""
    returned: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            returned.append(output)

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in returned}.values())


def cost_of_a_pass(model: nn.Module, example: Tensor) -> float:
    """What a pass costs whatever its images, in images: about, and by a rule, so that it is the same on every machine.

    Args:
        example: (1, C, H, W) on the device of the model.
    """
    try:
        with torch.no_grad(), attacking(model, "eval"), FlopCounterMode(display=False) as counter:
            model(example[:1])
    except Exception:  # a foreign module may raise anything where its operations are counted
        return UNCOUNTED
    weights = sum(parameter.numel() for parameter in model.parameters())
    return (PASS_FLOPS + WEIGHT_FLOPS * weights) / max(counter.get_total_flops(), 1)


def images_that_fill(cost: float) -> int:
    """Images from which on more of them make a pass hardly any cheaper for each, where it costs so many by itself.

    >>> images_that_fill(2.0), images_that_fill(20.0)
    (64, 180)
    """
    return min(max(round(cost * (1 - SPENT_WELL) / SPENT_WELL), FEWEST), MOST)
