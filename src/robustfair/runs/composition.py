"""From words to what acts in a run: compositions, repairs and edits read, checked, and built, and no image read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from robustfair.config import build
from robustfair.data.edits import Edit, read_edit
from robustfair.errors import RecipeError, RobustFairWarning, UnknownNameError
from robustfair.grammar import Term, format_value, parse_composition, parse_norm, parse_term
from robustfair.methods.base import Bundle, Method
from robustfair.methods.compose import Plan, compose
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.registry import BUNDLES, METHODS, OBJECTIVES, REPAIRS, load_plugin
from robustfair.repairs import Repair
from robustfair.runs.recipe import SCRATCH, Recipe, read_recipe
from robustfair.runs.shipped import find_row


def read_composition(text: str, defaults: Mapping[str, Any] | None = None) -> tuple[Objective, list[Method | Bundle]]:
    """The objective and the methods of a composition string, bundles as they are.

    Args:
        defaults: norm, eps, step_size, steps of the objective's attack; a key the string gives too must agree.
    """
    terms = parse_composition(text)
    objectives = [term for term in terms if term.name in OBJECTIVES]
    for term in terms:
        if not any(term.name in registry for registry in (OBJECTIVES, METHODS, BUNDLES)):
            raise UnknownNameError("objective or method", term.name, [*OBJECTIVES, *METHODS, *BUNDLES])
    if len(objectives) != 1:
        found = " and ".join(term.name for term in objectives) or "none"
        raise RecipeError(f"{text!r} needs exactly one objective ({', '.join(OBJECTIVES)}), found {found}")
    objective = _build_objective(objectives[0], defaults or {})
    return objective, [_build_method(term) for term in terms if term is not objectives[0]]


def plan_of(what: str, allow: Iterable[str] = (), plugins: Iterable[str] = ()) -> Plan:
    """The plan of a composition string, a shipped recipe or a YAML file, nothing else read or built but plugins."""
    (stage, plan), *more = plans_of(what, allow, plugins)
    if plan is None or more:
        raise RecipeError(f"{what} has not one plan ({stage}, ...): see `plans_of`")
    return plan


def plans_of(what: str, allow: Iterable[str] = (), plugins: Iterable[str] = ()) -> list[tuple[str, Plan | None]]:
    """What `plan_of` gives, or of a recipe of stages each stage in a line, with the plan of one that trains.

    Of a row of a table that has nothing to train a line says why. An edit of the training images before all training is
    in the line of the plan, or has one before those of stages.
    """
    row = find_row(what)
    if row is not None and not row.values:
        return [(row.stops, None)]
    given = {"allow": tuple(allow), "plugin": tuple(plugins)}
    recipe = read_recipe(what, {"data": "any"} | {key: value for key, value in given.items() if value})
    for path in recipe.plugin:
        load_plugin(path)
    edited = ""
    if recipe.edit is not None:
        require_modelless(recipe.edit)
        edited = f"before all training, edit: {recipe.edit}"
    if not recipe.stages:
        return [(edited, plan_of_recipe(recipe))]
    first: list[tuple[str, Plan | None]] = [(edited, None)] if edited else []
    return first + [
        (
            f"stage {number}, {stage.does}: {stage.what}",
            plan_of_recipe(recipe.of_stage(number - 1, start=SCRATCH)) if stage.does == "train" else None,
        )
        for number, stage in enumerate(recipe.stages, 1)
    ]


def plan_of_recipe(recipe: Recipe) -> Plan:
    """The plan of a recipe without stages; its plugins are loaded."""
    for path in recipe.plugin:
        load_plugin(path)
    given = {"norm": recipe.norm, "eps": recipe.eps, "step_size": recipe.step_size, "steps": recipe.steps}
    chosen = {key: value for key, value in given.items() if value is not None}
    objective, methods = read_composition(recipe.train, chosen)
    if chosen and not isinstance(objective, AdversarialObjective):
        ignored = ", ".join(chosen)
        warnings.warn(f"{objective.name} trains without an attack: {ignored} will not act", RobustFairWarning, 2)
    return compose(objective, methods, allow=frozenset(recipe.allow), validation=recipe.validation != 0)


def require_modelless(text: str) -> Edit:
    """The edit that `text` names, which comes before all training.

    Raises:
        RecipeError: it asks a model, and there is none yet.
    """
    found = read_edit(text)
    if found.needs_model:
        raise RecipeError(f"recipe: edit is {text}, which asks a model, and none is trained yet: make it a stage")
    return found


def read_repair(text: str) -> Repair:
    """The repair that `hwnwb` or `hwnwb(target_norm=mean)` names."""
    term = parse_term(text, "repair", example="hwnwb(target_norm=mean)")
    return build(REPAIRS.get(term.name), term.args, owner=term.name)


def _build_objective(term: Term, defaults: Mapping[str, Any]) -> Objective:
    cls = OBJECTIVES.get(term.name)
    args = dict(term.args)
    if not issubclass(cls, AdversarialObjective):
        return build(cls, args, owner=term.name)
    objective = build(cls, {**defaults, **args}, owner=term.name)
    for key, value in defaults.items():
        if key in args and getattr(objective, key) != (parse_norm(value) if key == "norm" else value):
            given = format_value(args[key])
            raise RecipeError(f"{key} is {given} in {term} and {format_value(value)} beside it: give it once")
    return objective


def _build_method(term: Term) -> Method | Bundle:
    registry = METHODS if term.name in METHODS else BUNDLES
    return build(registry.get(term.name), term.args, owner=term.name)
