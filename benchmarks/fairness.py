"""Does a fairness method help? Every method beside its base, at small scale on real images, over several seeds.

A row is a composition, trained with the settings of its scale, from scratch or from another row's weights. All rows of
a seed begin with the same weights and see the same images in the same order, all are tested on the same images, and a
row is compared with its base seed by seed. The reports of rows that go on from others name as base a row that trains on
for as long without the method.

Each training is a run folder under --runs, each audit a pair of files under --out, so that the command goes on where it
was stopped: what is audited is not trained again. Audits are small and kept with the results; runs are not.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Report, Row, Table
from robustfair.data import ImageDataset, load_dataset
from robustfair.errors import ConfigError, RobustFairError, RobustFairWarning, UnknownNameError
from robustfair.evaluate.result import Audit, load_audit
from robustfair.evaluate.run import audit
from robustfair.files import write_json, write_text
from robustfair.metrics import OverSeeds, difference_over_seeds, holm, over_seeds
from robustfair.runs.folder import RunFolder
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.run import train

ATTACKS = ("apgd-ce(steps=30)", "apgd-t(targets=3, steps=20)")
"""Of every row that is judged by "robust", which is right under all of them."""
AUTOATTACK = "autoattack"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all rows on a data set share.

    Attributes:
        keys: of their recipes.
        test_images: audited, as many of each class.
        autoattack_images: of these, under the whole of AutoAttack for the rows that are chosen for it.
        judged: what its rows are compared by, "robust" or "clean".
    """

    keys: Mapping[str, Any]
    judged: str = "robust"
    test_images: int = 2000
    autoattack_images: int = 200


COMMON = {"schedule": "one-cycle", "batch_size": 50, "lr": 0.1, "select": "last", "validation": 0.05}
CIFAR10 = {**COMMON, "data": "cifar10", "model": "resnet9", "width": 8, "epochs": 8}
SCALES = {
    "cifar10": Scale(
        keys={**CIFAR10, "limit_per_class": 500, "eps": 4 / 255, "step_size": 3 / 255, "steps": 2},
    ),
    "fashion-mnist": Scale(
        keys={
            **COMMON,
            "data": "fashion-mnist",
            "limit_per_class": 500,
            "model": "small-cnn",
            "width": 16,
            "eps": 13 / 255,
            "step_size": 6.5 / 255,
            "steps": 3,
            "epochs": 10,
        },
    ),
    "cifar10-lt": Scale(keys={**CIFAR10, "edit": "long-tail(factor=50)", "epochs": 12}, judged="clean"),
}
ROBUST, LONG_TAILED = ("cifar10", "fashion-mnist"), ("cifar10-lt",)
PLAIN = "pgd-at-ls-ema"
"""The row without a fairness method that a fairness method should beat."""
CFA_SHORT = "begin=2, avg_start=4, threshold=0.02"
"""CFA for few epochs, and for validation images of which the worst class withstands few: its own are for 200 epochs."""
MORE = {"epochs": 3, "lr": 0.01, "schedule": "constant"}
"""Of rows that go on from another's weights."""
TWICE = [
    {"train": "standard", "epochs": 3, "schedule": "constant", "select": "last"},
    {"edit": "upweight(times=20)"},
    {"train": "standard", "start": "scratch"},
]
"""Just train twice, in as few epochs."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table.

    Attributes:
        train: its composition; {NAME} in it is the run of another row, such as a teacher.
        base: name of the row that it is compared with; empty for a base.
        start: name of the row whose weights it goes on from; empty trains from scratch.
        keys: of its recipe, where they are others than the scale's; None leaves out what the scale has.
        on: the scales that have it.
    """

    train: str
    base: str = ""
    start: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] = ROBUST

    def keys_on(self, scale: str) -> dict[str, Any]:
        """Of its recipe on a scale."""
        keys = {**SCALES[scale].keys, **self.keys}
        return {key: value for key, value in keys.items() if value is not None}

    @property
    def asks(self) -> list[str]:
        """Names of the rows that have to be trained before it."""
        return [*re.findall(r"{([\w-]+)}", self.train), *filter(None, [self.start])]


ENTRIES: dict[str, Entry] = {
    "pgd-at": Entry(train="pgd-at"),
    "trades": Entry(train="trades"),
    "trades-2": Entry(train="trades(beta=2)"),
    "friendly-at": Entry(train="pgd-at + friendly-at(variant=cfa)"),
    "mart": Entry(train="mart"),
    "n-fgsm": Entry(train="n-fgsm", base="pgd-at", keys={"steps": None, "step_size": None}),
    "pgd-at-ema": Entry(train="pgd-at + ema(decay=0.99)", base="pgd-at"),
    "trades-ema": Entry(train="trades + ema(decay=0.99)", base="trades"),
    "pgd-at-ls-ema": Entry(train="pgd-at + label-smoothing + ema(decay=0.99)", base="pgd-at"),
    "pgd-at-ccm": Entry(train="pgd-at + ccm(begin=2)", base="pgd-at"),
    "pgd-at-cfa": Entry(train=f"pgd-at + cfa({CFA_SHORT})", base="pgd-at"),
    "trades-ccm": Entry(train="trades + ccm(begin=2)", base="trades"),
    "trades-ccr": Entry(train="trades + ccr(begin=2)", base="trades"),
    "trades-cfa": Entry(train=f"trades + cfa({CFA_SHORT})", base="trades"),
    "friendly-at-cfa": Entry(train=f"pgd-at + friendly-at(variant=cfa) + cfa({CFA_SHORT})", base="friendly-at"),
    "fair-tat": Entry(train="pgd-at + fair-tat", base="pgd-at"),
    "trades-fair-tat": Entry(train="trades(beta=2) + fair-tat", base="trades-2"),
    "fair-tat-fawa": Entry(train="pgd-at + fair-tat + fawa(begin=4, threshold=0.02)", base="pgd-at"),
    "wat": Entry(train="trades + wat", base="trades"),
    "bat": Entry(train="bat", base="trades"),
    "dafa": Entry(train="trades + dafa(begin=5)", base="trades"),
    "pgd-at-dafa": Entry(train="pgd-at + dafa(begin=5)", base="pgd-at"),
    "faal": Entry(train="pgd-at + faal", base="pgd-at"),
    "trades-faal": Entry(train="trades + faal", base="trades"),
    "mart-faal": Entry(train="mart + faal", base="mart"),
    "variance-fat": Entry(train="pgd-at + variance-fat", base="pgd-at"),
    "csr": Entry(train="pgd-at + csr", base="pgd-at"),
    "trades-csr": Entry(train="trades + csr", base="trades"),
    "pgd-at-awp": Entry(train="pgd-at + awp", base="pgd-at"),
    "pgd-at-more": Entry(train="pgd-at", start="pgd-at", keys=MORE),
    "trades-more": Entry(train="trades", start="trades", keys=MORE),
    "frl-more": Entry(train="trades(beta=1.5) + frl", base="trades-more", start="trades", keys=MORE),
    "faal-more": Entry(train="pgd-at + faal", base="pgd-at-more", start="pgd-at", keys=MORE),
    "csr-more": Entry(train="trades + csr", base="trades-more", start="trades", keys=MORE),
    "rslad": Entry(train="rslad(teacher={pgd-at})", base="pgd-at"),
    "ard": Entry(train="ard(teacher={pgd-at})", base="pgd-at"),
    "absld": Entry(train="rslad(teacher={pgd-at}) + absld", base="rslad"),
    "fair-ard": Entry(train="ard(teacher={pgd-at}) + fair-ard", base="ard"),
    "standard": Entry(train="standard", on=LONG_TAILED),
    "logit-adjustment": Entry(train="standard + logit-adjustment", base="standard", on=LONG_TAILED),
    "class-balanced": Entry(train="standard + class-balanced", base="standard", on=LONG_TAILED),
    "lff": Entry(train="standard + lff", base="standard", on=LONG_TAILED),
    "jtt": Entry(train="jtt", base="standard", keys={"stages": TWICE}, on=LONG_TAILED),
    "standard-csr": Entry(train="standard + csr", base="standard", on=LONG_TAILED),
}


# Command line


def main(argv: Sequence[str] | None = None) -> Report:
    """Train, audit and report from the command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.set_defaults(json=None)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--threads", type=int, default=1, help="of the CPU")
    options.add_argument("--scale", choices=list(SCALES), default="cifar10", help="data set, network, images, epochs")
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of each row")
    options.add_argument("--only", nargs="+", metavar="ROW", help="train and audit these rows, and what they need")
    options.add_argument("--autoattack", nargs="+", metavar="ROW", default=[], help="attack these rows whole too")
    options.add_argument("--report", action="store_true", help="train nothing: report the audits that are there")
    options.add_argument("--runs", type=Path, default=Path("runs/fairness"), help="folder of run folders")
    options.add_argument("--out", type=Path, default=Path("results/fairness-cpu"), help="folder of audits and reports")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """Do what is missing, seed by seed, and report all that is there."""
    for name in (*(args.only or ()), *args.autoattack):
        if name not in ENTRIES:
            raise UnknownNameError("row", name, ENTRIES)
    scale, test = SCALES[args.scale], None
    for seed in args.seeds if not args.report else ():
        for name in wanted(args.scale, args.only):
            test = test or tested(scale)
            done = Work(args, name, seed)
            if done.audited():
                continue
            measure.say(f"{args.scale}, {name}, seed {seed}")
            done.train()
            done.audit(test, ATTACKS if scale.judged == "robust" else (), "audit")
            _write(args)
        for name in args.autoattack:
            test = test or tested(scale)
            done = Work(args, name, seed)
            if not done.audited("autoattack"):
                part = test.sample(scale.autoattack_images, stratified=True, seed=0)
                done.audit(part, [AUTOATTACK], "autoattack")
    return _write(args)


def wanted(scale: str, only: Sequence[str] | None) -> list[str]:
    """The rows of a scale to train, each after those that it asks for."""
    found: list[str] = []

    def add(name: str) -> None:
        for asked in ENTRIES[name].asks:
            add(asked)
        if name not in found:
            found.append(name)

    for name in only or ENTRIES:
        if scale in ENTRIES[name].on:
            add(name)
    return found


def tested(scale: Scale) -> ImageDataset:
    """The first test images of each class."""
    test = load_dataset(str(scale.keys["data"])).test
    return test.limit_per_class(scale.test_images // test.num_classes)


# A row with a seed


class Work:
    """One training and its audits, on disk."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int) -> None:
        self.args, self.entry, self.seed = args, ENTRIES[name], seed
        self.folder: Path = args.runs / args.scale / f"{name}-{seed}"
        self.stem = f"{name}-{seed}"
        self.audits: Path = args.out / args.scale

    def audited(self, kind: str = "audit") -> bool:
        return (self.audits / f"{self.stem}.{kind}.json").exists()

    def recipe(self) -> Recipe:
        asked = {name: Work(self.args, name, self.seed) for name in self.entry.asks}
        for work in asked.values():
            work.train()
        start = {"start": str(asked[self.entry.start].folder)} if self.entry.start else {}
        keys = {**self.entry.keys_on(self.args.scale), **start}
        composition = self.entry.train.format(**{name: work.folder for name, work in asked.items()})
        return read_recipe(composition, {**keys, "seed": self.seed, "device": self.args.device})

    def train(self) -> None:
        """Into its folder, or on where it was stopped; nothing where it is over."""
        folder = RunFolder(self.folder)
        if folder.exists() and folder.manifest().get("status") == "complete":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustFairWarning)
            train(self.recipe(), self.folder, resume=folder.exists())

    def audit(self, test: ImageDataset, attacks: Sequence[str], kind: str) -> None:
        """Attack the selected weights within the radius that they were trained for, and keep the verdicts."""
        self.train()
        model = RunFolder(self.folder).read()[0]
        radius = {key: value for key, value in SCALES[self.args.scale].keys.items() if key == "eps"}
        given = {"label": self.stem, "device": self.args.device, "journal": self.folder / f"{kind}.journal"}
        found = audit(model, test, attacks=["clean", *attacks], **radius, **given)
        found.save(self.audits, f"{self.stem}.{kind}")


# Report


def _between(key: str, form: str = ".1f") -> str:
    """A figure and its interval, of a row."""
    return f"{{{key}:{form}}} ({{{key}_low:{form}}} to {{{key}_high:{form}}})"


def _columns(judged: str) -> dict[str, str]:
    """Of the table of rows."""
    keys = ("clean", "robust") if judged == "robust" else ("clean",)
    rates = {key: _between(key) for key in keys}
    return {
        "row": "{row}",
        "seeds": "{seeds}",
        **rates,
        **{f"{key}, worst class": _between(f"{key}_worst") for key in keys},
    }


def _changed(judged: str) -> dict[str, str]:
    """Of the table of changes."""
    judges = {judged: judged, f"{judged}, worst class": f"{judged}_worst", "range": f"{judged}_range"}
    told = {heading: f"{_between(key, '+.1f')}, p {{{key}_p:.3f}}" for heading, key in judges.items()}
    clean = {"clean": _between("clean", "+.1f")} if judged != "clean" else {}
    plain = {f"worst class against {PLAIN}": _between("plain", "+.1f")}
    return {"row": "{row}", "base": "{base}", **told, **clean, **plain}


AGREEMENT = {
    "row": "{row}",
    "images": "{images}",
    "robust to all of the table": "{short:.1f}",
    "to AutoAttack": "{whole:.1f}",
    "verdicts that agree": "{agree:.1%}",
}
NOTES = (
    "Percent of test images, the mean over seeds, with 95 % intervals over seeds and test images (see "
    "`robustfair.metrics.over_seeds`); robust is right under APGD-CE of 30 steps and under targeted APGD of 20 steps "
    "towards each of 3 classes.",
    "p of a change: Student's test over seeds and images, after Holm's correction over the rows of the table.",
    "Small scale: narrow networks, few images and epochs. It can tell that a method moves the worst class in this "
    "setting, and not what it does in the papers', nor which method is best.",
)


def _write(args: argparse.Namespace) -> Report:
    """The report of all audits of a scale, and its files."""
    found = {name: audits for name in ENTRIES if (audits := _audits(args, name))}
    if not found:
        raise ConfigError("fairness", "--out", allowed="a folder with audits", got=str(args.out))
    scale = SCALES[args.scale]
    given = {key: str(value) for key, value in scale.keys.items()}
    tables = [
        Table("Rows", _columns(scale.judged), [_row(name, audits, scale.judged) for name, audits in found.items()]),
        Table("Changes, seed by seed, against the base", _changed(scale.judged), _changes(found, scale.judged)),
        Table("AutoAttack whole, on a part", AGREEMENT, list(_agreement(args, found))),
    ]
    whole = Report("fairness", given, [table for table in tables if table.rows], NOTES)
    write_json(args.out / f"{args.scale}.json", whole.as_json())
    write_text(args.out / f"{args.scale}.md", whole.text() + "\n")
    return whole


def _audits(args: argparse.Namespace, name: str, kind: str = "audit") -> dict[int, Audit]:
    """Seed -> audit of a row, as far as they are there."""
    works = {seed: Work(args, name, seed) for seed in args.seeds}
    return {
        seed: load_audit(work.audits / f"{work.stem}.{kind}.json") for seed, work in works.items() if work.audited(kind)
    }


def _hits(audits: Mapping[int, Audit], attack: str, seeds: Sequence[int]) -> Tensor:
    """(S, N) what the runs get right."""
    return torch.stack([audits[seed].hits(attack) for seed in seeds])


def _row(name: str, audits: Mapping[int, Audit], judged: str) -> Row:
    first, row = next(iter(audits.values())), {"row": name, "train": ENTRIES[name].train, "seeds": len(audits)}
    for attack in dict.fromkeys(("clean", judged)):
        for statistic, key in (("average", attack), ("worst", f"{attack}_worst")):
            hits = _hits(audits, attack, list(audits))
            found = over_seeds(hits, first.labels, first.num_classes, statistic)
            row |= _figures(key, found)
    return row


def _figures(key: str, found: OverSeeds) -> Row:
    """In percent; None where one seed says nothing."""
    ends = {f"{key}_low": found.lower, f"{key}_high": found.upper}
    row: Row = {name: 100 * end if math.isfinite(end) else None for name, end in ends.items()}
    p = None if math.isnan(found.p) else found.p
    return {**row, key: 100 * found.value, f"{key}_each": [100 * each for each in found.each], f"{key}_p": p}


def _changes(found: Mapping[str, Mapping[int, Audit]], judged: str) -> list[Row]:
    rows = []
    for name, audits in found.items():
        row: Row = {"row": name, "base": ENTRIES[name].base}
        against = found.get(row["base"], {})
        for attack, statistic, key in (
            (judged, "average", judged),
            (judged, "worst", f"{judged}_worst"),
            (judged, "range", f"{judged}_range"),
            ("clean", "average", "clean"),
        ):
            row |= _change(against, audits, attack, statistic, key)
        if against and name != PLAIN:
            row |= _change(found.get(PLAIN, {}), audits, judged, "worst", "plain")
        if against:
            rows.append({**row, "seeds": len(row[f"{judged}_each"])})
    for key in (judged, f"{judged}_worst", f"{judged}_range"):
        told = [row for row in rows if row[f"{key}_p"] is not None]
        adjusted = holm(torch.tensor([row[f"{key}_p"] for row in told], dtype=torch.float64))
        for row, p in zip(told, adjusted.tolist(), strict=True):
            row[f"{key}_p"] = p
    return rows


def _change(before: Mapping[int, Audit], after: Mapping[int, Audit], attack: str, statistic: str, key: str) -> Row:
    """Of the seeds that both have; nothing where there is none."""
    seeds = [seed for seed in after if seed in before]
    if not seeds:
        return {}
    first = after[seeds[0]]
    base, with_it = _hits(before, attack, seeds), _hits(after, attack, seeds)
    return _figures(key, difference_over_seeds(base, with_it, first.labels, first.num_classes, statistic))


def _agreement(args: argparse.Namespace, found: Mapping[str, Mapping[int, Audit]]) -> Iterator[Row]:
    """How far the attacks of the table stand for AutoAttack, on the images that both saw."""
    for name, audits in found.items():
        wholes = {seed: each for seed, each in _audits(args, name, "autoattack").items() if seed in audits}
        if not wholes:
            continue
        short, whole = [], []
        for seed, each in wholes.items():
            short.append(audits[seed].hits("robust")[each.index])
            whole.append(each.hits("robust"))
        a, b = torch.cat(short), torch.cat(whole)
        rates = {"short": 100 * float(a.float().mean()), "whole": 100 * float(b.float().mean())}
        yield {"row": name, "images": len(a), **rates, "agree": float((a == b).float().mean())}


if __name__ == "__main__":
    try:
        main()
    except RobustFairError as error:
        sys.exit(str(error))
