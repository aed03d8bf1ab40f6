"""One call of the suite: the tasks it runs until its time is over, and the files and tables of what they found."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.gpu.checks import failed
from benchmarks.measure import Report, Table
from benchmarks.rows import ATTACKS, OutOfTimeError, Row, Way, row_lines
from robustfair.errors import CheckpointError
from robustfair.files import read_json, write_json

TASK_SCHEMA = "robustfair.suite/1"

COMPILED = ("replay", "compiled")
"""What the names of checks begin with that speak for `compile`."""


@dataclass(frozen=True)
class Suite:
    """One call of the suite.

    Attributes:
        results: folder of JSON files, one per finished task.
        way: how rows are trained.
        deadline: of `time.monotonic()`.
        small: sizes for a check on a CPU: everything runs, no number means anything.
        forced: run what was named, also where a look at it says that it is not worth it.
        spare: seconds before the deadline after which no further way is prepared to be timed.
    """

    results: Path
    way: Way
    deadline: float
    small: bool
    forced: bool = False
    spare: float = 0.0

    def settings(self, *, data: bool = True) -> dict[str, Any]:
        """What a result depends on besides the code: results of other settings are not mixed with it.

        Args:
            data: whether it is of images that were loaded.
        """
        everything = self.checked_way().settings() | {"small": self.small}
        return everything if data else {key: everything[key] for key in ("model", "width", "small")}

    def checked_way(self) -> Way:
        """How rows are trained here: uncompiled where a check of compiled or replayed attacks failed."""
        path = self.results / "correctness.json"
        if not self.way.compile or not path.exists():
            return self.way
        rows = read_json(path, TASK_SCHEMA)["found"]["tables"][0]["rows"]
        wrong = [name for name in failed(rows) if name.startswith(COMPILED)]
        return replace(self.way, compile=not wrong)

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
                own = self.settings(data=task.data)
                differ = [key for key in own if found.get(key) != own[key]]
                if differ:
                    raise CheckpointError(
                        f"{self.file(task.name)} was measured with another {differ[0]} ({found.get(differ[0])}, now "
                        f"{own[differ[0]]}): give another folder with --resume"
                    )


@dataclass(frozen=True)
class Task:
    """One thing to measure: its file's name, the seconds without which it is not begun, and what does it.

    `data` tells whether it needs the images that are trained on.
    """

    name: str
    seconds: float
    run: Callable[[Suite], Mapping[str, Any]]
    data: bool = True


class NotNeededError(Exception):
    """A task that has nothing to do here, or that is not worth its time."""


def report(suite: Suite, name: str, tables: Sequence[Table], notes: Sequence[str]) -> Mapping[str, Any]:
    """A table as a report, printed on the way."""
    settings = {"model": suite.way.model, "width": suite.way.width, "device": suite.way.device}
    made = Report(name=name, settings=settings, tables=tables, notes=notes)
    print(made.text(), flush=True)
    return kept(made)


def kept(made: Report) -> Mapping[str, Any]:
    """A report as JSON, and as it reads."""
    return made.as_json() | {"text": made.text()}


def run_all(
    suite: Suite, todo: Sequence[Task], after: Callable[[Sequence[str]], None] = lambda lines: None
) -> list[str]:
    """Run what has no file yet, until the time is over; returns a line per task. `after` hears them as they come."""
    suite.results.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for task in todo:
        after(lines)
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
        except NotNeededError as error:
            lines.append(f"{task.name}: not run, {error}")
            continue
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
        about = {"schema": TASK_SCHEMA, "task": task.name, "seconds": seconds}
        about["settings"] = suite.settings(data=task.data)
        about |= {"machine": measure.machine(), "commit": measure.commit()}
        write_json(path, about | {"found": found})
        path.with_suffix(".error.txt").unlink(missing_ok=True)
        lines.append(f"{task.name}: {seconds:.0f} s")
    return lines


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
