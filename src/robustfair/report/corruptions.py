"""A corruption audit for people: a console table, and one offline page with a heat map for the average and one for the
worst class, rows corruptions, columns severities.

The page forbids itself every request, and follows the reader's light or dark scheme by the style sheet of the report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from markupsafe import Markup

from robustfair.data.corruptions.names import ALL, SETS
from robustfair.evaluate.corruptions import CorruptionAudit
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN
from robustfair.files import write_text
from robustfair.report.details import flat
from robustfair.report.figures import HEAT_STEPS, rate_map
from robustfair.report.html import page_path, render_page
from robustfair.report.table import WORST, Cell, Column, Table, name_cell, worst_name
from robustfair.report.words import percent, printable, span

Measure = Literal["average", "worst"]

MEAN = "mean"
_SET_NAMES = {"standard": "standard", "fair_tat": "FAIR-TAT's", "extra": "extra", ALL: "all"}


def corruption_table(audit: CorruptionAudit, *, by_severity: bool = True) -> Table:
    """Average and worst class accuracy under each corruption: by severity, and in the mean with intervals."""
    severities = audit.severities if by_severity else ()
    lowest, hardest = (_lowest(audit, value) for value in (audit.average, lambda name: audit.worst(name).value))

    def is_among(what: str, found: WorstClass) -> bool:
        return what in (audit.corruptions[index] for index in found.indices)

    def both(what: str, severity: int) -> Cell:
        return Cell(text=f"{percent(audit.average(what, severity))}/{percent(audit.worst(what, severity).value)}")

    def mean(value: float, interval: tuple[float, float], *, marked: bool) -> Cell:
        return Cell(text=percent(value), interval=span(*interval), mark=WORST if marked else "")

    def row(what: str) -> tuple[Cell, ...]:
        worst = audit.worst(what)
        return (
            name_cell(row_name(audit, what)),
            *(Cell() if what == CLEAN else both(what, severity) for severity in severities),
            mean(audit.average(what), audit.average_interval(what), marked=is_among(what, lowest)),
            mean(worst.value, audit.worst_interval(what), marked=is_among(what, hardest)),
            worst_name(worst),
        )

    heads = ("corruption", *(f"s{severity}" for severity in severities), "average", "worst")
    legend = "By severity: average/worst class. * lowest of its column. Intervals: 95 %, Wilson; for worst, bootstrap."
    return Table(
        title=f"{audit.model} on {audit.data}, common corruptions, percent right",
        columns=(
            *(Column(head=head) for head in heads),
            Column(head="worst is", side="left"),
        ),
        above=(row(CLEAN),),
        rows=tuple(map(row, audit.corruptions)),
        totals=tuple(map(row, shown_sets(audit))),
        notes=(legend,),
        labels=1,
    )


def summary_lines(audit: CorruptionAudit) -> list[str]:
    """One line for the clean images, each set of corruptions, and the corruption that is hardest on the worst class."""
    rows = []
    hardest = _lowest(audit, lambda name: audit.worst(name).value)
    names = {what: row_name(audit, what) for what in (CLEAN, *shown_sets(audit))}
    for what, name in (names | {audit.corruptions[hardest.class_index]: hardest.words}).items():
        worst = audit.worst(what)
        average = f"average {percent(audit.average(what))} {span(*audit.average_interval(what))}"
        lowest = f"worst class {percent(worst.value)} {span(*audit.worst_interval(what))}"
        rows.append((name, average, f"{lowest}, {printable(worst.words)}"))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:<{first}}  {average:<{second}}  {worst}" for name, average, worst in rows]


def write_corruption_report(path: Path | str, audit: CorruptionAudit, *, title: str | None = None) -> Path:
    """Write the page of a corruption audit, whole or not at all; an earlier file of that name is replaced.

    Args:
        title: heading; None names the model.

    Raises:
        ConfigError: `path` is a folder.
    """
    path = page_path(path)
    page = render_corruption_report(audit, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render_corruption_report(audit: CorruptionAudit, *, title: str | None = None) -> str:
    """The page as text; the same audit gives the same page."""
    highest, lowest = (percent(rate) for rate in _scale(audit))
    return render_page(
        "corruptions.html.j2",
        title=title or f"Common corruptions: {audit.model}",
        lead=_lead(audit),
        facts=_facts(audit),
        steps=[f"h{step}" for step in range(HEAT_STEPS + 1)],
        highest=highest,
        lowest=lowest,
        average=corruption_map(audit, "average"),
        worst=corruption_map(audit, "worst"),
        means=corruption_table(audit, by_severity=False),
        provenance=[
            (name.replace("_", " "), value)
            for name, value in flat({"data fingerprint": audit.fingerprint, **audit.provenance})
            if value
        ],
        script="",
    )


def corruption_map(audit: CorruptionAudit, measure: Measure) -> Markup:
    """Average or worst class accuracy as a heat map in SVG: rows corruptions, columns severities.

    Means are set apart: over severities in the last column, over sets of corruptions in the last rows. Shades are the
    same for both measures.
    """
    sets = shown_sets(audit)
    rows = (*audit.corruptions, *sets)
    columns = (*audit.severities, *([None] if len(audit.severities) > 1 else []))
    value = {"average": audit.average, "worst": lambda *cell: audit.worst(*cell).value}[measure]
    tip = {"average": _average_words, "worst": _worst_words}[measure]
    title = {"average": "Average", "worst": "Worst class"}[measure]
    return rate_map(
        [[value(what, severity) for severity in columns] for what in rows],
        [row_name(audit, what) for what in rows],
        [MEAN if severity is None else str(severity) for severity in columns],
        scale=_scale(audit),
        tips=[
            [f"{_where(audit, what, severity)}: {tip(audit, what, severity)}" for severity in columns] for what in rows
        ],
        apart=(len(sets), len(columns) - len(audit.severities)),
        label=f"{title} accuracy under {len(audit.corruptions)} corruptions, rows, by severity, columns.",
    )


def shown_sets(audit: CorruptionAudit) -> tuple[str, ...]:
    """The sets that a report averages over; not the extra corruptions, and not all where another set says the same."""
    sets = [name for name in audit.sets if name not in ("extra", ALL)]
    said = len(audit.corruptions) == 1 or any(len(SETS[name]) == len(audit.corruptions) for name in sets)
    return tuple(sets if said else [*sets, ALL])


def row_name(audit: CorruptionAudit, what: str) -> str:
    """How reports call a corruption ("gaussian noise") or a set ("mean of standard 15")."""
    if what not in SETS:
        return what.replace("_", " ")
    return f"mean of {_SET_NAMES[what]} {len(audit.corruptions) if what == ALL else len(SETS[what])}"


# The page


def _lead(audit: CorruptionAudit) -> str:
    clean, what = audit.worst(CLEAN), shown_sets(audit)[-1] if shown_sets(audit) else audit.corruptions[0]
    worst, hardest = audit.worst(what), _lowest(audit, lambda name: audit.worst(name).value)
    loser = audit.worst(audit.corruptions[hardest.class_index]).words
    return (
        f"Clean, {percent(audit.average(CLEAN))} % of the images are right and {percent(clean.value)} % of the worst "
        f"class, {printable(clean.words)}. Under corruptions ({row_name(audit, what)}) it is "
        f"{percent(audit.average(what))} % and {percent(worst.value)} %, {printable(worst.words)}. Hardest on a "
        f"class: {hardest.words}, {percent(hardest.value)} % of {printable(loser)}."
    )


def _facts(audit: CorruptionAudit) -> list[tuple[str, str]]:
    return [
        ("Model", audit.model),
        ("Data", f"{audit.data} {audit.split}".strip()),
        ("Images", f"{len(audit.labels):,}"),
        ("Classes", str(audit.num_classes)),
        ("Corruptions", str(len(audit.corruptions))),
        ("Severities", ", ".join(map(str, audit.severities))),
    ]


# Numbers and words


def _lowest(audit: CorruptionAudit, value: Callable[[str], float]) -> WorstClass:
    """The corruptions, for classes, under which a rate is lowest, in the mean over severities."""
    rates = torch.tensor([value(name) for name in audit.corruptions], dtype=torch.float64)
    return WorstClass.of(rates, [row_name(audit, name) for name in audit.corruptions], "corruptions")


def _scale(audit: CorruptionAudit) -> tuple[float, float]:
    """The highest average and the lowest worst class of all cells, clean images among them: the shades of both maps."""
    cells = [(name, severity) for name in audit.corruptions for severity in audit.severities]
    highest = max(audit.average(CLEAN), *(audit.average(*cell) for cell in cells))
    return highest, min(audit.worst(*cell).value for cell in cells)


def _where(audit: CorruptionAudit, what: str, severity: int | None) -> str:
    return f"{row_name(audit, what)}, {'mean over severities' if severity is None else f'severity {severity}'}"


def _average_words(audit: CorruptionAudit, what: str, severity: int | None) -> str:
    return f"{percent(audit.average(what, severity))} % {span(*audit.average_interval(what, severity))}"


def _worst_words(audit: CorruptionAudit, what: str, severity: int | None) -> str:
    worst = audit.worst(what, severity)
    return f"{worst.words} {percent(worst.value)} % {span(*audit.worst_interval(what, severity))}"
