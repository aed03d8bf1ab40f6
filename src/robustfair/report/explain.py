"""A composition in words: who edits what, in which hook, and what will not act."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from robustfair.grammar import format_value
from robustfair.methods.compose import Plan
from robustfair.objectives.base import AdversarialObjective


def explain_plan(plan: Plan, epochs: int | None = None) -> str:
    """Lines of text: the objective with attack and terms, what bundles became, methods with hooks, claims, settings.

    Args:
        epochs: length of the run, to name the methods that would not act in it.
    """
    objective = plan.objective
    lines = [f"{objective.name}: {summary(type(objective))}", f"  {_settings(objective)}"]
    if isinstance(objective, AdversarialObjective):
        lines.append(f"  attack: {objective.steps} steps of {format_value(objective.step)} in {objective.norm}")
    lines.append(f"  loss terms: {', '.join(sorted(objective.terms))}")
    for became in plan.bundles:
        bundle = became.bundle
        lines += [f"{bundle.name}: {summary(type(bundle))}", f"  {_settings(bundle)}"]
        lines.append(f"  stands for: {', '.join(part.name for part in became.parts)}")
        lines += [f"  without {part}: it {reason}" for part, reason in became.unfit.items()]
        lines += [f"  without {part}: {reason}" for part, reason in became.taken.items()]
    for method in plan.methods:
        lines += [
            f"{method.name}: {summary(type(method))}",
            f"  {_settings(method)}",
            f"  acts in: {', '.join(method.hooks())}",
            f"  sets: {', '.join(sorted(method.claims)) or 'nothing'}",
        ]
        remark = None if epochs is None else plan.remark(method, epochs)
        if remark:
            lines.append(f"  note: {remark}")
    if plan.allow:
        lines.append(f"shared by permission, applied in list order: {', '.join(sorted(plan.allow))}")
    return "\n".join(lines)


def summary(entry: Any) -> str:
    """First sentence of an entry's docstring."""
    entry = getattr(entry, "func", entry)
    text = " ".join((entry.__doc__ or "").split())
    return re.split(r"\.(?: (?=[A-Z])|$)", text)[0]


def _settings(config: Any) -> str:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    said = {n: type(v).__name__ if isinstance(v, nn.Module) else format_value(v) for n, v in values.items()}
    return ", ".join(f"{name}={text}" for name, text in said.items()) or "no settings"
