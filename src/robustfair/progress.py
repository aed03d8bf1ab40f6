"""Progress of training and audits on stderr: a bar on a terminal, a line an epoch elsewhere, nothing when quiet."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from robustfair.runner import Prepared
from robustfair.training.state import TrainState

REDRAWS = 4
"""Of a bar, per second: rich's ten take more than one percent of a core from the training."""


class _Bar:
    """A bar that a context manager always takes down again; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
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


class TrainingProgress(_Bar):
    """Follows `runner.train` through its three callbacks."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._task = TaskID(0)
        self._steps = 0

    def start(self, ready: Prepared, state: TrainState | None) -> None:
        """Say what runs; open the bar, at the epoch where a resumed run goes on."""
        kept = len(ready.train) * (1 - ready.recipe.validation)
        self._steps = round(kept / ready.schedule.batch_size)
        done, epochs = state.epoch if state else 0, ready.schedule.epochs
        self._task = self.bar.add_task("training", total=epochs * self._steps, completed=done * self._steps)
        parameters = sum(parameter.numel() for parameter in ready.model.parameters())
        resumed = f", resumed after epoch {done}" if done else ""
        self.console.print(
            f"{ready.recipe.train} on {len(ready.train):,} images of {ready.recipe.data}, {ready.recipe.model} with "
            f"{parameters:,} parameters, {epochs} epochs{resumed}"
        )

    def step(self, epoch: int, step: int) -> None:
        self.bar.update(self._task, completed=epoch * self._steps + min(step + 1, self._steps))

    def epoch(self, state: TrainState) -> None:
        self.console.print(epoch_line(state.history[-1]))


class AuditProgress(_Bar):
    """Follows `evaluate.audit`: one bar per attack."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, attack: str, done: int, total: int) -> None:
        if attack not in self._tasks:
            self._tasks[attack] = self.bar.add_task(attack, total=total)
        self.bar.update(self._tasks[attack], completed=done)


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
