"""In which precision a run executes and whether it is compiled: as it was asked, or by a few timed passes.

A pass is the forward pass and the gradient of the images in eval mode: an attack makes one a step, and a training pass
is taken for one and a half. Timing reads no random stream of the run and leaves its model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from robustfair.config import Auto, Precision
from robustfair.execution.device import has_bf16
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import numerics
from robustfair.objectives.at import PGDAT
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.training.engine import Engine, require_compiler, require_pure
from robustfair.values import Batch

TIMED_SECONDS = 0.3
"""For how long passes of a kind are timed; one at least, after one that is not."""
WORTH_ROUNDING = 0.9
"""Share of the seconds of a float32 pass up to which one in bf16 is taken."""
TRAINING_PASS = 1.5
"""Passes that a training pass costs."""
COMPILING, SAVED = 60.0, 0.15
"""Seconds that compiling is taken to cost, and the share of a run that it may save, before it was tried."""

MakeEngine = Callable[[Precision, bool], Engine]
"""(precision, compile) -> an engine of the run."""


@dataclass(frozen=True)
class Way:
    """How a run executes.

    Attributes:
        precision: of forward and backward passes.
        compile: whether attack and training pass are compiled.
        why: one line on what was chosen and the seconds that were measured; empty where nothing was left to choose.
    """

    precision: Precision
    compile: bool
    why: str = ""


def choose_way(
    make: MakeEngine,
    batch: Batch,
    objective: Objective,
    *,
    precision: Precision | Auto,
    compile: bool | Auto,
    steps: int,
) -> tuple[Way, Engine]:
    """The way that a run takes, and the engine that goes it.

    Passes are timed for a second or two. Compiling is tried only where the run is so long that it may pay back, and
    costs what it costs; what was compiled is kept where it is taken.

    Args:
        batch: images of the run, as many as a step takes, on its device.
        precision, compile: as asked for; what is "auto" is chosen.
        steps: how many the run has ahead.

    Raises:
        ConfigError: compiling is asked for, and cannot be done on this machine.
    """
    device = batch.x.device
    said = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        kept_memory(device),
        numerics(deterministic=False),
    ):
        if precision == "auto":
            precision, why = _faster_precision(make, batch)
            said.append(f"precision auto is {precision}: {why}")
        if compile != "auto":
            return Way(precision, compile, "; ".join(said)), make(precision, compile)
        attack_steps = objective.steps if isinstance(objective, AdversarialObjective) else 0
        engine, why = _worth_compiling(partial(make, precision), batch, steps, attack_steps + TRAINING_PASS)
        said.append(f"compile auto is {str(engine.compiled).lower()}: {why}")
        return Way(precision, engine.compiled, "; ".join(said)), engine


def _faster_precision(make: MakeEngine, batch: Batch) -> tuple[Precision, str]:
    """fp32 or bf16, and why."""
    if not has_bf16(batch.x.device):
        return "fp32", "no bf16 instructions here"
    full, half = _seconds([make("fp32", False), make("bf16", False)], batch)
    chosen: Precision = "bf16" if half < WORTH_ROUNDING * full else "fp32"
    return chosen, f"a pass over {len(batch.y)} images takes {full:.3g} s in fp32, {half:.3g} s in bf16"


def _worth_compiling(make: Callable[[bool], Engine], batch: Batch, steps: int, passes: float) -> tuple[Engine, str]:
    """The engine that ends a run of so many steps, each of `passes`, earlier, and why."""
    plain = make(False)
    (before,) = _seconds([plain], batch)
    ahead = f"{steps} steps take about {steps * passes * before:.3g} s uncompiled"
    if steps * passes * before * SAVED < COMPILING:
        return plain, f"{ahead}, too few to pay back compiling"
    try:
        require_compiler(batch.x.device.type)
        require_pure(plain.model, batch.x[:2])
        compiled = make(True)
        started = time.perf_counter()
        _pass(compiled, batch)
        compiling = time.perf_counter() - started
        before, after = _seconds([plain, compiled], batch)
    except Exception as error:  # a compiler may raise anything
        reason = str(error).strip().split("\n")[0]
        return plain, f"it cannot be done here ({reason})"
    pays = steps * passes * (before - after) > compiling  # the training pass is still to be compiled, at such a price
    told = f"{ahead}, a pass {before:.3g} s and compiled {after:.3g} s, compiling it {compiling:.0f} s"
    return (compiled if pays else plain), told


def _seconds(engines: Sequence[Engine], batch: Batch) -> list[float]:
    """Seconds of the fastest pass of every engine; they take turns."""
    for engine in engines:
        _pass(engine, batch)
    found = [[_pass(engine, batch)] for engine in engines]
    while sum(map(sum, found)) < TIMED_SECONDS * len(engines):
        for engine, taken in zip(engines, found, strict=True):
            taken.append(_pass(engine, batch))
    return [min(taken) for taken in found]


def _pass(engine: Engine, batch: Batch) -> float:
    """Seconds of one pass."""
    attack = replace(PGDAT(steps=1).attack(batch), mode="eval")
    started = time.perf_counter()
    engine.attack(batch, attack, stream="timing").sum().item()  # waits for the device
    return time.perf_counter() - started
