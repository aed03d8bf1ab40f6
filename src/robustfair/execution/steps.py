"""The steps that a network's program is made of, each with its own way back, without weight gradients.

Where layers run on our kernels, the way back needs one bit of each number, its sign. Steps that are no kernel's go
through torch, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.execution.kernels.compiled import Kernels, Pointwise, Scheme

WINOGRAD = ((3, 3), (1, 1), (1, 1), (1, 1))
STRIDED = ((3, 3), (2, 2), (1, 1), (1, 1))
"""Kernel, stride, padding and dilation of the convolutions that `Kernels.convolve` takes."""
Gradients = list[Tensor | None]
"""Of what a step reads, one each; None where it has none."""


class Step(Protocol):
    """One step of a program."""

    def refresh(self) -> None:
        """Read the weights of its layers as they are now."""
        ...

    def forward(self, values: Sequence[Any], keep: bool) -> tuple[Any, Any]:
        """What the step makes of `values`, and, if it is to `keep` that, what its way back needs."""
        ...

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        """The gradients of `values`: `known`, which may be overwritten, plus what `gradient` of the result gives."""
        ...


@dataclass(frozen=True)
class TorchStep:
    """Whatever torch can do, and differentiate.

    Attributes:
        call: takes the values.
        in_place: it may write to them, and is given copies, since autograd lets nobody write to what it starts from.
    """

    call: Callable[..., Any]
    in_place: bool = False

    def refresh(self) -> None:
        """Nothing: a call reads what it needs."""

    def forward(self, values: Sequence[Any], keep: bool) -> tuple[Any, Any]:
        if not keep:
            return self.call(*self._given(values)), None
        with torch.enable_grad():
            leaves = [_leaf(value) for value in values]
            made = self.call(*self._given(leaves))
        return (made.detach(), (leaves, made)) if isinstance(made, Tensor) else (made, None)

    def _given(self, values: Sequence[Any]) -> Sequence[Any]:
        return [value.clone() if self.in_place and isinstance(value, Tensor) else value for value in values]

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        if kept is None:
            return known
        leaves, made = kept
        at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not at or not made.requires_grad:
            return known
        wanted = [leaves[place] for place in at]
        found = torch.autograd.grad(made, wanted, gradient, retain_graph=True, allow_unused=True)
        for place, new in zip(at, found, strict=True):
            before = known[place]
            known[place] = new if before is None else before if new is None else before + new
        return known


@dataclass(frozen=True)
class Convolution:
    """A convolution and the batch norm that alone reads it, where there is one, as one convolution."""

    layer: nn.Conv2d
    norm: nn.BatchNorm2d | None

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Its weights (K, C, h, w), and what is added to its sums, (K,) or nothing."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        if self.norm is None:
            return weight, None if bias is None else bias.detach().contiguous()
        scale, shift = scale_and_shift(self.norm)
        return weight * scale.view(-1, 1, 1, 1), shift if bias is None else shift + scale * bias.detach()


class SumStep:
    """Any convolution without groups, what is added to it, and a ReLU after that, where they are.

    It reads the image, and the other summand where there is one.
    """

    def __init__(self, kernels: Kernels, convolution: Convolution, *, adds: bool, positive: bool) -> None:
        self.kernels, self.convolution, self.adds, self.positive = kernels, convolution, adds, positive
        self.layer = convolution.layer
        self.fills = self.layer.in_channels % kernels.lanes == 0
        self.winograd: Tensor | None = None
        self.refresh()

    def refresh(self) -> None:
        step, padding = self.layer.stride[0], tuple(map(int, self.layer.padding))
        about: dict[str, Any] = {"step": step, "padding": padding, "dilation": self.layer.dilation[0]}
        self.weight, self.bias = self.convolution.read()
        if self.fills:
            self.there = self.kernels.taps_of(self.weight, **about)
        if not self.fills and geometry(self.layer) == WINOGRAD:
            self.winograd = self.kernels.transformed(self.weight.transpose(0, 1), flipped=True)
        else:
            self.back = self.kernels.taps_back(self.weight, **about)
            self.covers = len(self.back) == step**2

    def forward(self, values: Sequence[Tensor], keep: bool) -> tuple[Tensor, Any]:
        x, *others = map(_last, values)
        layer = self.layer
        shape = _shape_of(layer, x)
        _require_shape(others, shape)
        signs = self.kernels.signs(shape) if keep and self.positive else None
        after = Pointwise(shift=self.bias, add=others[0] if others else None, positive=self.positive, keep=signs)
        if self.fills:
            return self.kernels.sum(x, self.there, shape, after=after), (x.shape, signs)
        sums = _last(F.conv2d(x, self.weight, None, layer.stride, layer.padding, layer.dilation))
        return self.kernels.pointwise(sums, after, into=sums), (x.shape, signs)  # with few channels torch is faster

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        (shape, signs), gradient = kept, _last(gradient)
        to_x = (self._back_filled if self.fills else self._back_few)(gradient, shape, signs, known[0])
        return [to_x, _of_summand(self.kernels, gradient, signs, known[1])] if self.adds else [to_x]

    def _back_filled(self, gradient: Tensor, shape: torch.Size, signs: Tensor | None, known: Tensor | None) -> Tensor:
        add = _or_last(known)
        if self.covers:
            into = torch.empty(shape, memory_format=torch.channels_last)
        else:
            into = _zeros(shape) if add is None else add.clone(memory_format=torch.channels_last)
            add = None if add is None else into
        for taps in self.back:
            self.kernels.sum(gradient, taps, shape, Pointwise(gate=signs), Pointwise(add=add), into=into)
        return into

    def _back_few(self, gradient: Tensor, shape: torch.Size, signs: Tensor | None, known: Tensor | None) -> Tensor:
        gate = Pointwise(gate=signs)
        if self.winograd is not None:
            found = self.kernels.convolve(gradient, self.winograd, gate, channels=shape[1])
        else:
            found = _zeros(shape)
            for taps in self.back:
                self.kernels.sum(gradient, taps, shape, gate, into=found)
        return found if known is None else found + known


class PointwiseStep:
    """Batch norm in eval mode and a ReLU, or one of them."""

    def __init__(self, kernels: Kernels, norm: nn.BatchNorm2d, *, positive: bool) -> None:
        self.kernels, self.norm, self.positive = kernels, norm, positive
        self.refresh()

    def refresh(self) -> None:
        self.scale, self.shift = scale_and_shift(self.norm)

    def forward(self, values: Sequence[Tensor], keep: bool) -> tuple[Tensor, Any]:
        (x,) = map(_last, values)
        if x.shape[1] != self.norm.num_features:
            raise ValueError(f"images of {x.shape[1]} channels for a batch norm of {self.norm.num_features}")
        signs = self.kernels.signs(x.shape) if keep and self.positive else None
        done = Pointwise(scale=self.scale, shift=self.shift, positive=self.positive, keep=signs)
        return self.kernels.pointwise(x, done), signs

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        done = Pointwise(gate=kept, scale=self.scale, add=_or_last(known[0]))
        return [self.kernels.pointwise(_last(gradient), done)]


class WinogradStep:
    """A 3x3 convolution with stride one or two, by tiles, and what stands around it: a batch norm and ReLU before it, a
    sum after it, a ReLU after that.

    It reads the image, and the other summand where there is one.
    """

    def __init__(
        self, kernels: Kernels, convolution: Convolution, *, norm: nn.BatchNorm2d | None, adds: bool, positive: bool
    ) -> None:
        self.kernels, self.convolution, self.norm = kernels, convolution, norm
        self.layer, self.adds, self.positive = convolution.layer, adds, positive
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.strided = geometry(self.layer) == STRIDED
        self.refresh()

    def refresh(self) -> None:
        if self.norm is not None:
            self.scale, self.shift = scale_and_shift(self.norm)
        weight, self.bias = self.convolution.read()
        self.there = self.kernels.transformed(weight, strided=self.strided)
        self.back = self.kernels.transformed(weight.transpose(0, 1), strided=self.strided, flipped=True)

    def forward(self, values: Sequence[Tensor], keep: bool) -> tuple[Tensor, Any]:
        x, *others = map(_last, values)
        shape = _shape_of(self.layer, x)
        _require_shape(others, shape)
        first = self.kernels.signs(x.shape) if keep and self.scale is not None else None
        then = self.kernels.signs(shape) if keep and self.positive else None
        before = Pointwise(scale=self.scale, shift=self.shift, positive=self.scale is not None, keep=first)
        after = Pointwise(shift=self.bias, add=others[0] if others else None, positive=self.positive, keep=then)
        scheme: Scheme = "strided" if self.strided else "plain"
        return self.kernels.convolve(x, self.there, before, after, scheme=scheme), (x.shape[2:], first, then)

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        (size, first, then), gradient = kept, _last(gradient)
        before, after = Pointwise(gate=then), Pointwise(gate=first, scale=self.scale, add=_or_last(known[0]))
        scheme: Scheme = "spread" if self.strided else "plain"
        to_x = self.kernels.convolve(gradient, self.back, before, after, scheme=scheme, size=size)
        return [to_x, _of_summand(self.kernels, gradient, then, known[1])] if self.adds else [to_x]


class EitherStep:
    """A 3x3 convolution by tiles of 4x4 results, or as a sum where the results fill so little of their tiles that this
    needs fewer products.
    """

    def __init__(self, tiles: WinogradStep, sums: SumStep) -> None:
        self.tiles, self.sums = tiles, sums
        self.stale: set[Step] = set()

    def refresh(self) -> None:
        self.stale = {self.tiles, self.sums}

    def forward(self, values: Sequence[Tensor], keep: bool) -> tuple[Tensor, Any]:
        height, width = _shape_of(self.tiles.layer, values[0])[2:]
        points = len(self.tiles.there) * -(-height // 4) * -(-width // 4)
        step: Step = self.tiles if points < 9 * height * width else self.sums
        if step in self.stale:
            step.refresh()
            self.stale.discard(step)
        result, kept = step.forward(values, keep)
        return result, (step, kept)

    def backward(self, kept: Any, gradient: Tensor, known: Gradients) -> Gradients:
        step, kept = kept
        return step.backward(kept, gradient, known)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What batch norm does to the C channels in eval mode, (C,) each."""
    assert norm.running_mean is not None, "see `_is_norm`"
    assert norm.running_var is not None, "see `_is_norm`"
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.float(), shift.float()


def geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _shape_of(layer: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    """The shape of what a convolution makes of `x`."""
    if x.shape[1] != layer.in_channels:
        raise ValueError(f"images of {x.shape[1]} channels for a convolution of {layer.in_channels}")
    sizes = []
    for axis, size in enumerate(x.shape[2:]):
        room = size + 2 * int(layer.padding[axis]) - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1
        sizes.append(room // layer.stride[axis] + 1)
    return (len(x), layer.out_channels, *sizes)


def _of_summand(kernels: Kernels, gradient: Tensor, signs: Tensor | None, known: Tensor | None) -> Tensor:
    """The gradient of what was added before a ReLU of these signs."""
    if signs is None and known is None:
        return gradient
    return kernels.pointwise(gradient, Pointwise(gate=signs, add=_or_last(known)))


def _require_shape(values: Sequence[Tensor], shape: Sequence[int]) -> None:
    if any(value.shape != tuple(shape) for value in values):
        raise ValueError("a sum of images of other shapes")


def _zeros(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), memory_format=torch.channels_last).zero_()


def _or_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else _last(x)


def is_float32_on_cpu(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.device.type == "cpu"


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) as the kernels read them, by their address alone: other numbers would lead out of memory."""
    if not is_float32_on_cpu(x):
        raise TypeError(f"the kernels take float32 on a CPU, not {x.dtype} on {x.device}")
    return x.contiguous(memory_format=torch.channels_last)
