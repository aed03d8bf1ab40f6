"""A table as plain text, within the columns and the encoding of the screen that shows it.

A table that is too wide gets its intervals on lines of their own; where that is not enough, it goes on below with other
columns. No number is ever left out, and no line broken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from robustfair.errors import needed
from robustfair.report.console import ALL_ROWS, Screen, encodable
from robustfair.report.table import SURE, WORST, Cell, Row, Table
from robustfair.report.words import printable, short_names, shorten

with needed("rich", "a table or report"):
    from rich.cells import cell_len

LONGEST_NAME, LONGEST_CELL = 28, 16
"""Letters of a name at the head of a row, and in another cell."""
MOST_ROWS, LOWEST, HIGHEST = 100, 20, 10
"""On a terminal, a table of more rows shows so many of them, see `Table.ranks`."""


def render(table: Table, screen: Screen = ALL_ROWS) -> str:
    """A table as plain text that ends in a line end, without spaces at the ends of lines."""
    table, left_out = _fewer_rows(table) if screen.terminal else (table, "")
    table = _shown(table, screen)
    parts = [screen.fold(table.title)]
    for columns, stacked in _blocks(table, screen.width):
        parts.append("\n".join(_grid(table, columns, stacked)))
    lines = "\n\n".join(parts).splitlines()
    lines += ["", *(screen.fold(note) for note in (left_out, *table.notes) if note)]
    return encodable("\n".join(line.rstrip() for line in lines), screen.encoding) + "\n"


# Rows


def _fewer_rows(table: Table) -> tuple[Table, str]:
    """The rows that a terminal shows, in their order, and a line that tells of the others."""
    known = [index for index, rank in enumerate(table.ranks) if not math.isnan(rank)]
    if len(table.rows) <= MOST_ROWS or len(known) <= LOWEST + HIGHEST:
        return table, ""
    known.sort(key=lambda index: table.ranks[index])
    kept = sorted(known[:LOWEST] + known[-HIGHEST:])
    line = (
        f"{len(table.rows) - len(kept):,} of {len(table.rows):,} rows are left out: shown are the {LOWEST} lowest and "
        f"the {HIGHEST} highest by {table.ranked_by}. What is no terminal shows all, such as | less or a file."
    )
    return replace(table, rows=tuple(table.rows[index] for index in kept)), line


def _shown(table: Table, screen: Screen) -> Table:
    """The words as this screen shows them: its letters, and names as short as they must be."""
    longest = LONGEST_NAME if screen.width is None else max(8, min(LONGEST_NAME, screen.width // 3))

    def words(text: str) -> str:
        return encodable(printable(text), screen.encoding)

    def row(cells: Row, name: str | None = None) -> Row:
        first = shorten(words(cells[0].text), longest) if name is None else name
        rest = (words(cell.text) for cell in cells[1:])
        texts = [
            shorten(text, LONGEST_CELL) if cell.is_name else text for cell, text in zip(cells[1:], rest, strict=True)
        ]
        return tuple(replace(cell, text=text) for cell, text in zip(cells, (first, *texts), strict=True))

    names = short_names([words(cells[0].text) for cells in table.rows], longest)
    return replace(
        table,
        title=words(table.title),
        rows=tuple(row(cells, name) for cells, name in zip(table.rows, names, strict=True)),
        totals=tuple(map(row, table.totals)),
        above=tuple(map(row, table.above)),
        notes=tuple(map(words, table.notes)),
    )


# Columns


def _blocks(table: Table, width: int | None) -> list[tuple[list[int], bool]]:
    """Columns side by side, block below block, and whether intervals go below their numbers."""
    every = list(range(len(table.columns)))
    for stacked in (False, True):
        if width is None or _width(table, every, stacked) <= width:
            return [(every, stacked)]
    assert width is not None
    labels, rest = every[: table.labels], every[table.labels :]
    alone = [[column] for column in rest]
    attacks = [list(group) for _, group in groupby(rest, key=lambda column: table.columns[column].over or column)]
    for units, stacked in ((attacks, False), (attacks, True), (alone, True)):
        if all(_width(table, labels + unit, stacked) <= width for unit in units):
            break
    blocks: list[list[int]] = []
    for unit in units:
        if blocks and _width(table, blocks[-1] + unit, stacked) <= width:
            blocks[-1] += unit
        else:
            blocks.append(labels + unit)
    return [(block, stacked) for block in blocks]


def _width(table: Table, columns: Sequence[int], stacked: bool) -> int:
    return max(map(cell_len, _grid(table, columns, stacked)))


def _grid(table: Table, columns: Sequence[int], stacked: bool) -> list[str]:
    """The lines of some columns: heads, a rule, and the rows in their sections."""
    marks = [{cell.mark for cell in column} for column in zip(*table.above, *table.rows, *table.totals, strict=True)]
    whole = len(columns) == len(table.columns)

    def texts(row: Row) -> list[list[str]]:
        return [_words(row[column], marks[column], stacked) for column in columns]

    heads = [_head(table, columns, place, wide=whole and not stacked) for place in range(len(columns))]
    totals = [row for row in table.totals if whole or any(row[column].text for column in columns[table.labels :])]
    sections = [[texts(row) for row in rows] for rows in (table.above, table.rows, totals) if rows]
    rows = [heads, *(row for section in sections for row in section)]
    widths = [max(cell_len(line) for row in rows for line in row[place]) for place in range(len(columns))]
    sides = [table.columns[column].side if place else "left" for place, column in enumerate(columns)]

    def lines(row: list[list[str]], *, bottom: bool = False) -> Iterable[str]:
        height = max(map(len, row))
        for line in range(height):
            cells = []
            for words, width, side in zip(row, widths, sides, strict=True):
                at = line - (height - len(words) if bottom else 0)
                text = words[at] if 0 <= at < len(words) else ""
                gap = " " * (width - cell_len(text))
                cells.append(text + gap if side == "left" else gap + text)
            yield f" {'  '.join(cells)}"

    drawn = [*lines(heads, bottom=True), f" {'─' * (sum(widths) + 2 * (len(widths) - 1))}"]
    for number, section in enumerate(sections):
        drawn += [""] if number else []
        drawn += [line for row in section for line in lines(row)]
    return drawn


def _head(table: Table, columns: Sequence[int], place: int, *, wide: bool) -> list[str]:
    """The lines of a head. In a narrow table, the options of an attack take a line each."""
    column = table.columns[columns[place]]
    begins = column.over and (not place or column.over != table.columns[columns[place - 1]].over)
    over, head = column.over, column.head.replace("(", "\n(")
    if not wide:
        over, head = over.replace("(", "\n(").replace(", ", ",\n"), head.replace(", ", ",\n")
    return (f"{over}\n{head}" if begins else head).split("\n")


def _words(cell: Cell, marks: Iterable[str], stacked: bool) -> list[str]:
    """The lines of a cell; where others of its column have a mark, its place is left free, so numbers stay in line."""
    text = cell.text
    if text and WORST in marks and not cell.is_name:
        text = f"{'*' if cell.mark == WORST else ' '}{text}"
    if text and SURE in marks and not cell.is_name:
        text = f"{text}{'†' if cell.mark == SURE else ' '}"
    if cell.others:
        return [text, cell.others]
    if not cell.interval:
        return [text]
    return [text, cell.interval] if stacked else [f"{text} {cell.interval}"]
