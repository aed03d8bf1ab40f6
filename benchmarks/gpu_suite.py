"""Everything that wants a GPU, unattended: `python benchmarks/gpu_suite.py --minutes 9 --resume results/gpu`.

In this order: is what is computed on this device right; steps of training in every way; then row by row training,
AutoAttack on the first 1,000 test images and, where half of them stand, on all; then the other tables. Every task
leaves a JSON file in the results folder; training is saved after each epoch and AutoAttack every minute: the next call,
on the same work folder, goes on where this one stopped, and `--table` prints what there is, with "-" where nothing was
measured. `--out` names a folder for the few files that are to be fetched. A lease in three commands is in NOTES.md.

Needs torch, numpy, safetensors and pillow, and for all but the first tasks CIFAR-10 as packed by `robustfair data pack
cifar10 --parts 2`. AutoAttack is compared with pyautoattack where that imports; where it does not, the table says so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import attack, autoattack, epoch, measure, memory  # noqa: E402
from benchmarks.gpu import checks, speed  # noqa: E402
from benchmarks.gpu.check import Setting  # noqa: E402
from benchmarks.gpu.checks import all_checks, failed  # noqa: E402
from benchmarks.gpu.files import bring, bring_weights, left_out  # noqa: E402
from benchmarks.gpu.speed import Case  # noqa: E402
from benchmarks.gpu.suite import (  # noqa: E402
    TASK_SCHEMA,
    NotNeededError,
    Suite,
    Task,
    kept,
    report,
    run_all,
    summary,
)
from benchmarks.measure import Report, Table  # noqa: E402
from benchmarks.rows import (  # noqa: E402
    Row,
    Way,
    fast_rows,
    fit_row,
    folder_of,
    is_trained,
    paper_rows,
    target_rows,
    train_row,
)
from benchmarks.workload import synthetic  # noqa: E402
from robustfair.data import Splits, load_dataset  # noqa: E402
from robustfair.errors import RobustFairError  # noqa: E402
from robustfair.execution.precision import allow_deterministic_products  # noqa: E402
from robustfair.files import read_json  # noqa: E402
from robustfair.metrics.intervals import wilson  # noqa: E402
from robustfair.objectives import PGDAT  # noqa: E402
from robustfair.values import Threat  # noqa: E402

MARGIN = 20
"""Seconds of the time given that are left for what is under way."""
SPARE = 60
"""Seconds that timing takes once all ways are prepared."""


# Tasks


def correctness(suite: Suite) -> Mapping[str, Any]:
    """Every check of `benchmarks.gpu.checks`."""
    setting = Setting(suite.way.device, suite.small, suite.way.compile)
    rows = all_checks(setting)
    wrong = failed(rows)
    told = f"{len(rows) - len(wrong)} of {len(rows)} checks pass{', not ' * bool(wrong)}{', '.join(wrong)}."
    return report(suite, "correctness", [Table("Checks", checks.COLUMNS, rows)], [told])


def timed(model: str, width: int | None, size: int, cases: Sequence[Case]) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that runs steps of training in several ways, in turn."""

    def run(suite: Suite) -> Mapping[str, Any]:
        given: tuple[str, int | None, int, Sequence[Case]] = (model, width, size, cases)
        if suite.small:
            given = (model, 2, 4, speed.SMALL)
        repeats, device = 1 if suite.small else 5, suite.way.device
        table = speed.compared(*given, device, repeats=repeats, deadline=suite.deadline - suite.spare)
        return report(suite, f"speed-{size}", [table], [])

    return run


def tasks(rows: Sequence[Row]) -> list[Task]:
    """All tasks in order of use."""
    step, whole = (*SMALL, "--no-compile"), ("--width", "64", "--precision", "bf16", "--batch-size", "128", "--compile")
    preact, plain = "preact-resnet18", "resnet18"
    return [
        Task("correctness", 120, correctness, data=False),
        Task("speed-128", 120, timed(preact, None, 128, speed.FIRST), data=False),
        *(task for row in rows for task in row_tasks(row)),
        Task("speed-512", 120, timed(preact, None, 512, speed.SHORT), data=False),
        Task("speed-1024", 120, timed(preact, None, 1024, speed.SHORT), data=False),
        Task("speed-narrow-128", 120, timed(preact, 16, 128, speed.SHORT), data=False),
        Task("speed-narrow-512", 120, timed(preact, 16, 512, speed.SHORT), data=False),
        Task("speed-resnet18-512", 120, timed(plain, None, 512, speed.SHORT), data=False),
        Task("attack", 180, scripted(attack.main, ("--batch-size", "512"), (*step, "--steps", "2", "--images", "4"))),
        Task("epoch", 180, scripted(epoch.main, whole, (*SMALL, "--batches", "2", "--sizes", "8", "--workers", "0"))),
        Task("memory", 120, scripted(memory.main, whole, (*SMALL, "--epochs", "2", "--images", "8", "--sizes", "8"))),
        Task("autoattack-compared", 300, compared(rows)),
    ]


def row_tasks(row: Row) -> list[Task]:
    """Train a row, attack its first test images, and all where enough of them stand."""
    return [
        Task(f"row {row.name}", 60, trained(row)),
        Task(f"aa-first {row.name}", 60, autoattacked(row, FIRST_IMAGES)),
        Task(f"aa-all {row.name}", 60, autoattacked(row, None)),
    ]


FIRST_IMAGES = 1000
"""Of the test images, for a first look."""
TARGET = 0.5
"""Share of them that must stand for AutoAttack to go on to all."""
SMALL = ("--width", "2", "--repeats", "1", "--batch-size", "4")
"""Options that make any of the scripts a matter of seconds."""


def scripted(
    main: Callable[[Sequence[str]], Report], full: Sequence[str], small: Sequence[str]
) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that runs one of the other scripts, with these options or, for a check, with those."""

    def run(suite: Suite) -> Mapping[str, Any]:
        return kept(main([*(small if suite.small else full), "--device", suite.way.device]))

    return run


def trained(row: Row) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that trains and audits a row."""

    def run(suite: Suite) -> Mapping[str, Any]:
        way = suite.checked_way()
        if way.compile != suite.way.compile:
            measure.say("trained without compile, since a check of compiled or replayed attacks failed")
        return train_row(suite.sized(row), way, suite.deadline)

    return run


AUTOATTACK = {
    **{heading: form for heading, form in autoattack.WHOLE.items() if heading not in ("clean", "robust")},
    "clean": "{clean:.2%}",
    "robust": "{robust:.2%}",
    "95 % interval": "{low:.2%} to {high:.2%}",
    "images/s": "{images_per_second:,.1f}",
    "trained in, minutes": "{minutes:.1f}",
}


def autoattacked(row: Row, first: int | None) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that runs AutoAttack on what a row has trained, on the first test images or on all, over several calls."""

    def run(suite: Suite) -> Mapping[str, Any]:
        sized, way = suite.sized(row), suite.checked_way()
        if not is_trained(sized, way):
            raise NotNeededError("the row is not trained")
        folder = folder_of(sized, way)
        path = folder.audits / "first" / "whole.json"
        seen = read_json(path, autoattack.WHOLE_SCHEMA) if path.exists() else {}
        if first is None and not suite.forced and seen.get("robust", 1.0) < TARGET:
            raise NotNeededError(f"{seen['robust']:.2%} of the first images stood; name it with --only to run it")
        args, test = autoattack_options(suite), way.splits.test
        images = test if first is None else test.subset(torch.arange(min(first, len(test))))
        model = fit_row(sized, way, suite.deadline).model
        where = folder.audits / ("all" if first is None else "first")
        found = autoattack.whole(model, images, Threat(), args, where, suite.deadline)
        count = len(images)
        low, high = wilson(round(found["robust"] * count), count)
        line = {"model": row.name, **found, "low": float(low), "high": float(high)}
        line |= {"images_per_second": count / found["seconds"], "minutes": folder.manifest()["wall_seconds"] / 60}
        which = "all test images" if first is None else f"the first {count:,} test images"
        table = Table(f"{args.attack.name} on {which}", AUTOATTACK, [line], whole=True)
        return report(suite, f"autoattack {row.name}", [table], [searched_in(args)])

    return run


def compared(rows: Sequence[Row]) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that runs AutoAttack and pyautoattack on the first test images of a victim."""

    def run(suite: Suite) -> Mapping[str, Any]:
        row, model = victim(rows, suite)
        args, test = autoattack_options(suite), suite.way.splits.test
        few = test.subset(torch.arange(min(args.timed_images, len(test))))
        found = autoattack.side_by_side(model, few, Threat(), args)
        title = f"{args.attack.name} on {row.name}, {len(few):,} test images"
        tables = [Table(title, autoattack.SPEED, found, whole=True)]
        theirs = "The reference has batches of that size too, and torch's defaults: on a GPU tf32 in its convolutions."
        return report(suite, "autoattack-compared", tables, [searched_in(args), theirs])

    return run


VICTIM = Row("autoattack victim", PGDAT(), (), autoattack.VICTIMS[autoattack.TIMED].schedule)
"""What AutoAttack runs on where no row is trained yet."""


def victim(rows: Sequence[Row], suite: Suite) -> tuple[Row, nn.Module]:
    """The first row that is trained, or else `VICTIM`, and its model."""
    ready = (row for row in map(suite.sized, rows) if is_trained(row, suite.way))
    row = next(ready, suite.sized(VICTIM))
    return row, fit_row(row, suite.way, suite.deadline).model


def autoattack_options(suite: Suite) -> argparse.Namespace:
    """Batches that fill a GPU; for a check one cheap attack."""
    full = ("--batch-size", "2000", "--timed-images", "1000")
    small = ("--batch-size", "4", "--timed-images", "4", "--attack", "apgd-ce(steps=2)")
    given = ("--device", suite.way.device, "--precision", "bf16", "--repeats", "1")
    return autoattack.options().parse_args([*given, *(small if suite.small else full)])


def searched_in(args: argparse.Namespace) -> str:
    """How ours runs."""
    return f"Ours searches in {args.precision[0]}, {args.batch_size:,} images at a time; every verdict is in float32."


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks/gpu_suite.py", description=__doc__.partition("\n")[0])
    made.add_argument("--minutes", type=_minutes, default=9.0, help="stop in good time before so many are over")
    made.add_argument("--resume", type=Path, help="results folder, goes on there; results/gpu if not given")
    made.add_argument("--work", type=Path, help="training states; work/ in the results folder if not given")
    made.add_argument("--data", default="cifar10", help="packed parts, or anything that load_dataset takes")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rows", choices=tuple(ROWS), default="target", help="what is trained, see benchmarks/rows.py")
    made.add_argument("--out", type=Path, help="folder for the few files to fetch, written after every task")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="train and time uncompiled")
    made.add_argument("--only", nargs="+", metavar="TASK", help="tasks whose names begin so")
    made.add_argument("--small", action="store_true", help="check that everything runs; no number means anything")
    made.add_argument("--table", action="store_true", help="print what the results folder holds, run nothing")
    return made


ROWS = {"target": target_rows, "fast": fast_rows, "papers": paper_rows}


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if every task has its file, 1 if something is left."""
    parser = options()
    args = parser.parse_args(argv)
    started = time.monotonic()
    rows = ROWS[args.rows]()
    todo = tasks(rows)
    if args.only:
        for start in args.only:
            if not any(task.name.startswith(start) for task in todo):
                parser.error(f"--only {start}: no task begins so; there are {', '.join(task.name for task in todo)}")
        todo = [task for task in todo if task.name.startswith(tuple(args.only))]
    results = args.resume or ROOT / "results" / ("gpu-small" if args.small else "gpu")
    if results.exists() and not results.is_dir():
        parser.error(f"--resume {results} is a file: name a folder")
    try:
        if args.table:
            print(summary(results, todo))
            return 0
        measure.check_device(parser, args.device)
        allow_deterministic_products()
        suite = _suite(args, results, started, data=any(task.data for task in todo))
        suite.require_own_results(todo)
        lines = run_all(suite, todo, partial(_bring, args.out, results, todo))
        _bring(args.out, results, todo, lines)
        print(summary(results, todo), *lines, sep="\n")
        for line in _bring_weights(args.out, suite, rows):
            print(line)
    except RobustFairError as error:
        parser.error(str(error))
    return 0 if all(line.endswith((" s", "done before")) for line in lines) else 1


def _suite(args: argparse.Namespace, results: Path, started: float, *, data: bool) -> Suite:
    """The call that the arguments ask for; images are loaded only where a task needs them."""
    splits = load_dataset(args.data) if data else Splits(train=synthetic(8), test=synthetic(8))
    way = Way(splits, args.work or results / "work", args.device, compile=args.compile)
    if args.small:
        few = Splits(train=splits.train.limit_per_class(8), test=splits.test.limit_per_class(2))
        way = replace(way, splits=few, width=2, compile=False, precision="fp32", validation=0)
    deadline = started + 60 * args.minutes - MARGIN
    return Suite(results, way, deadline, args.small, forced=bool(args.only), spare=0 if args.small else SPARE)


def _bring(out: Path | None, results: Path, todo: Sequence[Task], lines: Sequence[str]) -> None:
    """Write what there is into the folder to fetch, if one was named."""
    if out is not None:
        bring(results, out, "\n".join([summary(results, todo), "", *lines]), TASK_SCHEMA)


def _bring_weights(out: Path | None, suite: Suite, rows: Sequence[Row]) -> list[str]:
    """Add the weights of the trained row of which most first images stood to the folder; lines about it."""
    ready: dict[float, Row] = {}
    for row in rows:
        path = suite.file(f"aa-first {row.name}")
        if path.exists():
            found = read_json(path, TASK_SCHEMA)["found"]["tables"][0]["rows"][0]
            ready.setdefault(found["robust"], row)
    if out is None or not ready:
        return []
    best = ready[max(ready)]
    model = fit_row(suite.sized(best), suite.checked_way(), suite.deadline).model
    paths = bring_weights(model.state_dict(), out, {"row": best.name, "model": suite.way.model})
    told = f"{out}: weights of {best.name} in {len(paths)} files" if paths else f"{out}: weights are too large to fetch"
    return [told, *left_out(sorted(out.iterdir()))]


if __name__ == "__main__":
    sys.exit(main())
