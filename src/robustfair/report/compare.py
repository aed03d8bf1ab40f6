"""Console tables of a comparison and of a grouping, in the manner of `robustfair.report.table`."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from robustfair.config import needed
from robustfair.evaluate.compare import Comparison
from robustfair.evaluate.grouping import GroupRates
from robustfair.report.sheet import SURE, WORST, Cell, Sheet, sheet_of
from robustfair.report.table import (
    add_column,
    add_row,
    empty_table,
    first_that_fits,
    gap,
    natural_width,
    printable,
    short_names,
    shorten,
)

with needed("rich", "a table or report"):
    from rich.table import Table
    from rich.text import Text


def comparison_table(
    comparison: Comparison, attacks: Sequence[str] | None = None, *, width: int | None = None
) -> Table:
    """Accuracy class by class before and after, the change with its paired interval and its test, under each attack.

    Args:
        attacks: None takes those of the comparison, and robust where there are several.
        width: columns of the terminal. Where the table would be wider, intervals go on lines of their own, then they
            go. None leaves the table as wide as it wants to be.

    Raises:
        UnknownNameError: an attack that the comparison does not hold.
    """
    return _fitted(sheet_of(comparison, attacks), width)


def comparison_tables(
    comparison: Comparison, attacks: Sequence[str] | None = None, *, width: int | None = None
) -> list[Table]:
    """The same in one table where that fits with its intervals, else in one an attack with the notes under the last."""
    whole = sheet_of(comparison, attacks)
    shown = list(dict.fromkeys(column.over for column in whole.columns if column.over))
    if width is None or len(shown) == 1 or natural_width(_table(whole, stacked=True)) <= width:
        return [_fitted(whole, width)]
    sheets = [sheet_of(comparison, [attack]) for attack in shown]
    return [_fitted(replace(sheet, notes=()), width) for sheet in sheets[:-1]] + [_fitted(sheets[-1], width)]


def group_table(groups: GroupRates, attacks: Sequence[str] | None = None, *, width: int | None = None) -> Table:
    """Accuracy group by group under each attack, with Wilson intervals; arguments as for `comparison_table`."""
    return _fitted(sheet_of(groups, attacks), width)


def _fitted(sheet: Sheet, width: int | None) -> Table:
    return first_that_fits(
        width,
        lambda: _table(sheet),
        lambda: _table(sheet, stacked=True),
        lambda: _table(sheet, intervals=False),
    )


def _table(sheet: Sheet, *, stacked: bool = False, intervals: bool = True) -> Table:
    table = empty_table(printable(sheet.title), "\n".join(["* worst of its column.", *map(printable, sheet.notes)]))
    for at, column in enumerate(sheet.columns):
        begins = column.over and column.over != sheet.columns[at - 1].over
        head = f"{column.over}\n{column.head}" if begins else column.head.replace("(", "\n(")
        add_column(table, head, justify="right" if at else "left")
    marked = [{cell.mark for cell in column} for column in zip(*sheet.rows, *sheet.totals, strict=True)]

    def words(row: Sequence[Cell]) -> list[Text]:
        return [_words(cell, marks, stacked, intervals) for cell, marks in zip(row, marked, strict=True)]

    names = short_names([printable(row[0].text) for row in sheet.rows], 28)
    for name, row in zip(names, sheet.rows, strict=True):
        add_row(table, [name, *words(row)[1:]])
    table.add_section()
    for row in sheet.totals:
        add_row(table, words(row))
    return table


def _words(cell: Cell, marks: Set[str], stacked: bool, intervals: bool) -> Text:
    """A cell with its mark; where others of its column bear one, its place is left free, so numbers stay in line."""
    text = shorten(printable(cell.text), 16) if cell.is_name else cell.text
    if text and WORST in marks:
        text = f"{'*' if cell.mark == WORST else ' '}{text}"
    if text and SURE in marks:
        text = f"{text}{'†' if cell.mark == SURE else ' '}"
    if cell.interval and intervals:
        text = f"{text}{gap(stacked)}{cell.interval}"
    return Text(text, style="bold" if cell.mark else "")
