"""Convolutions as oneDNN runs them fastest on a CPU: several small images at a time.

oneDNN convolves row by row. On the 4x4 images of a ResNet's last stage a row is too short to fill its registers, and
each image reads all weights anew, so such layers run at two thirds of the others' rate. Here `b` images lie in one,
their columns interleaved: pixel (h, w) of image i is at (h, w b + i), and a kernel dilated by `b` in width meets the
neighbours it met before. A stride of `s` in width becomes `s` such convolutions, one for each remainder of the column,
and their sum; a 1x1 convolution with a stride reads an image that was thinned before. Both take copies, so they pay
where a compiler merges these with what comes before and after, and are left alone elsewhere.

The products are the same and their sums taken in another order; under autocast the convolutions that a stride makes of
one are rounded to bf16 each, before they are added. What it brings is measured in benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustfair.models.layout import is_channels_last, is_packing

WIDEST = 4
"""Columns of the largest results that are computed in bundles."""
FEWEST_WEIGHTS = 256 * 256
"""Pairs of input and output channels from which on the weights outgrow a core's cache."""
LARGEST_BUNDLE = 8


class Bundled(TorchFunctionMode):
    """Within this scope `torch.conv2d` takes the faster way where there is one, save in checkpointed parts of a model:
    those are computed anew in the backward pass, outside of this scope, and have to save tensors of the same shapes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, or what stands for it."""
        if func is torch.conv2d and not is_packing():
            return conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def may_gain(model: nn.Module) -> bool:
    """Whether a model has a layer that could be bundled: the scope costs every operation a detour through Python."""
    weights = (getattr(module, "weight", None) for module in model.modules() if isinstance(module, nn.Conv2d))
    found = (weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 4)  # some compute it later
    return any(_many(weight) and weight.shape[3] > 1 for weight in found)


class Geometry(NamedTuple):
    """Stride and padding of a convolution, (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`: images (N, C, H, W) and weights (O, C, h, w) -> (N, O, H', W'), in the layout torch gives it."""
    geometry = _plain(input, weight, stride, padding, dilation, groups)
    strided = geometry is not None and geometry.stride != (1, 1)
    if geometry is None or (strided and not torch.compiler.is_compiling()):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if strided and weight.shape[2:] == (1, 1) and geometry.padding == (0, 0):
        thinned = input[:, :, :: geometry.stride[0], :: geometry.stride[1]]
        return torch.conv2d(thinned.clone(memory_format=_layout(input, weight)), weight, bias)
    b = bundle_size(input, weight, geometry)
    if b == 1:
        return torch.conv2d(input, weight, bias, stride, padding)
    return bundled_conv2d(input, weight, bias, geometry, b)


def bundled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, b: int) -> Tensor:
    """A convolution over bundles of `b` images.

    Args:
        x: a multiple of `b` images, no narrower than the stride; neither may the kernel be.
    """
    (down, across), (above, beside) = geometry
    columns = result_columns(x, weight, geometry)
    total: Tensor | None = None
    for remainder in range(across):
        start = (remainder + beside) % across  # the kernel's first column that meets such columns of the image
        kernel = weight[..., start::across]
        part = x[..., remainder::across]
        shift = (start - beside - remainder) // across  # where it stands when the first result is computed
        pad = max(0, -shift, columns + shift + kernel.shape[3] - 1 - part.shape[3])
        bundles = to_bundles(part, b)
        sums = torch.conv2d(bundles, kernel, bias if total is None else None, (down, 1), (above, pad * b), (1, b))
        sums = sums[..., (shift + pad) * b : (shift + pad + columns) * b]
        total = sums if total is None else total + sums
    assert total is not None, "a kernel has a column"
    return from_bundles(total, b).clone(memory_format=_layout(x, weight))


def to_bundles(x: Tensor, b: int) -> Tensor:
    """(N, C, H, W) -> (N/b, C, H, W b), channels last."""
    n, c, h, w = x.shape
    bundles = x.reshape(n // b, b, c, h, w).permute(0, 2, 3, 4, 1).reshape(n // b, c, h, w * b)
    return bundles.contiguous(memory_format=torch.channels_last)


def from_bundles(x: Tensor, b: int) -> Tensor:
    """(N/b, C, H, W b) -> (N, C, H, W)."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h, w // b, b).permute(0, 4, 1, 2, 3).reshape(n * b, c, h, w // b)


def bundle_size(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """Images to a bundle; 1 where a convolution is better left as it is."""
    narrow = min(weight.shape[3], x.shape[3]) < max(geometry.stride[1], 2)
    if not _many(weight) or narrow or not 0 < result_columns(x, weight, geometry) <= WIDEST:
        return 1
    return max(b for b in range(1, LARGEST_BUNDLE + 1) if x.shape[0] % b == 0)


def result_columns(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """W', the width of a convolution's result."""
    return (x.shape[3] + 2 * geometry.padding[1] - weight.shape[3]) // geometry.stride[1] + 1


def _many(weight: Tensor) -> bool:
    return weight.shape[0] * weight.shape[1] >= FEWEST_WEIGHTS


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """How torch lays out the result: channels last where the images or the weights lie so."""
    return torch.channels_last if is_channels_last(x) or is_channels_last(weight) else torch.contiguous_format


def _plain(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry | None:
    """The geometry of a batch's convolution on a CPU without dilation or groups; None for any other, or no images."""
    pairs = [_pair(value) for value in (stride, padding, dilation)]
    batch = x.dim() == weight.dim() == 4 and len(x) > 0 and x.device.type == "cpu"
    if not batch or groups != 1 or None in pairs or pairs[2] != (1, 1):
        return None
    return Geometry(*pairs[:2])  # type: ignore[arg-type]


def _pair(value: Any) -> tuple[int, int] | None:
    """What torch takes for (height, width): one number or two; None for anything else, such as a word."""
    values = [value] if isinstance(value, int) else value
    if not isinstance(values, list | tuple) or not all(isinstance(each, int) for each in values):
        return None
    return (values[0], values[-1]) if len(values) in (1, 2) else None
