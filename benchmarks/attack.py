"""Seconds of PGD alone on a network in eval mode: the naive loop, torchattacks, foolbox, and ours in each precision.

All share eps 8/255, steps of 2/255 and a uniform start, each with its own draw, and take turns; the loop and the other
libraries have a process of their own (`benchmarks.apart`). How strong they are is shown by the accuracy that they
leave: of the network of `--run`; else of a narrow one that is trained here for about a minute; else, where there are no
images to train on, of untrained weights on random images, which tells little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.external import Attacker, external_attackers
from benchmarks.measure import Report, Row, Table
from benchmarks.naive import EPS, STEP_SIZE, naive_attack
from benchmarks.workload import SYNTHETIC, as_in_fit, as_usual, build, default_data, load, one_batch, ways
from robustfair.data import evaluation_batches
from robustfair.data.datasets import ImageDataset
from robustfair.execution.live import live_program
from robustfair.losses import MaximiseCE
from robustfair.models.modes import attacking
from robustfair.objectives import PGDAT
from robustfair.runs.folder import RunFolder
from robustfair.training import Schedule, fit
from robustfair.training.engine import Engine
from robustfair.values import Attack, Batch

COLUMNS = {
    **measure.SPEED_COLUMNS,
    "times torchattacks": "{over_torchattacks:.2f}",
    "robust accuracy": "{robust:.1%}",
}
NARROW, TRAINING_IMAGES, EPOCHS = 16, 5000, 4
"""Width, images and epochs of the network that is trained for the accuracies: about a minute on two cores."""


@dataclass(frozen=True)
class Case:
    """One attack on one network: `attack` is None where `why` tells what is missing, `peak` names its precision."""

    attack: Attacker | None
    ours: bool = False
    peak: str = "fp32"
    why: str = ""


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser("attack", __doc__, batch_size=64, precision=("fp32", "bf16"), repeats=3)
    measure.add_compile(options)
    options.add_argument("--steps", type=int, nargs="+", default=(10, 20), help="gradient steps of the attack")
    options.add_argument("--run", type=Path, metavar="FOLDER", help="attack the network of this run, trained before")
    options.add_argument("--data", default=default_data(), help="images for the accuracies, or synthetic")
    options.add_argument("--images", type=int, default=256, help="how many of its test images")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table per number of steps."""
    peaks = measure.matmul_peaks(args.device)
    model, test = subject(args), load(args.data, "test", args.images).to(args.device)
    victim, told = judged_on(model, args)
    judges = others_on(victim, args.device) | ours_on(victim, args)
    timed = ours_on(model, args)
    tables = []
    with Apart(other_calls, args) as others:
        for steps in args.steps:
            measure.say(f"PGD-{steps}")
            rows = compare(model, judges, timed, others, steps, peaks, args)
            for name, row in zip(judges, rows, strict=True):
                row["robust"] = accuracy_left(victim, judges[name], test, steps, args)
            tables.append(Table(f"PGD-{steps} on {args.batch_size} images", COLUMNS, rows))
    return Report(
        name="attack",
        settings=measure.settings(args, peaks),
        tables=tables,
        notes=[
            f"Robust accuracy: on {len(test)} images of {args.data}, of {told}.",
            "TFLOP/s and MFU count 2 forward passes a step, whoever computes them; the naive loop computes 3.",
        ],
    )


def subject(args: argparse.Namespace) -> nn.Module:
    """What is timed, in eval mode: the network of `--run`, or an untrained one."""
    if args.run is not None:
        return RunFolder(args.run).read()[0].to(args.device).eval()
    return build(args.model, args.width, device=args.device).eval()


def judged_on(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """What the accuracies are measured on, and a description of it."""
    if args.run is not None:
        return model, "the network of --run, which is timed too"
    if args.data == SYNTHETIC:
        return model, "the untrained network that is timed: this tells little of the strength"
    measure.say("training a narrow network")
    train = load(args.data, "train", TRAINING_IMAGES)
    schedule = Schedule(epochs=EPOCHS, lr=0.1, kind="one-cycle")
    fgsm = PGDAT(steps=1, step_size=10 / 255)
    narrow = build(args.model, min(NARROW, args.width or NARROW))
    fitted = fit(narrow, train, fgsm, schedule=schedule, validation=0, select="last", device=args.device)
    told = f"a {args.model} of width {narrow.width}, trained with FGSM on {len(train)} images for {EPOCHS} epochs"
    return fitted.model, told


def others_on(model: nn.Module, device: str) -> dict[str, Case]:
    """The attacks of others on a copy of `model` of its own each; the naive loop first."""
    found = {"naive": Case(partial(_naive, deepcopy(model)))}
    for name, attack in external_attackers(deepcopy(model), device).items():
        found[name] = Case(None, why=attack) if isinstance(attack, str) else Case(attack)
    return found


def ours_on(model: nn.Module, args: argparse.Namespace) -> dict[str, Case]:
    """Our attack on a copy of `model` of its own for each way; on kernels in float32 where it is not compiled."""
    found = {}
    for name, (precision, compile) in ways(args.precision, compiled=args.compile).items():
        copied = deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_kernels = precision == "fp32" and not compile and torch.device(args.device).type == "cpu"
        given: dict[str, Any] = {"precision": precision, "compile": compile}
        given["program"] = live_program(copied, one_batch(2, args.device).x)[0] if on_kernels else None
        engine = Engine(copied, device=args.device, batch_size=args.batch_size, **given)
        found[name] = Case(partial(_ours, engine), ours=True, peak=precision)
    return found


def other_calls(args: argparse.Namespace) -> Calls:
    """What the process of the others does: attack a batch for so many steps and tell the seconds."""
    found = others_on(subject(args), args.device)
    return {name: partial(seconds, case, args) for name, case in found.items() if case.attack is not None}


def compare(
    model: nn.Module,
    cases: Mapping[str, Case],
    timed: Mapping[str, Case],
    others: Apart,
    steps: int,
    peaks: Mapping[str, float],
    args: argparse.Namespace,
) -> list[Row]:
    """A row for each of `cases`, timed on one batch; without numbers where a library is missing.

    Args:
        timed: those that run here.
        others: where the rest runs.
    """
    calls: dict[str, Callable[[], float]] = {}
    for name, case in cases.items():
        if name in timed:
            calls[name] = partial(seconds, timed[name], args, steps)
        elif case.attack is not None:
            calls[name] = partial(others, name, steps)
    timings = measure.interleaved(calls, args.repeats)
    flops = measure.attack_flops(measure.forward_flops(model, one_batch(1, args.device).x), steps) * args.batch_size
    fast = measure.ratios(timings, "naive")
    over = measure.ratios(timings, "torchattacks") if "torchattacks" in timings else {}
    rows: list[Row] = []
    for name, case in cases.items():
        if case.attack is None:
            rows.append({"case": f"{name} ({case.why})"})
            continue
        peak = peaks.get(case.peak)
        row = measure.speed_row(name, timings[name], fast[name], images=args.batch_size, flops=flops, peak=peak)
        rows.append({**row, "over_torchattacks": over.get(name)})
    return rows


def seconds(case: Case, args: argparse.Namespace, steps: int) -> float:
    """Of one attack on one batch; on a CPU a step that is not measured opens the turn."""
    assert case.attack is not None, "a library that is missing has no turn"
    attack = partial(case.attack, given(case, one_batch(args.batch_size, args.device)))
    settle = partial(attack, 1) if torch.device(args.device).type == "cpu" else None
    scope = partial(as_in_fit if case.ours else as_usual, args.device)
    return measure.clock(partial(attack, steps), args.device, scope=scope, settle=settle)()


def given(case: Case, batch: Batch) -> Batch:
    """The batch in the layout that the attack's users have."""
    return batch if case.ours else replace(batch, x=batch.x.contiguous())


def accuracy_left(
    victim: nn.Module, case: Case, test: ImageDataset, steps: int, args: argparse.Namespace
) -> float | None:
    """Share of the test images that the network still classifies in float32 once they are attacked."""
    if case.attack is None:
        return None
    correct = 0
    for batch in evaluation_batches(test, args.batch_size):
        x_adv = case.attack(given(case, batch), steps)
        with attacking(victim, "eval"), torch.no_grad():
            correct += int((victim(x_adv).argmax(1) == batch.y).sum())
    return correct / len(test)


def _naive(model: nn.Module, batch: Batch, steps: int) -> Tensor:
    noise = torch.empty_like(batch.x).uniform_(-EPS, EPS)
    return naive_attack(model, batch.x, batch.y, noise, steps)


def _ours(engine: Engine, batch: Batch, steps: int) -> Tensor:
    eps = torch.full_like(batch.x[:, 0, 0, 0], EPS)
    step_size = torch.full_like(eps, STEP_SIZE)
    return engine.attack(batch, Attack(eps=eps, step_size=step_size, steps=steps, goal=MaximiseCE()))


if __name__ == "__main__":
    main()
