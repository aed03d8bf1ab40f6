"""A network as a list of steps, each with its own way back: passes without weight gradients, as searches need them.

Autograd keeps the numbers that a layer returns until its backward pass. Where layers run on our kernels, the way back
needs one bit of each, its sign; what a step reads is given up after the last step that reads it, so that memory stays
small and warm, and gradients of an image that several steps read are summed where they are made. Steps that are no
kernel's go through torch, forwards and backwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from robustfair.execution.kernels.compiled import Kernels, Pointwise, Scheme

ADDITIONS = (operator.add, operator.iadd, torch.add)
POSITIVE_PARTS = (F.relu, torch.relu, torch.relu_)
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


class Program(nn.Module):
    """A network in eval mode, (B, C, H, W) -> logits (B, K), differentiable in its images, once.

    Its weights are those that its layers had when it was made, or when `refresh` was called last.

    Args:
        steps: in order.
        reads: of each step, the numbers of the values that it reads. The images are value 0, the result of step i is
            value i + 1; the last is the logits.
    """

    def __init__(self, steps: Sequence[Step], reads: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.steps, self.reads = tuple(steps), tuple(reads)
        last = {value: step for step, values in enumerate(self.reads) for value in values}
        self.gives_up = [[value for value in values if last[value] == step] for step, values in enumerate(self.reads)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Run.apply(x, self)
        return self.run(x, keep=False)[0]

    def refresh(self) -> None:
        """Take the weights and statistics that the layers have now, which takes as long as reading them a few times."""
        with torch.no_grad():
            for step in self.steps:
                step.refresh()

    def run(self, x: Tensor, *, keep: bool) -> tuple[Tensor, list[Any]]:
        """Logits, and what `back` needs."""
        values: dict[int, Any] = {0: x}
        kept = []
        with torch.no_grad():
            for number, (step, reads, gives_up) in enumerate(zip(self.steps, self.reads, self.gives_up, strict=True)):
                values[number + 1], needed = step.forward([values[value] for value in reads], keep)
                kept.append(needed)
                for value in set(gives_up):
                    del values[value]
        return values[len(self.steps)], kept

    def back(self, kept: Sequence[Any], gradient: Tensor) -> Tensor:
        """The gradient of the images (B, C, H, W) for that of the logits (B, K)."""
        gradients: dict[int, Tensor | None] = {len(self.steps): gradient}
        for number in range(len(self.steps) - 1, -1, -1):
            own = gradients.pop(number + 1, None)
            if own is None:
                continue
            reads = self.reads[number]
            known = [gradients.pop(value, None) for value in reads]  # of a value read twice, None at last
            for value, new in zip(reads, self.steps[number].backward(kept[number], own, known), strict=True):
                before = gradients.get(value)
                gradients[value] = new if before is None else before if new is None else before + new
        found_for_x = gradients.get(0)
        assert found_for_x is not None, "the logits depend on the images: it was tried"
        return found_for_x


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, program: Program) -> Tensor:
        logits, ctx.kept = program.run(x, keep=True)
        ctx.program = program
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.program.back(ctx.kept, gradient), None


@dataclass(frozen=True)
class TorchStep:
    """Whatever torch can do, and differentiate.

    Attributes:
        call: takes the values.
    """

    call: Callable[..., Any]

    def refresh(self) -> None:
        """Nothing: a call reads what it needs."""

    def forward(self, values: Sequence[Any], keep: bool) -> tuple[Any, Any]:
        if not keep:
            return self.call(*values), None
        with torch.enable_grad():
            leaves = [_leaf(value) for value in values]
            made = self.call(*leaves)
        return (made.detach(), (leaves, made)) if isinstance(made, Tensor) else (made, None)

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
            return weight, None if bias is None else bias.detach()
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
        geometry: dict[str, Any] = {"step": step, "padding": padding, "dilation": self.layer.dilation[0]}
        self.weight, self.bias = self.convolution.read()
        if self.fills:
            self.there = self.kernels.taps_of(self.weight, **geometry)
        if not self.fills and _geometry(self.layer) == WINOGRAD:
            self.winograd = self.kernels.transformed(self.weight.transpose(0, 1), flipped=True)
        else:
            self.back = self.kernels.taps_back(self.weight, **geometry)
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
        self.strided = _geometry(self.layer) == STRIDED
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


def program(network: fx.GraphModule, kernels: Kernels) -> Program:
    """The steps of a network in eval mode, on the kernels where those can take them.

    The weights that torch's own steps read are the network's, which must not change between two passes.

    Raises:
        ValueError: its graph does more than from images to logits.
    """
    return _Reader(network, kernels).read()


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


class _Reader:
    """Makes steps of the nodes of a graph; what one step covers of several nodes is its last one's."""

    def __init__(self, network: fx.GraphModule, kernels: Kernels) -> None:
        self.network, self.kernels = network, kernels
        self.layers = dict(network.named_modules())
        self.steps: list[Step] = []
        self.reads: list[tuple[int, ...]] = []
        self.value: dict[fx.Node, int] = {}

    def read(self) -> Program:
        nodes = list(self.network.graph.nodes)
        images = [node for node in nodes if node.op == "placeholder"]
        (output,) = (node for node in nodes if node.op == "output")
        if len(images) != 1 or not isinstance(output.args[0], fx.Node):
            raise ValueError("not a network from images to logits")
        self.value[images[0]] = 0
        plan = self._plan(nodes)
        for node in nodes:
            if node.op in ("placeholder", "output") or plan.get(node, node) is None:
                continue
            step, inputs = plan[node] if node in plan else self._torch(node)
            self.steps.append(step)
            self.reads.append(tuple(self.value[each] for each in inputs))
            self.value[node] = len(self.steps)
        if self.value[output.args[0]] != len(self.steps):
            raise ValueError("its graph goes on behind the logits")
        return Program(self.steps, self.reads)

    def _plan(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """Of each node that a kernel takes: the step and what it reads; None where a later node's step covers it."""
        plan: dict[fx.Node, Any] = {}
        for node in nodes:
            layer = self._layer(node)
            if layer is None or node in plan:
                continue
            if self._is_convolution(layer):
                self._plan_convolution(plan, node, layer)
            elif self._is_norm(layer):
                last, positive = self._positive_part(node)
                step = PointwiseStep(self.kernels, layer, positive=positive)
                self._cover(plan, (node, last), step, node.args)
        return plan

    def _plan_convolution(self, plan: dict[fx.Node, Any], node: fx.Node, layer: nn.Conv2d) -> None:
        """A step for a convolution, with what stands around it."""
        sums = self._norm_after(node)
        convolution = Convolution(layer, None if sums is node else self._layer(sums))
        total = _only_reader(sums)
        other = None if total is None or total in plan else _other_summand(total, sums)
        end = sums if total is None or other is None else total
        last, positive = self._positive_part(end)
        about: dict[str, Any] = {"adds": other is not None, "positive": positive}
        image, before = node.args[0], None
        if _geometry(layer) in (WINOGRAD, STRIDED) and layer.in_channels % self.kernels.lanes == 0:
            image, norm, before = self._norm_before(plan, image)
            tiles = WinogradStep(self.kernels, convolution, norm=norm, **about)
            either = norm is None
            step: Step = EitherStep(tiles, SumStep(self.kernels, convolution, **about)) if either else tiles
        else:
            step = SumStep(self.kernels, convolution, **about)
        reads = (image,) if other is None else (image, other)
        self._cover(plan, (*(before or ()), node, sums, end, last), step, reads)

    def _norm_after(self, node: fx.Node) -> fx.Node:
        """The batch norm that alone reads a node, or the node."""
        reader = _only_reader(node)
        return node if reader is None or not self._is_norm(self._layer(reader)) else reader

    def _norm_before(self, plan: dict[fx.Node, Any], image: Any) -> tuple[Any, nn.BatchNorm2d | None, Any]:
        """Of batch norm and ReLU that one layer reads: what they are made of, the norm, their nodes."""
        step = (plan.get(image) or (None,))[0]
        if not isinstance(step, PointwiseStep) or not step.positive or len(image.users) > 1:
            return image, None, None
        normed = image.args[0]
        return normed.args[0], self._layer(normed), (normed, image)

    def _cover(self, plan: dict[fx.Node, Any], nodes: Sequence[Any], step: Step, reads: Any) -> None:
        for node in nodes:
            plan[node] = None
        plan[nodes[-1]] = step, reads

    def _torch(self, node: fx.Node) -> tuple[Step, Sequence[fx.Node]]:
        inputs = list(node.all_input_nodes)
        if node.op == "get_attr":
            return TorchStep(lambda: operator.attrgetter(str(node.target))(self.network)), inputs

        def call(*values: Any) -> Any:
            known = dict(zip(inputs, values, strict=True))
            args = fx.node.map_arg(node.args, known.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
            if node.op == "call_module":
                return self.layers[str(node.target)](*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return TorchStep(call), inputs

    def _layer(self, node: fx.Node) -> Any:
        """The layer that a node calls on one value; None for any other node."""
        plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return self.layers.get(str(node.target)) if plain and isinstance(node.args[0], fx.Node) else None

    def _positive_part(self, node: fx.Node) -> tuple[fx.Node, bool]:
        """The ReLU that alone reads a node and True, or the node and False."""
        reader = _only_reader(node)
        if reader is None or reader.args[:1] != (node,):
            return node, False
        found = (
            (reader.op == "call_function" and reader.target in POSITIVE_PARTS)
            or (reader.op == "call_method" and reader.target in ("relu", "relu_"))
            or type(self._layer(reader)) is nn.ReLU
        )
        return (reader, True) if found else (node, False)

    def _is_convolution(self, layer: nn.Module) -> bool:
        """Whether a kernel computes it: one stride and dilation, no groups, zeros beside the image."""
        if type(layer) is not nn.Conv2d or not _is_plain(layer.weight):
            return False
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        alike = all(len(set(pair)) == 1 for pair in (layer.stride, layer.dilation))
        return alike and layer.out_channels % self.kernels.lanes == 0

    def _is_norm(self, layer: Any) -> bool:
        if type(layer) is not nn.BatchNorm2d or layer.training or layer.running_mean is None:
            return False
        return _is_plain(layer.running_mean) and layer.num_features % self.kernels.lanes == 0


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(total: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a sum adds to a node; None where it is no sum of two."""
    if total.op != "call_function" or total.target not in ADDITIONS or total.kwargs or len(total.args) != 2:
        return None
    others = [each for each in total.args if each is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _shape_of(layer: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    """The shape of what a convolution makes of `x`."""
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


def _is_plain(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.device.type == "cpu"


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
