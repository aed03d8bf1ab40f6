"""In which precision a run executes and whether it is compiled: as it was asked, or by a few timed passes.

A pass is the forward pass and the gradient of the images: an attack makes one a step, and a training pass is taken for
one and a half. Where attacks run on kernels of our own, passes on torch's layers are timed beside theirs. Timing reads
no random stream of the run and leaves its model as it was.
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
from robustfair.values import Batch, Mode

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
        why: one line on what was chosen and the seconds that were measured, and on what cannot be had here; empty where
            nothing was left to choose.
        kernels: whether attacks in eval mode run on kernels of our own.
    """

    precision: Precision
    compile: bool
    why: str = ""
    kernels: bool = False


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
    attack_steps = objective.steps if isinstance(objective, AdversarialObjective) else 0
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        kept_memory(device),
        numerics(deterministic=False),
    ):
        if precision == "auto":
            precision, why = _faster_precision(make, batch, attack_steps)
            said.append(f"precision auto is {precision}: {why}")
        if compile == "auto":
            engine, why = _worth_compiling(partial(make, precision), batch, steps, attack_steps)
            said.append(f"compile auto is {str(engine.compiled).lower()}: {why}")
        else:
            engine = make(precision, compile)
        return Way(precision, engine.compiled, "; ".join(said), engine.program is not None), engine


def _faster_precision(make: MakeEngine, batch: Batch, attack_steps: int) -> tuple[Precision, str]:
    """fp32 or bf16, and why; a pass is the mean over those of a step."""
    if not has_bf16(batch.x.device):
        return "fp32", "no bf16 instructions here"
    engines = [make("fp32", False), make("bf16", False)]
    full, half = _seconds(engines, batch)
    if engines[0].program is not None:
        share = attack_steps / (attack_steps + TRAINING_PASS)
        others = _seconds(engines, batch, "train_frozen")
        full, half = (share * one + (1 - share) * other for one, other in zip((full, half), others, strict=True))
    chosen: Precision = "bf16" if half < WORTH_ROUNDING * full else "fp32"
    return chosen, f"a pass over {len(batch.y)} images takes {full:.3g} s in fp32, {half:.3g} s in bf16"


def _worth_compiling(make: Callable[[bool], Engine], batch: Batch, steps: int, attack_steps: int) -> tuple[Engine, str]:
    """The engine that ends a run of so many steps earlier, and why. What runs on kernels of our own is not compiled."""
    plain = make(False)
    passes, on_kernels = attack_steps + TRAINING_PASS, 0.0
    mode: Mode = "eval"
    if plain.program is not None:
        passes, on_kernels = TRAINING_PASS, attack_steps * _seconds([plain], batch)[0]
        mode = "train_frozen"
    (before,) = _seconds([plain], batch, mode)
    ahead = f"{steps} steps take about {steps * passes * before + steps * on_kernels:.3g} s uncompiled"
    if steps * passes * before * SAVED < COMPILING:
        return plain, f"{ahead}, too few to pay back compiling"
    try:
        require_compiler(batch.x.device.type)
        require_pure(plain.model, batch.x[:2])
        compiled = make(True)
        started = time.perf_counter()
        _pass(compiled, batch, mode)
        compiling = time.perf_counter() - started
        before, after = _seconds([plain, compiled], batch, mode)
    except Exception as error:  # a compiler may raise anything
        reason = str(error).strip().split("\n")[0]
        return plain, f"it cannot be done here ({reason})"
    pays = steps * passes * (before - after) > compiling  # the training pass is still to be compiled, at such a price
    told = f"{ahead}, a pass {before:.3g} s and compiled {after:.3g} s, compiling it {compiling:.0f} s"
    return (compiled if pays else plain), told


def _seconds(engines: Sequence[Engine], batch: Batch, mode: Mode = "eval") -> list[float]:
    """Seconds of the fastest pass of every engine; they take turns."""
    for engine in engines:
        _pass(engine, batch, mode)
    found = [[_pass(engine, batch, mode)] for engine in engines]
    while sum(map(sum, found)) < TIMED_SECONDS * len(engines):
        for engine, taken in zip(engines, found, strict=True):
            taken.append(_pass(engine, batch, mode))
    return [min(taken) for taken in found]


def _pass(engine: Engine, batch: Batch, mode: Mode) -> float:
    """Seconds of one pass. One on kernels reads the weights anew, which a run does once an attack."""
    attack = replace(PGDAT(steps=1).attack(batch), mode=mode)
    started = time.perf_counter()
    engine.attack(batch, attack, stream="timing").sum().item()  # waits for the device
    return time.perf_counter() - started
