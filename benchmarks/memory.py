"""How much memory training takes: after each of many epochs, and for growing numbers of images.

Every run is a process of its own. Sizes are in MiB: what is resident at the time and the most that ever was, as Linux
counts them (VmRSS, VmHWM), and on CUDA the most that torch has allocated on the device. The images are held as uint8
and are part of it. The attack takes one step, since more steps need no more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import ROOT, Report, Row, Table
from benchmarks.workload import CHEAP, LR, build, synthetic
from robustfair.objectives import PGDAT
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState

MIB = 2**20
KINDS = {"resident": "VmRSS", "peak": "VmHWM"}
COLUMNS = {"resident": "{resident:.1f}", "peak": "{peak:.1f}", "peak on the device": "{device:.1f}"}


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = measure.parser("memory", __doc__, batch_size=64, precision="fp32", width=16, repeats=1)
    options.add_argument("--compile", action="store_true", help="compile our passes")
    options.add_argument("--epochs", type=int, default=12, help="of the run that is watched epoch by epoch")
    options.add_argument("--images", type=int, default=640, help="of that run")
    options.add_argument("--sizes", type=int, nargs="+", default=(2000, 10_000, 50_000), help="images of other runs")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A table over epochs, and one over images."""
    build(args.model, args.width)  # an unknown network is refused here and not in another process
    measure.say(f"{args.epochs} epochs on {args.images} images")
    watched = _medians([run_apart(args, args.model, args.width, args.images, args.epochs) for _ in range(args.repeats)])
    epochs = [{"epoch": epoch, **row} for epoch, row in enumerate(watched, 1)]
    images: list[Row] = []
    for size in args.sizes:
        measure.say(f"{size} images")
        last = _medians([run_apart(args, *CHEAP, size, 1) for _ in range(args.repeats)])[-1]
        images.append({"images": size, "pixels": size * 3 * 32 * 32 / MIB, **last})
    shown = {"batch_size": args.batch_size, "precision": args.precision, "compiled": args.compile}
    return Report(
        name="memory",
        settings={**measure.settings(args), **shown},
        tables=[
            Table(f"After each epoch on {args.images} images, MiB", {"epoch": "{epoch}", **COLUMNS}, epochs),
            Table(
                f"After one epoch of {CHEAP[0]} of width {CHEAP[1]}, MiB",
                {"images": "{images:,}", "their pixels": "{pixels:.1f}", **COLUMNS},
                images,
            ),
        ],
        notes=_growth(epochs),
    )


def run_apart(args: argparse.Namespace, model: str, width: int | None, images: int, epochs: int) -> list[Row]:
    """Memory after each epoch of one run of `fit`, in a process of its own."""
    settings = {"model": model, "width": width, "images": images, "epochs": epochs}
    shared = {name: getattr(args, name) for name in ("device", "precision", "compile", "batch_size", "threads")}
    command = [sys.executable, "-c", "from benchmarks.memory import child; child()", json.dumps(settings | shared)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # also where the package is not installed
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def child() -> None:
    """Train as the command line says and print the memory after each epoch as JSON."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    rows: list[Row] = []

    def at_boundary(state: TrainState) -> None:
        rows.append(in_use(settings["device"]))

    fit(
        build(settings["model"], settings["width"]),
        synthetic(settings["images"]),
        PGDAT(steps=1),
        schedule=Schedule(epochs=settings["epochs"], lr=LR, kind="constant", batch_size=settings["batch_size"]),
        validation=0,
        select="last",
        precision=settings["precision"],
        compile=settings["compile"],
        device=settings["device"],
        save=at_boundary,
    )
    print(json.dumps(rows))


def in_use(device: str) -> Row:
    """MiB of this process by kind; None for what the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    told = {name: value for name, _, value in (line.partition(":") for line in lines)}
    found: Row = {kind: int(told[key].split()[0]) / 1024 if key in told else None for kind, key in KINDS.items()}
    on_cuda = torch.device(device).type == "cuda"
    return {**found, "device": torch.cuda.max_memory_allocated(device) / MIB if on_cuda else None}


def _medians(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Epoch by epoch the median over runs of every kind."""

    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return [{kind: middle([row[kind] for row in rows]) for kind in rows[0]} for rows in zip(*runs, strict=True)]


def _growth(epochs: Sequence[Row]) -> list[str]:
    """How far the resident memory after the last epoch lies from that after the second."""
    if len(epochs) < 3 or epochs[1]["resident"] is None:
        return []
    grown = epochs[-1]["resident"] - epochs[1]["resident"]
    return [f"Resident memory from epoch 2 to epoch {len(epochs)}: {grown:+.1f} MiB."]


if __name__ == "__main__":
    main()
