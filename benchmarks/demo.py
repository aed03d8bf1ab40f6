"""Does the demo tell one story on every machine? `robustfair demo` with other instructions, threads and seeds.

Rounding differs between processors, and adversarial training turns the last bit of a gradient into another run. So a
processor is simulated by keeping the libraries from its newer instructions, and every line is a process of its own.
What the documentation says of the demo must hold in every line of the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Report, Row, Table, machine, say
from robustfair.cli.demo import run_demo
from robustfair.evaluate.compare import compare
from robustfair.evaluate.find import comparable_audits
from robustfair.evaluate.result import ROBUST
from robustfair.files import write_json, write_text
from robustfair.grammar import format_eps
from robustfair.runs.recipe import read_recipe

PROCESSORS = {
    "as it is": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""Name -> what keeps oneDNN, ATen and MKL from newer instructions."""
COLUMNS = {
    "processor, threads, seed": "{processor}, {threads}, {seed}",
    "norms before": "{ratio:.2f}",
    "average": "{average_before:.1f} -> {average_after:.1f}{average_mark}",
    "worst class": "{worst_before:.1f} -> {worst_after:.1f}{worst_mark}",
    "change, 95 %": "[{worst_lower:+.1f}, {worst_upper:+.1f}]",
    "worst is": "{class_before} -> {class_after}",
    "seconds": "{seconds:.0f}",
}
NOTE = (
    "Percent right before -> after hwnwb. † more than chance: an exact McNemar test for the average, for the worst "
    "class a bootstrap interval without zero. norms: largest row of the head over smallest."
)


def main(argv: Sequence[str] | None = None) -> Report | None:
    """Run the demo in every way, print the report, and write it after every run."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--processors", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    options.add_argument("--epochs", type=int, help="other than the recipe's")
    options.add_argument("--out", type=Path, default=ROOT / "results" / "demo.md", help="the report; beside it as JSON")
    options.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.answer:
        print(json.dumps(measured(args.seeds[0], args.epochs)))
        return None
    lines: list[Row] = []
    for threads in args.threads:
        for processor in args.processors:
            for seed in args.seeds:
                lines += _apart(processor, threads, seed, args.epochs)
                whole = report(lines)
                write_text(args.out, whole.text() + "\n")
                write_json(args.out.with_suffix(".json"), whole.as_json())
    print(whole.text())
    return whole


def measured(seed: int, epochs: int | None) -> list[Row]:
    """The demo in this process: a line an attack, rates and changes in percent."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for _ in run_demo(Path(folder), seed, epochs, quiet=True):
            pass
        (_, before), (_, after) = comparable_audits([f"{folder}/trained", f"{folder}/repaired"])
    seconds = time.monotonic() - began
    lines = []
    for entry in compare(before, after).attacks:
        average, worst = entry.average, entry.worst
        lines.append(
            {
                "attack": entry.attack,
                "seed": seed,
                "ratio": before.head_norm_ratio,
                "average_before": 100 * average.difference.before,
                "average_after": 100 * average.difference.after,
                "average_mark": "†" if average.significant else "",
                "worst_before": 100 * worst.before,
                "worst_after": 100 * worst.after,
                "worst_lower": 100 * worst.lower,
                "worst_upper": 100 * worst.upper,
                "worst_mark": "†" if worst.sure else "",
                "class_before": entry.worst_before.words,
                "class_after": entry.worst_after.words,
                "seconds": seconds,
            }
        )
    return lines


def report(lines: Sequence[Row]) -> Report:
    """A table an attack, robust among them: right under all attacks."""
    recipe = read_recipe("demo", {})
    tables = [
        Table(_title(attack, _of(lines, attack)), COLUMNS, _of(lines, attack))
        for attack in dict.fromkeys(line["attack"] for line in lines)
    ]
    about: dict[str, Any] = {"train": recipe.train, "eps": format_eps(recipe.eps or 0), "epochs": recipe.epochs}
    where = {key: value for key, value in machine().items() if key != "threads"}
    return Report(name="demo", settings=about, tables=tables, notes=[NOTE], where=where)


def _of(lines: Sequence[Row], attack: str) -> list[Row]:
    return [line for line in lines if line["attack"] == attack]


def _title(attack: str, lines: Sequence[Row]) -> str:
    """The attack, and in how many lines average and worst class gain or lose."""
    counts = []
    for what in ("worst", "average"):
        changes = [line[f"{what}_after"] - line[f"{what}_before"] for line in lines]
        counts.append(f"{what} up in {sum(c > 0 for c in changes)}, down in {sum(c < 0 for c in changes)}")
    return f"{'right under all' if attack == ROBUST else attack}: of {len(lines)} runs {'; '.join(counts)}"


def _apart(processor: str, threads: int, seed: int, epochs: int | None) -> list[Row]:
    """The lines of one run, from a process with that processor's instructions and so many threads."""
    more = [] if epochs is None else ["--epochs", str(epochs)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--answer", "--seeds", str(seed), *more],
        cwd=ROOT,
        env={
            **os.environ,
            **PROCESSORS[processor],
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",  # a thread that waits leaves its core to others
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [{"processor": processor, "threads": threads, **line} for line in json.loads(done.stdout)]
    was, now = (lines[-1][f"worst_{when}"] for when in ("before", "after"))
    say(f"{processor}, {threads} threads, seed {seed}: worst class {was:.1f} -> {now:.1f}")
    return lines


if __name__ == "__main__":
    main()
