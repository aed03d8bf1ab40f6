"""Does every objective train? One small run of each on the same images, audited class by class.

All runs start from the same weights and see the same images in the same order. A run is a row of `ROWS`; what is
audited is its last weights, and beside them every average of weights that its methods export. Averages never reach back
into training, so the raw weights of `pgd-at + ema` stand as `pgd-at`, and its average as a line of its own.

A row is in the report as soon as it is done; a command that was stopped goes on with `--keep`. What is kept under
`results/` is written into the cards of objectives, methods and augmentations by `benchmarks.cards`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import ROOT, SCHEMA, Report, Row, Table
from benchmarks.workload import initialised, load
from robustfair.config import Curve, require
from robustfair.data import ImageDataset
from robustfair.data.augment.crops import parse_augmentation
from robustfair.errors import CheckpointError, UnknownNameError
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.files import read_json, write_json, write_text
from robustfair.grammar import format_eps, format_value, parse_composition
from robustfair.methods import Bundle, Method, compose
from robustfair.objectives import Objective
from robustfair.runs.composition import read_composition
from robustfair.runs.folder import environment
from robustfair.training.fit import fit
from robustfair.training.schedule import Schedule
from robustfair.training.state import TrainState

CURVE: Curve = "one-cycle"
LR = 0.2
ATTACKS = {"clean": "clean", "pgd-20": "pgd20"}
"""Attack -> what its keys in a line begin with."""

Lines = list[Row]
"""What one run came to: a line of its raw weights, then one per export."""


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        train: its composition.
        norm: of the attacks in training and audit, at the norm's default radius.
        augment: name of an augmentation; None is the data set's own.
    """

    train: str
    norm: str = "linf"
    augment: str | None = None

    @property
    def key(self) -> str:
        """Unique among rows.

        >>> Case("trades", norm="l2").key, Case("pgd-at", augment="idbh").key
        ('trades, l2', 'pgd-at, idbh')
        """
        return ", ".join(
            [self.train, *([self.augment] if self.augment else []), *(["l2"] if self.norm == "l2" else [])]
        )


ROWS: tuple[Case, ...] = (
    Case("standard"),
    Case("fgsm-at"),
    Case("pgd-at + ema(decay=0.99) + swa(begin=6)"),
    Case("pgd-at + label-smoothing"),
    Case("trades"),
    Case("mart"),
    Case("arow"),
    Case("pgd-at + friendly-at"),
    Case("pgd-at + friendly-at(variant=cfa)"),
    Case("trades + friendly-at"),
    Case("mart + friendly-at"),
    Case("pgd-at + awp"),
    Case("trades + awp"),
    Case("pgd-at + avmixup"),
    Case("pgd-at", augment="crop-shift"),
    Case("pgd-at", augment="idbh"),
    Case("pgd-at", augment="idbh-strong"),
    Case("fgsm-at", norm="l2"),
    Case("pgd-at", norm="l2"),
    Case("trades", norm="l2"),
    Case("mart", norm="l2"),
    Case("arow", norm="l2"),
)
RATES = {
    "clean": "{clean:.1f} ({clean_low:.1f} to {clean_high:.1f})",
    "clean, worst class": "{clean_worst:.1f} ({clean_worst_low:.1f} to {clean_worst_high:.1f}) {clean_worst_class}",
    "PGD-20": "{pgd20:.1f} ({pgd20_low:.1f} to {pgd20_high:.1f})",
    "PGD-20, worst class": "{pgd20_worst:.1f} ({pgd20_worst_low:.1f} to {pgd20_worst_high:.1f}) {pgd20_worst_class}",
    "seconds": "{seconds:,.0f}",
}
COLUMNS = {
    "what": "{what}",
    "images x epochs": "{images:,} x {epochs}",
    **RATES,
    "images/s": "{images_per_second:,.0f}",
    "commit": "{commit}",
}
NOTES = (
    "Small scale: one seed, a narrow network, few images and epochs. It shows that each objective trains, and not "
    "which is best.",
    "Accuracies in percent with 95 % intervals, which are over test images and not over seeds.",
    "Seconds are those of the training steps, with other rows and other work on the same cores: they do not compare "
    "costs. Lines of one run, raw weights and averages of them, share its seconds.",
)


# Command line


def main(argv: Sequence[str] | None = None) -> Report | None:
    """Train the rows from the command line; exit code 1 if a row failed."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = measure.parser("objectives", __doc__, batch_size=128, precision="fp32", width=16)
    options.set_defaults(threads=1, argv=given)
    options.add_argument("--data", default="cifar10", help="name or path of images, or synthetic")
    options.add_argument("--images", type=int, default=2000, help="training images, as many of each class")
    options.add_argument("--test-images", type=int, default=2000, help="audited images, as many of each class")
    options.add_argument("--epochs", type=int, default=12, help=f"of each run, {CURVE} to {LR}")
    options.add_argument("--seed", type=int, default=0, help="of weights, order and draws")
    options.add_argument("--jobs", type=int, default=2, help="rows at a time, each in a process with --threads")
    options.add_argument("--only", nargs="+", metavar="TRAIN", help="the rows of these compositions")
    options.add_argument("--keep", action="store_true", help="go on with the file of --json: train what it lacks")
    options.add_argument("--row", help=argparse.SUPPRESS)
    args = options.parse_args(given)
    if args.row is not None:
        _answer(options, args)
        return None
    if args.keep and args.json is None:
        options.error("--keep needs --json, the report to read")
    if args.keep and args.force:
        options.error("--keep and --force: one goes on with the file, the other replaces it")
    failed: list[str] = []
    whole = measure.run(options, lambda args: report(args, failed), given + ["--force"] * args.keep)
    _write(args.json, whole)
    if failed:
        sys.exit(1)
    return whole


def report(args: argparse.Namespace, failed: list[str]) -> Report:
    """Train what is asked for and not there yet; the file of --json is written after every row.

    Args:
        failed: keys of the rows that failed are added to it.
    """
    require(args.jobs >= 1, "objectives", "jobs", allowed="at least 1", got=args.jobs)
    chosen, commit = picked(args.only), _commit()
    train, test = _images(args)
    shared = _shared(args, train, test)
    found = _kept(args.json, shared, chosen) if args.keep and args.json.exists() else {}
    missing = []
    for case in chosen:
        settings = _tried(partial(_settings, case, shared, train))
        if not isinstance(settings, str) and case.key in found and found[case.key][0]["settings"] == settings:
            measure.say(f"{case.key}: kept")
            continue
        found.pop(case.key, None)
        if isinstance(settings, str):
            _fail(case, settings, failed)
        else:
            missing.append(case)
    for case, outcome in _outcomes(missing, args, train, test):
        if isinstance(outcome, str):
            _fail(case, outcome, failed)
            continue
        found[case.key] = outcome
        raw = outcome[0]
        measure.say(f"{case.key}: clean {raw['clean']:.1f}, PGD-20 {raw['pgd20']:.1f}, {raw['seconds']:.0f} s")
        _write(args.json, _report(found, shared, args, commit))
    if not found:
        sys.exit(1)
    return _report(found, shared, args, commit)


def picked(only: Sequence[str] | None) -> tuple[Case, ...]:
    """The rows whose composition or key is named, in the order of `ROWS`; all of them for None.

    Raises:
        UnknownNameError: no row is called so.
    """
    for name in only or ():
        if not any(name in (case.train, case.key) for case in ROWS):
            raise UnknownNameError("row", name, [case.key for case in ROWS])
    return tuple(case for case in ROWS if only is None or case.train in only or case.key in only)


def _images(args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images, the first of each class."""
    found = []
    for part, count in (("train", args.images), ("test", args.test_images)):
        data = load(args.data, part)
        found.append(data.limit_per_class(count // data.num_classes))
    return found[0], found[1]


def _fail(case: Case, reason: str, failed: list[str]) -> None:
    failed.append(case.key)
    measure.say(f"{case.key}: failed, {reason}")


# A row


def trained(case: Case, train: ImageDataset, test: ImageDataset, args: argparse.Namespace) -> Lines:
    """Train one row and audit its last weights and every export; rates in percent, and the counts that they are of."""
    commit = _commit()
    plan = compose(*read_composition(case.train, {"norm": case.norm}))
    schedule = Schedule(epochs=args.epochs, kind=CURVE, lr=LR, batch_size=args.batch_size)

    def save(state: TrainState) -> None:
        measure.say(f"{case.key}: epoch {state.epoch} of {args.epochs}, loss {state.history[-1]['loss']:.3f}")

    fitted = fit(
        initialised(args.model, args.width, train, args.seed),
        train,
        plan.objective,
        methods=plan.methods,
        schedule=schedule,
        seed=args.seed,
        validation=0,
        select="last",
        augment=None if case.augment is None else parse_augmentation(case.augment),
        precision=args.precision,
        device=args.device,
        save=save,
    )
    seconds = sum(record["seconds"] for record in fitted.history)
    about = {
        "settings": _settings(case, _shared(args, train, test), train),
        "images": len(train),
        "epochs": args.epochs,
        "seconds": seconds,
        "images_per_second": len(train) * args.epochs / seconds,
        "commit": commit,
        "date": environment()["date"],
    }
    lines = []
    for name, weights in {"model": fitted.state.weights, **fitted.state.exports}.items():
        fitted.model.load_state_dict(dict(weights))
        result = audit(fitted.model, test, attacks=list(ATTACKS), norm=case.norm, device=args.device)
        lines.append({"key": case.key, **asdict(case), "weights": name, **_named(case, plan.methods, name)})
        lines[-1] |= {"eps": format_eps(result.threat.eps), **measured(result), **about}
    return lines


def measured(result: Audit) -> Row:
    """Average and worst class of every attack in percent, each with its interval, and the counts."""
    row: Row = {"count": result.count().tolist()}
    for attack, name in ATTACKS.items():
        worst = result.worst(attack)
        rates = {"": (result.average(attack), *result.average_interval(attack))}
        rates["_worst"] = (worst.value, *result.worst_interval(attack))
        for kind, values in rates.items():
            for end, value in zip(("", "_low", "_high"), values, strict=True):
                row[f"{name}{kind}{end}"] = 100 * value
        row[f"{name}_worst_class"] = worst.words
        row[f"{name}_correct"] = result.correct(attack).tolist()
    return row


def _named(case: Case, methods: Sequence[Method], weights: str) -> Row:
    """The composition that weights stand for, without the averages that they are not, and the names in it."""
    averages = {method.name for method in methods if method.claims and all(_exported(c) for c in method.claims)}
    own = {method.name for method in methods if f"export.{weights}" in method.claims}
    terms = [term for term in parse_composition(case.train) if term.name not in averages - own]
    extra = [] if case.augment is None else [case.augment]
    what = " + ".join(str(term) for term in terms)
    return {"what": ", ".join([what, *extra]), "names": [*(term.name for term in terms), *extra]}


def _exported(claim: str) -> bool:
    return claim.startswith("export.")


def _shared(args: argparse.Namespace, train: ImageDataset, test: ImageDataset) -> dict[str, Any]:
    """What all rows of a report depend on, as JSON values."""
    given = ("model", "width", "epochs", "batch_size", "seed", "precision", "device", "threads")
    return {
        **{name: getattr(args, name) for name in given},
        "curve": CURVE,
        "lr": LR,
        "data": train.name,
        "images": len(train),
        "test_images": len(test),
        "fingerprints": [train.fingerprint, test.fingerprint],
    }


def _settings(case: Case, shared: Mapping[str, Any], train: ImageDataset) -> dict[str, Any]:
    """What a row depends on, with every default of its objective and methods written out.

    Raises:
        RobustFairError: a name, key or value that is not known.
    """
    objective, methods = read_composition(case.train, {"norm": case.norm})
    augment = case.augment or train.augment
    parse_augmentation(augment)
    parts: list[Objective | Method | Bundle] = [objective, *methods]
    given = {part.name: {key: format_value(value) for key, value in vars(part).items()} for part in parts}
    return {**shared, "train": given, "norm": case.norm, "augment": augment}


# Many rows


def _outcomes(
    cases: Sequence[Case], args: argparse.Namespace, train: ImageDataset, test: ImageDataset
) -> Iterator[tuple[Case, Lines | str]]:
    """Every row as it is done, with its lines or the reason that there are none."""
    if args.jobs == 1:
        for case in cases:
            yield case, _tried(partial(trained, case, train, test, args))
        return
    pool = ThreadPoolExecutor(args.jobs)
    try:
        begun = {pool.submit(_apart, case.key, args.argv): case for case in cases}
        for done in as_completed(begun):
            yield begun[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tried(make: Callable[[], Any]) -> Any:
    """What `make` returns, or its error in one line."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _apart(key: str, argv: Sequence[str]) -> Lines | str:
    """A row trained in a process of its own, which ends when this one does."""
    command = [sys.executable, "-m", "benchmarks.objectives", *argv, "--row", key]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        code = process.wait()
    return f"its process ended with code {code}" if code else json.loads(told.splitlines()[-1])


def _answer(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The other side of `_apart`: train the row and print its lines, or the reason that there are none."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    measure.check_device(options, args.device)
    torch.set_num_threads(args.threads)
    (case,) = (case for case in ROWS if case.key == args.row)
    print(json.dumps(_tried(partial(trained, case, *_images(args), args))))


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


# Report


def _report(found: Mapping[str, Lines], shared: Mapping[str, Any], args: argparse.Namespace, commit: str) -> Report:
    """A table per norm, in the order of `ROWS`."""
    lines = [line for case in ROWS for line in found.get(case.key, ())]
    tables = []
    for norm in dict.fromkeys(line["norm"] for line in lines):
        rows = [line for line in lines if line["norm"] == norm]
        tables.append(Table(f"{norm}, radius {rows[0]['eps']}", COLUMNS, rows))
    settings = {name: value for name, value in shared.items() if name not in ("threads", "fingerprints")}
    return Report("objectives", {**settings, "jobs": args.jobs}, tables, NOTES, commit=commit)


def _write(path: Path | None, whole: Report) -> None:
    """The report, and its text beside it."""
    if path is not None:
        write_json(path, whole.as_json())
        write_text(path.with_suffix(".md"), whole.text() + "\n")


def _kept(path: Path, shared: Mapping[str, Any], chosen: Sequence[Case]) -> dict[str, Lines]:
    """The lines of a report by row.

    Raises:
        CheckpointError: it cannot be read, or is another script's.
        ConfigError: rows that are not to be trained have other settings than those that are.
    """
    found: dict[str, Lines] = {}
    for line in _lines_of(_read(path)):
        found.setdefault(line["key"], []).append(line)
    for case in set(ROWS) - set(chosen):
        for line in found.get(case.key, ()):
            for name, value in shared.items():
                hint = f"{case.key} of {path} is not among --only: leave --only out, or name another file"
                got = line["settings"][name]
                require(got == value, "--keep", name, allowed=f"{got!r} as in the file", got=value, hint=hint)
    return found


def _read(path: Path) -> dict[str, Any]:
    """A report as it was written.

    Raises:
        CheckpointError: it cannot be read, or is another script's.
    """
    written = read_json(path, SCHEMA)
    if written["name"] != "objectives":
        raise CheckpointError(f"{path} is a report of benchmarks.{written['name']}, not of benchmarks.objectives")
    return written


def _lines_of(written: Mapping[str, Any]) -> Lines:
    return [row for table in written["tables"] for row in table["rows"]]


def _commit() -> str:
    """As `measure.commit`, but a changed file under results/ does not count: the report itself is one."""
    found = measure.commit()
    asked = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)results"]
    if found.endswith("+") and subprocess.run(asked, cwd=ROOT, capture_output=True).returncode == 0:
        return found.removesuffix("+")
    return found


if __name__ == "__main__":
    main()
