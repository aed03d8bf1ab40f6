"""AutoAttack `standard`: our engine beside `pyautoattack`, its verdicts image by image, and the time it takes.

Parts:
- agreement: both engines on models of several kinds, trained here; how many verdicts differ, and which way.
- speed: seconds of a whole evaluation on one of the models, in turn. The reference runs as its users run it, in a
  process of its own (`benchmarks.apart`).
- memory: the most that an audit ever holds, at full width and with a batch size no machine could take.

The two engines draw other random starts. How far that alone moves a verdict is shown by our engine with another seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.apart import Apart, Calls
from benchmarks.measure import ROOT, Report, Row, Table
from benchmarks.workload import build, initialised, synthetic
from robustfair.data import ImageDataset, load_dataset
from robustfair.evaluate.audit import Audit, audit
from robustfair.objectives import PGDAT, Objective, Standard, Trades
from robustfair.training import Schedule, fit

PARTS = ("agreement", "speed", "memory")
ATTACK = "autoattack"
BATCH_SIZE = 250


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A model to attack, trained here on few images.

    Attributes:
        data, model, width: what it is.
        objective: that it is trained with.
        norm, eps: that it is attacked with.
        images: to train on.
        schedule: of its training.
    """

    data: str
    model: str
    width: int
    objective: Objective
    norm: str = "linf"
    eps: float = 8 / 255
    images: int = 5000
    schedule: Schedule


VICTIMS = {
    "digits, small-cnn, PGD-AT": Victim(
        data="digits",
        model="small-cnn",
        width=16,
        objective=PGDAT(eps=0.2, step_size=0.05),
        eps=0.2,
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
        norm="l2",
        eps=0.1,
        schedule=Schedule(epochs=8, lr=0.1, kind="one-cycle"),
    ),
}
TIMED = "CIFAR-10, preact-resnet18, PGD-AT"
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


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser(
        "autoattack",
        __doc__,
        batch_size=BATCH_SIZE,
        precision=("auto",),
        precisions=("auto", "fp32", "bf16"),
        repeats=3,
    )
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options.add_argument("--victims", nargs="+", choices=tuple(VICTIMS), default=tuple(VICTIMS), help="for agreement")
    options.add_argument("--images", type=int, default=500, help="test images of the part agreement, at most")
    options.add_argument("--timed-images", type=int, default=200, help="test images of the part speed")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table per part."""
    made = {"agreement": agreement, "speed": speed, "memory": memory}
    tables = []
    for part in args.parts:
        measure.say(part)
        tables.append(made[part](args))
    settings = {"attack": f"{ATTACK} standard", "device": args.device, "batch_size": args.batch_size}
    return Report("autoattack", {**settings, "precision": args.precision}, tables)


def agreement(args: argparse.Namespace) -> Table:
    """Verdicts of both engines on every victim, and of ours with another seed."""
    rows = []
    for name in args.victims:
        victim = VICTIMS[name]
        model, test = trained(name, args.device), images_of(victim, args.images)
        measure.say(f"{name}: reference")
        reference = Reference(model, test, victim, args.device).attack() == test.labels
        for precision in args.precision:
            measure.say(f"{name}: ours, {precision}")
            found = [attacked(model, test, victim, precision, args, seed=seed) for seed in (0, 1)]
            rows.append({"model": f"{name}, {precision} search", **compared(found, reference)})
            measure.say(str(rows[-1]))
    return Table("Agreement with the reference", AGREEMENT, rows)


def compared(found: Sequence[Audit], reference: Tensor, attack: str = ATTACK) -> Row:
    """How our verdicts stand beside the reference's (N,) flags; `found` differ in their seed."""
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


def speed(args: argparse.Namespace) -> Table:
    """Seconds of whole evaluations in turn."""
    victim = VICTIMS[TIMED]
    model, test = trained(TIMED, args.device), images_of(victim, args.timed_images)
    with Apart(reference_calls, model, test, victim, args.device) as reference:
        cases: dict[str, Callable[[], float]] = {"reference": partial(reference, "seconds")}
        for precision in args.precision:
            call = partial(attacked, model, test, victim, precision, args)
            cases[f"ours {precision}"] = measure.clock(call, args.device)
        timings = measure.interleaved(cases, args.repeats, 0)
    fast = measure.ratios(timings, "reference")
    rows = [measure.speed_row(name, timing, fast[name], images=len(test)) for name, timing in timings.items()]
    clean = attacked(model, test, victim, "fp32", args, attacks="clean").average("clean")
    title = f"{TIMED}, width {victim.width}, {len(test)} images of which {clean:.0%} are right when clean"
    return Table(title, measure.SPEED_COLUMNS, rows)


def memory(args: argparse.Namespace) -> Table:
    """Peak of a process that audits preact-resnet18 at full width, whatever batch size is asked for."""
    command = [sys.executable, "-c", "from benchmarks.autoattack import memory_child; memory_child()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    rows: list[Row] = []
    for attacks in ("pgd-2", "apgd-ce(steps=2)", "fab-t(steps=1, targets=1)", "square(queries=2)"):
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
    from benchmarks.memory import in_use

    given: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    data = synthetic(1000)
    model = build("preact-resnet18", None).eval()
    with torch.no_grad():
        labels = torch.cat([model(part.float() / 255).argmax(1) for part in data.images.split(100)])
    asked = 100_000
    found = audit(model, replace(data, labels=labels), attacks=given["attacks"], batch_size=asked)
    taken = found.provenance["batch_size"]
    print(json.dumps({"images": len(data), "asked": asked, "taken": taken, "peak": in_use("cpu")["peak"]}))


@cache
def trained(name: str, device: str) -> nn.Module:
    """The model of one of `VICTIMS`, in eval mode; trained once a process."""
    victim = VICTIMS[name]
    measure.say(f"training {victim.model} on {victim.data}")
    data = load_dataset(victim.data).train
    data = data.subset(torch.arange(min(victim.images, len(data))))
    model = initialised(victim.model, victim.width, data, seed=0)
    options: dict[str, Any] = {"validation": 0, "select": "last", "precision": "bf16", "device": device}
    return fit(model, data, victim.objective, schedule=victim.schedule, **options).model.eval()


def images_of(victim: Victim, count: int) -> ImageDataset:
    """The first test images of the victim's data."""
    test = load_dataset(victim.data).test
    return test.subset(torch.arange(min(count, len(test))))


def attacked(
    model: nn.Module,
    test: ImageDataset,
    victim: Victim,
    precision: Any,
    args: argparse.Namespace,
    *,
    seed: int = 0,
    attacks: str = ATTACK,
) -> Audit:
    """Our audit."""
    return audit(
        model,
        test,
        attacks=attacks,
        norm=victim.norm,
        eps=victim.eps,
        precision=precision,
        batch_size=args.batch_size,
        device=args.device,
        seed=seed,
    )


class Reference:
    """`pyautoattack` on a model, as its users call it."""

    def __init__(self, model: nn.Module, test: ImageDataset, victim: Victim, device: str) -> None:
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        norm = {"linf": "Linf", "l2": "L2"}[victim.norm]
        self.model = model.to(device).eval()
        self.x, self.y = test.images.to(device).float() / 255, test.labels.to(device)
        self.engine = AutoAttack(self.model, norm=norm, eps=victim.eps, seed=0, version="standard", device=device)

    def attack(self) -> Tensor:
        """(N,) predictions after the attack, on the CPU."""
        return self.engine.run_standard_evaluation(self.x, self.y, batch_size=BATCH_SIZE)[1].cpu()


def reference_calls(model: nn.Module, test: ImageDataset, victim: Victim, device: str) -> Calls:
    """What the process of the reference does: a whole evaluation, and tell the seconds."""
    reference = Reference(model, test, victim, device)
    return {"seconds": measure.clock(reference.attack, device)}


if __name__ == "__main__":
    main()
