"""What a method or an objective costs: an epoch of it beside an epoch of its base, in turn.

An epoch lasts from one boundary to the next, so that what a method does between epochs counts too: a pass over the
training images, a validation, an average. Both trainings go on side by side, an epoch of one and then an epoch of the
other; the first of each is left out, and with it what only begins later. The ratio is the median over turns of one
epoch beside the other of the same turn. On a CPU the seconds are the processor's own, of which other work on the
machine takes less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import Queue
from statistics import median
from threading import Thread
from typing import Any

from benchmarks import measure
from benchmarks.measure import Report, Row, Table
from benchmarks.workload import SYNTHETIC, build, load
from robustfair.data import ImageDataset
from robustfair.errors import UnknownNameError
from robustfair.objectives.taught import TaughtObjective
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState


@dataclass(frozen=True)
class Case:
    """A composition whose methods all act from the second epoch on, and what it is set against.

    A teacher is a network like the student.

    Attributes:
        allowed: the ratio that it is meant to stay under; None where the cost is only stated.
        validation: share of each class held out in both, for methods that measure on it.
    """

    train: str
    base: str
    allowed: float | None = None
    validation: float = 0.0


HELD = 0.02
CASES: dict[str, Case] = {
    "ccm": Case("pgd-at + ccm(begin=1)", "pgd-at", 1.05),
    "ccr": Case("trades + ccr(begin=1)", "trades", 1.05),
    "fawa": Case("pgd-at + fawa(begin=0, threshold=0)", "pgd-at", 1.05, HELD),
    "ema": Case("pgd-at + ema(buffers=average)", "pgd-at", 1.05),
    "ema, statistics anew": Case("pgd-at + ema", "pgd-at"),
    "cfa": Case("trades + cfa(begin=1, avg_start=1, threshold=0)", "trades", None, HELD),
    "dafa": Case("trades + dafa(begin=1)", "trades", 1.05),
    "fair-tat": Case("pgd-at + fair-tat", "pgd-at", 1.05),
    "faal": Case("pgd-at + faal", "pgd-at", 1.05),
    "frl": Case("trades + frl", "trades", None, HELD),
    "wat": Case("trades + wat", "trades", None, HELD),
    "variance-fat": Case("pgd-at + variance-fat", "pgd-at"),
    "csr": Case("trades + csr", "trades"),
    "class-balanced": Case("standard + class-balanced", "standard"),
    "logit-adjustment": Case("standard + logit-adjustment", "standard"),
    "lff": Case("standard + lff", "standard"),
    "awp": Case("trades + awp", "trades"),
    "friendly-at": Case("pgd-at + friendly-at(variant=cfa)", "pgd-at"),
    "label-smoothing": Case("pgd-at + label-smoothing", "pgd-at"),
    "absld": Case("rslad + absld", "rslad"),
    "fair-ard": Case("ard + fair-ard", "ard"),
    "rslad": Case("rslad", "trades"),
    "ard": Case("ard", "pgd-at"),
    "bat": Case("bat", "trades"),
    "n-fgsm": Case("n-fgsm", "pgd-at"),
}
COLUMNS = {
    "method": "{method}",
    "composition": "{train}",
    "base": "{base}",
    "base, s an epoch": "{before:.2f}",
    "with it": "{after:.2f}",
    "ratio": "{ratio:.3f}",
    "turn by turn": "{low:.3f} to {high:.3f}",
    "meant to stay under": "{allowed:.2f}",
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser("method_cost", __doc__, batch_size=64, precision="fp32", width=16, repeats=9)
    options.set_defaults(threads=1)
    options.add_argument("--data", default=SYNTHETIC, help="training images: a data set, or synthetic")
    options.add_argument("--batches", type=int, default=4, help="per epoch")
    options.add_argument("--only", nargs="+", metavar="METHOD", help="of these methods")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A line per method."""
    for name in args.only or ():
        if name not in CASES:
            raise UnknownNameError("method", name, CASES)
    data = load(args.data, "train", args.batches * args.batch_size)
    rows = []
    for name in args.only or CASES:
        measure.say(name)
        rows.append(cost(name, CASES[name], data, args))
    settings = {**measure.settings(args), "batch_size": args.batch_size, "batches": args.batches, "data": args.data}
    return Report("method_cost", settings, [Table("Cost of an epoch beside the base", COLUMNS, rows)])


def cost(name: str, case: Case, data: ImageDataset, args: argparse.Namespace) -> Row:
    """Epochs with and without the method, which take turns."""
    trainings = {train: Training(train, case.validation, data, args) for train in (case.base, case.train)}
    try:
        taken = measure.interleaved({train: each.epoch for train, each in trainings.items()}, args.repeats)
    finally:
        for each in trainings.values():
            each.stop()
    before, after = (taken[train] for train in (case.base, case.train))
    ratios = [b / a for a, b in zip(before.seconds, after.seconds, strict=True)]
    found: Row = {"method": name, "train": case.train, "base": case.base, "allowed": case.allowed}
    found |= {"before": before.median, "after": after.median, "seconds": [before.seconds, after.seconds]}
    return {**found, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}


class Training:
    """A training that stands still between two calls of `epoch`, in a thread of its own.

    Args:
        train: its composition.
        validation: share of each class held out.
        args: of the command line.
    """

    def __init__(self, train: str, validation: float, data: ImageDataset, args: argparse.Namespace) -> None:
        self.train, self.validation, self.data, self.args = train, validation, data, args
        self.wanted: Queue[bool] = Queue()
        self.ended: Queue[BaseException | None] = Queue()
        Thread(target=self._work, daemon=True).start()

    def epoch(self) -> float:
        """Train to the next boundary; the seconds that it took: of the processor on a CPU."""
        clock = time.process_time if self.args.device == "cpu" else time.perf_counter
        began = clock()
        self.wanted.put(True)
        error = self.ended.get()
        if error is not None:
            raise error
        return clock() - began

    def stop(self) -> None:
        """Train no more."""
        self.wanted.put(False)

    def _work(self) -> None:
        try:
            self._wait()
            self._fit()
        except _Stopped:
            pass
        except Exception as error:
            self.ended.put(error)

    def _wait(self) -> None:
        if not self.wanted.get():
            raise _Stopped

    def _fit(self) -> None:
        def save(state: TrainState) -> None:
            self.ended.put(None)
            self._wait()

        args = self.args
        objective, methods = read_composition(self.train)
        schedule = Schedule(epochs=args.repeats + 2, lr=0.01, kind="constant", batch_size=args.batch_size)
        if isinstance(objective, TaughtObjective):
            teacher = build(args.model, args.width, device=args.device, in_channels=self.data.images.shape[1])
            objective = replace(objective, teacher=teacher)
        model = build(args.model, args.width, device=args.device, in_channels=self.data.images.shape[1])
        options: dict[str, Any] = {"precision": args.precision, "device": args.device, "validation": self.validation}
        fit(model, self.data, objective, methods=methods, schedule=schedule, save=save, select="last", **options)


class _Stopped(Exception):  # noqa: N818 - no error
    """Raised inside a training that is not wanted any more."""


if __name__ == "__main__":
    main()
