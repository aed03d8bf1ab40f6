"""From words to what acts in a run: compositions, repairs and edits read, checked, and built, and no image read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robustfair.config import build
from robustfair.data.edits import Edit, read_edit
from robustfair.errors import RecipeError, RobustFairWarning, UnknownNameError
from robustfair.grammar import Term, canonical_key, format_value, parse_composition, parse_norm, parse_term
from robustfair.methods.base import Bundle, Method
from robustfair.methods.compose import Plan, compose
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.registry import BUNDLES, METHODS, OBJECTIVES, REPAIRS, load_plugin
from robustfair.repairs import Repair
from robustfair.runs.recipe import PREVIOUS, SCRATCH, Recipe, recipe_of, values_of
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


@dataclass(frozen=True)
class Step:
    """One thing that a recipe does.

    Attributes:
        said: it in a line; "" for a recipe that trains and no more.
        plan: who edits what, where it trains.
        recipe: keys that it trains with; None where it does not, and for a composition string, which has none.
        start: weights that it trains from, previous for those of the stage before.
    """

    said: str
    plan: Plan | None = None
    recipe: Recipe | None = None
    start: str = SCRATCH


def steps_of(what: str, allow: Iterable[str] = (), plugins: Iterable[str] = ()) -> list[Step]:
    """What a composition string, a shipped recipe or a YAML file does, in order, nothing read or built but plugins.

    Of a row of a table that cannot run: what comes before, and a line that says why. An edit of the training images
    before all training is in the line of the plan, or has one before those of stages. Data that is not named is "".
    """
    row = find_row(what)
    values = values_of(what) if row is None else row.values
    stops = [] if row is None or not row.stops else [Step(row.stops)]
    if not values:
        return stops
    given: dict[str, Any] = {"allow": tuple(allow), "plugin": tuple(plugins)}
    named = {canonical_key(str(key)) for key in values}
    open_data = {} if "data" in named else {"data": ""}
    recipe = recipe_of(values, open_data | {key: value for key, value in given.items() if value}, what)
    for path in recipe.plugin:
        load_plugin(path)
    edited = ""
    if recipe.edit is not None:
        require_modelless(recipe.edit)
        edited = f"before all training, edit: {recipe.edit}"
    if not recipe.stages:
        return [Step(edited, plan_of_recipe(recipe), None if named == {"train"} else recipe, recipe.start), *stops]
    first = [Step(edited)] if edited else []
    return [*first, *(_step(recipe, number) for number in range(len(recipe.stages))), *stops]


def _step(recipe: Recipe, number: int) -> Step:
    """What the 0-based stage of a recipe does."""
    stage = recipe.stages[number]
    said = f"stage {number + 1}, {stage.does}: {stage.what}"
    if stage.does != "train":
        return Step(said)
    own = recipe.of_stage(number, start=SCRATCH)
    before = PREVIOUS if any(earlier.does != "edit" for earlier in recipe.stages[:number]) else recipe.start
    return Step(said, plan_of_recipe(own), own, stage.keys.get("start", before))


def plans_of(what: str, allow: Iterable[str] = (), plugins: Iterable[str] = ()) -> list[tuple[str, Plan | None]]:
    """Line and plan of each of `steps_of`."""
    return [(step.said, step.plan) for step in steps_of(what, allow, plugins)]


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
