"""What a table says, before anything says how it looks: the cells of an audit, a grouping or a comparison, in words.

`robustfair.report.layout` lays them out for a terminal, `robustfair.report.text` for Markdown and LaTeX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from robustfair import metrics
from robustfair.evaluate.compare import AttackComparison, Comparison, Difference, PairedTest
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.result import CLEAN, ROBUST, shortfall
from robustfair.report.layout import SURE, WORST, Cell, Column, Sheet
from robustfair.report.table import (
    CHANGES,
    NO_IMAGES,
    Measured,
    Rates,
    class_rates,
    heading,
    percent,
    points,
    shown_attacks,
    span,
    worst_name,
)


def sheet_of(measured: Measured, attacks: Sequence[str] | None = None) -> Sheet:
    """The table of an audit, of its rates by group, or of a comparison.

    Args:
        attacks: None takes all, and robust where there are several.

    Raises:
        UnknownNameError: an attack that it does not hold.
    """
    return _changes(measured, attacks) if isinstance(measured, Comparison) else _rates(measured, attacks)


def p_value(p: float) -> str:
    """A probability in words, nothing for nan.

    >>> p_value(0.0312), p_value(0.0004), p_value(float("nan"))
    ('0.031', '<0.001', '')
    """
    if math.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# Rates


def _rates(rates: Rates, attacks: Sequence[str] | None) -> Sheet:
    chosen = shown_attacks(rates) if attacks is None else tuple(attacks)
    kind = "group" if isinstance(rates, GroupRates) else "class"
    columns = [class_rates(rates, attack) for attack in chosen]
    rows = []
    for c, (name, n) in enumerate(zip(rates.class_names, rates.count().tolist(), strict=True)):
        cells = [_rate(column[c].rate, (column[c].lower, column[c].upper), worst=column[c].worst) for column in columns]
        rows.append((_name(name), Cell(text=str(n or NO_IMAGES)), *cells))

    def total(label: str, cell: Callable[[str], Cell]) -> tuple[Cell, ...]:
        return _name(label), Cell(), *map(cell, chosen)

    return Sheet(
        title=heading(rates.model, rates),
        columns=(Column(head=kind), Column(head="images"), *(Column(head=attack) for attack in chosen)),
        rows=tuple(rows),
        totals=(
            total("average", lambda attack: _rate(rates.average(attack), rates.average_interval(attack))),
            total("worst", lambda attack: _rate(rates.worst(attack).value, rates.worst_interval(attack))),
            total("worst is", lambda attack: worst_name(rates.worst(attack))),
            total("std", lambda attack: Cell(text=percent(metrics.std(rates.rate(attack))))),
            total("range", lambda attack: Cell(text=percent(metrics.accuracy_range(rates.rate(attack))))),
        ),
        notes=(
            "Intervals: 95 %, Wilson; for worst, bootstrap.",
            *(_group_notes(rates, chosen) if isinstance(rates, GroupRates) else ()),
            *_cut_short(rates, chosen),
        ),
        ranks=tuple(rates.rate(chosen[-1]).tolist()),
        ranked_by=f"accuracy under {chosen[-1]}",
    )


def _group_notes(groups: GroupRates, attacks: Sequence[str]) -> list[str]:
    if groups.within == "class":
        return ["An image counts as right if its class is."]
    bound = any(groups.misses_groups(attack) for attack in attacks)
    return [
        "An image counts as right if any class of its group is predicted."
        + (" The attacks aimed at another class, so the rates under attack are upper bounds." if bound else "")
    ]


def _cut_short(rates: Rates, attacks: Sequence[str]) -> list[str]:
    parts = {part: share for attack in attacks for part, share in rates.unfinished(attack).items()}
    return [f"Upper bounds under attack: {shortfall(parts)}."] if parts else []


# Changes


def _changes(comparison: Comparison, attacks: Sequence[str] | None) -> Sheet:
    chosen = _shown(comparison) if attacks is None else [comparison.under(name) for name in attacks]
    first = chosen[0]
    rows = [
        (
            _name(name),
            Cell(text=str(first.classes[c].n or NO_IMAGES)),
            *(cell for entry in chosen for cell in _class_cells(entry, c)),
        )
        for c, name in enumerate(comparison.class_names)
    ]
    labels = ("average", "worst", "worst is", "range")
    totals = [
        (_name(label), Cell(), *(cell for entry in chosen for cell in _total_cells(entry)[label])) for label in labels
    ]
    heads = ("before", "after", "change", "lost/won", "p")
    level = f"{100 * comparison.level:g} %"
    return Sheet(
        title=heading(f"{comparison.before} -> {comparison.after}", comparison),
        columns=(
            Column(head="class"),
            Column(head="images"),
            *(Column(head=head, over=entry.attack) for entry in chosen for head in heads),
        ),
        rows=tuple(rows),
        totals=tuple(totals),
        notes=(
            f"Changes in points. {CHANGES.replace('95 %', level)}",
            "lost/won: images that only the first, only the second model gets right.",
            "p: exact McNemar, of classes after Holm's correction.",
            f"† more than chance: p at most {1 - comparison.level:g}, or an interval without zero.",
            *(f"{note}." for note in comparison.notes),
        ),
        ranks=tuple(tested.difference.change for tested in chosen[-1].classes),
        ranked_by=f"change under {chosen[-1].attack}",
    )


def _shown(comparison: Comparison) -> list[AttackComparison]:
    """All entries, without robust where it is the same as the only attack."""
    single = [entry.average for entry in comparison.attacks if entry.attack not in (CLEAN, ROBUST)]
    return [entry for entry in comparison.attacks if entry.attack != ROBUST or single != [entry.average]]


def _class_cells(entry: AttackComparison, c: int) -> list[Cell]:
    tested = entry.classes[c]
    if not tested.n:
        return [Cell()] * 5
    return _tested_cells(tested, worst=(c in entry.worst_before.indices, c in entry.worst_after.indices))


def _tested_cells(tested: PairedTest, *, worst: tuple[bool, bool] = (False, False)) -> list[Cell]:
    return [
        *_both(tested.difference, worst),
        _change(tested.difference, sure=tested.significant),
        Cell(text=f"{tested.lost}/{tested.won}"),
        Cell(text=p_value(tested.p_adjusted)),
    ]


def _total_cells(entry: AttackComparison) -> dict[str, list[Cell]]:
    """By the label of their row."""
    blank = [Cell(), Cell()]
    return {
        "average": _tested_cells(entry.average),
        "worst": [*_both(entry.worst), _change(entry.worst, sure=entry.worst.sure), *blank],
        "worst is": [worst_name(entry.worst_before), worst_name(entry.worst_after), Cell(), *blank],
        "range": [*_both(entry.range), _change(entry.range, sure=entry.range.sure), *blank],
    }


def _both(difference: Difference, worst: tuple[bool, bool] = (False, False)) -> list[Cell]:
    pairs = zip((difference.before, difference.after), worst, strict=True)
    return [Cell(text=percent(value), mark=WORST if is_worst else "") for value, is_worst in pairs]


# Cells


def _name(text: str) -> Cell:
    return Cell(text=text, is_name=True)


def _rate(value: float, interval: tuple[float, float], *, worst: bool = False) -> Cell:
    if math.isnan(value):
        return Cell()
    lower, upper = interval
    half = percent(max(value - lower, upper - value))
    return Cell(text=percent(value), interval=span(lower, upper), half=half, mark=WORST if worst else "")


def _change(difference: Difference, *, sure: bool) -> Cell:
    value, lower, upper = difference.change, difference.lower, difference.upper
    return Cell(
        text=points(value),
        interval=f"[{points(lower)}, {points(upper)}]",
        half=percent(max(value - lower, upper - value)),
        mark=SURE if sure else "",
    )
