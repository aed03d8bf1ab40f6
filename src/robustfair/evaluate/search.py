"""The network that searches in bf16 see: what the model computes, in fewer and cheaper steps.

Batch norm that alone reads a convolution is folded into its weights, and weights are cast once instead of in every
pass. That changes roundings, as bf16 does itself, and no more: what a search finds is judged by the model as given.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from robustfair.attacks.pgd import attacking
from robustfair.models.normalise import Normalise
from robustfair.training.precision import InPrecision

SAME = 1e-3
"""Share of the largest logit by which the folded network may differ from the model in float32."""


def search_network(model: nn.Module, example: Tensor) -> nn.Module:
    """A network for searches in bf16, (B, C, H, W) -> logits (B, K) in float32; shares nothing with the model.

    What cannot be copied or read as a graph, or computes something else then, is taken as it is.

    Args:
        model: in eval mode.
        example: (B, C, H, W) in [0, 1], on the device of the model.
    """
    with attacking(model, "eval"):
        network = _folded(model, example)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and network is not model:
            module.to(torch.bfloat16)
    return InPrecision(network, "bf16", example.device.type)


class _Layers(fx.Tracer):
    """Looks into everything but torch's own layers and the normalisation of the input, which looks at shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalise) or super().is_leaf_module(m, module_qualified_name)


def _folded(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model with batch norm folded where that gives the same logits; the model if it has no copy."""
    try:
        copy = deepcopy(model).requires_grad_(False)
    except Exception:
        return model
    try:
        folded = fuse(fx.GraphModule(copy, _Layers().trace(copy)), no_trace=True).requires_grad_(False)
        with torch.no_grad():
            wanted, found = model(example), folded(example)
    except Exception:
        return copy
    same = wanted.shape == found.shape and bool(((found - wanted).abs() <= SAME * wanted.abs().amax()).all())
    return folded if same else copy
