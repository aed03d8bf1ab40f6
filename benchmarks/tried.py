"""One pass of an attack on a CPU, run in every way that was tried: what the engine does, and what it leaves out.

A pass is the forward pass and the gradient of the cross-entropy with respect to the images, in eval mode. NOTES.md says
what each way was expected to bring. Ways that leave memory to the C library run in a process of their own
(`benchmarks.apart`), in turn with the others. The last table is the floor: the convolutions alone, forward and
backward, with weights as they are and with weights brought into oneDNN's own layout beforehand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.measure import Report, Row, Table
from benchmarks.workload import build, one_batch
from robustfair.attacks.pgd import input_gradient
from robustfair.execution.folded import folded
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import InPrecision
from robustfair.losses import cross_entropy
from robustfair.values import Model

CHUNK = 32
Pass = Callable[[Tensor, Tensor], Tensor]
COLUMNS = {
    "way": "{case}",
    "ms": "{ms:.1f}",
    "fastest to slowest": "{low_ms:.1f} to {high_ms:.1f}",
    "times as fast": "{ratio:.2f}",
    "gradient, relative error": "{error:.1e}",
}
FLOOR_COLUMNS = {"convolutions": "{case}", "ms": "{ms:.1f}", "ms, weights laid out before": "{packed_ms:.1f}"}


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the comparison from the command line."""
    options = measure.parser("tried", __doc__, batch_size=(64, 128), precision=("fp32", "bf16"))
    measure.add_compile(options)
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table per batch size and precision, then the floor."""
    model = subject(args)
    tables = []
    for size in args.batch_size:
        for precision in args.precision:
            rows = compare(model, size, precision, args)
            tables.append(Table(f"{precision}, {size} images", COLUMNS, rows))
            if args.device == "cpu":
                tables.append(Table(f"{precision}, {size} images, floor", FLOOR_COLUMNS, floor(model, size, precision)))
    return Report(name="tried", settings=measure.settings(args), tables=tables)


def subject(args: argparse.Namespace) -> nn.Module:
    """The network in eval mode, its weights without gradients."""
    model = build(args.model, args.width, device=args.device).requires_grad_(False).eval()
    spread_statistics(model)
    return model


def spread_statistics(model: nn.Module) -> None:
    """Running statistics as if the network had been trained: at 0 and 1, batch norm would be no work to undo."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=draw))  # type: ignore[union-attr]
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=draw))  # type: ignore[union-attr]


def compare(model: nn.Module, size: int, precision: Any, args: argparse.Namespace) -> list[Row]:
    """Rows of all ways on the same images, the plain NCHW pass through all weights first."""
    torch.compiler.reset()  # it compiles a function eight times at most, and then runs it as it stands
    batch = one_batch(size, args.device)
    exact = gradient(deepcopy(model).double(), batch.x.double(), batch.y)
    keep = partial(kept_memory, args.device)
    with Apart(usual_calls, size, precision, args) as usual:
        found = {name: partial(usual, name, "gradient") for name in usual("names")}
        cases: dict[str, Callable[[], float]] = {name: partial(usual, name, "seconds") for name in found}
        for name, call in kept_ways(model, precision, args.device, compiled=args.compile).items():
            found[name] = partial(call, batch.x, batch.y)
            cases[name] = measure.clock(found[name], args.device, scope=keep, settle=found[name])
        errors = {}
        for name, once in found.items():
            measure.say(f"{precision}, {size} images: {name}")
            errors[name] = float((once() - exact).norm() / exact.norm())
        timings = measure.interleaved(cases, args.repeats)
    fast = measure.ratios(timings, next(iter(cases)))
    return [
        {
            "case": name,
            "ms": 1e3 * timing.median,
            "low_ms": 1e3 * timing.low,
            "high_ms": 1e3 * timing.high,
            "ratio": fast[name],
            "error": errors[name],
        }
        for name, timing in timings.items()
    ]


def usual_calls(size: int, precision: Any, args: argparse.Namespace) -> Calls:
    """What the process of the usual ways does: name them, and of each tell the gradient or the seconds of a pass."""
    batch = one_batch(size, args.device)
    ways = usual_ways(subject(args), precision, args.device)
    calls = {name: partial(call, batch.x, batch.y) for name, call in ways.items()}

    def answer(name: str, what: str) -> Any:
        call = calls[name]
        return call().cpu() if what == "gradient" else measure.clock(call, args.device, settle=call)()

    return {"names": lambda: list(calls)} | {name: partial(answer, name) for name in calls}


def usual_ways(model: nn.Module, precision: Any, device: str) -> dict[str, Pass]:
    """Name -> pass, for ways that leave memory to the C library."""
    plain = copied(model, precision, device)
    trained = deepcopy(model).requires_grad_(True)
    return {
        "NCHW, gradients of all weights": partial(
            all_gradients, InPrecision(trained, precision, device, bundled=False)
        ),
        "NCHW, gradient of the images": nchw(copied(model, precision, device, last=False)),
        "channels last": partial(gradient, plain),
        f"channels last, {CHUNK} images at a time": partial(in_chunks, plain),
    }


def kept_ways(model: nn.Module, precision: Any, device: str, *, compiled: bool) -> dict[str, Pass]:
    """Name -> pass, for ways that run with freed memory kept."""
    run = partial(copied, model, precision, device)
    found: dict[str, Pass] = {
        "channels last, memory kept": partial(gradient, run()),
        "the same, batch norm backward as one product": partial(gradient, run(with_short_backward)),
        "the same, batch norm folded where it follows a convolution": partial(gradient, run(folded)),
        "the same, small images in bundles": partial(gradient, run(bundled=True)),
    }
    if compiled:
        found["compiled forward and backward apart"] = partial(gradient, torch.compile(run(), dynamic=False))
        found["compiled whole"] = torch.compile(partial(pure, run()), dynamic=False)
        found["compiled whole, folded"] = torch.compile(partial(pure, run(folded)), dynamic=False)
        if precision == "bf16":
            cast = partial(pure, run(with_cast_weights))
            found["compiled whole, weights cast once"] = torch.compile(cast, dynamic=False)
        bundled = partial(pure, run(bundled=True))
        found["compiled whole, small images in bundles"] = torch.compile(bundled, dynamic=False)
    return found


def copied(
    model: nn.Module,
    precision: Any,
    device: str,
    edit: Callable[[nn.Module], Any] = lambda net: None,
    *,
    last: bool = True,
    bundled: bool = False,
) -> Model:
    """A copy of the model, edited, channels last or as it is, its convolutions in bundles or as they are."""
    net = deepcopy(model)
    if last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return InPrecision(edit(net) or net, precision, torch.device(device).type, bundled=bundled)


# Passes


def gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the images alone."""
    z = x.detach().requires_grad_(True)
    return input_gradient(cross_entropy(model(z), y), z)


def all_gradients(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The images' gradient out of a backward pass that fills those of the weights too."""
    z = x.contiguous().detach().requires_grad_(True)
    cross_entropy(model(z), y).sum().backward()
    assert z.grad is not None, "a leaf that the loss depends on"
    return z.grad


def nchw(model: Model) -> Pass:
    return lambda x, y: gradient(model, x.contiguous(), y)


def in_chunks(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """A few images at a time, so that more of the activations stay in the cache."""
    return torch.cat([gradient(model, a, b) for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)])


def pure(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The gradient as a function, for a compiler to see whole."""
    return torch.func.grad(lambda z: cross_entropy(model(z), y).sum())(x)


# Networks


class ShortBackward(torch.autograd.Function):
    """Batch norm in eval mode whose backward pass is one product, the scale rounded to the images' type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        scale, _ = affine(norm)
        ctx.save_for_backward(scale.to(x.dtype).view(-1, 1, 1))
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that batch norm is in eval mode."""
    assert norm.running_mean is not None, "built with running statistics"
    assert norm.running_var is not None, "built with running statistics"
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def with_short_backward(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.forward = MethodType(lambda self, x: ShortBackward.apply(x, self), norm)  # type: ignore[method-assign]


def with_cast_weights(model: nn.Module) -> None:
    """Weights in the type that autocast would cast them to in every pass."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)


# Floor


def floor(model: nn.Module, size: int, precision: str) -> list[Row]:
    """Milliseconds of all convolutions of one pass, fastest of several calls each."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sums = {name: {"ms": 0.0, "packed_ms": 0.0} for name in ("forward", "backward to the images")}
    for conv, shape in convolutions(model, one_batch(size, "cpu").x):
        for name, (plain, packed) in both_layouts(conv, shape, dtype).items():
            sums[name]["ms"] += fastest(plain)
            sums[name]["packed_ms"] += fastest(packed)
    return [{"case": name, **found} for name, found in sums.items()]


def both_layouts(
    conv: nn.Conv2d, shape: torch.Size, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """The forward and the backward pass of a convolution, with weights in torch's layout and in oneDNN's."""
    x = torch.rand(shape).to(dtype).to(memory_format=torch.channels_last)
    weight = conv.weight.to(dtype).to(memory_format=torch.channels_last)
    kernel, one = conv.kernel_size[0], [1, 1]
    stride, padding = list(conv.stride), [kernel // 2] * 2
    out = torch.conv2d(x, weight, None, stride, padding)
    rest = [(side + 2 * pad - kernel) % step for side, pad, step in zip(shape[2:], padding, stride, strict=True)]
    ops = torch.ops.mkldnn
    there = ops._reorder_convolution_weight(weight, padding, stride, one, 1, list(x.shape))
    back = ops._reorder_convolution_transpose_weight(weight, padding, rest, stride, one, 1, list(out.shape))
    plain_backward = partial(torch.ops.aten.convolution_backward, out, x, weight, None, stride, padding, one)
    no_epilogue: tuple[str, list[float], str] = ("none", [], "")
    return {
        "forward": (
            partial(torch.conv2d, x, weight, None, stride, padding),
            partial(ops._convolution_pointwise, x, there, None, padding, stride, one, 1, *no_epilogue),
        ),
        "backward to the images": (
            partial(plain_backward, False, [0, 0], 1, [True, False, False]),
            partial(ops._convolution_transpose_pointwise, out, back, None, padding, rest, stride, one, 1, *no_epilogue),
        ),
    }


def convolutions(model: nn.Module, x: Tensor) -> list[tuple[nn.Conv2d, torch.Size]]:
    """Every convolution with the shape of its input."""
    seen: list[tuple[nn.Conv2d, torch.Size]] = []
    with recorded(model, seen), torch.no_grad():
        model(x)
    return seen


@contextmanager
def recorded(model: nn.Module, seen: list[tuple[nn.Conv2d, torch.Size]]) -> Iterator[None]:
    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        seen.append((module, inputs[0].shape))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of the fastest of several calls, memory kept."""
    with kept_memory("cpu"):
        call()
        return 1e3 * min(measure.timed(call) for _ in range(repeats))


if __name__ == "__main__":
    main()
