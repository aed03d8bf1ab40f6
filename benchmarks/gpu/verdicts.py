"""Checks of what audits find: predictions, and verdicts of AutoAttack's members."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import cache
from typing import Any

from torch import nn

from benchmarks.gpu.check import (
    OUTSIDE,
    Check,
    Setting,
    patterns,
    shaken,
    starts_from_cpu,
)
from benchmarks.workload import build
from robustfair.data.augment.crops import to_unit
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.objectives import PGDAT
from robustfair.training import Schedule, fit

MEMBERS = ("apgd-ce(steps=20)", "apgd-dlr(steps=20)", "apgd-t(steps=10)", "fab(steps=5)", "fab-t(steps=10)")
STRONG = (*MEMBERS, "square(queries=200)", "autoattack")
RADII = {"linf": 0.05, "l2": 0.6}


def members(setting: Setting) -> list[Check]:
    """Verdicts of AutoAttack's members on a small trained network, in float32, and where its points lie."""
    data = patterns(20 if setting.small else 100)
    model, checks = trained_on_patterns(), []
    for norm, eps in RADII.items():
        for attack in STRONG if norm == "linf" and not setting.small else STRONG[:-1]:

            def judged(device: str, seed: int, norm: str = norm, eps: float = eps, attack: str = attack) -> Audit:
                how: dict[str, Any] = {"norm": norm, "eps": eps, "attacks": attack, "seed": seed, "precision": "fp32"}
                return audit(deepcopy(model), data, device=device, checks=False, keep_points=True, **how)

            here, other, there = judged("cpu", 0), judged("cpu", 1), judged(setting.device, 0)
            name = here.attacks[-1]
            right = [found.hits(name) for found in (here, other, there)]
            seeds = int((right[0] != right[1]).sum())
            differ = int((right[0] != right[2]).sum())
            checks.append(Check(f"verdicts, {norm}, {name}: images", "CPU float32", differ, 2 * seeds + 1))
            moves = [(point - to_unit(data.images[index])).flatten() for index, point in there.points[name].items()]
            power = 2.0 if norm == "l2" else math.inf
            outside = max((float(move.double().norm(power)) - eps for move in moves), default=0.0)
            checks.append(Check(f"outside the ball, {norm}, {name}", "the radius", max(outside, 0.0), OUTSIDE))
    return checks


def predictions(setting: Setting) -> list[Check]:
    """Clean predictions of an audit, and fgsm from the images themselves."""
    data, model, checks = patterns(100), trained_on_patterns(), []
    with starts_from_cpu():
        here, there = (
            audit(deepcopy(model), data, attacks=["clean", "pgd-10"], eps=0.05, device=device, checks=False)
            for device in ("cpu", setting.device)
        )
        shaky = audit(shaken(model, "float32"), data, attacks=["clean", "pgd-10"], eps=0.05, checks=False)
    for attack in here.attacks:
        wanted = here.prediction(attack)
        rounding = int((shaky.prediction(attack) != wanted).sum())
        differ = int((there.prediction(attack) != wanted).sum())
        checks.append(Check(f"predictions, {attack}: images", "CPU float32", differ, 2 * rounding + 1))
    return checks


@cache
def trained_on_patterns() -> nn.Module:
    """A small network, trained here against PGD until about half of the images stand."""
    schedule = Schedule(epochs=10, batch_size=32, lr=0.003, optimizer="adam", kind="constant")
    objective = PGDAT(steps=2, eps=0.06)
    return fit(build("small-cnn", 8), patterns(480), objective, schedule=schedule, validation=0, select="last").model
