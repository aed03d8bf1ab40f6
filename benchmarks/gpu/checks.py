"""Is what the library computes on a device right? Checks, each against a reference, with a tolerance that is derived.

The reference is the CPU in float64, or what must be equal bit for bit. A tolerance is `FACTOR` times what rounding does
on the CPU to the very numbers that are compared: measured as the distance between float64 and the precision in question
(tf32 is emulated: inputs and weights of every product rounded to ten bits), or between float64 and the same with all
weights moved by one rounding. A wrong radius, class, mode or weight is off by a few percent or more, mostly a thousand
times as much. What is rounded coarsely is compared on a network without kinks: the gradient of a ReLU jumps where its
input is near zero. Verdicts of AutoAttack may differ on twice as many images as two seeds do, and one more.

Random starts are drawn on the CPU on both sides, since devices have other streams. `small` shrinks all sizes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from benchmarks.gpu.check import (
    Check,
    Setting,
)
from benchmarks.gpu.passes import attacks, compiled_step, passes, replays
from benchmarks.gpu.training import images, objectives, resumes, runs, waits
from benchmarks.gpu.verdicts import members, predictions
from benchmarks.measure import Row

COLUMNS = {
    "check": "{check}",
    "against": "{against}",
    "difference": "{difference:.1e}",
    "tolerance": "{tolerance:.1e}",
    "passes": "{passes}",
    "failed": "{error}",
}


def all_checks(setting: Setting) -> list[Row]:
    """Lines of all checks; a group that fails to run has one that says so, with its traceback."""
    rows: list[Row] = []
    for name, group in GROUPS.items():
        try:
            rows += [check.row() for check in group(setting)]
        except Exception as error:
            line = str(error).strip().split("\n")[0]
            told = f"{type(error).__name__}: {line}"
            rows.append({"check": name, "passes": "NO", "error": told, "traceback": traceback.format_exc()})
    return rows


def failed(rows: Sequence[Row]) -> list[str]:
    """Names of the checks that do not pass."""
    return [row["check"] for row in rows if row["passes"] != "yes"]


GROUPS: dict[str, Callable[[Setting], list[Check]]] = {
    "passes": passes,
    "attacks": attacks,
    "replays": replays,
    "compiled step": compiled_step,
    "waits": waits,
    "objectives": objectives,
    "runs": runs,
    "resumes": resumes,
    "images": images,
    "predictions": predictions,
    "members": members,
}
"""In order of use: what training in earnest rests on comes first."""
