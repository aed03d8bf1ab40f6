"""Training rows: one run each under the fast schedule, resumable after every epoch, audited on the test images.

A row is trained with an average of its weights beside it and audited four times: raw weights and average, each as it is
and with its head repaired. Ours in every respect but the clock: images, split, methods and audit are the library's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from benchmarks.workload import initialised
from robustfair.config import Precision
from robustfair.data import Splits
from robustfair.errors import CheckpointError
from robustfair.evaluate.run import audit
from robustfair.grammar import format_value
from robustfair.methods import AWP, CCM, CCR, EMA, FriendlyAT, LabelSmoothing, Method
from robustfair.objectives import MART, PGDAT, AdversarialObjective, ARoW, Trades
from robustfair.repairs import HWNwB
from robustfair.runs.folder import RunFolder, environment
from robustfair.training.fit import Fitted, fit
from robustfair.training.schedule import Schedule
from robustfair.training.state import TrainState

ATTACKS = ("clean", "pgd-20", "cw-20")
LATE = EMA(decay=0.999, begin=25)
"""Average over the last epochs of a fast run: every boundary from there on costs a pass to re-estimate batch norm."""
CFA_EMA = EMA(decay=0.85, per="epoch", begin=50)
"""The averaged baseline of the CFA paper, but for batch norm, which it averages."""


class OutOfTimeError(Exception):
    """The time given is over; what was reached is on disk."""


@dataclass(frozen=True)
class Row:
    """One training run.

    Attributes:
        name: of its files.
        objective, methods: what it trains.
        schedule: how long and how fast.
        brief: audit only what the last method exports, on clean images and under PGD-20: what counts is AutoAttack.
    """

    name: str
    objective: AdversarialObjective
    methods: tuple[Method, ...]
    schedule: Schedule
    brief: bool = False

    def describe(self) -> dict[str, Any]:
        """What was trained, as JSON values."""
        parts: tuple[AdversarialObjective | Method, ...] = (self.objective, *self.methods)
        given = {part.name: {key: format_value(value) for key, value in vars(part).items()} for part in parts}
        return {"name": self.name, "train": given, "schedule": vars(self.schedule)}


@dataclass(frozen=True)
class Way:
    """How all rows are run: on what, in which precision, with which network, and where states are kept."""

    splits: Splits
    work: Path
    device: str
    precision: Precision = "bf16"
    compile: bool = True
    model: str = "preact-resnet18"
    width: int | None = None
    validation: float = 0.02

    def settings(self) -> dict[str, Any]:
        """What a trained row depends on besides the row itself, as JSON values."""
        names = ("precision", "compile", "model", "width", "validation")
        return {name: getattr(self, name) for name in names} | {"fingerprint": self.splits.train.fingerprint}


def target_rows() -> tuple[Row, ...]:
    """What may reach 50 % under AutoAttack in the fewest minutes, in order of promise: see benchmarks/NOTES.md."""
    late = EMA(decay=0.999, begin=20)

    def row(name: str, objective: AdversarialObjective, *methods: Method, **schedule: Any) -> Row:
        how = Schedule.fast(**{"batch_size": 256, "lr": 0.2} | schedule)
        average = replace(late, begin=how.epochs * 2 // 3)
        return Row(f"{name} {how.epochs}", objective, (*methods, average), how, brief=True)

    return (
        row("trades + awp + ema", Trades(), AWP(begin=3)),
        row("pgd-at + awp + smoothing + ema", PGDAT(), AWP(begin=3), LabelSmoothing(), lr=0.3),
        row("trades + ema", Trades()),
        row("trades + awp + ema", Trades(), AWP(begin=5), epochs=50),
    )


def passes_of(row: Row) -> int:
    """Forward passes' worth of arithmetic a training image takes: 2 a gradient step, 3 an image in the loss.

    >>> [passes_of(row) for row in target_rows()]
    [33, 26, 27, 33]
    """
    objective = row.objective
    in_loss = 3 * (1 + objective.clean_pass)
    perturbed = any(isinstance(method, AWP) for method in row.methods)
    return 2 * objective.steps + objective.clean_pass + in_loss * (1 + perturbed)


def fast_rows() -> tuple[Row, ...]:
    """The fast protocol and its two larger batches, then the methods there are under the best known of them."""
    fast = Schedule.fast()
    return (
        Row("pgd-at fast", PGDAT(), (LATE,), fast),
        Row("pgd-at fast batch 256", PGDAT(), (LATE,), Schedule.fast(batch_size=256, lr=0.4)),
        Row("pgd-at fast batch 512", PGDAT(), (LATE,), Schedule.fast(batch_size=512, lr=0.6)),
        Row("trades fast", Trades(), (LATE,), fast),
        Row("pgd-at + ccm fast", PGDAT(), (CCM(begin=5), LATE), fast),
        Row("trades + ccm + ccr fast", Trades(), (CCM(begin=5), CCR(begin=5), LATE), fast),
        Row("mart fast", MART(), (LATE,), fast),
        Row("arow fast", ARoW(), (LATE,), fast),
        Row("pgd-at + awp fast", PGDAT(), (AWP(), LATE), fast),
        Row("trades + awp fast", Trades(), (AWP(), LATE), fast),
        Row("pgd-at + friendly-at fast", PGDAT(), (FriendlyAT(variant="cfa"), LATE), fast),
        Row("pgd-at fast 20 epochs", PGDAT(), (replace(LATE, begin=16),), Schedule.fast(epochs=20)),
    )


def paper_rows() -> tuple[Row, ...]:
    """200 epochs with drops at 100 and 150, the schedule of the papers."""
    papers = Schedule()
    return (
        Row("pgd-at", PGDAT(), (CFA_EMA,), papers),
        Row("trades", Trades(), (CFA_EMA,), papers),
        Row("pgd-at + ccm", PGDAT(), (CCM(), CFA_EMA), papers),
        Row("trades + ccm + ccr", Trades(), (CCM(), CCR(), CFA_EMA), papers),
        Row("trades + awp", Trades(), (AWP(begin=9), CFA_EMA), papers),
        Row("pgd-at + awp", PGDAT(), (AWP(), CFA_EMA), papers),
        Row("mart", MART(beta=3), (CFA_EMA,), papers),
        Row("arow", ARoW(), (CFA_EMA,), papers),
    )


def train_row(row: Row, way: Way, deadline: float, *, seed: int = 0) -> dict[str, Any]:
    """Train or go on training, then audit; a JSON record.

    Args:
        deadline: of `time.monotonic()`; looked at after every epoch.

    Raises:
        OutOfTimeError: before the last epoch or its audits; the next call goes on from there.
    """
    fitted = fit_row(row, way, deadline, seed=seed)
    speeds = sorted(record["images_per_second"] for record in fitted.history)
    return {
        **row.describe(),
        **way.settings(),
        "seed": seed,
        "training_images": sum(fitted.history[-1]["train"]["count"]),
        "wall_seconds": folder_of(row, way).manifest()["wall_seconds"],
        "images_per_second": speeds[len(speeds) // 2],
        "history": list(fitted.history),
        "audits": _audits(row, way, fitted, deadline),
    }


def fit_row(row: Row, way: Way, deadline: float, *, seed: int = 0) -> Fitted:
    """Train or go on training; a row that is trained to its end is read back.

    Raises:
        OutOfTimeError: before the last epoch; the next call goes on from there.
    """
    folder = folder_of(row, way)
    state = _begin(folder, row, way, seed)
    about = {"row": row.name}
    spent = folder.manifest().get("wall_seconds", 0.0)
    started = time.monotonic()

    def save(state: TrainState) -> None:
        folder.save(state, about)
        seconds = spent + time.monotonic() - started
        folder.update_manifest(wall_seconds=round(seconds, 1))
        record = state.history[-1]
        say(f"{row.name}: epoch {state.epoch} of {row.schedule.epochs}, loss {record['loss']:.3f}, {seconds:.0f} s")
        if time.monotonic() > deadline and state.epoch < row.schedule.epochs:
            raise OutOfTimeError(f"{row.name} stands at epoch {state.epoch} of {row.schedule.epochs}")

    return _fit(row, way, seed, state, save)


def folder_of(row: Row, way: Way) -> RunFolder:
    """Where the row's states are."""
    return RunFolder(way.work / row.name.replace(" ", "-"))


def is_trained(row: Row, way: Way) -> bool:
    """Whether the row has been trained to its end."""
    return len(folder_of(row, way).history()) >= row.schedule.epochs


def _begin(folder: RunFolder, row: Row, way: Way, seed: int) -> TrainState | None:
    """A new run, or the state of the one that is there.

    Raises:
        CheckpointError: it was begun with other settings.
    """
    # Through JSON and back, as the manifest has it: lists where there were tuples.
    settings = json.loads(json.dumps(row.describe() | way.settings() | {"seed": seed}))
    if not folder.exists():
        folder.create(f"# {row.name}, see benchmarks/rows.py\n", environment() | {"settings": settings})
        return None
    if folder.manifest()["settings"] != settings:
        raise CheckpointError(f"{folder.path} was begun with other settings: give another folder for the states")
    return folder.resume_state()


def _fit(row: Row, way: Way, seed: int, state: TrainState | None, save: Callable[[TrainState], None]) -> Fitted:
    train = way.splits.train
    return fit(
        initialised(way.model, way.width, train, seed),
        train,
        row.objective,
        methods=row.methods,
        schedule=row.schedule,
        seed=seed,
        validation=way.validation,
        select="last",
        precision=way.precision,
        compile=way.compile,
        device=way.device,
        resume=state,
        save=save,
    )


def _audits(row: Row, way: Way, fitted: Fitted, deadline: float) -> dict[str, Any]:
    """Raw weights and average, each before and after the repair of its head, in float32; of a brief row the last."""
    found = {}
    candidates = {"model": fitted.state.weights, **fitted.state.exports}
    attacks: tuple[str, ...] = ATTACKS
    if row.brief:
        candidates, attacks = dict([candidates.popitem()]), ATTACKS[:2]
    for name, weights in candidates.items():
        fitted.model.load_state_dict(dict(weights))
        repaired = () if row.brief else ((f"{name} + hwnwb", HWNwB()(fitted.model)),)
        for label, model in ((name, fitted.model), *repaired):
            if time.monotonic() > deadline:
                raise OutOfTimeError(f"{row.name} is trained and not yet audited")
            result = audit(model, way.splits.test, attacks=attacks, device=way.device, label=f"{row.name}, {label}")
            robust, worst = result.average("pgd-20"), result.worst("pgd-20")
            say(f"{result.model}: PGD-20 average {robust:.4f}, worst {worst.words} {worst.value:.4f}")
            found[label] = result.to_dict()
    return found


def row_lines(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a table out of the records of rows: one per audited model, rates in percent."""
    lines = []
    for record in records:
        for label, result in record["audits"].items():
            line = {"row": record["name"], "model": label, "seconds": record["wall_seconds"]}
            line["images_per_second"] = record["images_per_second"]
            for attack in result["attacks"]:
                hits = list(zip(result["attacks"][attack]["correct"], result["count"], strict=True))
                line[attack] = 100 * sum(right for right, _ in hits) / sum(count for _, count in hits)
                line[f"{attack}_worst"] = min(100 * right / count for right, count in hits)
            lines.append(line)
    return lines
