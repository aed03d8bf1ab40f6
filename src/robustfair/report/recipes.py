"""The recipes that ship as a list, and rows of papers' tables beside what the papers report. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from robustfair.errors import UnknownNameError
from robustfair.registry import canonical
from robustfair.runs.recipe import read_recipe
from robustfair.runs.reported import ReportedNumber, reported
from robustfair.runs.shipped import Row, read_table, shipped_recipes, tables

STRONGEST_FIRST = ("autoattack", "cw-20", "pgd-20", "pgd-10", "clean")
WORST = ("worst", "worst-10pct", "worst-5pct")
HEADING = "reported in percent, average / worst class"


@dataclass(frozen=True)
class Shelf:
    """Recipes that stand together.

    Attributes:
        title: name and source of a table; "" for recipes with a file each.
        entries: (name, what is done, what is reported of it, "" for nothing).
    """

    title: str
    entries: tuple[tuple[str, str, str], ...]


def shelves(word: str = "") -> list[Shelf]:
    """Recipes by table.

    Args:
        word: "" gives a line per table; else the rows whose names begin with it (`cfa`, `cfa/table-1`) or, where none
            does, those that have it in their name or in what they do (`fawa`).

    Raises:
        UnknownNameError: none has it.
    """
    word = canonical(word.replace(" ", ""))
    single = Shelf("", tuple((name, _said(name), "") for name in shipped_recipes()))
    if not word:
        folded = [
            (name, f"{read_table(name).source} ({_rows(len(read_table(name).names()))})", "") for name in tables()
        ]
        return [single, Shelf("", tuple(folded))]
    for fits in (lambda name, _: f"{name}/".startswith(f"{word}/"), lambda name, said: word in f"{name} {said}"):
        found = [Shelf("", tuple(entry for entry in single.entries if fits(*entry[:2])))]
        for name in tables():
            rows = [row for row in map(read_table(name).row, read_table(name).names()) if fits(row.name, row.said)]
            entries = tuple((row.name, row.said + _awaiting(row), in_percent(reported(row.name))) for row in rows)
            found.append(Shelf(f"{name}: {read_table(name).source}; {HEADING}", entries))
        if any(shelf.entries for shelf in found):
            return [shelf for shelf in found if shelf.entries]
    raise UnknownNameError("recipe", word, [*shipped_recipes(), *tables()])


def recipe_entries(word: str = "") -> list[tuple[str, str]]:
    """(name, what it does and what is reported of it) of the recipes of `shelves`, which says what `word` is."""
    entries = [entry for shelf in shelves(word) for entry in shelf.entries]
    return [(name, f"{said}; {HEADING}: {numbers}" if numbers else said) for name, said, numbers in entries]


def in_percent(numbers: Sequence[ReportedNumber]) -> str:
    """Average and worst class under the strongest attack that they are printed for, by checkpoint.

    >>> in_percent(reported("cfa/table-1/at"))
    'best 46.7 / 20.1, last 43.0 / 15.5 autoattack'
    """
    for attack in STRONGEST_FIRST:
        cells = list(_cells([number for number in numbers if number.attack == attack]))
        if cells:
            return f"{', '.join(cells)} {attack}"
    return f"{len(numbers)} numbers"


def provenance(row: Row) -> list[str]:
    """Lines on where a row comes from: source, protocol, what is reported, departures, guesses and doubts."""
    table, protocol = row.table, row.table.protocol
    numbers = reported(row.name)
    stated = dict.fromkeys(number.checkpoint for number in numbers if number.checkpoint)
    kept = " and ".join(stated) or f"{' and '.join(protocol.checkpoints)} (not stated)"
    runs = "1 run" if protocol.seeds == 1 else f"{protocol.seeds or '(not stated how many)'} runs"
    on = f" on {protocol.data}" if protocol.data else ""
    under = f", {', '.join(protocol.attacks)}" if protocol.attacks else ""
    measured = f"{kept} checkpoint of {runs}{on}{under}"
    lines = [f"{row.name}: {table.source}", f"  measured: {measured}"]
    attacks = dict.fromkeys(number.attack for number in numbers)
    for attack in attacks:
        cells = ", ".join(_cells([number for number in numbers if number.attack == attack]))
        if cells:
            lines.append(f"  {HEADING}, {attack}: {cells}")
    texts = {"departure": table.departures, "guess": table.guesses, "doubt": table.doubts}
    return [*lines, *(f"  {kind}: {' '.join(text.split())}" for kind, found in texts.items() for text in found)]


def _cells(numbers: Sequence[ReportedNumber]) -> Iterator[str]:
    """Average and worst class of each checkpoint, as far as they are printed: `best 46.7 / 20.1`, `last - / 22.0`."""
    for checkpoint, note in dict.fromkeys((number.checkpoint, number.note) for number in numbers):
        of = {n.metric: n.value for n in numbers if (n.checkpoint, n.note) == (checkpoint, note)}
        average = _percent(of["average"]) if "average" in of else "-"
        worst = [_percent(of[metric]) for metric in WORST if metric in of]
        if average != "-" or worst:
            yield " ".join(filter(None, (checkpoint, note, " / ".join([average, *worst]))))


def _percent(rate: float) -> str:
    """With the digits that papers print: one, or two where they are not 0."""
    return f"{100 * rate:.2f}".removesuffix("0")


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _said(name: str) -> str:
    """What a recipe that has a file of its own does."""
    recipe = read_recipe(name, {"data": "digits"})
    what = recipe.train or ", then ".join(stage.what for stage in recipe.stages)
    return f"{what}, {recipe.model}, {recipe.epochs} epochs"


def _awaiting(row: Row) -> str:
    words = [word for word in row.table.awaits if word in row.stops]
    if words:
        return f" ({words[0]} is not there yet)"
    model = str(row.values.get("model", ""))
    return f" ({model} does not train)" if ":" in model else ""
