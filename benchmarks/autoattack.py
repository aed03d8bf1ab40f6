"""AutoAttack `standard`: our engine beside `pyautoattack`, its verdicts image by image, and the time it takes.

Parts:
- agreement: both engines on models of several kinds, trained here; how many verdicts differ, and which way.
- speed: seconds of whole evaluations, in turn, of a small network, where overhead decides, and of convolutional ones of
  two widths, where arithmetic does; how many verdicts agree; what each member of ours took. The reference runs as its
  users run it, in a process of its own (`benchmarks.apart`).
- memory: the most that an audit ever holds, at full width and with a batch size no machine could take.

The two engines draw other random starts. How far that alone moves a verdict is shown by our engine with another seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.external import imported
from benchmarks.measure import ROOT, SPEED_COLUMNS, Report, Row, Table
from benchmarks.memory import in_use
from benchmarks.rows import OutOfTimeError
from benchmarks.workload import build, initialised, synthetic
from robustfair.attacks.autoattack.named import AUTOATTACK, AutoAttack
from robustfair.attacks.named import parse_attacks
from robustfair.data import ImageDataset, load_dataset
from robustfair.errors import ConfigError, RobustFairError
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.execution.device import has_bf16
from robustfair.files import read_json, write_json, write_tensors
from robustfair.objectives import FGSMAT, PGDAT, Objective, Standard, Trades
from robustfair.training import Schedule, fit
from robustfair.values import Threat

PARTS = ("agreement", "speed", "memory")
BATCH_SIZE = 250
WHOLE_SCHEMA = "robustfair.whole-evaluation/1"
NOTE_EVERY = 10.0
"""Seconds between notes of how long an evaluation has taken so far."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A model to attack, trained here on few images.

    Attributes:
        data, model, width: what it is.
        objective: that it is trained with.
        threat: norm and radius that it is attacked with.
        images: to train on.
        schedule: of its training.
    """

    data: str
    model: str
    width: int
    objective: Objective
    threat: Threat = field(default_factory=Threat)
    images: int = 5000
    schedule: Schedule


VICTIMS = {
    "digits, small-cnn, PGD-AT": Victim(
        data="digits",
        model="small-cnn",
        width=16,
        objective=PGDAT(eps=0.2, step_size=0.05),
        threat=Threat(eps=0.2),
        schedule=Schedule(epochs=25, lr=0.001, kind="constant", optimizer="adam", weight_decay=0.0, batch_size=32),
    ),
    "CIFAR-10, preact-resnet18, PGD-AT": Victim(
        data="cifar10",
        model="preact-resnet18",
        width=16,
        objective=PGDAT(),
        schedule=Schedule(epochs=6, lr=0.2, kind="one-cycle"),
    ),
    "CIFAR-10, resnet9, TRADES": Victim(
        data="cifar10",
        model="resnet9",
        width=8,
        objective=Trades(beta=6.0),
        schedule=Schedule(epochs=6, lr=0.2, kind="one-cycle"),
    ),
    "CIFAR-10, small-cnn, standard, small l2 ball": Victim(
        data="cifar10",
        model="small-cnn",
        width=16,
        objective=Standard(),
        threat=Threat(norm="l2", eps=0.1),
        schedule=Schedule(epochs=8, lr=0.1, kind="one-cycle"),
    ),
}
FULL_WIDTH = "CIFAR-10, preact-resnet18 of full width, FGSM-AT"
VICTIMS[FULL_WIDTH] = Victim(
    data="cifar10",
    model="preact-resnet18",
    width=64,
    objective=FGSMAT(),
    images=3000,
    schedule=Schedule(epochs=6, lr=0.1, kind="one-cycle"),
)
TIMED = "CIFAR-10, preact-resnet18, PGD-AT"
TIMED_IMAGES = {"digits, small-cnn, PGD-AT": 360, TIMED: 200, FULL_WIDTH: 60}
"""Victim of the part speed -> its first test images."""
AGREEING = tuple(name for name in VICTIMS if name != FULL_WIDTH)
"""Victims of the part agreement."""
AGREEMENT = {
    "model": "{model}",
    "images": "{images}",
    "clean": "{clean:.2%}",
    "reference": "{reference:.2%}",
    "ours": "{ours:.2%}",
    "ours - reference": "{difference:+.2f}",
    "verdicts that agree": "{agree:.2%}",
    "broken by the reference alone": "{reference_alone}",
    "by ours alone": "{ours_alone}",
    "ours, two seeds: agree": "{seeds_agree:.2%}",
}
SPEED = {
    **{heading: SPEED_COLUMNS[heading] for heading in ("case", "seconds", "fastest to slowest", "times as fast")},
    "images/s": "{images_per_second:,.1f}",
    "robust": "{robust:.2%}",
    "verdicts that agree": "{agree:.2%}",
}
SPENT = {
    "member": "{member}",
    "seconds": "{seconds:.1f}",
    "passes": "{passes:,}",
    "images a pass": "{size:.0f}",
    "microseconds an image and pass": "{each:.0f}",
}
WHOLE = {
    "model": "{model}",
    "images": "{images:,}",
    "clean": "{clean:.2%}",
    "robust": "{robust:.2%}",
    "seconds": "{seconds:.1f}",
    "in calls": "{calls}",
    "peak on the device, MiB": "{peak:,.0f}",
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    return measure.run(options(), report, argv)


def options() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = measure.parser(
        "autoattack",
        __doc__,
        batch_size=BATCH_SIZE,
        precision=("auto",),
        precisions=("auto", "fp32", "bf16"),
        repeats=3,
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    made.add_argument("--attack", type=_strong, default=AUTOATTACK, help="or one of its members, with its settings")
    made.add_argument("--victims", nargs="+", choices=tuple(VICTIMS), default=AGREEING, help="for agreement")
    made.add_argument("--images", type=int, default=500, help="test images of the part agreement, at most")
    timed = tuple(TIMED_IMAGES)
    made.add_argument("--timed", nargs="+", choices=timed, default=timed, metavar="VICTIM", help="for speed")
    made.add_argument("--timed-images", type=int, help="test images of the part speed; usually as many as suits each")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the trained victims there for the next time")
    return made


def report(args: argparse.Namespace) -> Report:
    """A table per part."""
    made = {"agreement": lambda args: [agreement(args)], "speed": speed, "memory": lambda args: [memory(args)]}
    tables: list[Table] = []
    for part in args.parts:
        measure.say(part)
        tables += made[part](args)
    settings = {"attack": args.attack.name, "device": args.device, "batch_size": args.batch_size}
    return Report("autoattack", {**settings, "precision": args.precision}, tables)


def agreement(args: argparse.Namespace) -> Table:
    """Verdicts of both engines on every victim, and of ours with another seed."""
    rows = []
    for name in args.victims:
        victim = VICTIMS[name]
        model, test = trained(name, args.device, args.keep), images_of(victim, args.images)
        measure.say(f"{name}: reference")
        reference = Reference(model, test, victim.threat, args).attack() == test.labels
        for precision in args.precision:
            measure.say(f"{name}: ours, {precision}")
            found = [attacked(model, test, victim.threat, precision, args, seed=seed) for seed in (0, 1)]
            rows.append({"model": f"{name}, {precision} search", **compared(found, reference)})
            measure.say(str(rows[-1]))
    return Table("Agreement with the reference", AGREEMENT, rows)


def compared(found: Sequence[Audit], reference: Tensor) -> Row:
    """How our verdicts stand beside the reference's (N,) flags; `found`, of one attack, differ in their seed."""
    attack = found[0].attacks[-1]
    ours, again = (one.hits(attack) for one in found)
    return {
        "images": len(ours),
        "clean": found[0].average("clean"),
        "reference": int(reference.sum()) / len(reference),
        "ours": int(ours.sum()) / len(ours),
        "difference": 100 * (int(ours.sum()) - int(reference.sum())) / len(ours),
        "agree": float((ours == reference).float().mean()),
        "reference_alone": int((ours & ~reference).sum()),
        "ours_alone": int((~ours & reference).sum()),
        "seeds_agree": float((ours == again).float().mean()),
        "fell_to": {member: int(count.sum()) for member, count in found[0].fell_to(attack).items()},
    }


def speed(args: argparse.Namespace) -> list[Table]:
    """Seconds of whole evaluations in turn, and what our members took in the last of them; two tables a victim."""
    tables = []
    for name in args.timed:
        victim = VICTIMS[name]
        model = trained(name, args.device, args.keep)
        test = images_of(victim, args.timed_images or TIMED_IMAGES[name])
        spent: dict[str, list[Row]] = {}
        rows = side_by_side(model, test, victim.threat, args, spent)
        clean = attacked(model, test, victim.threat, "fp32", args, attacks="clean").average("clean")
        title = f"{name}, width {victim.width}, {len(test)} images of which {clean:.0%} are right when clean"
        tables.append(Table(title, SPEED, rows, whole=True))
        tables += [Table(f"Members of {case}", SPENT, found) for case, found in spent.items()]
    return tables


def members(found: Audit, attack: str) -> list[Row]:
    """What each member of an attack took."""
    rows: list[Row] = []
    for name, spent in found.provenance["spent"][attack].items():
        seconds, passes, images = (spent[key] for key in ("seconds", "passes", "images"))
        each = {} if not images else {"size": images / passes, "each": 1e6 * seconds / images}
        rows.append({"member": name, "seconds": seconds, "passes": passes, **each})
    return rows


def side_by_side(
    model: nn.Module,
    test: ImageDataset,
    threat: Threat,
    args: argparse.Namespace,
    spent: dict[str, list[Row]] | None = None,
) -> list[Row]:
    """Both engines in turn, each with a line of `SPEED`; the reference's is empty where it cannot be had.

    Args:
        spent: takes what the members of ours took.
    """
    right: dict[str, Tensor] = {}

    def ours(name: str, precision: str) -> None:
        found = attacked(model, test, threat, precision, args)
        right[name] = found.hits(args.attack.name)
        for line in found.provenance["searches"].values():
            measure.say(f"{name}: {line}")
        if spent is not None:
            spent[name] = members(found, args.attack.name)

    cases: dict[str, Callable[[], float]] = {}
    rows: list[Row] = []
    library = imported("pyautoattack")
    with ExitStack() as stack:
        if isinstance(library, str):
            rows.append({"case": f"reference (pyautoattack {library})"})
        else:
            reference = stack.enter_context(Apart(reference_calls, deepcopy(model).cpu(), test, threat, args))
            cases["reference"] = partial(reference, "seconds")
        for precision in args.precision:
            name = f"ours {precision}"
            cases[name] = measure.clock(partial(ours, name, precision), args.device)
        timings = measure.interleaved(cases, args.repeats, 0)
        if "reference" in cases:
            right["reference"] = torch.tensor(reference("right"))
    fast = measure.ratios(timings, "reference") if "reference" in cases else {}
    for name, timing in timings.items():
        agree = float((right[name] == right["reference"]).float().mean()) if fast else None
        row = measure.speed_row(name, timing, fast.get(name), images=len(test))
        rows.append({**row, "robust": float(right[name].float().mean()), "agree": agree})
    return rows


def whole(
    model: nn.Module, test: ImageDataset, threat: Threat, args: argparse.Namespace, folder: Path, deadline: float
) -> Row:
    """One evaluation of ours, spread over several calls where need be: its seconds are those of all calls.

    Args:
        folder: keeps what is known between calls.
        deadline: of `time.monotonic()`.

    Raises:
        OutOfTimeError: the deadline came first; the next call goes on from there.
    """
    path, journal = folder / "whole.json", folder / "whole.safetensors"
    known = read_json(path, WHOLE_SCHEMA) if path.exists() else {}
    if "robust" in known:
        return known
    before = known if journal.exists() else {}
    began = noted = time.monotonic()
    if deadline <= began:
        raise OutOfTimeError("no time is left to begin")
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)

    def note(**more: object) -> Row:
        nonlocal noted
        noted = time.monotonic()
        peaks = filter(None, (before.get("peak"), in_use(args.device)["device"]))
        row: Row = {
            "schema": WHOLE_SCHEMA,
            "calls": before.get("calls", 0) + 1,
            "seconds": before.get("seconds", 0.0) + noted - began,
            "peak": max(peaks, default=None),
            **more,
        }
        write_json(path, row)
        return row

    def on_progress(attack: str, done: int, total: int) -> None:
        if time.monotonic() - noted >= NOTE_EVERY:
            measure.say(f"{attack}: {done:,} of {total:,} images, {note()['seconds']:.0f} s")

    folder.mkdir(parents=True, exist_ok=True)
    minutes = (deadline - began) / 60
    (precision,) = args.precision
    resumable = {"journal": journal, "max_minutes": minutes, "on_progress": on_progress}
    try:
        found = attacked(model, test, threat, precision, args, **resumable)
    finally:
        so_far = note()
    if not found.complete:
        raise OutOfTimeError(f"stands after {so_far['seconds']:.0f} s, goes on at the next call")
    return note(images=len(test), clean=found.average("clean"), robust=found.average(args.attack.name))


def memory(args: argparse.Namespace) -> Table:
    """Peak of a process that audits preact-resnet18 at full width, whatever batch size is asked for."""
    command = [sys.executable, "-c", "from benchmarks.autoattack import memory_child; memory_child()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    rows: list[Row] = []
    for attacks in ("pgd-2", "apgd-ce(steps=2)", "fab-t(steps=1, targets=1)", "fab(steps=1)", "square(queries=2)"):
        given = json.dumps({"attacks": attacks, "threads": args.threads})
        done = subprocess.run([*command, given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
        rows.append({"attacks": attacks, **json.loads(done.stdout)})
        measure.say(str(rows[-1]))
    columns = {
        "attacks": "{attacks}",
        "images": "{images:,}",
        "batch asked for": "{asked:,}",
        "batch taken": "{taken}",
        "peak, MiB": "{peak:.0f}",
    }
    return Table("Memory of an audit of preact-resnet18 at width 64 on a CPU", columns, rows)


def memory_child() -> None:
    """Audit as the command line says and print the peak of this process as JSON."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    data = synthetic(1000)
    model = build("preact-resnet18", None).eval()
    with torch.no_grad():
        labels = torch.cat([model(part.float() / 255).argmax(1) for part in data.images.split(100)])
    asked = 100_000
    found = audit(model, replace(data, labels=labels), attacks=given["attacks"], batch_size=asked, keep_points=True)
    taken = found.provenance["batch_size"]
    print(json.dumps({"images": len(data), "asked": asked, "taken": taken, "peak": in_use("cpu")["peak"]}))


def trained(name: str, device: str, keep: Path | None = None) -> nn.Module:
    """The model of one of `VICTIMS`, in eval mode; trained once a process, or once for a folder that keeps it."""
    path = None if keep is None else keep / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.safetensors"
    if path is None or not path.exists():
        model = _trained(name, repr(VICTIMS[name]), device)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, model.state_dict(), {"victim": repr(VICTIMS[name])})
        return model
    measure.say(f"{name}: as it was trained for {keep}")
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("victim") != repr(VICTIMS[name]):
            raise ConfigError("benchmark", "--keep", allowed="a folder of this version", got=str(keep))
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    model = _initialised(name)
    model.load_state_dict(weights)
    return model.to(device).eval()


@cache
def _trained(name: str, about: str, device: str) -> nn.Module:
    """The victim of a name, which is `about` it in words, once a process."""
    victim = VICTIMS[name]
    measure.say(f"training {victim.model} on {victim.data}")
    precision = "bf16" if has_bf16(torch.device(device)) else "fp32"
    options: dict[str, Any] = {"validation": 0, "select": "last", "precision": precision, "device": device}
    data = _training_images(name)
    return fit(_initialised(name), data, victim.objective, schedule=victim.schedule, **options).model.eval()


def _initialised(name: str) -> nn.Module:
    victim = VICTIMS[name]
    return initialised(victim.model, victim.width, _training_images(name), seed=0)


def _training_images(name: str) -> ImageDataset:
    victim = VICTIMS[name]
    data = load_dataset(victim.data).train
    return data.subset(torch.arange(min(victim.images, len(data))))


def images_of(victim: Victim, count: int) -> ImageDataset:
    """The first test images of the victim's data."""
    test = load_dataset(victim.data).test
    return test.subset(torch.arange(min(count, len(test))))


def attacked(
    model: nn.Module, test: ImageDataset, threat: Threat, precision: Any, args: argparse.Namespace, **more: Any
) -> Audit:
    """Our audit, without the looks at the model that the reference does not take; `more` goes to `audit` as it is."""
    given: dict[str, Any] = {"attacks": args.attack.name, "norm": threat.norm, "eps": threat.eps}
    given |= {"precision": precision, "device": args.device, "checks": False}
    return audit(model, test, **given | more)


class Reference:
    """`pyautoattack` on a model: `standard` as its users call it, all else by an audit with that engine."""

    def __init__(self, model: nn.Module, test: ImageDataset, threat: Threat, args: argparse.Namespace) -> None:
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        self.model, self.test, self.threat, self.args = model.to(args.device).eval(), test, threat, args
        self.x, self.y = test.images.to(args.device).float() / 255, test.labels.to(args.device)
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        self.engine = AutoAttack(self.model, norm=norm, eps=threat.eps, seed=0, device=args.device)
        self.found = test.labels

    def attack(self) -> Tensor:
        """(N,) predictions after the attack, on the CPU."""
        attack = self.args.attack.name
        if attack == AUTOATTACK:
            self.found = self.engine.run_standard_evaluation(self.x, self.y, batch_size=self.args.batch_size)[1].cpu()
        else:
            audited = attacked(self.model, self.test, self.threat, "fp32", self.args, engine="reference")
            self.found = audited.prediction(attack)
        return self.found

    def right(self) -> list[bool]:
        """Which images stood the last attack."""
        stood: list[bool] = (self.found == self.test.labels).tolist()
        return stood


def reference_calls(model: nn.Module, test: ImageDataset, threat: Threat, args: argparse.Namespace) -> Calls:
    """What the process of the reference does: a whole evaluation, and tell the seconds; then its verdicts."""
    reference = Reference(model, test, threat, args)
    return {"seconds": measure.clock(reference.attack, args.device), "right": reference.right}


def _strong(text: str) -> AutoAttack:
    try:
        found = parse_attacks(text)
    except RobustFairError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(found) != 1 or not isinstance(found[0], AutoAttack):
        raise argparse.ArgumentTypeError(f"must be {AUTOATTACK} or one of its members, got {text}")
    return found[0]


if __name__ == "__main__":
    main()
