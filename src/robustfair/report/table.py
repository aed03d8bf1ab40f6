"""The table of an audit, a grouping or a comparison: its cells in words, built once for every renderer.

`layout` prints it in a terminal, `text` writes it as Markdown and LaTeX, `html` puts it on the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from robustfair import metrics
from robustfair.config import require
from robustfair.evaluate.compare import (
    AttackComparison,
    Comparison,
    Difference,
    PairedTest,
    check_comparable,
    compare_under,
)
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, shortfall
from robustfair.report.rates import Rates, both_attacks, class_rates, shown_attacks
from robustfair.report.words import NO_IMAGES, heading, p_value, percent, points, points_span, span

WORST: Literal["worst"] = "worst"
SURE: Literal["sure"] = "sure"

CHANGES = "Intervals of changes: 95 %, paired over the images; of worst and range by bootstrap."
TESTED = (
    "† more than chance: by an exact McNemar test, of classes after Holm's correction, or an interval without zero."
)
"""What marks a change, in every report: the verdict of `robustfair.evaluate.compare`."""
_INTERVALS = "Intervals: 95 %, Wilson; for worst, bootstrap."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of a table.

    Attributes:
        text: a number in words, or a name.
        interval: of the number, in brackets; "" without.
        half: the larger distance from the number to an end of its interval.
        mark: "worst" class of its column, or a change that is "sure" to be one.
        is_name: whether the text is a name that a user gave, or a word.
        others: who shares what the name says: "and 2 others".
    """

    text: str = ""
    interval: str = ""
    half: str = ""
    mark: Literal["", "worst", "sure"] = ""
    is_name: bool = False
    others: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its head, the attack that it shares with its neighbours, "" if it shares none, and its side."""

    head: str
    over: str = ""
    side: Literal["left", "right"] = "right"


Row = tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in words.

    Attributes:
        title: models, data, threat and unit.
        columns: names of the rows first.
        rows: one a class or group.
        totals: rows over all of them.
        notes: what the numbers are, one sentence each.
        above: rows before the others.
        labels: how many columns at the left say what a row is: its name, and mostly its images.
        ranks: a number a row; of very many rows, those of the lowest and the highest are shown on a terminal. Empty
            where all are.
        ranked_by: what these numbers are.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    totals: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    above: tuple[Row, ...] = ()
    labels: int = 2
    ranks: tuple[float, ...] = ()
    ranked_by: str = ""


# Tables


def table_of(result: Rates | Comparison, attacks: Sequence[str] | None = None) -> Table:
    """The table of an audit, of its rates by group, or of a comparison, for papers and notes.

    Args:
        attacks: None takes all, and robust where there are several.

    Raises:
        UnknownNameError: an attack that it does not hold.
    """
    return _comparison(result, attacks) if isinstance(result, Comparison) else _rates(result, attacks)


def class_table(audit: Audit, compared: Mapping[str, AttackComparison] | None = None) -> Table:
    """Accuracy class by class under each attack with Wilson intervals, then average, worst class, std and range.

    Args:
        compared: attacks under which accuracy before, after and its change are shown instead.
    """
    compared = compared or {}
    blocks = [
        _change_columns(compared[attack]) if attack in compared else _rate_columns(audit, attack)
        for attack in shown_attacks(audit)
    ]
    table = _join(audit.class_names, audit.count().tolist(), blocks, title=heading(audit.model, audit))
    if audit.head_norms is not None:
        table = _with_norms(table, audit.head_norms)
    return replace(table, notes=(f"* worst class of its column. {_INTERVALS}",))


def group_table(groups: GroupRates, attacks: Sequence[str] | None = None) -> Table:
    """Accuracy group by group under each attack, with Wilson intervals; arguments and errors as for `table_of`."""
    return _with_legend(table_of(groups, attacks))


def comparison_table(comparison: Comparison, attacks: Sequence[str] | None = None) -> Table:
    """Accuracy class by class before and after, the change with its paired interval and its test, under each attack.

    Arguments and errors as for `table_of`.
    """
    return _with_legend(table_of(comparison, attacks))


def before_after_table(before: Audit, after: Audit, attacks: Sequence[str] | None = None) -> Table:
    """Accuracy class by class before and after a repair, and the change in points, under each attack.

    A change has its 95 % interval, paired over the images, that of worst and range by bootstrap. It is marked where
    `compare` finds it to be more than chance: of classes after Holm's correction.

    Args:
        attacks: None takes those that both audits have.

    Raises:
        DataError: the audits are not of the same images, classes and threat.
        ConfigError: an attack that one of them lacks, or none at all.
    """
    check_comparable(before, after)
    shared = both_attacks(before, after)
    chosen = shared if attacks is None else list(attacks)
    allowed = f"in both audits ({', '.join(shared)})"
    for attack in chosen:
        require(attack in shared, "report", "attack", allowed=allowed, got=attack)
    require(bool(chosen), "report", "attacks", allowed=f"at least one {allowed}", got=chosen)
    blocks = [_change_columns(compare_under(before, after, attack)) for attack in chosen]
    title = heading(f"{before.model} -> {after.model}", after)
    table = _join(after.class_names, after.count().tolist(), blocks, title=title)
    return replace(table, notes=("* worst class of its column. Changes in points.", CHANGES, TESTED))


def _rates(rates: Rates, attacks: Sequence[str] | None) -> Table:
    chosen = shown_attacks(rates) if attacks is None else tuple(attacks)
    blocks = [_rate_columns(rates, attack) for attack in chosen]
    groups = isinstance(rates, GroupRates)
    table = _join(
        rates.class_names,
        rates.count().tolist(),
        blocks,
        title=heading(rates.model, rates),
        kind="group" if groups else "class",
    )
    notes = _group_notes(rates, chosen) if isinstance(rates, GroupRates) else []
    return replace(table, notes=(_INTERVALS, *notes, *_cut_short(rates, chosen)))


def _group_notes(groups: GroupRates, attacks: Sequence[str]) -> list[str]:
    about = [groups.about] if groups.about else []
    if groups.within == "class":
        return [*about, "An image counts as right if its class is."]
    bound = any(groups.misses_groups(attack) for attack in attacks)
    return [
        *about,
        "An image counts as right if any class of its group is predicted."
        + (" The attacks aimed at another class, so the rates under attack are upper bounds." if bound else ""),
    ]


def _cut_short(rates: Rates, attacks: Sequence[str]) -> list[str]:
    parts = {part: share for attack in attacks for part, share in rates.unfinished(attack).items()}
    return [f"Upper bounds under attack: {shortfall(parts)}."] if parts else []


def _comparison(comparison: Comparison, attacks: Sequence[str] | None) -> Table:
    chosen = _shown_entries(comparison) if attacks is None else [comparison.under(name) for name in attacks]
    table = _join(
        comparison.class_names,
        [tested.n for tested in chosen[0].classes],
        [_change_columns(entry, tests=True) for entry in chosen],
        title=heading(f"{comparison.before} -> {comparison.after}", comparison),
        kind="group" if comparison.groups else "class",
    )
    level = f"{100 * comparison.level:g} %"
    return replace(
        table,
        totals=tuple(row for row in table.totals if row[0].text != "std"),
        notes=(
            f"Changes in points. {CHANGES.replace('95 %', level)}",
            "lost/won: images that only the first, only the second model gets right.",
            "p: exact McNemar, of classes after Holm's correction.",
            f"† more than chance: p at most {1 - comparison.level:g}, or an interval without zero.",
            *(f"{note}." for note in comparison.notes),
        ),
    )


def _shown_entries(comparison: Comparison) -> list[AttackComparison]:
    """All entries, without robust where it is the same as the only attack."""
    single = [entry.average for entry in comparison.attacks if entry.attack not in (CLEAN, ROBUST)]
    return [entry for entry in comparison.attacks if entry.attack != ROBUST or single != [entry.average]]


def _with_legend(table: Table) -> Table:
    return replace(table, notes=("* worst of its column.", *table.notes))


# The columns of one attack


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """What one attack adds to every row (C,) and, by name, to every total; `ranks` and `ranked_by` as of a table."""

    columns: tuple[Column, ...]
    rows: list[Row]
    totals: dict[str, Row]
    ranks: tuple[float, ...]
    ranked_by: str


def _rate_columns(rates: Rates, attack: str) -> _Columns:
    entries, worst, rate = class_rates(rates, attack), rates.worst(attack), rates.rate(attack)
    return _Columns(
        columns=(Column(head=attack),),
        rows=[(_rate(entry.rate, (entry.lower, entry.upper), worst=entry.worst),) for entry in entries],
        totals={
            "average": (_rate(rates.average(attack), rates.average_interval(attack)),),
            "worst": (_rate(worst.value, rates.worst_interval(attack)),),
            "worst is": (worst_name(worst),),
            "std": (Cell(text=percent(metrics.std(rate))),),
            "range": (Cell(text=percent(metrics.accuracy_range(rate))),),
        },
        ranks=tuple(rate.tolist()),
        ranked_by=f"accuracy under {attack}",
    )


def _change_columns(entry: AttackComparison, *, tests: bool = False) -> _Columns:
    """Before, after and the change; with `tests` also the images lost and won, and the p value."""
    heads = ("before", "after", "change", *(("lost/won", "p") if tests else ()))
    blank = (Cell(),) * (len(heads) - 3)

    def tested(found: PairedTest, c: int | None = None) -> Row:
        if not found.n:
            return (Cell(),) * len(heads)
        worst = [c in tied.indices for tied in (entry.worst_before, entry.worst_after)]
        words = (f"{found.lost}/{found.won}", p_value(found.p_adjusted))
        more = tuple(Cell(text=text) for text in words) if tests else ()
        return (*_change(found.difference, sure=found.significant, worst=worst), *more)

    stds = [
        metrics.std(torch.tensor([getattr(found.difference, end) for found in entry.classes], dtype=torch.float64))
        for end in ("before", "after")
    ]
    return _Columns(
        columns=tuple(Column(head=head, over=entry.attack) for head in heads),
        rows=[tested(found, c) for c, found in enumerate(entry.classes)],
        totals={
            "average": tested(entry.average),
            "worst": (*_change(entry.worst, sure=entry.worst.sure), *blank),
            "worst is": (worst_name(entry.worst_before), worst_name(entry.worst_after), Cell(), *blank),
            "std": (*(Cell(text=text) for text in (*map(percent, stds), points(stds[1] - stds[0]))), *blank),
            "range": (*_change(entry.range, sure=entry.range.sure), *blank),
        },
        ranks=tuple(found.difference.change for found in entry.classes),
        ranked_by=f"change under {entry.attack}",
    )


def _join(
    names: Sequence[str], counts: Sequence[int], blocks: Sequence[_Columns], *, title: str, kind: str = "class"
) -> Table:
    """Names (C,) and images (C,) at the left, and beside them the columns of each attack."""
    rows = [
        (name_cell(name), Cell(text=str(n or NO_IMAGES)), *(cell for block in blocks for cell in block.rows[c]))
        for c, (name, n) in enumerate(zip(names, counts, strict=True))
    ]
    totals = [
        (name_cell(total), Cell(), *(cell for block in blocks for cell in block.totals[total]))
        for total in blocks[0].totals
    ]
    return Table(
        title=title,
        columns=(Column(head=kind), Column(head="images"), *(column for block in blocks for column in block.columns)),
        rows=tuple(rows),
        totals=tuple(totals),
        ranks=blocks[-1].ranks,
        ranked_by=blocks[-1].ranked_by,
    )


def _with_norms(table: Table, norms: Sequence[float]) -> Table:
    """The norms (C,) of the rows of the last layer, beside the images."""
    cells = [Cell(text=f"{norm:.3f}") for norm in norms]
    return replace(
        table,
        columns=(*table.columns[:2], Column(head="head norm"), *table.columns[2:]),
        rows=tuple((*row[:2], cell, *row[2:]) for row, cell in zip(table.rows, cells, strict=True)),
        totals=tuple((*row[:2], Cell(), *row[2:]) for row in table.totals),
    )


# Cells


def worst_name(worst: WorstClass) -> Cell:
    """Whose accuracy is lowest, and who shares it."""
    return Cell(text=worst.name, is_name=True, others=worst.others)


def name_cell(text: str) -> Cell:
    """A name that a user gave, or a word."""
    return Cell(text=text, is_name=True)


def _rate(value: float, interval: tuple[float, float], *, worst: bool = False) -> Cell:
    if math.isnan(value):
        return Cell()
    lower, upper = interval
    half = percent(max(value - lower, upper - value))
    return Cell(text=percent(value), interval=span(lower, upper), half=half, mark=WORST if worst else "")


def _change(difference: Difference, *, sure: bool, worst: Sequence[bool] = (False, False)) -> Row:
    """Before, after, and the change."""
    ends = zip((difference.before, difference.after), worst, strict=True)
    value, lower, upper = difference.change, difference.lower, difference.upper
    return (
        *(Cell(text=percent(end), mark=WORST if is_worst else "") for end, is_worst in ends),
        Cell(
            text=points(value),
            interval=points_span(difference),
            half=percent(max(value - lower, upper - value)),
            mark=SURE if sure else "",
        ),
    )
