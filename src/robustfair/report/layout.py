"""A table in words, and its one layout as text: within the columns and the encoding of the screen that shows it.

A table that is too wide gets its intervals on lines of their own; where that is not enough, it goes on below with other
columns. No number is ever left out, and no line broken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from robustfair.errors import needed
from robustfair.report.console import Screen, encodable

with needed("rich", "a table or report"):
    from rich.cells import cell_len

WORST: Literal["worst"] = "worst"
SURE: Literal["sure"] = "sure"
LONGEST_NAME, LONGEST_CELL = 28, 16
"""Letters of a name at the head of a row, and in another cell."""
MOST_ROWS, LOWEST, HIGHEST = 100, 20, 10
"""On a terminal, a table of more rows shows so many of them, see `Sheet.ranks`."""
ALL_ROWS = Screen()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of a table.

    Attributes:
        text: a number in words, or a name.
        interval: of the number, in brackets; "" without.
        half: the larger distance from the number to an end of its interval.
        mark: "worst" class of its column, or a change that is "sure" to be one.
        is_name: whether the text is a name that a user gave, or a word.
        others: who shares what the name stands for: "and 2 others".
    """

    text: str = ""
    interval: str = ""
    half: str = ""
    mark: Literal["", "worst", "sure"] = ""
    is_name: bool = False
    others: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its head, the attack that it shares with its neighbours, "" if it stands alone, and its side."""

    head: str
    over: str = ""
    side: Literal["left", "right"] = "right"


Row = tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table in words.

    Attributes:
        title: models, data, threat and unit.
        columns: names of the rows first.
        rows: one a class or group.
        totals: rows over all of them.
        notes: what the numbers are, one sentence each.
        above: rows that stand before the others.
        labels: how many columns at the left say what a row is: its name, and mostly its images.
        ranks: a number a row; of very many rows, those of the lowest and the highest are shown on a terminal. Empty
            where all are.
        ranked_by: what these numbers are.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    totals: tuple[Row, ...]
    notes: tuple[str, ...]
    above: tuple[Row, ...] = ()
    labels: int = 2
    ranks: tuple[float, ...] = ()
    ranked_by: str = ""


def render(sheet: Sheet, screen: Screen = ALL_ROWS) -> str:
    """A table as plain text that ends in a line end, without spaces at the ends of lines."""
    sheet, left_out = _fewer_rows(sheet) if screen.terminal else (sheet, "")
    sheet = _shown(sheet, screen)
    parts = [screen.fold(sheet.title)]
    for columns, stacked in _blocks(sheet, screen.width):
        parts.append("\n".join(_grid(sheet, columns, stacked)))
    lines = "\n\n".join(parts).splitlines()
    lines += ["", *(screen.fold(note) for note in (left_out, *sheet.notes) if note)]
    return encodable("\n".join(line.rstrip() for line in lines), screen.encoding) + "\n"


def printable(text: str) -> str:
    """Folder names are class names: a control character in one must not reach the terminal.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shorten(name: str, limit: int) -> str:
    """`name` with its middle left out where it is longer than `limit`, since long names often differ at their end.

    >>> shorten("traffic sign, speed limit 30", 15), shorten("cat", 15)
    ('traffic…imit 30', 'cat')
    """
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """Every name in at most `limit` letters; where two would look the same, all bear their number in the data set.

    >>> short_names(["speed_limit_30_urban", "speed_limit_50_urban"], 12)
    ['0 speed…rban', '1 speed…rban']
    """
    short = [shorten(name, limit) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    room = limit - len(f"{len(names) - 1} ")
    return [f"{index} {shorten(name, room)}" for index, name in enumerate(names)]


# Rows


def _fewer_rows(sheet: Sheet) -> tuple[Sheet, str]:
    """The rows that a terminal shows, in their order, and a line that tells of the others."""
    known = [index for index, rank in enumerate(sheet.ranks) if not math.isnan(rank)]
    if len(sheet.rows) <= MOST_ROWS or len(known) <= LOWEST + HIGHEST:
        return sheet, ""
    known.sort(key=lambda index: sheet.ranks[index])
    kept = sorted(known[:LOWEST] + known[-HIGHEST:])
    line = (
        f"{len(sheet.rows) - len(kept):,} of {len(sheet.rows):,} rows are left out: shown are the {LOWEST} lowest and "
        f"the {HIGHEST} highest by {sheet.ranked_by}. What is no terminal shows all, such as | less or a file."
    )
    return replace(sheet, rows=tuple(sheet.rows[index] for index in kept)), line


def _shown(sheet: Sheet, screen: Screen) -> Sheet:
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

    names = short_names([words(cells[0].text) for cells in sheet.rows], longest)
    return replace(
        sheet,
        title=words(sheet.title),
        rows=tuple(row(cells, name) for cells, name in zip(sheet.rows, names, strict=True)),
        totals=tuple(map(row, sheet.totals)),
        above=tuple(map(row, sheet.above)),
        notes=tuple(map(words, sheet.notes)),
    )


# Columns


def _blocks(sheet: Sheet, width: int | None) -> list[tuple[list[int], bool]]:
    """Columns that stand side by side, block below block, and whether intervals go below their numbers."""
    every = list(range(len(sheet.columns)))
    for stacked in (False, True):
        if width is None or _width(sheet, every, stacked) <= width:
            return [(every, stacked)]
    assert width is not None
    labels, rest = every[: sheet.labels], every[sheet.labels :]
    alone = [[column] for column in rest]
    attacks = [list(group) for _, group in groupby(rest, key=lambda column: sheet.columns[column].over or column)]
    for units, stacked in ((attacks, False), (attacks, True), (alone, True)):
        if all(_width(sheet, labels + unit, stacked) <= width for unit in units):
            break
    blocks: list[list[int]] = []
    for unit in units:
        if blocks and _width(sheet, blocks[-1] + unit, stacked) <= width:
            blocks[-1] += unit
        else:
            blocks.append(labels + unit)
    return [(block, stacked) for block in blocks]


def _width(sheet: Sheet, columns: Sequence[int], stacked: bool) -> int:
    return max(map(cell_len, _grid(sheet, columns, stacked)))


def _grid(sheet: Sheet, columns: Sequence[int], stacked: bool) -> list[str]:
    """The lines of some columns: heads, a rule, and the rows in their sections."""
    marks = [{cell.mark for cell in column} for column in zip(*sheet.above, *sheet.rows, *sheet.totals, strict=True)]
    whole = len(columns) == len(sheet.columns)

    def texts(row: Row) -> list[list[str]]:
        return [_words(row[column], marks[column], stacked) for column in columns]

    heads = [_head(sheet, columns, place, wide=whole and not stacked) for place in range(len(columns))]
    totals = [row for row in sheet.totals if whole or any(row[column].text for column in columns[sheet.labels :])]
    sections = [[texts(row) for row in rows] for rows in (sheet.above, sheet.rows, totals) if rows]
    rows = [heads, *(row for section in sections for row in section)]
    widths = [max(cell_len(line) for row in rows for line in row[place]) for place in range(len(columns))]
    sides = [sheet.columns[column].side if place else "left" for place, column in enumerate(columns)]

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


def _head(sheet: Sheet, columns: Sequence[int], place: int, *, wide: bool) -> list[str]:
    """The lines of a head. Where room is scarce, the options of an attack take a line each."""
    column = sheet.columns[columns[place]]
    begins = column.over and (not place or column.over != sheet.columns[columns[place - 1]].over)
    over, head = column.over, column.head.replace("(", "\n(")
    if not wide:
        over, head = over.replace("(", "\n(").replace(", ", ",\n"), head.replace(", ", ",\n")
    return (f"{over}\n{head}" if begins else head).split("\n")


def _words(cell: Cell, marks: Iterable[str], stacked: bool) -> list[str]:
    """The lines of a cell; where others of its column bear a mark, its place is left free, so numbers stay in line."""
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
