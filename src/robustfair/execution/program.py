"""A network as a list of steps, each with its own way back: passes without weight gradients, as searches need them.

Autograd keeps the numbers that a layer returns until its backward pass. Here what a step reads is given up after the
last step that reads it, so that memory stays small and warm, and gradients of an image that several steps read are
summed where they are made.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from robustfair.execution.kernels.compiled import Kernels
from robustfair.execution.steps import (
    STRIDED,
    WINOGRAD,
    Convolution,
    EitherStep,
    PointwiseStep,
    Step,
    SumStep,
    TorchStep,
    WinogradStep,
    geometry,
    is_float32_on_cpu,
)

ADDITIONS = (operator.add, operator.iadd, torch.add)
WRITING = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
POSITIVE_PARTS = (F.relu, torch.relu, torch.relu_)


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


def program(network: fx.GraphModule, kernels: Kernels) -> Program:
    """The steps of a network in eval mode, on the kernels where those can take them.

    The weights that torch's own steps read are the network's, which must not change between two passes.

    Raises:
        ValueError: its graph does more than from images to logits.
    """
    return _Reader(network, kernels).read()


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
        if geometry(layer) in (WINOGRAD, STRIDED) and layer.in_channels % self.kernels.lanes == 0:
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

        return TorchStep(call, in_place=self._is_in_place(node)), inputs

    def _is_in_place(self, node: fx.Node) -> bool:
        """Whether a node, going by its name or a flag, writes to what it reads."""
        if node.op == "call_module":
            return bool(getattr(self.layers.get(str(node.target)), "inplace", False))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.kwargs.get("inplace") is True or name.endswith("_") or node.target in WRITING

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
        if type(layer) is not nn.Conv2d or not is_float32_on_cpu(layer.weight):
            return False
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        alike = all(len(set(pair)) == 1 for pair in (layer.stride, layer.dilation))
        return alike and layer.out_channels % self.kernels.lanes == 0

    def _is_norm(self, layer: Any) -> bool:
        if type(layer) is not nn.BatchNorm2d or layer.training or layer.running_mean is None:
            return False
        return is_float32_on_cpu(layer.running_mean) and layer.num_features % self.kernels.lanes == 0


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(total: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a sum adds to a node; None where it is no sum of two."""
    if total.op != "call_function" or total.target not in ADDITIONS or total.kwargs or len(total.args) != 2:
        return None
    others = [each for each in total.args if each is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
