"""Console tables of an audit, class by class, and the words that every report uses for a number.

Rates are fractions everywhere else; here they become percent with one decimal, differences become percentage points.
Colour only repeats what a mark says already: `*` is the worst class of its column.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import IO, Literal

from torch import Tensor

from robustfair import metrics
from robustfair.config import format_eps, needed, require
from robustfair.evaluate.audit import ROBUST, Audit
from robustfair.evaluate.compare import Comparison, check_comparable
from robustfair.evaluate.finding import paired_difference
from robustfair.evaluate.grouping import GroupRates

with needed("rich", "a table or report"):
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

Rates = Audit | GroupRates
Measured = Rates | Comparison

NO_IMAGES = "no images"
_UNLIMITED = 100_000


# Numbers as words


def percent(value: float) -> str:
    """A fraction as percent with one decimal, without the sign.

    >>> percent(0.5234), percent(float("nan"))
    ('52.3', 'n/a')
    """
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def points(change: float) -> str:
    """A difference of two fractions in percentage points, always with its sign; rounding leaves no negative zero.

    >>> points(0.182), points(-0.031), points(-0.0001)
    ('+18.2', '-3.1', '0.0')
    """
    if math.isnan(change):
        return "n/a"
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text


def span(lower: float, upper: float) -> str:
    """An interval in percent.

    >>> span(0.481, 0.5637)
    '[48.1, 56.4]'
    """
    return f"[{percent(lower)}, {percent(upper)}]"


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


def printable(text: str) -> str:
    """Folder names are class names: a control character in one must not reach the terminal.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def threat_words(audit: Measured) -> str:
    """The adversary in words: norm and radius."""
    return f"{audit.threat.norm} eps {format_eps(audit.threat.eps)}"


def heading(title: str, audit: Measured) -> str:
    """What a table is about: models, data, threat and unit."""
    return f"{title} on {audit.data}, {threat_words(audit)}, percent right"


# What the tables show


def shown_attacks(audit: Rates) -> tuple[str, ...]:
    """The columns of a report: the attacks, and "robust" (no attack of them succeeds) where there are several."""
    return (*audit.attacks, ROBUST) if len(audit.attacks) > 2 else audit.attacks


@dataclass(frozen=True, kw_only=True)
class ClassRate:
    """Accuracy of one class under one attack, as fractions; all nan where the class has no images."""

    correct: int
    n: int
    rate: float
    lower: float
    upper: float
    worst: bool


def class_rates(audit: Rates, attack: str) -> list[ClassRate]:
    """One entry a class or group (C,), in the order of the data set, with its 95 % Wilson interval."""
    worst = audit.worst(attack).class_index
    rate, correct, n = audit.rate(attack).tolist(), audit.correct(attack).tolist(), audit.count().tolist()
    lower, upper = (end.tolist() for end in audit.interval(attack))
    return [
        ClassRate(correct=correct[c], n=n[c], rate=rate[c], lower=lower[c], upper=upper[c], worst=c == worst)
        for c in range(len(audit.class_names))
    ]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference of two accuracies on the same images, after - before, with its paired 95 % interval; fractions."""

    value: float
    lower: float
    upper: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.lower > 0 or self.upper < 0

    @property
    def span(self) -> str:
        """The interval in points."""
        return f"[{points(self.lower)}, {points(self.upper)}]"


def changes(before: Audit, after: Audit, attack: str) -> list[Change]:
    """The change of every class (C,) under one attack; nan for a class without images."""
    old, new = before.hits(attack), after.hits(attack)
    return [_change(old[of_class], new[of_class]) for of_class in (after.labels == c for c in range(after.num_classes))]


def change_of_average(before: Audit, after: Audit, attack: str) -> Change:
    """The change of the average under one attack."""
    return _change(before.hits(attack), after.hits(attack))


# Tables


def class_table(audit: Audit, *, width: int | None = None) -> Table:
    """Accuracy class by class under each attack with Wilson intervals, then average, worst class, std and range.

    Args:
        width: columns of the terminal. Where the table would be wider, intervals go on lines of their own, then the
            head norms go, then the intervals. None leaves the table as wide as it wants to be.
    """
    return first_that_fits(
        width,
        lambda: _class_table(audit),
        lambda: _class_table(audit, stacked=True),
        lambda: _class_table(audit, stacked=True, norms=False),
        lambda: _class_table(audit, norms=False, intervals=False),
    )


def before_after_table(
    before: Audit, after: Audit, attacks: Sequence[str] | None = None, *, width: int | None = None
) -> Table:
    """Accuracy class by class before and after a repair, and the change in points, under each attack.

    A change stands with its 95 % interval, paired over the images; that of the worst class has none, since it may be
    another class before and after.

    Args:
        attacks: None takes those that both audits have.
        width: as for `class_table`.

    Raises:
        DataError: the audits are not of the same images, classes and threat.
        ConfigError: an attack that one of them lacks, or none at all.
    """
    check_comparable(before, after)
    shared = [attack for attack in shown_attacks(after) if attack in shown_attacks(before)]
    chosen = shared if attacks is None else list(attacks)
    allowed = f"in both audits ({', '.join(shared)})"
    for attack in chosen:
        require(attack in shared, "report", "attack", allowed=allowed, got=attack)
    require(bool(chosen), "report", "attacks", allowed=f"at least one {allowed}", got=chosen)
    return first_that_fits(
        width,
        lambda: _before_after_table(before, after, chosen),
        lambda: _before_after_table(before, after, chosen, stacked=True),
        lambda: _before_after_table(before, after, chosen, intervals=False),
    )


def summary_lines(audit: Audit) -> list[str]:
    """One line per attack: average and worst class, each with its interval.

    They are aligned, and fit below one another in a log.
    """
    rows = []
    for attack in shown_attacks(audit):
        worst = audit.worst(attack)
        average = f"average {percent(audit.average(attack))} {span(*audit.average_interval(attack))}"
        lowest = f"worst class {percent(worst.value)} {span(*audit.worst_interval(attack))}"
        rows.append((attack, average, f"{lowest}, {printable(worst.class_name)}"))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{attack:<{first}}  {average:<{second}}  {worst}" for attack, average, worst in rows]


def member_lines(audit: Audit) -> list[str]:
    """For every strong attack of several parts, how many images each part broke, on what those before had left."""
    found = []
    for attack in audit.broken_by:
        parts = [f"{member} {int(count.sum())}" for member, count in audit.fell_to(attack).items()]
        if len(parts) > 1:
            found.append(f"{attack} broke by {', '.join(parts)}")
    return found


# Output


def render(table: Table, width: int | None = None) -> str:
    """A table as plain text, without colour and without spaces at line ends; None is as wide as it wants to be."""
    out = StringIO()
    width = natural_width(table) if width is None else width
    Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def show(table: Table, file: IO[str] | None = None) -> None:
    """Print to a terminal in its width and colours; to anything else as plain text that is never cut."""
    console = Console(file=file or sys.stdout)
    if console.is_terminal:
        console.print(table)
    else:
        console.file.write(render(table))


# Parts


def first_that_fits(width: int | None, *builds: Callable[[], Table]) -> Table:
    """The first table that is not wider than `width`; the last one if all are."""
    for build in builds:
        table = build()
        if width is None or natural_width(table) <= width:
            break
    return table


def _class_table(audit: Audit, *, stacked: bool = False, norms: bool = True, intervals: bool = True) -> Table:
    attacks, head_norms = shown_attacks(audit), audit.head_norms if norms else None
    table = _table(audit.model, audit, "* worst class of its column. Intervals: 95 %, Wilson; for worst, bootstrap.")
    if head_norms is not None:
        add_column(table, "head norm")
    for attack in attacks:
        add_column(table, attack.replace("(", "\n("))

    def cell(value: float, interval: tuple[float, float]) -> str:
        if not intervals:
            return percent(value)
        return f"{percent(value)}{gap(stacked)}{span(*interval)}"

    columns = [class_rates(audit, attack) for attack in attacks]
    for c, name in enumerate(_names(audit)):
        row = [column[c] for column in columns]
        norm = [] if head_norms is None else [f"{head_norms[c]:.3f}"]
        rates = [_marked(cell(e.rate, (e.lower, e.upper)) if e.n else "", e.worst) for e in row]
        add_row(table, [name, str(row[0].n or NO_IMAGES), *norm, *rates])
    table.add_section()
    blank = [""] * (1 if head_norms is None else 2)
    worst = {attack: audit.worst(attack) for attack in attacks}
    add_row(table, ["average", *blank, *(cell(audit.average(a), audit.average_interval(a)) for a in attacks)])
    add_row(table, ["worst", *blank, *(cell(worst[a].value, audit.worst_interval(a)) for a in attacks)])
    add_row(table, ["worst is", *blank, *(_name(worst[a].class_name, 16) for a in attacks)])
    add_row(table, ["std", *blank, *(percent(metrics.std(audit.rate(a))) for a in attacks)])
    add_row(table, ["range", *blank, *(percent(metrics.accuracy_range(audit.rate(a))) for a in attacks)])
    return table


def _before_after_table(
    before: Audit, after: Audit, attacks: Sequence[str], *, stacked: bool = False, intervals: bool = True
) -> Table:
    title = f"{before.model} -> {after.model}"
    table = _table(title, after, "* worst class of its column. Changes in points, intervals 95 %, paired.")
    for attack in attacks:
        for head in (f"{attack}\nbefore", "after", "change"):
            add_column(table, head)

    def change(value: Change) -> str:
        if math.isnan(value.value):
            return ""
        return f"{points(value.value)}{gap(stacked)}{value.span}" if intervals else points(value.value)

    columns = [
        (class_rates(before, attack), class_rates(after, attack), changes(before, after, attack)) for attack in attacks
    ]
    for c, name in enumerate(_names(after)):
        cells: list[str | Text] = [name, str(columns[0][0][c].n or NO_IMAGES)]
        for old, new, changed in columns:
            cells += [_marked(percent(e.rate) if e.n else "", e.worst) for e in (old[c], new[c])]
            cells.append(change(changed[c]))
        add_row(table, cells)
    table.add_section()
    rows: dict[str, list[str | Text]] = {name: [name, ""] for name in ("average", "worst", "worst is", "std", "range")}
    for attack in attacks:
        old_rate, new_rate = before.rate(attack), after.rate(attack)
        old_worst, new_worst = before.worst(attack), after.worst(attack)
        rows["average"] += [percent(before.average(attack)), percent(after.average(attack))]
        rows["average"].append(change(change_of_average(before, after, attack)))
        rows["worst is"] += [_name(old_worst.class_name, 14), _name(new_worst.class_name, 14), ""]
        for name, old_value, new_value in (
            ("worst", old_worst.value, new_worst.value),
            ("std", metrics.std(old_rate), metrics.std(new_rate)),
            ("range", metrics.accuracy_range(old_rate), metrics.accuracy_range(new_rate)),
        ):
            rows[name] += [percent(old_value), percent(new_value), points(new_value - old_value)]
    for cells in rows.values():
        add_row(table, cells)
    return table


def _change(before: Tensor, after: Tensor) -> Change:
    """Of hits (n,) on the same images."""
    value, lower, upper = paired_difference(after, before) if len(after) else (math.nan, math.nan, math.nan)
    return Change(value=value, lower=lower, upper=upper)


def empty_table(title: str, caption: str) -> Table:
    """A table without columns; strings that reach it are never read as markup."""
    return Table(
        title=Text(title),
        caption=Text(caption),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )


def _table(title: str, audit: Audit, caption: str) -> Table:
    table = empty_table(printable(heading(title, audit)), caption)
    add_column(table, "class", justify="left")
    add_column(table, "images")
    return table


def add_column(table: Table, head: str, *, justify: Literal["left", "right"] = "right") -> None:
    table.add_column(Text(head), justify=justify, no_wrap=True)


def add_row(table: Table, cells: Sequence[str | Text]) -> None:
    """Add a row; plain strings become texts, so that a bracket in a class name is not read as markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _marked(text: str, worst: bool) -> Text:
    """The worst class of a column bears `*`; the others leave its place free, so that numbers stay in line."""
    return Text(f"{'*' if worst else ' '}{text}", style="bold" if worst else "")


def gap(stacked: bool) -> str:
    """What stands between a number and its interval."""
    return "\n" if stacked else " "


def _names(audit: Audit) -> list[str]:
    return short_names([printable(name) for name in audit.class_names], 28)


def _name(name: str, limit: int) -> str:
    return shorten(printable(name), limit)


def natural_width(table: Table) -> int:
    """Columns that a table takes where nothing limits it."""
    console = Console(file=StringIO(), width=_UNLIMITED)
    return Measurement.get(console, console.options, table).maximum
