"""A composition in words: who edits what, in which hook, and what will not act."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from robustfair.errors import RobustFairError, as_flags
from robustfair.grammar import format_value
from robustfair.methods.compose import Plan
from robustfair.models.build import require_model
from robustfair.objectives.base import AdversarialObjective
from robustfair.runs.recipe import Recipe

IMAGES = ("data", "image_size", "limit_per_class", "augment", "validation")
SCHEDULE = ("epochs", "batch_size", "optimizer", "lr", "schedule")
OF_CURVE = {"multistep": ("milestones", "gamma"), "one-cycle": ("warmup", "cycle_momentum")}
OF_OPTIMIZER = {"sgd": ("momentum", "nesterov")}
EXECUTION = ("precision", "compile", "deterministic")


def explain_run(recipe: Recipe, start: str) -> list[str]:
    """Lines on what a recipe trains with beside its composition, by the names of its keys; and why it cannot, if so.

    Args:
        start: weights that it trains from.
    """
    values = {name: _written(value) for name, value in recipe.values().items() if value not in (None, [])}
    values |= {"start": start, "data": recipe.data or "(to be named)"}
    values["augment"] = recipe.augment or "(that of the data)"
    changed = [f.name for f in dataclasses.fields(Recipe) if f.name in EXECUTION and vars(recipe)[f.name] != f.default]
    of_curve, of_optimizer = OF_CURVE.get(recipe.curve, ()), OF_OPTIMIZER.get(recipe.optimizer, ())
    schedule = (*SCHEDULE, *of_curve, *of_optimizer, "weight_decay", *changed)
    kinds = {"images": IMAGES, "model": ("model", "width", "start", "only"), "schedule": schedule, "keeps": ("select",)}
    said = {kind: ", ".join(f"{key}={values[key]}" for key in keys if key in values) for kind, keys in kinds.items()}
    lines = [f"  {kind}: {text}" for kind, text in said.items()]
    if recipe.curve == "multistep":
        drops = ", ".join(f"{round(milestone * recipe.epochs, 1):g}" for milestone in recipe.milestones)
        lines.insert(3, f"  rate drops after epochs: {drops}")
    try:
        require_model(recipe.model)
    except RobustFairError as error:
        lines.append(f"  cannot run: {as_flags(str(error))}")
    return lines


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


def _written(value: Any) -> str:
    """A value of a recipe's key as a file has it, text without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return value if isinstance(value, str) else format_value(value)


def _settings(config: Any) -> str:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    said = {n: type(v).__name__ if isinstance(v, nn.Module) else format_value(v) for n, v in values.items()}
    return ", ".join(f"{name}={text}" for name, text in said.items()) or "no settings"
