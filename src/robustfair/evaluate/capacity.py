"""How many images a model can take at a time within a budget of memory, measured on the model itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import attacking
from robustfair.losses import cross_entropy

CPU_BUDGET = 2 << 30
"""Bytes of activations on a CPU: fixed, so that the same audit runs in the same batches on every machine."""
CUDA_SHARE = 0.6
"""Of the free memory of a GPU."""
HEADROOM = 1.5
"""Workspaces and gradients, as a factor on what a pass saves for its backward pass."""


def images_that_fit(model: nn.Module, example: Tensor) -> int:
    """Images (at least 1) whose forward and backward pass stays within the budget of their device.

    Args:
        example: (1, C, H, W) on the device of the model.
    """
    device = example.device
    budget = CUDA_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_BUDGET
    return max(1, int(budget / (HEADROOM * bytes_per_image(model, example))))


def bytes_per_image(model: nn.Module, example: Tensor) -> int:
    """What autograd keeps for the gradient of one image, weights left out."""
    known = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    x = example[:1].detach().clone().requires_grad_(True)
    with (
        attacking(model, "eval"),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        logits = model(x)
        loss = cross_entropy(logits, logits.argmax(1))
    del loss
    return max(sum(kept.values()), x.numel() * x.element_size())
