"""Recipes that ship: a YAML file each, and tables of papers, one file a table and a recipe each row.

A table is named as in its paper, `cfa/table-1`, and its rows are recipes of the names `cfa/table-1/trades+cfa`:

    schema: robustfair.table/1
    source: where the numbers stand
    protocol:                                   # what the paper measured; `runs/reported.py` has the numbers
      attacks: [clean, autoattack]
      checkpoints: [best, last]
      seeds: 5                                  # left out where the paper does not say
    departures: [where these recipes differ from what the paper did]
    guesses: [what the paper leaves open, and what is taken]
    doubts: [what is doubtful in the paper]
    keys: {data: cifar10, epochs: 200}          # of a recipe, for every row
    settings:                                   # of a word, wherever it stands without them in this file
      trades: {beta: 6}
    stages:                                     # what rows name, with keys of its own
      frl: {train: trades + frl, epochs: 80}
      deco-sam: {train: "{objective} + deco-sam"}       # {objective}: of the training before it
    rows:
      trades: trades                            # a composition,
      trades+ema: trades + ema
      frl+ema: [trades, frl + ema]              # or several things done one after another,
      wat: {train: trades + wat, epochs: 100}   # or a recipe with keys of its own,
      best: official/trades                     # or another recipe by its name

A composition in a list of several trains from new weights; a stage goes on from the model before it, with the settings
that follow its name in brackets, and with the methods added to it. Another recipe in a list brings what it does with
its keys, those that hold for every stage only if it stands first.

A table may be `like` another: keys, settings, stages, protocol and what it awaits hold unless given anew, departures
and guesses hold too, and a row without a word (`at:`) is the row of that name there. `parts` are the blocks of a table,
such as data sets or networks, each with keys, and with rows where they are not the same in all:
`cfa/table-9/cifar100/at`. What stands in `first` is done before every row's own. A word in `awaits` is not there yet,
and why: a row whose stage names it can be explained up to that stage, and not run. A row of published `weights` has
nothing to train.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from robustfair.config import Count, build
from robustfair.errors import RecipeError, UnknownNameError
from robustfair.grammar import Term, parse_composition
from robustfair.registry import canonical
from robustfair.runs.recipe_yaml import SCRATCH, SHARED, read_yaml

TABLE_SCHEMA = "robustfair.table/1"
OBJECTIVE = "{objective}"
KINDS = ("train", "repair", "edit")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a paper measured of the rows of a table.

    Attributes:
        attacks: by our names; empty where the numbers are of something else.
        checkpoints: "best" (chosen on images, ours on validation images), "last", or both.
        seeds: runs that the numbers are the mean of; None where the paper does not say.
        data: images measured on, where they are not of the data set trained on.
    """

    attacks: tuple[str, ...]
    checkpoints: tuple[Literal["best", "last"], ...]
    seeds: Count | None = None
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as its file has it, with what it takes over from the one it is like; see the head of this module."""

    name: str
    source: str
    protocol: Protocol
    departures: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    like: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    awaits: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Full names of the rows, in the order of the file."""
        parts = self.parts or {"": {}}
        return ["/".join(filter(None, (self.name, part, row))) for part in parts for row in self._rows_of(part)]

    def row(self, name: str) -> Row:
        """The row of that full name.

        Raises:
            UnknownNameError: there is none; shows the nearest.
            RecipeError: its entry cannot be read.
        """
        names = self.names()
        if name not in names:
            short = [known.removeprefix(self.name + "/") for known in names]
            raise UnknownNameError(f"row of {self.name}", name.removeprefix(self.name + "/"), short)
        part, _, row = name.removeprefix(self.name + "/").rpartition("/")
        keys = {key: value for key, value in self.parts.get(part, {}).items() if key != "rows"}
        return self._read(name, part, self._rows_of(part)[row], {**self.keys, **keys})

    def _rows_of(self, part: str) -> Mapping[str, Any]:
        """Rows of a block of the table, those without a word as the table has them that this one is like."""
        rows = self.parts.get(part, {}).get("rows", self.rows)
        return {row: read_table(str(self.like)).rows[row] if entry is None else entry for row, entry in rows.items()}

    def _read(self, name: str, part: str, entry: Any, keys: Mapping[str, Any]) -> Row:
        own = dict(entry) if isinstance(entry, Mapping) else {"stages" if isinstance(entry, list) else "train": entry}
        if "weights" in own:
            stops = f"{name} is published weights, with nothing to train: {own['weights']}"
            return Row(name, self, {}, "published weights", stops)
        steps = own.pop("stages", None) or [own.pop("train")]
        if len(steps) == 1 and _is_name(steps[0]) and not self.first:
            values, stops = _recipe(steps[0])
            return Row(name, self, {**values, **own}, steps[0], stops.replace(steps[0], name, 1))
        if _is_name(steps[0]):
            values, _ = _recipe(steps[0])
            keys = {**keys, **{key: values[key] for key in SHARED if key in values}}
        steps = [*self.first, *steps]
        stages: list[dict[str, Any]] = []
        kept, stops = 0, ""
        for done, step in enumerate(steps):
            for stage in self._stages(step, stages):
                stages.append(stage)
                word = self._awaited(stage)
                if word and not stops:
                    stops = f"{name} cannot run yet: its stage {len(stages)}, {_what(stage)}, needs {word}, which "
                    stops += self.awaits[word] + self._what_comes_before(part, steps[:done])
                kept += not stops
        values = {**keys, **own, "stages": stages[:kept]}
        if len(stages) == 1:
            values |= values.pop("stages")[0] if kept else {}
        return Row(name, self, values if kept else {}, ", then ".join(steps), stops)

    def _what_comes_before(self, part: str, steps: Sequence[str]) -> str:
        """Which row of this part does `steps` and no more, in words; "" where none does."""
        if len(steps) == 1 and _is_name(steps[0]):
            return f"; what comes before that is {steps[0]}"
        for row, entry in self._rows_of(part).items():
            own = entry.get("stages", entry.get("train")) if isinstance(entry, Mapping) else entry
            if steps and [*self.first, *(own if isinstance(own, list) else [own])] == list(steps):
                return f"; what comes before that is {'/'.join(filter(None, (self.name, part, row)))}"
        return ""

    def _stages(self, step: str, before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What a step of a row stands for."""
        fresh = {"start": SCRATCH} if before else {}
        if _is_name(step):
            values, stops = _recipe(step)
            if stops:
                raise RecipeError(f"table {self.name}: a row goes on from {step}, and {stops}")
            return [{**fresh, **stage} if "train" in stage else stage for stage in _as_stages(values)]
        first, *more = parse_composition(step)
        if first.name not in self.stages:
            return [{"train": self._with_settings(step, {}), **fresh}]
        stage = dict(self.stages[first.name])
        kind = next(kind for kind in KINDS if kind in stage)
        what = " + ".join([str(stage[kind]), *map(str, more)])
        if OBJECTIVE in what:
            trained = [earlier["train"] for earlier in before if "train" in earlier]
            what = what.replace(OBJECTIVE, str(parse_composition(trained[-1])[0]))
        return [{**stage, kind: self._with_settings(what, {first.name: first.args})}]

    def _with_settings(self, text: str, more: Mapping[str, Mapping[str, Any]]) -> str:
        """A composition with the settings of this table, and those of `more` over them."""
        terms = []
        for term in parse_composition(text):
            given = {**self.settings.get(term.name, {}), **term.args, **more.get(term.name, {})}
            terms.append(str(Term(term.name, given)))
        return " + ".join(terms)

    def _awaited(self, stage: Mapping[str, Any]) -> str:
        """The word of a stage that is not there yet, "" where all are."""
        what = next(str(stage[kind]) for kind in KINDS if kind in stage)
        return next((term.name for term in parse_composition(what) if term.name in self.awaits), "")


@dataclass(frozen=True)
class Row:
    """A row of a table as a recipe.

    Attributes:
        name: full name, such as cfa/table-1/trades+cfa.
        table: that it stands in.
        values: keys of the recipe, up to the stage that is not there yet; empty where there is nothing to train.
        said: what is done, in the words of the table.
        stops: why it cannot run, "" where it can.
    """

    name: str
    table: Table
    values: Mapping[str, Any]
    said: str
    stops: str = ""


@functools.cache
def _files() -> Mapping[str, Any]:
    """Name -> resource of every YAML file in the package."""

    def walk(folder: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for entry in folder.iterdir():
            if entry.is_dir():
                found |= walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry
        return found

    return dict(sorted(walk(resources.files("robustfair") / "recipes", "").items()))


@functools.cache
def tables() -> tuple[str, ...]:
    """Names of the tables, table-10 behind table-9."""
    start = f"schema: {TABLE_SCHEMA}\n"
    found = [name for name, file in _files().items() if file.read_text(encoding="utf-8").startswith(start)]
    return tuple(
        sorted(
            found,
            key=lambda name: [(len(word), word) if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)],
        )
    )


def shipped_recipes() -> dict[str, Any]:
    """Name -> resource of every recipe that has a file of its own."""
    return {name: file for name, file in _files().items() if name not in tables()}


@functools.cache
def _read_file(name: str) -> Mapping[str, Any]:
    """Keys and values of a recipe that has a file of its own."""
    return read_yaml(_files()[name].read_text(encoding="utf-8"), f"recipe {name}")


@functools.cache
def read_table(name: str) -> Table:
    """A table by its name.

    Raises:
        RecipeError, ConfigError, UnknownNameError: its file is not a table.
    """
    owner = f"table {name}"
    values = read_yaml(_files()[name].read_text(encoding="utf-8"), owner, TABLE_SCHEMA)
    if "like" in values:
        other = read_table(values["like"])
        for key in ("keys", "settings", "stages", "awaits"):
            values[key] = {**getattr(other, key), **values.get(key, {})}
        for key in ("departures", "guesses"):
            values[key] = [*getattr(other, key), *values.get(key, [])]
        values["protocol"] = {**vars(other.protocol), **values.get("protocol", {})}
    protocol = build(Protocol, values.pop("protocol", {}), owner=f"{owner}, protocol")
    return build(Table, {"name": name, "protocol": protocol, **values}, owner=owner)


def find_row(name: str) -> Row | None:
    """The row of a table by its full name in any spelling; None where no table has a name that this one begins with.

    Raises:
        RecipeError: it is the name of a table.
        UnknownNameError: the table has no such row; shows the nearest.
    """
    name = canonical(name.replace(" ", ""))
    table = "/".join(name.split("/")[:2])
    if "/" not in name or name.endswith((".yaml", ".yml")) or table not in tables():
        return None
    found = read_table(table)
    if name == table:
        first = found.names()[0]
        raise RecipeError(f"{name} is a table: name one of its {len(found.names())} rows, such as {first}")
    return found.row(name)


def shipped_values(name: str) -> Mapping[str, Any] | None:
    """Keys and values of the recipe that ships under a name in any spelling; None for any other name.

    Raises:
        RecipeError: a row that has nothing to train or needs what is not there yet, or the name of a table.
        UnknownNameError: a table has no such row.
    """
    if not _is_name(name) and canonical(name) not in _files():
        return None
    row = find_row(name)
    if row is None:
        return _read_file(canonical(name)) if canonical(name) in _files() else None
    if row.stops:
        raise RecipeError(row.stops)
    return row.values


def _is_name(step: str) -> bool:
    """Whether a step of a row names another recipe, and is no composition."""
    return "/" in step.split("(")[0]


def _recipe(name: str) -> tuple[Mapping[str, Any], str]:
    """Keys and values of the recipe that ships under a name, and why it cannot run."""
    row = find_row(name)
    values = shipped_values(name) if row is None else row.values
    if values is None:
        raise UnknownNameError("recipe", name, [*shipped_recipes(), *tables()])
    return values, "" if row is None else row.stops


def _as_stages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A recipe as stages, each that trains with all keys but those that hold for every stage."""
    own = {key: value for key, value in values.items() if key not in (*SHARED, "train", "stages")}
    stages = values.get("stages") or [{"train": values["train"]}]
    return [{**own, **stage} if "train" in stage else dict(stage) for stage in stages]


def _what(stage: Mapping[str, Any]) -> str:
    """A stage in words."""
    return next(f"{kind}: {stage[kind]}" for kind in KINDS if kind in stage)
