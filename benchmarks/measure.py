"""How the benchmarks measure and report: interleaved timings, counted FLOPs, the machine, tables as markdown and JSON.

Cost model. FLOPs of one forward pass are counted once per model; a multiply-add is two, and convolutions and matrix
products are all that counts. A pass with the gradient of its input costs twice the forward pass, one with the gradients
of input and weights three times. So K attack steps and a training step on B images are (2 K + 3) forward passes,
whoever computes them: a loop that does more work than that is slower, it does not achieve more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from string import Formatter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustfair.errors import RobustFairError
from robustfair.execution.device import has_bf16
from robustfair.files import write_json
from robustfair.runs.folder import environment

SCHEMA = "robustfair.benchmark/1"
ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


# Timing


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of one case."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle repeat.

        >>> Timing((3.0, 1.0, 9.0)).median
        3.0
        """
        return median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest repeat."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest repeat."""
        return max(self.seconds)


def interleaved(cases: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time all cases in turn, again and again, so that a slow minute of the machine falls on all alike.

    Args:
        cases: name -> what runs the case once and returns its seconds, as `clock` makes it.
        repeats: measured turns.
        warmup: turns before them that are not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        say(f"  turn {turn + 1} of {warmup + repeats}{' (warm-up)' if turn < warmup else ''}")
        for name, case in cases.items():
            taken = case()
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def clock(
    call: Callable[[], object],
    device: torch.device | str = "cpu",
    *,
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
    settle: Callable[[], object] | None = None,
) -> Callable[[], float]:
    """A case for `interleaved`: the seconds of one call.

    Args:
        device: waited for before and after the call.
        scope: makes what is entered before the call and left after it, outside the timing.
        settle: called between scope and timing, so that a case meets its own caches and memory and not what its
            neighbour has left.
    """

    def once() -> float:
        with scope():
            if settle is not None:
                settle()
            return timed(call, device)

    return once


def timed(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device | str) -> None:
    """Wait until a CUDA device has done all it was given; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def ratios(timings: Mapping[str, Timing], baseline: str) -> dict[str, float]:
    """How many times as fast as `baseline` each case is: ratio of the medians.

    >>> ratios({"slow": Timing((4.0, 8.0, 6.0)), "fast": Timing((2.0, 1.0, 3.0))}, "slow")
    {'slow': 1.0, 'fast': 3.0}
    """
    return {name: timings[baseline].median / timing.median for name, timing in timings.items()}


# FLOPs


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass on `x` (B, C, H, W), counted while it runs.

    >>> forward_flops(nn.Linear(3, 2), torch.ones(4, 3))
    48
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def attack_flops(forward: int, steps: int) -> int:
    """FLOPs of an attack of `steps` gradient steps: two forward passes a step."""
    return 2 * steps * forward


def training_flops(forward: int, steps: int) -> int:
    """FLOPs of a step of adversarial training: the attack, and three forward passes for the weights' gradients."""
    return attack_flops(forward, steps) + 3 * forward


def matmul_peaks(device: torch.device | str, *, size: int = 8192, repeats: int = 20) -> dict[str, float]:
    """TFLOP/s that products of two random square matrices reach, by precision; empty on a CPU.

    "fp32" is measured with tf32 where the convolutions run in tf32 too, as cuDNN's do by default: it is the peak that a
    float32 network is up against under the settings in force.
    """
    if torch.device(device).type != "cuda":
        return {}
    with products_in(_convolution_precision()):
        return {
            "fp32": matmul_tflops(device, torch.float32, size=size, repeats=repeats),
            "bf16": matmul_tflops(device, torch.bfloat16, size=size, repeats=repeats),
        }


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """float32 products of a GPU's matrices in "tf32" or "ieee"; restored on leaving.

    Through torch's older switch, which sets the newer one too: where only that was set to tf32, torch refuses to read
    the older one, and some of it does.
    """
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def matmul_tflops(device: torch.device | str, dtype: torch.dtype, *, size: int, repeats: int) -> float:
    """Median TFLOP/s of `repeats` products of two random (size, size) matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    taken = [timed(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats)]
    return 2 * size**3 / median(taken) / 1e12


def speed_row(
    name: str, timing: Timing, ratio: float | None, *, images: int, flops: int | None = None, peak: float | None = None
) -> Row:
    """One line of a speed table as JSON values.

    Args:
        ratio: times as fast as the baseline; None where it could not be had.
        images: how many one call handles.
        flops: that one call needs by the cost model; None where it is not comparable.
        peak: measured TFLOP/s of the matrix product in this precision; None leaves the fraction of it open.
    """
    tflops = None if flops is None else flops / timing.median / 1e12
    return {
        "case": name,
        "median": timing.median,
        "low": timing.low,
        "high": timing.high,
        "seconds": list(timing.seconds),
        "ratio": ratio,
        "images_per_second": images / timing.median,
        "tflops": tflops,
        "mfu": None if tflops is None or peak is None else tflops / peak,
    }


SPEED_COLUMNS = {
    "case": "{case}",
    "seconds": "{median:.4f}",
    "fastest to slowest": "{low:.4f} to {high:.4f}",
    "times as fast": "{ratio:.2f}",
    "images/s": "{images_per_second:,.0f}",
    "TFLOP/s": "{tflops:.3g}",
    "MFU": "{mfu:.3f}",
}
"""Heading -> cell of the rows that `speed_row` makes."""


# Machine


def machine() -> dict[str, Any]:
    """What the numbers depend on, as JSON values; nothing that names the host or its folders."""
    known = environment()
    found: dict[str, Any] = {
        "cpu": known["hardware"]["cpu"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": _bf16_instructions(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn_instructions": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "python": known["versions"]["python"],
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["float32_convolutions"] = _convolution_precision()
    return found


def _convolution_precision() -> str:
    """How cuDNN rounds float32 convolutions: "tf32" unless switched off."""
    return str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


def _bf16_instructions() -> list[str]:
    """Instruction sets for bf16 arithmetic that the CPU has, where the system tells."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(errors="replace").split()) if info.exists() else set()
    return sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def commit() -> str:
    """Short hash of the checkout, with "+" where tracked files were changed; "unknown" outside a checkout.

    A copy without its history is told by the environment variable ROBUSTFAIR_COMMIT.
    """
    told = os.environ.get("ROBUSTFAIR_COMMIT")
    if told:
        return told
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Report


@dataclass(frozen=True)
class Table:
    """Rows of JSON values, and how they print.

    Attributes:
        title: what was measured.
        columns: heading -> cell, a format string over the keys of a row. A cell whose values are missing or None prints
            as "-"; a column without any value is left out unless `whole`.
        rows: one mapping a line; may hold more than is printed.

    >>> table = Table("", {"case": "{case}", "s": "{seconds:.1f}"}, [{"case": "a", "seconds": 2}, {"case": "b"}])
    >>> print(table.markdown())
    | case |   s |
    | ---- | --- |
    | a    | 2.0 |
    | b    |   - |
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    whole: bool = False

    def markdown(self) -> str:
        """The table as aligned markdown: text to the left, everything else to the right."""
        lines = []
        for heading, form in self.columns.items():
            cells = [_cell(form, row) for row in self.rows]
            if self.whole or any(cell != "-" for cell in cells):
                width = max(len(cell) for cell in (heading, *cells))
                align = str.ljust if heading == next(iter(self.columns)) else str.rjust
                lines.append([align(heading, width), "-" * width, *(align(cell, width) for cell in cells)])
        return "\n".join("| " + " | ".join(line) + " |" for line in zip(*lines, strict=True))


def _cell(form: str, row: Row) -> str:
    names = [name for _, name, _, _ in Formatter().parse(form) if name]
    return "-" if any(row.get(name) is None for name in names) else form.format(**row)


@dataclass(frozen=True)
class Report:
    """What one script measured.

    Attributes:
        name: of the script.
        settings: what it ran on, as JSON values.
        tables: the numbers.
        notes: sentences without which the numbers would mislead.
        where: the machine.
    """

    name: str
    settings: Mapping[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    where: Mapping[str, Any] = field(default_factory=machine)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: environment()["date"])

    def text(self) -> str:
        """Markdown: the machine, the settings, the tables, the notes."""
        parts = [f"# {self.name}", _inline(self.where), _inline(self.settings), f"commit {self.commit}, {self.date}"]
        for table in self.tables:
            parts += [f"## {table.title}", table.markdown()]
        return "\n\n".join([*parts, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values, the repeats of every case included."""
        tables = [{"title": table.title, "rows": list(table.rows)} for table in self.tables]
        return {"schema": SCHEMA, **asdict(self), "tables": tables}


def _inline(values: Mapping[str, Any]) -> str:
    """`{"cpu": "x", "bf16": ["a", "b"]}` is "cpu x, bf16 a b"; what is None or empty is left out."""
    words = {key: value if isinstance(value, list | tuple) else [value] for key, value in values.items()}
    shown = {key: [str(word) for word in found if word is not None] for key, found in words.items()}
    return ", ".join(f"{key.replace('_', ' ')} {' '.join(found)}" for key, found in shown.items() if found)


# Command line


def parser(
    name: str,
    description: str,
    *,
    batch_size: int | tuple[int, ...],
    precision: str | tuple[str, ...],
    precisions: Sequence[str] = ("fp32", "bf16"),
    model: str = "preact-resnet18",
    width: int | None = None,
    repeats: int = 5,
) -> argparse.ArgumentParser:
    """The options that all scripts share, with a script's own defaults; a tuple lets an option take several values."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {"nargs": "+"}
    on = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=on, help="cpu or cuda")
    made.add_argument(
        "--precision",
        default=precision,
        choices=precisions,
        help="of our passes",
        **(several if isinstance(precision, tuple) else {}),  # type: ignore[arg-type]
    )
    made.add_argument("--model", default=model, help="name of a network, as in robustfair list models")
    made.add_argument("--width", type=_positive, default=width, help="of the network; None is the published one")
    made.add_argument(
        "--batch-size",
        type=_positive,
        default=batch_size,
        help="images per step",
        **(several if isinstance(batch_size, tuple) else {}),  # type: ignore[arg-type]
    )
    made.add_argument("--repeats", type=_positive, default=repeats, help="measured turns; medians are reported")
    made.add_argument("--threads", type=_positive, default=2, help="of the CPU")
    made.add_argument("--json", type=Path, metavar="PATH", help="write the report here too")
    made.add_argument("--force", action="store_true", help="let --json replace a file")
    return made


def add_compile(options: argparse.ArgumentParser) -> None:
    """`--no-compile`, for scripts that measure our path both ways."""
    options.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave out what torch.compile makes"
    )


def settings(args: argparse.Namespace, peaks: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The settings that every report names."""
    measured = [f"{name} {value:.0f}" for name, value in (peaks or {}).items()]
    return {"model": args.model, "width": args.width, "device": args.device, "matmul_tflops": measured}


def run(
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Report],
    argv: Sequence[str] | None = None,
) -> Report:
    """Read the command line, measure, print the report, write it. Wrong use ends with one line and exit code 2."""
    args = options.parse_args(argv)
    if args.json is not None and args.json.exists() and not args.force:
        options.error(f"--json {args.json} exists: name another file, or add --force to replace it")
    if args.json is not None and not args.json.parent.is_dir():
        options.error(f"--json {args.json}: {args.json.parent} is no folder")
    check_device(options, args.device)
    check_precision(options, args)
    torch.set_num_threads(args.threads)
    try:
        report = measure(args)
    except RobustFairError as error:
        options.error(str(error))
    print(report.text())
    if args.json is not None:
        write_json(args.json, report.as_json())
    return report


def check_device(options: argparse.ArgumentParser, name: str) -> None:
    """End with one line and exit code 2 where torch knows no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        options.error(f"--device {name}: {str(error).splitlines()[0]}")


def check_precision(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave bf16 out where the device has no instructions for it; where nothing is left, end with exit code 2."""
    given = getattr(args, "precision", ())  # some scripts have no passes of ours
    asked = [given] if isinstance(given, str) else given
    if "bf16" not in asked or has_bf16(torch.device(args.device)):
        return
    left = [precision for precision in asked if precision != "bf16"]
    if not left:
        options.error(f"--precision bf16: {args.device} has no bf16 instructions here: give fp32")
    say(f"--precision: bf16 is left out, {args.device} has no bf16 instructions here")
    args.precision = left


def say(text: str) -> None:
    """Tell on stderr how far a measurement is."""
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
