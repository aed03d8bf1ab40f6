"""Steps of PGD-10 adversarial training in every way there is to run them on a GPU, in turn, beside the naive loop.

    eager              operator by operator
    replayed           the same attack as one CUDA graph, the training pass eager
    compiled           attack step and training pass compiled
    compiled, replayed and the compiled attack as one CUDA graph: what `fit` does under `compile`
    reduce-overhead    compiled in torch's mode of that name, which makes graphs of its own, one a step of the attack

float32 is "fp32" without tf32 and "tf32" with it; the naive loop has torch's defaults, and a process of its own. A way
that does not run here has an empty line that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.apart import Apart
from benchmarks.gpu.passes import float32_as
from benchmarks.measure import SPEED_COLUMNS, Row, Table
from benchmarks.naive import STEPS
from benchmarks.train_step import naive_calls
from benchmarks.workload import Step, as_in_fit, build, one_batch
from robustfair.attacks.pgd import StepInputs, ascend, functional_step
from robustfair.config import Precision
from robustfair.objectives import PGDAT
from robustfair.training.capture import CapturedAscent
from robustfair.training.engine import _logits, _own_copy
from robustfair.values import Model

EAGER, REPLAYED, COMPILED, BOTH = "eager", "replayed", "compiled", "compiled, replayed"
REDUCED = "reduce-overhead"
COLUMNS = {**SPEED_COLUMNS, "why not": "{why}"}


@dataclass(frozen=True)
class Case:
    """One way: "fp32", "tf32" or "bf16", and how it is run."""

    precision: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.precision} {self.mode}"


FIRST = (
    Case("bf16", BOTH),
    Case("bf16", EAGER),
    Case("bf16", REPLAYED),
    Case("bf16", COMPILED),
    Case("tf32", EAGER),
    Case("fp32", EAGER),
    Case("bf16", REDUCED),
    Case("tf32", BOTH),
)
"""In order of use where time is short: compiling is what takes it."""
SHORT = (Case("bf16", BOTH), Case("bf16", EAGER), Case("bf16", REPLAYED))
SMALL = (Case("bf16", EAGER), Case("tf32", EAGER), Case("fp32", EAGER))


def compared(
    model: str,
    width: int | None,
    size: int,
    cases: Sequence[Case],
    device: str,
    *,
    repeats: int,
    deadline: float,
) -> Table:
    """A line a way, the naive loop first, all in turn.

    Args:
        size: images a batch.
        deadline: of `time.monotonic()`, after which no further way is prepared.
    """
    network, batch = build(model, width, device=device), one_batch(size, device)
    peaks = measure.matmul_peaks(device)
    ready: dict[str, Callable[[], float]] = {}
    why: dict[str, str] = {}
    with Apart(naive_calls, model, width, size, device) as naive:
        naive("step")
        ready["naive"] = partial(naive, "seconds")
        for case in cases:
            if time.monotonic() > deadline:
                why[case.name] = "no time was left"
                continue
            measure.say(f"{model}, {size} images: first steps of {case.name}")
            try:
                step = step_of(case, network, size, device)
                scope = partial(as_asked, case, device)
                with scope():
                    for _ in range(3):  # compiles, records, and replays once
                        step(batch)
                    measure.synchronize(device)
                ready[case.name] = measure.clock(partial(step, batch), device, scope=scope)
            except Exception as error:  # a compiler may fail in many ways, and the others are to be measured
                why[case.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        timings = measure.interleaved(ready, repeats)
    flops = measure.training_flops(measure.forward_flops(network, batch.x[:1]), STEPS) * size
    fast = measure.ratios(timings, "naive")
    rows: list[Row] = []
    for name in ("naive", *(case.name for case in cases)):
        if name in timings:
            peak = peaks.get("bf16" if name.startswith("bf16") else "fp32")
            rows.append(measure.speed_row(name, timings[name], fast[name], images=size, flops=flops, peak=peak))
        else:
            rows.append({"case": name, "why": why[name]})
    shown = "its own width" if width is None else f"width {width}"
    return Table(f"One step on {size} images, {model} of {shown}", COLUMNS, rows)


def step_of(case: Case, network: torch.nn.Module, size: int, device: str) -> Step:
    """The step of a way, on a copy of the network."""
    precision: Precision = "bf16" if case.precision == "bf16" else "fp32"
    compiled = case.mode in (COMPILED, BOTH)
    step = Step(network, PGDAT(), precision=precision, compile=compiled, device=device, batch_size=size)
    engine = step.engine
    if case.mode == COMPILED and isinstance(engine._ascent, CapturedAscent):
        engine._ascent = engine._ascent.ascent
    if case.mode == REPLAYED:
        engine._ascent = CapturedAscent(ascend, engine.model)
    if case.mode == REDUCED:
        engine._compiled = torch.compile(_own_copy(_logits), dynamic=False, mode=REDUCED)
        engine._ascent = partial(ascend, step=reduced_step())
    return step


def reduced_step() -> Callable[[Model, Tensor, StepInputs], tuple[Tensor, Tensor, Tensor]]:
    """A gradient step in torch's own mode; its results are copied, since the next step writes over them."""
    compiled = torch.compile(_own_copy(functional_step), dynamic=False, mode=REDUCED)

    def step(model: Model, x_adv: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        moved, value, logits = compiled(model, x_adv, inputs)
        return moved.clone(), value.clone(), logits.clone()

    return step


@contextmanager
def as_asked(case: Case, device: str) -> Iterator[None]:
    """The scope in which a way runs: as in `fit`, products of float32 in the precision of the way."""
    precision = {"tf32": "tf32", "fp32": "ieee"}.get(case.precision)
    with as_in_fit(device), nullcontext() if precision is None else float32_as(precision):
        yield
