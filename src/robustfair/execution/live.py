"""A model that trains, as a program for the attacks on it: on kernels of our own, with the weights of the moment.

It computes what the model does in eval mode with frozen weights, with other roundings, and asks for no gradient of a
weight. The transformed weights take eight times the memory of the model's.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, fx, nn

from robustfair.execution.folded import Layers, gives_the_logits
from robustfair.execution.kernels.compiled import kernels, missing
from robustfair.execution.program import Program, program
from robustfair.execution.steps import TorchStep
from robustfair.models.modes import attacking

SAME_GRADIENT = 0.05
"""Share of its length by which a gradient may differ: a ReLU near zero that rounds to the other side makes 0.001."""


def live_program(model: nn.Module, example: Tensor) -> tuple[Program | None, str]:
    """The model as a program that shares its weights, see `Program.refresh`, or None and why there is none.

    Args:
        model: on a CPU, in any mode; it stays as it is.
        example: (B, C, H, W) in [0, 1].
    """
    at_hand = kernels()
    if at_hand is None:
        return None, str(missing())
    if hooked(model):
        return None, "the model has hooks"
    try:
        with attacking(model, "eval"):
            # Traced are the layers of a copy without numbers: what a trace would keep of a weight cannot be read.
            graph = Layers().trace(deepcopy(model).to("meta"))
            found = program(fx.GraphModule(model, graph), at_hand)
            if all(isinstance(step, TorchStep) for step in found.steps):
                return None, ""  # nothing is lost
            if not gives_the_logits(found, model, example) or not _gives_the_gradient(found, model, example):
                return None, "the model computes something else than its layers in order"
    except Exception as error:  # a foreign module may raise anything, and has to be attacked all the same
        reason = str(error).strip().split("\n")[0]
        return None, f"the order of the model's layers cannot be read ({reason})"
    return found, ""


def hooked(model: nn.Module) -> bool:
    """Whether the model calls hooks in its passes, which a program would not."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in model.modules()
    )


def _gives_the_gradient(network: nn.Module, model: nn.Module, example: Tensor) -> bool:
    """Whether the gradient of the largest logits is the model's: it would not be where the model cuts its graph."""
    gradients = []
    for each in (model, network):
        with torch.enable_grad():
            x = example.detach().clone().requires_grad_(True)
            gradients.append(torch.autograd.grad(each(x).amax(1).sum(), x)[0])
    wanted, found = gradients
    return bool((found - wanted).norm() <= SAME_GRADIENT * wanted.norm())
