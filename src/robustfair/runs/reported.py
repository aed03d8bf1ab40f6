"""The numbers that papers print, by the names of the recipes that should give them: `cfa/table-1/trades+cfa`.

Beside the file of each table of recipes lies a CSV with its numbers, a row a row and a column an attack and a metric.
They are facts transcribed from the papers, and from the logs of FAAL's authors; nothing in them was measured here.

Units: fractions in [0, 1] with the digits that are printed (46.7 % is 0.467), accuracies, their spread over classes and
runs, ranges and gaps alike. Correlations (-1 to 1), ratios of norms (>= 1) and variances of weights are as they stand.
Metrics: average, worst, best, std and range are over classes; worst-10pct and worst-5pct the mean of the worst tenth
and twentieth of them; easy, medium and hard, many-, medium- and few-shot of groups of them; class.NAME of one.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

from robustfair.errors import UnknownNameError
from robustfair.registry import canonical
from robustfair.runs.shipped import read_table, tables

_LABELS = ("row", "checkpoint", "note")


@dataclass(frozen=True, kw_only=True)
class ReportedNumber:
    """One number that a paper prints.

    Attributes:
        recipe: full name of the row.
        checkpoint: "best", "last", or "" where the paper does not say.
        attack: by our names; "" where none is involved.
        metric: what was measured, see the head of this module.
        value: a fraction, where it is one.
        std: standard deviation over the runs that it is the mean of; None where none is printed.
        note: what else tells it apart, such as run=2 or epoch=108.
    """

    recipe: str
    checkpoint: str
    attack: str
    metric: str
    value: float
    std: float | None = None
    note: str = ""


def reported(
    name: str, *, checkpoint: str | None = None, attack: str | None = None, metric: str | None = None
) -> list[ReportedNumber]:
    """What a paper prints of a row, a table, or in all, in the order of its tables. Fractions, not percent.

    Args:
        name: `cfa/table-1/trades+cfa`, `cfa/table-1` or `cfa`, in any spelling.
        checkpoint, attack, metric: only those; None takes all.

    Raises:
        UnknownNameError: nothing of that name; shows the nearest.

    >>> [found] = reported("cfa/table-1/trades+cfa", checkpoint="best", attack="autoattack", metric="worst")
    >>> found.value, found.std
    (0.265, 0.004)
    """
    name = canonical(name.replace(" ", ""))
    within = [table for table in tables() if f"{table}/".startswith(f"{name}/") or name.startswith(f"{table}/")]
    found = [number for table in within for number in _numbers(table) if f"{number.recipe}/".startswith(f"{name}/")]
    if not found:
        known = [row for table in within for row in read_table(table).names()] if within else tables()
        raise UnknownNameError("reported row or table", name, known)
    wanted = {"checkpoint": checkpoint, "attack": attack, "metric": metric}
    asked = {key: value for key, value in wanted.items() if value is not None}
    return [number for number in found if all(getattr(number, key) == value for key, value in asked.items())]


@functools.cache
def _numbers(table: str) -> tuple[ReportedNumber, ...]:
    """All numbers of a table."""
    file = resources.files("robustfair") / "recipes" / f"{table}.csv"
    found = []
    for line in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
        for column, cell in line.items():
            if column in _LABELS or not cell:
                continue
            value, _, std = cell.partition("±")
            attack, _, metric = column.rpartition(" ")
            number = ReportedNumber(
                recipe=f"{table}/{line['row']}",
                checkpoint=line["checkpoint"],
                attack=attack,
                metric=metric,
                value=float(value),
                std=float(std) if std else None,
                note=line.get("note", ""),
            )
            found.append(number)
    return tuple(found)
