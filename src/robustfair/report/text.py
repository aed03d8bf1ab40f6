"""Tables for papers and notes: Markdown, and LaTeX that needs no package beyond booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, get_args

from robustfair.config import require
from robustfair.report.table import SURE, WORST, Cell, Column, Table
from robustfair.report.words import printable

Intervals = Literal["brackets", "pm"]

_BOLD = "Bold: worst of its column."
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "†": r"$^\dagger$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},
}
"""Brackets and stars go in braces: at the start of a row they would be read as arguments of the line end before."""


def markdown(table: Table, *, intervals: Intervals = "brackets") -> str:
    """A table in Markdown with its title and notes.

    Args:
        intervals: "brackets" for `12.3 [11.0, 13.7]`, "pm" for the number and the larger distance to an end.

    Raises:
        ConfigError: another word for the intervals.
    """
    _check(intervals)
    heads = [escape_markdown(f"{column.over} {column.head}".strip()) for column in table.columns]
    rules = [":--", *["--:"] * (len(heads) - 1)]
    rows = [[_markdown_cell(cell, intervals) for cell in row] for row in (*table.rows, *table.totals)]
    lines = [f"| {' | '.join(row)} |" for row in (heads, rules, *rows)]
    notes = " ".join(escape_markdown(note) for note in (_BOLD, *table.notes))
    return "\n".join([f"**{escape_markdown(table.title)}**", "", *lines, "", notes]) + "\n"


def latex(table: Table, *, intervals: Intervals = "brackets") -> str:
    """The same as a `tabular` in the style of booktabs; title and notes are comments above it.

    Arguments and errors as for `markdown`; "pm" prints a plus-minus sign.
    """
    _check(intervals)
    rows, totals = (
        [_latex_row([_latex_cell(cell, intervals) for cell in row]) for row in part]
        for part in (table.rows, table.totals)
    )
    lines = [
        *(f"% {printable(line)}" for line in (table.title, _BOLD, *table.notes, r"Needs \usepackage{booktabs}.")),
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        *_latex_heads(table.columns),
        r"\midrule",
        *rows,
        r"\midrule",
        *totals,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """`text` as LaTeX prints it letter by letter.

    >>> print(escape_latex("5% [a]--b"))
    5\\% {[}a{]}-{}-b
    """
    return re.sub(r"-(?=-)", "-{}", "".join(_LATEX.get(letter, letter) for letter in printable(text)))


def escape_markdown(text: str) -> str:
    """`text` as Markdown shows it letter by letter, also inside a table.

    >>> print(escape_markdown("step_size|*"))
    step\\_size\\|\\*
    """
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", printable(text))


def _markdown_cell(cell: Cell, intervals: Intervals) -> str:
    if cell.is_name:
        return escape_markdown(f"{cell.text} {cell.others}".rstrip())
    text = f"**{cell.text}**" if cell.mark == WORST else cell.text
    return _with_interval(f"{text}†" if cell.mark == SURE else text, cell, intervals, " ± ")


def _latex_cell(cell: Cell, intervals: Intervals) -> str:
    if cell.is_name:
        return escape_latex(f"{cell.text} {cell.others}".rstrip())
    text = escape_latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.mark == WORST else text
    text = _with_interval(f"{text}{_LATEX['†']}" if cell.mark == SURE else text, cell, intervals, r"\,$\pm$\,")
    return re.sub(r"-(?=\d)", "$-$", text)


def _with_interval(text: str, cell: Cell, intervals: Intervals, sign: str) -> str:
    if not cell.interval:
        return text
    return f"{text}{sign}{cell.half}" if intervals == "pm" else f"{text} {cell.interval}"


def _latex_heads(columns: Sequence[Column]) -> list[str]:
    """One line of heads; above it, where columns share an attack, a line of attacks and the rules under them."""
    heads = _latex_row([escape_latex(column.head) for column in columns])
    if not any(column.over for column in columns):
        return [heads]
    over, rules, at = [], [], 1
    for attack, group in groupby(columns, key=lambda column: column.over):
        width = len(list(group))
        over += [rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(attack)}}}"] if attack else [""] * width
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if attack else []
        at += width
    return [_latex_row(over), " ".join(rules), heads]


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _check(intervals: str) -> None:
    require(intervals in get_args(Intervals), "table", "intervals", allowed="brackets or pm", got=intervals)
