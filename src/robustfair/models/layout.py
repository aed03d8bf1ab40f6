"""In which layout a network and its images lie in memory, and the one convolution that must not lie channels last.

Convolutions are fastest channels last. But on a CPU oneDNN's weight gradient of a strided 1x1 convolution is wrong
there, or writes outside of its memory, where there are fewer input channels than the vector block (8 with AVX2, 16 with
AVX-512; uxlfoundation/oneDNN#6035). Images or weights that lie so suffice; with groups, with padding, and in bf16 or
float64 no fault was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VECTOR_BLOCK = 16
"""Input channels from which on no processor's gradient is at fault."""


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Lay out the weights of a model in place.

    Other than `model.to(memory_format=...)` it undoes channels last in 1x1 weights too, whose strides alone tell.
    """
    model.to(memory_format=layout)  # type: ignore[call-overload]
    if layout is torch.contiguous_format:
        for tensor in (*model.parameters(), *model.buffers()):
            if is_channels_last(tensor):
                tensor.data = tensor.data.clone(memory_format=layout)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch takes strides for channels last: rising from channels to columns, rows and images, gaps or none."""
    if x.dim() != 4:
        return False
    shape, strides, least = x.shape, x.stride(), 1
    for dim in (1, 3, 2):
        if strides[dim] < least:
            return False
        least = strides[dim] * shape[dim]
    return strides[0] >= least > strides[1]


class Thinned(TorchFunctionMode):
    """Within this scope a convolution at fault that meets images or weights channels last is given only the pixels that
    its stride does not skip, and no stride: the same sums, and a gradient that is right.

    Checkpointed parts of a model are left alone, as they are computed anew outside of this scope.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, or what stands for it."""
        if func is torch.conv2d and not is_packing():
            return _thinned(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def is_packing() -> bool:
    """Whether hooks take what is saved for the backward pass, as in a checkpointed part. A compiler needs no such care:
    it takes what is computed anew from the one graph that it traced.
    """
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class FaultWatch(TorchFunctionMode):
    """Around a pass of a model: `found` tells whether the gradient of a convolution of it is at fault channels last,
    be it a layer or called in the pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        self.found = any(
            _is_faulty(c.in_channels, c.kernel_size, c.stride, c.groups)
            for c in convolutions
            if not isinstance(getattr(c, "weight", None), Tensor)
            or c.weight.device.type == "cpu"  # some compute it later
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what is called, and run it."""
        given = kwargs or {}
        if func is torch.conv2d and _strides(*args, **given) is not None:
            self.found = True
        return func(*args, **given)


def _thinned(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    strides = _strides(input, weight, bias, *args, **kwargs)
    if strides is None or not (is_channels_last(input) or is_channels_last(weight)):
        return torch.conv2d(input, weight, bias, *args, **kwargs)
    thinned = input[:, :, :: strides[0], :: strides[1]]
    return torch.conv2d(thinned.clone(memory_format=torch.channels_last), weight, bias)


def _strides(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, int] | None:
    """The strides (down, across) of a convolution at fault channels last; None for any other."""
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor) or not input.dim() == weight.dim() == 4:
        return None
    strides = _pair(stride)
    padded = padding not in ("valid", "same") and any(_pair(padding))
    at_fault = _is_faulty(weight.shape[1], tuple(weight.shape[2:]), strides, groups)
    return strides if at_fault and not padded and input.device.type == "cpu" else None


def _is_faulty(channels: int, kernel: tuple[int, ...], strides: tuple[int, ...], groups: int) -> bool:
    return channels < VECTOR_BLOCK and kernel == (1, 1) and max(strides) > 1 and groups == 1


def _pair(value: Any) -> tuple[int, int]:
    """What torch takes for (height, width): one number or two."""
    values = [value] if isinstance(value, int) else value
    return values[0], values[-1]
