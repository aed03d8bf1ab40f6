"""What a whole epoch of `fit` costs: beside its bare kernels, with the number of images, and beside a naive epoch.

Parts, each a table:
- overhead: epochs of `fit` (loading, augmentation, tallies, state at the boundary) in turn with as many bare steps on
  batches that were prepared before; the median over epochs of one beside the other.
- share: what class tallies, history and progress cost within that; each is called by itself, many times, and set
  against a bare step. On CUDA their kernels are then waited for, which training does not do: an upper bound.
- linear: time per image for growing numbers of images, with a cheap network and a one-step attack.
- naive: epochs of `fit` in turn with the naive loop behind a `DataLoader` that prepares image by image, in a process
  of its own (`benchmarks.apart`).

An epoch lasts from one boundary to the next; the first one of every run is left out.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.measure import Report, Row, Table, Timing
from benchmarks.naive import STEPS, NaiveTraining, naive_loader
from benchmarks.workload import CHEAP, LR, SYNTHETIC, Step, as_in_fit, as_usual, build, load, one_batch
from robustfair.data import ImageDataset, Loader, Splits
from robustfair.models.head import head_norms
from robustfair.objectives import PGDAT, Objective
from robustfair.training import Schedule, fit
from robustfair.training.loop import counts
from robustfair.training.run import EpochStatistics
from robustfair.training.state import TrainState

PARTS = ("overhead", "share", "linear", "naive")
CALLS = 200
"""How often a call of the part "share" is repeated."""


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser("epoch", __doc__, batch_size=64, precision="fp32", width=16, repeats=3)
    options.add_argument("--compile", action="store_true", help="compile our passes")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options.add_argument("--batches", type=int, default=16, help="per epoch, for overhead and naive")
    options.add_argument("--sizes", type=int, nargs="+", default=(2000, 10_000, 50_000), help="images, for linear")
    options.add_argument("--workers", type=int, default=2, help="processes that prepare images for the naive loop")
    options.add_argument("--data", default=SYNTHETIC, help="training images: a data set, or synthetic")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table per part."""
    made = {"overhead": overhead, "share": share, "linear": linear, "naive": naive}
    tables = []
    for part in args.parts:
        measure.say(part)
        tables.append(made[part](args))
    shown = {"batch_size": args.batch_size, "attack": f"pgd-{STEPS}", "precision": args.precision, "data": args.data}
    settings = {**measure.settings(args), **shown, "compiled": args.compile}
    cheap = f"The part linear runs {CHEAP[0]} of width {CHEAP[1]} under a one-step attack, whatever --model says."
    return Report("epoch", settings, tables, [cheap] if "linear" in args.parts else [])


def overhead(args: argparse.Namespace) -> Table:
    """Epochs of `fit`, interrupted by bare steps: after every step on a CPU, after every epoch on CUDA.

    On CUDA a step is only launched when `fit` goes on to the next, and waiting in between would slow it down.
    """
    data = load(args.data, "train", args.batches * args.batch_size)
    model = build(args.model, args.width, device=args.device)
    bare_step = _step(model, args)
    batches = list(Loader(data.to(args.device), args.batch_size, augment=data.augment, seed=0).epoch(0))
    by_step = torch.device(args.device).type == "cpu"
    bare = [0.0]

    def after_step(step: int) -> None:
        bare[-1] += measure.timed(lambda: bare_step(batches[step]), args.device)

    def after_epoch() -> None:
        if not by_step:
            bare[-1] = measure.timed(lambda: [bare_step(batch) for batch in batches], args.device)
        bare.append(0.0)

    whole = fit_epochs(
        model,
        data,
        PGDAT(steps=STEPS),
        args,
        epochs=1 + args.repeats,
        after_step=after_step if by_step else None,
        after_epoch=after_epoch,
    )
    timings = {"bare kernels": Timing(tuple(bare[1:-1])), "fit": Timing(tuple(whole))}
    beside = [a / b - 1 for a, b in zip(whole, bare[1:-1], strict=True)]
    rows = _epoch_rows(timings, "bare kernels", len(data))
    rows[1] |= {"overhead": median(beside), "overhead_low": min(beside), "overhead_high": max(beside)}
    shown = {"overhead": "{overhead:+.2%}", "turn by turn": "{overhead_low:+.2%} to {overhead_high:+.2%}"}
    return Table(f"Overhead of an epoch of {len(batches)} batches", measure.SPEED_COLUMNS | shown, rows)


def share(args: argparse.Namespace) -> Table:
    """What counting and telling cost, per step or per epoch, as a share of the bare steps."""
    model = build(args.model, args.width, device=args.device)
    batch = one_batch(args.batch_size, args.device)
    step = _step(model, args)
    with as_in_fit(args.device):
        step(batch)
        bare = Timing(tuple(measure.timed(lambda: step(batch), args.device) for _ in range(args.repeats))).median
    statistics = EpochStatistics(10, torch.device(args.device))
    attack = step.objective.attack(batch)
    loss = step.objective(step.engine, replace(batch, x_adv=batch.x))
    total = loss.total()

    def tally() -> None:
        statistics.add(batch, attack, loss, total, 0)
        if batch.x.device.type == "cpu":
            statistics.first_bad_step()

    def history() -> None:
        counts(statistics.tally), statistics.per_class(), statistics.loss(), head_norms(model)

    rows = [
        _share_row("class tallies", "step", _per_call(tally, args.device), bare),
        _share_row("history record", "epoch", _per_call(history, args.device), bare * args.batches),
        *_progress_rows(bare, args),
    ]
    together: Row = {"case": "together", "share": sum(row["share"] for row in rows if row.get("share") is not None)}
    columns = {"case": "{case}", "seconds": "{seconds:.2e}", "per": "{per}", "share of bare steps": "{share:.4%}"}
    title = f"Share of counting and telling, beside {args.batches} steps of {bare:.4f} s an epoch"
    return Table(title, columns, [*rows, together])


def linear(args: argparse.Namespace) -> Table:
    """Seconds per image of an epoch, for every size in turn."""
    data = load(args.data, "train", max(args.sizes))
    seconds: dict[int, list[float]] = {size: [] for size in args.sizes}
    for turn in range(args.repeats):
        for size in args.sizes:
            measure.say(f"  turn {turn + 1} of {args.repeats}: {size} images")
            part = data.subset(torch.arange(min(size, len(data))))
            model = build(*CHEAP, device=args.device)
            seconds[size] += fit_epochs(model, part, PGDAT(steps=1), args, epochs=2)
    rows: list[Row] = []
    for size, taken in seconds.items():
        timing, count = Timing(tuple(taken)), min(size, len(data))
        per_image = [1e6 * value / count for value in (timing.median, timing.low, timing.high)]
        row = {"images": count, "median": timing.median, "seconds": taken}
        rows.append({**row, **dict(zip(("per_image", "low", "high"), per_image, strict=True))})
    for row in rows:
        row["against_first"] = row["per_image"] / rows[0]["per_image"] - 1
    columns = {
        "images": "{images:,}",
        "seconds an epoch": "{median:.3f}",
        "microseconds an image": "{per_image:.2f}",
        "fastest to slowest": "{low:.2f} to {high:.2f}",
        "against the first": "{against_first:+.1%}",
    }
    return Table("Time per image with the number of images", columns, rows)


def naive(args: argparse.Namespace) -> Table:
    """Naive epochs and epochs of `fit` in turn."""
    data = load(args.data, "train", args.batches * args.batch_size)
    model = build(args.model, args.width, device=args.device)
    seconds: dict[str, list[float]] = {"naive": [], "fit": []}
    with Apart(naive_calls, args) as loop:
        for turn in range(1 + args.repeats):
            measure.say(f"  turn {turn + 1} of {1 + args.repeats}{' (warm-up)' if turn == 0 else ''}")
            seconds["naive"].append(loop("epoch"))
            seconds["fit"] += fit_epochs(model, data, PGDAT(steps=STEPS), args, epochs=2)
    timings = {name: Timing(tuple(taken[1:])) for name, taken in seconds.items()}
    rows = _epoch_rows(timings, "naive", len(data))
    return Table(f"An epoch of {args.batches} batches", measure.SPEED_COLUMNS, rows)


def naive_calls(args: argparse.Namespace) -> Calls:
    """What the process of the naive loop does: train for an epoch and tell the seconds."""
    data = load(args.data, "train", args.batches * args.batch_size)
    loop = NaiveTraining(build(args.model, args.width, device=args.device))
    loader = naive_loader(data, args.batch_size, workers=args.workers, pin_memory=args.device != "cpu")
    epoch = partial(loop.epoch, loader, args.device)
    return {"epoch": measure.clock(epoch, args.device, scope=partial(as_usual, args.device))}


def fit_epochs(
    model: nn.Module,
    data: ImageDataset,
    objective: Objective,
    args: argparse.Namespace,
    *,
    epochs: int,
    after_step: Callable[[int], None] | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> list[float]:
    """Seconds of every epoch of one run of `fit` but the first, which also pays for setting up.

    Args:
        after_step: called with the number of every step within its epoch, and not counted.
        after_epoch: called after every epoch, the first included, and not counted.
    """
    seconds = [0.0]
    started = time.perf_counter()

    def pause(call: Callable[[], None]) -> None:
        nonlocal started
        measure.synchronize(args.device)
        seconds[-1] += time.perf_counter() - started
        call()
        started = time.perf_counter()

    def at_boundary(state: TrainState) -> None:
        pause(after_epoch or (lambda: None))
        seconds.append(0.0)

    def at_step(epoch: int, step: int) -> None:
        if after_step is not None:
            pause(partial(after_step, step))

    torch.compiler.reset()
    fit(
        model,
        data,
        objective,
        schedule=Schedule(epochs=epochs, lr=LR, kind="constant", batch_size=args.batch_size),
        validation=0,
        select="last",
        precision=args.precision,
        compile=args.compile,
        device=args.device,
        save=at_boundary,
        on_step=at_step,
    )
    return seconds[1:-1]


def _step(model: nn.Module, args: argparse.Namespace) -> Step:
    return Step(
        model,
        PGDAT(steps=STEPS),
        precision=args.precision,
        compile=args.compile,
        device=args.device,
        batch_size=args.batch_size,
    )


def _epoch_rows(timings: dict[str, Timing], baseline: str, images: int) -> list[Row]:
    fast = measure.ratios(timings, baseline)
    return [measure.speed_row(name, timing, fast[name], images=images) for name, timing in timings.items()]


def _per_call(call: Callable[[], object], device: str) -> float:
    """Mean seconds of one of many calls in a row, until the device has finished them all."""
    call()
    return measure.timed(lambda: [call() for _ in range(CALLS)], device) / CALLS


def _share_row(name: str, per: str, seconds: float, beside: float) -> Row:
    return {"case": name, "per": per, "seconds": seconds, "share": seconds / beside}


def _progress_rows(bare: float, args: argparse.Namespace) -> list[Row]:
    """Cost of the command line's progress on a terminal: updates and epoch lines, and the thread that draws the bar."""
    try:
        from robustfair.cli.progress import TrainingProgress
    except ImportError as error:
        return [{"case": f"progress (not measured: no {error.name})"}]
    count = args.batches * args.batch_size
    images = ImageDataset(
        images=torch.zeros(count, 1, 1, 1, dtype=torch.uint8),
        labels=torch.arange(count) % 10,
        class_names=tuple("0123456789"),
    )
    ready: Any = SimpleNamespace(
        train=images,
        validation=None,
        splits=Splits(train=images),
        recipe=SimpleNamespace(train="pgd-at", data=args.data, model=args.model, edit=None),
        schedule=SimpleNamespace(batch_size=args.batch_size, epochs=1),
        model=nn.Linear(1, 1),
        notes=(),
    )
    told = {"count": [1] * 10, "clean": None, "robust": [1] * 10}
    record = {"epoch": 1, "lr": LR, "loss": 1.0, "train": told, "validation": {}, "images_per_second": 1.0}
    state = cast(TrainState, SimpleNamespace(history=[record]))
    before = os.environ.get("FORCE_COLOR")
    os.environ["FORCE_COLOR"] = "1"  # takes the redirected stream for a terminal, so that the bar is drawn
    try:
        with redirect_stderr(io.StringIO()), TrainingProgress() as progress:
            progress.start(ready, None)
            update = _per_call(lambda: progress.step(0, 0), "cpu")
            line = _per_call(lambda: progress.epoch(state), "cpu")
            used, started = time.process_time(), time.perf_counter()
            time.sleep(1)
            drawing = (time.process_time() - used) / (time.perf_counter() - started)
    finally:
        if before is None:
            del os.environ["FORCE_COLOR"]
        else:
            os.environ["FORCE_COLOR"] = before
    return [
        _share_row("progress update", "step", update, bare),
        _share_row("progress line", "epoch", line, bare * args.batches),
        {"case": "drawing the bar", "per": "second, of one core", "seconds": drawing, "share": drawing / args.threads},
    ]


if __name__ == "__main__":
    main()
