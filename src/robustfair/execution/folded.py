"""A copy of a model for attacks that search in bf16: it computes the same, in fewer and cheaper steps.

Batch norm that alone reads a convolution is folded into its weights, and weights are cast once instead of in every
pass. That changes roundings, as bf16 does itself, and no more: what a search finds is judged by the model as given.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from robustfair.execution.precision import InPrecision
from robustfair.models.modes import attacking
from robustfair.models.normalise import Normalise

SAME = 1e-3
"""Share of the largest logit by which the folded network may differ from the model in float32."""


def search_network(model: nn.Module, example: Tensor) -> nn.Module:
    """A network for searches in bf16, (B, C, H, W) -> logits (B, K) in float32.

    A folded copy of the model, or a plain one where no graph of it can be read or the graph computes something else;
    the model itself where it has no copy, or one that gives no logits and gradients with weights cast.

    Args:
        model: in eval mode.
        example: (B, C, H, W) in [0, 1], on the device of the model.
    """
    with attacking(model, "eval"):
        for copied in (partial(_folded, example=example), deepcopy):
            network = _cast(model, copied, example)
            if network is not None:
                return network
    return InPrecision(model, "bf16", example.device.type)


def folded(model: nn.Module) -> fx.GraphModule:
    """A copy of the model, which is in eval mode, with every batch norm that alone reads a convolution in its weights.

    Raises:
        Exception: no graph of the model can be read.
    """
    copy = deepcopy(model)
    return fuse(fx.GraphModule(copy, _Layers().trace(copy)), no_trace=True)  # type: ignore[return-value]


class _Layers(fx.Tracer):
    """Looks into everything but torch's own layers and the normalisation of the input, which looks at shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalise) or super().is_leaf_module(m, module_qualified_name)


def _folded(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The folded copy where it gives the logits of the model."""
    network = folded(model)
    with torch.no_grad():
        wanted, found = model(example), network(example)
    same = wanted.shape == found.shape and bool(((found - wanted).abs() <= SAME * wanted.abs().amax()).all())
    return network if same else None


def _cast(model: nn.Module, copied: Callable[[nn.Module], nn.Module | None], example: Tensor) -> nn.Module | None:
    """The copy with its weights in bf16, if it shares none with the model and its passes go through."""
    try:
        network = copied(model)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        if network is None or any(parameter.data_ptr() in own for parameter in network.parameters()):
            return None
        network.requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
        found = InPrecision(network, "bf16", example.device.type)
        with torch.no_grad():
            found(example)
        with torch.enable_grad():
            x = example.clone().requires_grad_(True)
            torch.autograd.grad(found(x).sum(), x)
    except Exception:  # a foreign module may raise anything, and has to be searched all the same
        return None
    return found
