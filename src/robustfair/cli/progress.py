"""Progress of training and audits on stderr: a bar on a terminal, lines elsewhere, nothing when quiet.

Training tells every epoch in a line, on a terminal too. An audit tells an attack's end, and how far it is meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from robustfair.report.console import PipedConsole
from robustfair.runs.run import Prepared
from robustfair.training.state import TrainState

REDRAWS = 4
"""Of a bar, per second: rich's ten take more than one percent of a core from the training."""
LINE_EVERY = 30.0
"""Seconds between two lines of one attack, at least."""


class _Bar:
    """A bar that a context manager always takes down again; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = PipedConsole(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        silent = quiet or not self.console.is_terminal
        self.bar = Progress(
            *columns,
            TimeLeftColumn(),
            console=self.console,
            refresh_per_second=REDRAWS,
            transient=True,
            disable=silent,
        )

    def __enter__(self) -> Any:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, *lines: str) -> None:
        """Print lines as they are."""
        for line in lines:
            self.console.print(line, markup=False)


class TrainingProgress(_Bar):
    """Follows `runs.run.train` through its three callbacks."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._task = TaskID(0)
        self._steps = 0

    def start(self, ready: Prepared, state: TrainState | None) -> None:
        """Say what runs on which images; open the bar, at the epoch where a resumed run goes on."""
        self._steps = round(len(ready.train) / ready.schedule.batch_size)
        done, epochs = state.epoch if state else 0, ready.schedule.epochs
        self._task = self.bar.add_task("training", total=epochs * self._steps, completed=done * self._steps)
        parameters = sum(parameter.numel() for parameter in ready.model.parameters())
        resumed = f", resumed after epoch {done}" if done else ""
        edited = "" if ready.recipe.edit is None else f" after {ready.recipe.edit}"
        self.console.print(
            f"{ready.recipe.train} on {len(ready.train):,} images of {ready.recipe.data}{edited}, {ready.recipe.model} "
            f"with {parameters:,} parameters, {epochs} epochs{resumed}"
        )
        parts = {"train": ready.train, "validation": ready.validation, "test": ready.splits.parts.get("test")}
        self.say(*(data.count_line(part) for part, data in parts.items() if data is not None), *ready.notes)

    def step(self, epoch: int, step: int) -> None:
        self.bar.update(self._task, completed=epoch * self._steps + min(step + 1, self._steps))

    def epoch(self, state: TrainState) -> None:
        self.console.print(epoch_line(state.history[-1]))


class AuditProgress(_Bar):
    """Follows `evaluate.run` and `evaluate.corruptions`: a bar per attack, or lines where stderr is no terminal.

    Args:
        clock: seconds since some moment.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(quiet=quiet)
        self._images = ""
        self._tasks: dict[str, TaskID] = {}
        self._lines = _Lines(self.console, clock)

    def images(self, line: str) -> None:
        """A line on the images, printed when the first attack is heard of: before, the request may yet be refused."""
        self._images = line

    def __call__(self, attack: str, done: int, total: int) -> None:
        if self._images:
            self.say(self._images)
            self._images = ""
        if self.bar.disable:
            self._lines.tell(attack, done, total)
            return
        if attack not in self._tasks:
            self._tasks[attack] = self.bar.add_task(attack, total=total)
        self.bar.update(self._tasks[attack], completed=done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._lines.flush()


class _Lines:
    """Lines for a log: of every attack the last that was heard of it, and one about every half minute before that.

    An attack begins where the last word of the one before was, and its time left follows the pace since its own first
    word: what a resumed attack had behind it by then says nothing of the pace.
    """

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._attack: str | None = None
        self._ended = False
        self._heard = self._began = self._printed = clock()
        self._first = (self._began, 0)
        self._line = ""

    def tell(self, attack: str, done: int, total: int) -> None:
        now = self._clock()
        if attack != self._attack:
            self.flush()
            self._attack, self._ended, self._first = attack, False, (now, done)
            self._began = self._printed = self._heard
        self._heard = now
        if self._ended:
            return
        since, before = self._first
        left = (now - since) * (total - done) / (done - before) if done > before else None
        self._line = attack_line(attack, done, total, now - self._began, left)
        self._ended = done >= total
        if self._ended or now - self._printed >= LINE_EVERY:
            self._printed = now
            self.flush()

    def flush(self) -> None:
        """Print what was heard last, unless it is printed."""
        if self._line:
            self._console.print(self._line)
        self._line = ""


def attack_line(attack: str, done: int, total: int, elapsed: float, left: float | None) -> str:
    """How far an attack is, in one line; times in seconds, None where the time left is not known yet.

    >>> attack_line("pgd-20", 250, 1000, 61.4, 184.2)
    'pgd-20: 250 of 1,000 images, 25%, 0:01:01 elapsed, 0:03:04 left'
    >>> attack_line("pgd-20", 1000, 1000, 245.6, 0.0)
    'pgd-20: 1,000 of 1,000 images, 100%, 0:04:06 elapsed'
    """
    share = 100 * done // total if total else 100
    line = f"{attack}: {done:,} of {total:,} images, {share}%, {_duration(elapsed)} elapsed"
    return line if left is None or done >= total else f"{line}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def epoch_line(record: Mapping[str, Any]) -> str:
    """One epoch in one line: loss, then accuracies as average/worst class in percent."""
    parts = [f"epoch {record['epoch']:>3}  lr {record['lr']:.4f}  loss {record['loss']:.4f}"]
    measured = {"train": record["train"], **{f"valid {name}": counts for name, counts in record["validation"].items()}}
    for name, counts in measured.items():
        kinds = [kind for kind in ("clean", "robust") if counts[kind] is not None]
        parts.append(f"{name} {', '.join(f'{kind} {_average_and_worst(counts, kind)}' for kind in kinds)}")
    parts.append(f"{record['images_per_second']:.0f} images/s")
    return " | ".join(parts)


def _average_and_worst(counts: Mapping[str, Any], kind: str) -> str:
    rates = [100 * hits / n for hits, n in zip(counts[kind], counts["count"], strict=True) if n]
    return f"{100 * sum(counts[kind]) / sum(counts['count']):.1f}/{min(rates):.1f}"
