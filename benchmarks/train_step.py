"""Seconds of one step of adversarial training with PGD-10: the naive loop, and ours in each precision.

All cases start from the same weights, images and starting points and take turns. The naive loop has a process of its
own (`benchmarks.apart`); ours keeps freed memory and attacks on our kernels where they can be had, as in `fit`. Each
turn of a case opens with one training pass that is not measured.

First losses are compared twice: on the images that the naive loop attacked, and each on its own. Where the network
rounds otherwise (another memory layout is enough), a gradient near zero changes its sign, and ten steps carry that to a
tenth of the pixels, so the second comparison tells little in float32. In float64 it is exact to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.measure import Report, Row, Table
from benchmarks.naive import STEPS, NaiveTraining
from benchmarks.workload import Step, as_in_fit, as_usual, build, one_batch, ways
from robustfair.attacks.pgd import STARTS
from robustfair.config import Precision
from robustfair.objectives import PGDAT
from robustfair.values import Batch

COLUMNS = {
    **measure.SPEED_COLUMNS,
    "loss - naive, same x_adv": "{same_difference:+.1e}",
    "own x_adv": "{own_difference:+.1e}",
}
CHECK_COLUMNS = {"case": "{case}", "first loss": "{loss:.9f}", "loss - naive": "{own_difference:+.1e}"}
CHECK_IMAGES = 16
OBJECTIVE = PGDAT()


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser("train_step", __doc__, batch_size=(64, 128), precision=("fp32", "bf16"))
    measure.add_compile(options)
    options.add_argument(
        "--no-kernels", dest="kernels", action="store_false", help="attack on torch's layers, not on our kernels"
    )
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table per batch size, then the comparison in float64."""
    model = build(args.model, args.width, device=args.device)
    peaks = measure.matmul_peaks(args.device)
    tables = [
        Table(f"One step on {size} images", COLUMNS, compare(model, one_batch(size, args.device), peaks, args))
        for size in args.batch_size
    ]
    check = check_in_float64(model, min(CHECK_IMAGES, *args.batch_size), args.device)
    return Report(
        name="train_step",
        settings={**measure.settings(args, peaks), "attack": f"pgd-{STEPS}", "kernels": args.kernels},
        tables=[*tables, Table("First loss in float64, each on its own attacked images", CHECK_COLUMNS, check)],
        notes=[
            "TFLOP/s and MFU count 23 forward passes a step, 2 for each of the 10 attack steps and 3 for the update, "
            "whoever computes them; the naive loop computes 33."
        ],
    )


def compare(model: nn.Module, batch: Batch, peaks: Mapping[str, float], args: argparse.Namespace) -> list[Row]:
    """The rows of one batch size, the naive loop first."""
    torch.compiler.reset()
    size = len(batch.y)
    ours = ways(args.precision, compiled=args.compile)
    steps = {name: _step(model, size, args.device, *way, kernels=args.kernels) for name, way in ours.items()}
    with Apart(naive_calls, args.model, args.width, size, args.device) as naive:
        attacked = replace(batch, x_adv=_as_format_of(batch.x, naive("attack").to(args.device)))
        same: dict[str, float | None] = {name: _loss_before(step, attacked) for name, step in steps.items()}
        measure.say(f"batch size {size}: first step of the naive loop")
        first = {"naive": naive("step")}
        cases: dict[str, Callable[[], float]] = {"naive": partial(naive, "seconds")}
        scope = partial(as_in_fit, args.device)
        for name, step in steps.items():
            measure.say(f"batch size {size}: first step of {name}")
            with scope():
                first[name] = float(step(batch))
            settle = partial(_training_pass, step, attacked)
            cases[name] = measure.clock(partial(step, batch), args.device, scope=scope, settle=settle)
        timings = measure.interleaved(cases, args.repeats, 0)

    flops = measure.training_flops(measure.forward_flops(model, batch.x[:1]), STEPS) * size
    fast = measure.ratios(timings, "naive")
    rows = []
    for name, timing in timings.items():
        peak = peaks.get(ours[name][0] if name in ours else "fp32")
        row = measure.speed_row(name, timing, fast[name], images=size, flops=flops, peak=peak)
        shared = same.get(name)
        row["loss"], row["own_difference"] = first[name], first[name] - first["naive"]
        row["same_difference"] = None if shared is None else shared - first["naive"]
        rows.append(row)
    return rows


def naive_calls(model: str, width: int | None, size: int, device: str) -> Calls:
    """What the process of the naive loop does: attack the batch, step and tell the loss, step and tell the seconds."""
    loop, batch = NaiveTraining(build(model, width, device=device)), one_batch(size, device)
    x, y, noise = batch.x.contiguous(), batch.y, starting_noise(batch)

    def step() -> float:
        return loop.step(x, y, noise)[0]

    def settle() -> None:
        loop.loss(x, y).backward()

    return {
        "attack": lambda: loop.attack(x, y, noise).cpu(),
        "step": step,
        "seconds": measure.clock(step, device, scope=partial(as_usual, device), settle=settle),
    }


def check_in_float64(model: nn.Module, images: int, device: str) -> list[Row]:
    """First losses of both loops in double precision."""
    double = deepcopy(model).double()
    batch = one_batch(images, device)
    batch = replace(batch, x=batch.x.double())
    naive = NaiveTraining(double).step(batch.x.contiguous(), batch.y, starting_noise(batch))[0]
    ours = float(_step(double, images, device, "fp32", False)(batch))
    return [
        {"case": "naive", "loss": naive, "own_difference": 0.0},
        {"case": "ours", "loss": ours, "own_difference": ours - naive},
    ]


def starting_noise(batch: Batch) -> Tensor:
    """(B, C, H, W) in NCHW: how far our attack on `batch` starts from its images."""
    attack = OBJECTIVE.attack(batch)
    return (STARTS[attack.start](batch.x, attack, batch.rng("attack")) - batch.x).contiguous()


def _step(
    model: nn.Module, size: int, device: str, precision: Precision, compile: bool, *, kernels: bool = True
) -> Step:
    given: dict[str, Any] = {"precision": precision, "compile": compile, "kernels": kernels}
    return Step(model, OBJECTIVE, device=device, batch_size=size, **given)


def _training_pass(step: Step, attacked: Batch) -> None:
    step.loss(attacked).backward()


def _loss_before(step: Step, attacked: Batch) -> float:
    """Loss on images attacked elsewhere; weights and batch-norm statistics stay as they were."""
    before = deepcopy(step.model.state_dict())
    loss = step.loss(attacked).item()
    step.model.load_state_dict(before)
    return loss


def _as_format_of(like: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(x)


if __name__ == "__main__":
    main()
