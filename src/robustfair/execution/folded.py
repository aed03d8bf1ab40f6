"""A copy of a model for attacks that search: it computes the same, in fewer and cheaper steps.

Batch norm that alone reads a convolution is folded into its weights. In bf16 weights are cast once instead of in every
pass; in float32 on a CPU the layers run on kernels of our own where there are such. That changes roundings, as bf16
does itself, and no more: what a search finds is judged by the model as given.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from robustfair.config import Precision
from robustfair.execution.kernels.compiled import kernels
from robustfair.execution.precision import InPrecision
from robustfair.execution.program import program
from robustfair.models.modes import attacking
from robustfair.models.normalise import Normalise

SAME = 1e-3
"""Share of the largest logit by which the folded network may differ from the model in float32."""


def search_network(model: nn.Module, example: Tensor, precision: Precision) -> nn.Module:
    """A network for searches, (B, C, H, W) -> logits (B, K) in float32.

    A folded copy of the model, on the kernels where they take it, or a plain copy where no graph of it can be read or
    the graph computes something else; the model itself where it has no copy, or one that gives no logits and gradients.

    Args:
        model: in eval mode.
        example: (B, C, H, W) in [0, 1], on the device of the model.
    """
    ways: list[Callable[[], nn.Module | None]] = [
        lambda: _folded(model, example),
        lambda: deepcopy(model),
    ]
    if precision == "fp32" and example.device.type == "cpu":
        ways.insert(0, lambda: _on_kernels(model, example))
    with attacking(model, "eval"):
        for way in ways:
            network = _prepared(model, way, example, precision)
            if network is not None:
                return network
    return InPrecision(model, precision, example.device.type)


def folded(model: nn.Module) -> fx.GraphModule:
    """A copy of the model, which is in eval mode, with every batch norm that alone reads a convolution in its weights.

    Raises:
        Exception: no graph of the model can be read.
    """
    copy = deepcopy(model)
    return fuse(fx.GraphModule(copy, Layers().trace(copy)), no_trace=True)  # type: ignore[return-value]


class Layers(fx.Tracer):
    """Looks into everything but torch's own layers and the normalisation of the input, which looks at shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalise) or super().is_leaf_module(m, module_qualified_name)


def _folded(model: nn.Module, example: Tensor) -> fx.GraphModule | None:
    """The folded copy where it gives the logits of the model."""
    network = folded(model)
    return network if gives_the_logits(network, model, example) else None


def _on_kernels(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The folded copy on the kernels, where there are such and it gives the logits of the model."""
    at_hand = kernels()
    if at_hand is None:
        return None
    network = program(folded(model).requires_grad_(False), at_hand)
    return network if gives_the_logits(network, model, example) else None


def gives_the_logits(network: nn.Module, model: nn.Module, example: Tensor) -> bool:
    """Whether a network gives the logits of the model, by `SAME`."""
    with torch.no_grad():
        wanted, found = model(example), network(example)
    return wanted.shape == found.shape and bool(((found - wanted).abs() <= SAME * wanted.abs().amax()).all())


def _prepared(
    model: nn.Module, copied: Callable[[], nn.Module | None], example: Tensor, precision: Precision
) -> nn.Module | None:
    """The copy for passes in a precision, if it shares no weights with the model and its passes go through."""
    try:
        network = copied()
        own = {parameter.data_ptr() for parameter in model.parameters()}
        if network is None or any(parameter.data_ptr() in own for parameter in network.parameters()):
            return None
        network.requires_grad_(False)
        if precision == "bf16":
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16)
        found = InPrecision(network, precision, example.device.type)
        with torch.no_grad():
            found(example)
        with torch.enable_grad():
            x = example.clone().requires_grad_(True)
            torch.autograd.grad(found(x).sum(), x)
    except Exception:  # a foreign module may raise anything, and has to be searched all the same
        return None
    return found
