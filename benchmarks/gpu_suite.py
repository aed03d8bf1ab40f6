"""Everything that wants a GPU, unattended: `python benchmarks/gpu_suite.py --minutes 9 --resume results/gpu`.

In this order: is the fast path right on this device; the speed tables, between them the fast protocol; AutoAttack on
what that has trained; the other training rows. Every task leaves a JSON file in the results folder; training is saved
after each epoch and AutoAttack every minute: the next call, on the same work folder, goes on where this one stopped,
and `--table` prints what there is, with "-" where nothing was measured.

Needs torch, numpy, safetensors and pillow, and CIFAR-10 as packed by `robustfair data pack cifar10 --parts 2`.
AutoAttack is compared with pyautoattack where that imports; where it does not, the table says so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import attack, autoattack, epoch, measure, memory, train_step  # noqa: E402
from benchmarks.measure import Report, Table  # noqa: E402
from benchmarks.rows import (  # noqa: E402
    ATTACKS,
    OutOfTimeError,
    Row,
    Way,
    fast_rows,
    fit_row,
    folder_of,
    is_trained,
    paper_rows,
    row_lines,
    train_row,
)
from benchmarks.workload import build, one_batch, synthetic  # noqa: E402
from robustfair.config import Precision  # noqa: E402
from robustfair.data import Splits, load_dataset  # noqa: E402
from robustfair.errors import CheckpointError, RobustFairError  # noqa: E402
from robustfair.execution.precision import numerics  # noqa: E402
from robustfair.files import read_json, write_json  # noqa: E402
from robustfair.models.head import laid_out  # noqa: E402
from robustfair.objectives import PGDAT, Trades  # noqa: E402
from robustfair.training.engine import Engine  # noqa: E402
from robustfair.training.fit import fit  # noqa: E402
from robustfair.training.schedule import Schedule  # noqa: E402
from robustfair.values import Batch, Threat  # noqa: E402

TASK_SCHEMA = "robustfair.suite/1"
MARGIN = 20
"""Seconds of the time given that are left for what is under way."""


@dataclass(frozen=True)
class Suite:
    """One call of the suite.

    Attributes:
        results: folder of JSON files, one per finished task.
        way: how rows are trained.
        deadline: of `time.monotonic()`.
        small: sizes for a check on a CPU: everything runs, no number means anything.
    """

    results: Path
    way: Way
    deadline: float
    small: bool

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the code: results of other settings are not mixed with it."""
        return self.way.settings() | {"small": self.small}

    def file(self, task: str) -> Path:
        """Where the result of a task lies."""
        return self.results / f"{task.replace(' ', '-')}.json"

    def sized(self, row: Row) -> Row:
        """The row as this call trains it."""
        return replace(row, schedule=replace(row.schedule, epochs=2, batch_size=16)) if self.small else row

    def require_own_results(self, todo: Sequence[Task]) -> None:
        """Refuse a folder that holds results of other settings.

        Raises:
            CheckpointError: names the file and what differs.
        """
        for task in todo:
            if self.file(task.name).exists():
                found = read_json(self.file(task.name), TASK_SCHEMA).get("settings", {})
                own = self.settings()
                differ = [key for key in own if found.get(key) != own[key]]
                if differ:
                    raise CheckpointError(
                        f"{self.file(task.name)} was measured with another {differ[0]} ({found.get(differ[0])}, now "
                        f"{own[differ[0]]}): give another folder with --resume"
                    )


@dataclass(frozen=True)
class Task:
    """One thing to measure: its file's name, the seconds without which it is not begun, and what does it."""

    name: str
    seconds: float
    run: Callable[[Suite], Mapping[str, Any]]


# Is the fast path right here?


def correctness(suite: Suite) -> Mapping[str, Any]:
    """Every way of running the attack and the loss against the eager float32 one, and an epoch that may not wait."""
    device, size = suite.way.device, 8 if suite.small else 128
    batch = one_batch(size, device)
    model = laid_out(build(suite.way.model, suite.way.width, device=device).train(), batch.x)
    rows = []
    for objective in (PGDAT(), Trades()):
        reference: tuple[Tensor, Tensor] | None = None
        for name, precision, compile, graphs in ways_to_run(device, compiled=not suite.small):
            engine = Engine(model, precision=precision, device=device, compile=compile, graphs=graphs, batch_size=size)
            with numerics(deterministic=reference is None):
                again = [engine.attack(batch, objective.attack(batch)) for _ in range(2)]
                loss = frozen_loss(engine, objective, replace(batch, x_adv=again[0]))
            if reference is None:
                reference = again[0], loss
            rows.append(
                {
                    "case": f"{objective.name} {name}",
                    "loss": float(loss),
                    "difference": float(loss - reference[1]),
                    "other_pixels": float((again[0] != reference[0]).float().mean()),
                    "largest": float((again[0] - batch.x).abs().max()) * 255,
                    "repeats": torch.equal(again[0], again[1]),
                }
            )
    columns = {
        "case": "{case}",
        "loss": "{loss:.6f}",
        "- the first": "{difference:+.1e}",
        "pixels that differ": "{other_pixels:.4f}",
        "largest move / 255": "{largest:.4f}",
        "same when repeated": "{repeats}",
    }
    tables = [Table("Attack and loss on random images", columns, rows)]
    return report(suite, "correctness", tables, [waiting(suite)])


def ways_to_run(device: str, *, compiled: bool) -> list[tuple[str, Precision, bool, bool]]:
    """(name, precision, compile, graphs): the deterministic reference first, graphs on CUDA alone."""
    on_cuda = torch.device(device).type == "cuda"
    found: list[tuple[str, Precision, bool, bool]] = [("fp32 deterministic", "fp32", False, False)]
    for precision in ("fp32", "bf16"):
        found.append((precision, precision, False, False))
        if on_cuda:
            found.append((f"{precision} replayed", precision, False, True))
        if compiled:
            found.append((f"{precision} compiled" + " replayed" * on_cuda, precision, True, on_cuda))
    return found


def frozen_loss(engine: Engine, objective: PGDAT | Trades, batch: Batch) -> Tensor:
    """Loss in training mode, running statistics left as they were."""
    before = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    loss = objective(engine, batch).total().detach()
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(before[name])
    return loss


def waiting(suite: Suite) -> str:
    """Train three epochs, the last with torch's error for every wait from its second step on; say how it went."""
    device, size = suite.way.device, 8 if suite.small else 128
    if torch.device(device).type != "cuda":
        return "Waits for the device inside an epoch: not checked, no CUDA device."
    data, steps = synthetic(size * 6), 6

    def on_step(epoch: int, step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if epoch == 2 and step < steps - 2 else "default")

    model = build(suite.way.model, suite.way.width)
    schedule = Schedule(epochs=3, batch_size=size, lr=0.01)
    options = {"schedule": schedule, "validation": 0, "select": "last", "device": device, "on_step": on_step}
    try:
        fit(model, data, Trades(), precision=suite.way.precision, compile=suite.way.compile, **options)  # type: ignore[arg-type]
    except RuntimeError as error:
        return f"Waits for the device inside an epoch: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"Waits for the device inside an epoch: none in the {steps - 2} steps between its first and its last."


def report(suite: Suite, name: str, tables: Sequence[Table], notes: Sequence[str]) -> Mapping[str, Any]:
    """A table as a report, printed on the way."""
    settings = {"model": suite.way.model, "width": suite.way.width, "device": suite.way.device}
    made = Report(name=name, settings=settings, tables=tables, notes=notes)
    print(made.text(), flush=True)
    return kept(made)


def kept(made: Report) -> Mapping[str, Any]:
    """A report as JSON, and as it reads."""
    return made.as_json() | {"text": made.text()}


# Tasks


def tasks(rows: Sequence[Row]) -> list[Task]:
    """All tasks in order of use."""
    step, whole = (*SMALL, "--no-compile"), ("--width", "64", "--precision", "bf16", "--batch-size", "128", "--compile")
    both, bf16 = ("--precision", "fp32", "bf16"), ("--precision", "bf16")
    return [
        Task("correctness", 240, correctness),
        Task("train-step-128", 240, scripted(train_step.main, ("--batch-size", "128", *both), step)),
        Task(f"row {rows[0].name}", 60, trained(rows[0])),
        Task("train-step-512", 180, scripted(train_step.main, ("--batch-size", "512", *bf16), step)),
        Task("epoch", 180, scripted(epoch.main, whole, (*SMALL, "--batches", "2", "--sizes", "8", "--workers", "0"))),
        Task("train-step-1024", 180, scripted(train_step.main, ("--batch-size", "1024", *bf16), step)),
        Task("attack", 180, scripted(attack.main, (), (*step, "--steps", "2", "--images", "4"))),
        Task("memory", 120, scripted(memory.main, whole, (*SMALL, "--epochs", "2", "--images", "8", "--sizes", "8"))),
        Task("autoattack", 60, autoattacked(rows)),
        Task("autoattack-compared", 300, compared(rows)),
        *(Task(f"row {row.name}", 60, trained(row)) for row in rows[1:]),
    ]


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
        return train_row(suite.sized(row), suite.way, suite.deadline)

    return run


def autoattacked(rows: Sequence[Row]) -> Callable[[Suite], Mapping[str, Any]]:
    """A task that attacks every test image of a victim, in as many calls as it takes."""

    def run(suite: Suite) -> Mapping[str, Any]:
        row, model = victim(rows, suite)
        args, test = autoattack_options(suite), suite.way.splits.test
        folder = folder_of(row, suite.way).audits
        found = {"model": row.name, **autoattack.whole(model, test, Threat(), args, folder, suite.deadline)}
        tables = [Table(f"{args.attack.name} on all test images", autoattack.WHOLE, [found], whole=True)]
        return report(suite, "autoattack", tables, [searched_in(args)])

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


def run_all(suite: Suite, todo: Sequence[Task]) -> list[str]:
    """Run what has no file yet, until the time is over; returns a line per task."""
    suite.results.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in todo:
        path = suite.file(task.name)
        left = suite.deadline - time.monotonic()
        if path.exists():
            lines.append(f"{task.name}: done before")
            continue
        if left < task.seconds and not suite.small:
            lines.append(f"{task.name}: not begun, {left:.0f} s left")
            continue
        measure.say(f"== {task.name}, {left:.0f} s left")
        started = time.monotonic()
        try:
            found = task.run(suite)
        except OutOfTimeError as error:
            lines.append(f"{task.name}: {error}")
            break
        except KeyboardInterrupt:
            lines.append(f"{task.name}: interrupted, goes on at the next call")
            break
        except (Exception, SystemExit):
            path.with_suffix(".error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            lines.append(f"{task.name}: failed, see {path.with_suffix('.error.txt').name}")
            continue
        seconds = round(time.monotonic() - started, 1)
        about = {"schema": TASK_SCHEMA, "task": task.name, "seconds": seconds, "settings": suite.settings()}
        about |= {"machine": measure.machine(), "commit": measure.commit()}
        write_json(path, about | {"found": found})
        path.with_suffix(".error.txt").unlink(missing_ok=True)
        lines.append(f"{task.name}: {seconds:.0f} s")
    return lines


# What was found


ROW_COLUMNS = {
    "row": "{row}",
    "model": "{model}",
    **{attack: f"{{{attack}:.2f}}" for attack in ATTACKS},
    **{f"{attack} worst": f"{{{attack}_worst:.2f}}" for attack in ATTACKS},
    "images/s": "{images_per_second:,.0f}",
    "minutes": "{minutes:.1f}",
}


def summary(results: Path, todo: Sequence[Task]) -> str:
    """Markdown of all files in a results folder; what has none is named, and a row without one has empty cells.

    Raises:
        CheckpointError: a file is damaged.
    """
    parts: list[str] = []
    records, missing = [], []
    for task in todo:
        path = results / f"{task.name.replace(' ', '-')}.json"
        trains = task.name.startswith("row ")
        if path.exists():
            found = read_json(path, TASK_SCHEMA)["found"]
            records += [found] if trains else []
            parts += [] if trains else [found["text"]]
        elif trains:
            missing.append({"row": task.name.removeprefix("row ")})
        else:
            parts.append(f"# {task.name}\n\n-")
    lines = [line | {"minutes": line["seconds"] / 60} for line in row_lines(records)]
    if lines or missing:
        parts.append("# Rows\n\n" + Table("Rows", ROW_COLUMNS, [*lines, *missing], whole=True).markdown())
    return "\n\n".join(parts)


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks/gpu_suite.py", description=__doc__.partition("\n")[0])
    made.add_argument("--minutes", type=_minutes, default=9.0, help="stop in good time before so many are over")
    made.add_argument("--resume", type=Path, help="results folder, goes on there; results/gpu if not given")
    made.add_argument("--work", type=Path, help="training states; work/ in the results folder if not given")
    made.add_argument("--data", default="cifar10", help="packed parts, or anything that load_dataset takes")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rows", choices=("fast", "papers"), default="fast", help="30 epochs a row, or 200")
    made.add_argument("--only", nargs="+", metavar="TASK", help="tasks whose names begin so")
    made.add_argument("--small", action="store_true", help="check that everything runs; no number means anything")
    made.add_argument("--table", action="store_true", help="print what the results folder holds, run nothing")
    return made


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
    todo = tasks(fast_rows() if args.rows == "fast" else paper_rows())
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
        suite = _suite(args, results, started)
        suite.require_own_results(todo)
        lines = run_all(suite, todo)
        print(summary(results, todo), *lines, sep="\n")
    except RobustFairError as error:
        parser.error(str(error))
    return 0 if all(line.endswith((" s", "done before")) for line in lines) else 1


def _suite(args: argparse.Namespace, results: Path, started: float) -> Suite:
    splits = load_dataset(args.data)
    way = Way(splits, args.work or results / "work", args.device)
    if args.small:
        few = Splits(train=splits.train.limit_per_class(8), test=splits.test.limit_per_class(2))
        way = replace(way, splits=few, width=2, compile=False, precision="fp32", validation=0)
    return Suite(results, way, started + 60 * args.minutes - MARGIN, args.small)


if __name__ == "__main__":
    sys.exit(main())
