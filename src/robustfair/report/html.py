"""The report: one HTML file that reads offline, on a telephone, on paper and in the dark.

The page forbids itself every request (its content security policy names no source), and all of it is readable without
the script, which only re-orders the class table. This module turns an audit into finished words and tables; the order
of the page is in `templates/report.html.j2`, its looks in `templates/report.css`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from robustfair.errors import ConfigError, needed
from robustfair.evaluate.compare import check_comparable, compare_under
from robustfair.evaluate.diagnostics.results import diagnose, diagnose_change
from robustfair.evaluate.gates import GateResult
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.files import write_text
from robustfair.grammar import read_path
from robustfair.registry import REPORTS
from robustfair.report import details, figures, panels
from robustfair.report.figures import Bar
from robustfair.report.rates import (
    ClassRate,
    both_attacks,
    class_rates,
    image_lines,
    shown_attacks,
    strongest,
    under_words,
)
from robustfair.report.table import CHANGES, TESTED, Row, Table, class_table, table_of
from robustfair.report.words import percent, span, threat_words

SEVERITIES = {"warn": "Warning", "note": "Note"}

TOTAL_NAMES = {"average": "Average", "worst": "Worst class", "std": "Standard deviation", "range": "Range"}
"""Totals of the class table by their rows in a `Table`."""


@REPORTS.register("html")
def write_report(
    path: Path | str,
    audit: Audit,
    *,
    baseline: Audit | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    title: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    rates: GroupRates | None = None,
    gates: Sequence[GateResult] = (),
) -> Path:
    """Write the report of an audit, whole or not at all; an earlier file of that name is replaced.

    Args:
        baseline: the audit before a repair, over the same classes: every rate is then shown before and after.
        history: records of a training run, one an epoch, as `fit` leaves them.
        title: heading; None names the model.
        recipe: what the model was made from, printed as YAML.
        rates: the audit's by group, as a table of their own.
        gates: demands on the audit, each shown with its outcome.

    Raises:
        ConfigError: `path` is a folder.
        DataError: the baseline is over other classes.
    """
    path = page_path(path)
    more: dict[str, Any] = {"history": history, "title": title, "recipe": recipe, "rates": rates, "gates": gates}
    page = render_report(audit, baseline=baseline, **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render_report(
    audit: Audit,
    *,
    baseline: Audit | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    title: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    rates: GroupRates | None = None,
    gates: Sequence[GateResult] = (),
) -> str:
    """The page as text; arguments as for `write_report`. The same audit gives the same page."""
    if baseline is not None:
        check_comparable(baseline, audit)
    attacks = shown_attacks(audit)
    before = {} if baseline is None else dict.fromkeys(both_attacks(baseline, audit), baseline)
    table = class_table(audit, {attack: compare_under(other, audit, attack) for attack, other in before.items()})
    script = _asset("report.js")
    return render_page(
        "report.html.j2",
        title=title or f"Robustness by class: {audit.model}",
        lead=_lead(audit, baseline),
        facts=_facts(audit, baseline),
        findings=_findings(audit, baseline),
        gates=[{"status": gate.status, "line": gate.line} for gate in gates],
        groups=None if rates is None else table_of(rates),
        attacks=attacks,
        has_baseline=baseline is not None,
        has_norms=audit.head_norms is not None,
        tiles=[_tile(audit, before.get(attack), attack) for attack in attacks],
        tiles_note=_tiles_note(audit),
        classes=_class_rows(audit, before, table),
        totals=_total_rows(audit, table),
        classes_note=_classes_note(baseline),
        classes_caption=f"Accuracy of each class of {audit.data} under {', '.join(attacks)}, percent, with intervals",
        confusion=panels.confusion(audit, before),
        norms=panels.norm_figures(audit, baseline),
        history=panels.history_figures(history or (), audit.class_names),
        history_note=panels.history_note(history or ()),
        metrics=details.metrics_table(audit, before, paired=baseline is not None),
        vectors=details.vectors_table(audit),
        vectors_under=under_words(audit, strongest(audit)),
        settings=details.settings_table(audit),
        provenance=details.provenance(audit, baseline),
        recipe=_yaml(recipe),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def page_path(path: Path | str) -> Path:
    """Where a page goes.

    Raises:
        ConfigError: `path` is a folder.
    """
    path = read_path(path)
    if path.is_dir():
        raise ConfigError("report", "path", allowed="a file name", got=str(path), hint=f"Try {path / 'report.html'}.")
    return path


def render_page(template: str, **values: Any) -> str:
    """A page of `templates`; every value that is not `Markup` is escaped."""
    with needed("jinja2", "a report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("robustfair.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    page = environment.get_template(template).render(style=Markup(_asset("report.css")), **values)
    return page.encode("utf-8", "replace").decode()


def breakable(name: str) -> Markup:
    """`name`, escaped, with places where a line may break: after each underscore, hyphen and slash.

    >>> str(breakable("speed_limit <30>"))
    'speed_<wbr>limit &lt;30&gt;'
    """
    return Markup("<wbr>").join(re.split(r"(?<=[_/-])(?=\w)", name))


# Head of the page


def _lead(audit: Audit, baseline: Audit | None) -> str:
    """The finding in two sentences: the worst class under the hardest column, against the average."""
    attack = shown_attacks(audit)[-1]
    worst, average = audit.worst(attack), audit.average(attack)
    under = under_words(audit, attack)
    value = f"{percent(worst.value)}\u00a0%"
    keeps = f"the worst class, {worst.words}, keeps {value} of its images"
    if not worst.indices:
        keeps = f"{worst.words} keep {value} of their images"
    elif worst.others:
        keeps = f"the worst classes, {worst.words}, keep {value} of their images"
    text = (
        f"{under[0].upper()}{under[1:]} {keeps} {span(*audit.worst_interval(attack))}; the average is "
        f"{percent(average)}\u00a0%."
    )
    if baseline is not None and attack in both_attacks(baseline, audit):
        was = baseline.worst(attack)
        named = f"the worst class was {was.words} with" if was.indices else f"{was.words} kept"
        text += (
            f" Before, {named} {percent(was.value)}\u00a0% {span(*baseline.worst_interval(attack))} and the average "
            f"{percent(baseline.average(attack))}\u00a0%."
        )
    return text


def _facts(audit: Audit, baseline: Audit | None) -> list[tuple[str, str]]:
    facts = [("Model", audit.model)]
    if baseline is not None:
        facts.append(("Compared with", baseline.model))
    split = f", {audit.split} split" if audit.split else ""
    facts += [
        ("Data", f"{audit.data}{split}"),
        ("Images", f"{len(audit.labels):,} in {audit.num_classes} classes"),
        *([("Sample", "; ".join(lines))] if (lines := image_lines(audit)) else []),
        ("Threat", threat_words(audit)),
        ("Attacks", ", ".join(audit.attacks)),
    ]
    date = audit.provenance.get("date")
    return facts + ([("Date", str(date)[:10])] if date else [])


def _findings(audit: Audit, baseline: Audit | None) -> list[dict[str, str]]:
    found = list(diagnose(audit))
    if baseline is not None:
        found += diagnose_change(baseline, audit)
    return [
        {"kind": item.severity, "severity": SEVERITIES[item.severity], "text": item.text, "advice": item.advice}
        for item in found
    ]


def _tiles_note(audit: Audit) -> str:
    note = "Every tick is a class on a scale from 0 to 100 %; the tall ticks are the worst class and the average."
    if len(shown_attacks(audit)) > len(audit.attacks):
        note += " Under robust an image counts as right only if it survives every attack of this audit."
    return note


def _tile(audit: Audit, before: Audit | None, attack: str) -> dict[str, Any]:
    return {
        "attack": attack,
        "now": _tile_numbers(audit, attack, "after: " if before else ""),
        "before": _tile_numbers(before, attack, "before: ") if before else None,
    }


def _tile_numbers(audit: Audit, attack: str, label: str) -> dict[str, Any]:
    worst, average = audit.worst(attack), audit.average(attack)
    words = f"{label}worst class {percent(worst.value)} %, average {percent(average)} %"
    return {
        "worst": percent(worst.value),
        "worst_name": worst.words,
        "worst_marked": bool(worst.indices),
        "worst_span": span(*audit.worst_interval(attack)),
        "average": percent(average),
        "average_span": span(*audit.average_interval(attack)),
        "rug": figures.rug(audit.rate(attack).tolist(), average=average, worst=worst.indices, label=words),
    }


# Class by class


def _classes_note(baseline: Audit | None) -> str:
    note = (
        "Percent of the images of a class that are classified right, with its 95 % Wilson interval. "
        "A triangle marks the worst class of a column."
    )
    if baseline is None:
        return note
    return (
        "Percent of the images of a class that are classified right, before (hollow bars) and after (filled bars); the "
        "whiskers are 95 % Wilson intervals, a triangle marks the worst class after. The change is in points. "
        f"{CHANGES} Bold, with {TESTED} What may be nothing is printed light."
    )


def _class_rows(audit: Audit, before: Mapping[str, Audit], table: Table) -> list[dict[str, Any]]:
    """Each row of the class table with its bars and the numbers that order it."""
    now = {attack: class_rates(audit, attack) for attack in shown_attacks(audit)}
    was = {attack: class_rates(other, attack) for attack, other in before.items()}
    rows = []
    for c, row in enumerate(table.rows):
        entries = {attack: rates[c] for attack, rates in now.items()}
        worst_under = [attack for attack, entry in entries.items() if entry.worst]
        cells = _by_attack(audit, table, row)
        for attack, cell in cells.items():
            drawn = [_bar(was[attack][c], attack, before=True)] if attack in was else []
            cell["bars"] = figures.bars([*drawn, _bar(entries[attack], attack, before=False)])
        rows.append(
            {
                "name": row[0].text,
                "n": entries[CLEAN].n,
                "norm": row[2].text,
                "worst": f"worst under {', '.join(worst_under)}" if worst_under else "",
                "sort_keys": " ".join(f"{entry.rate:.6f}" if entry.n else "none" for entry in entries.values()),
                "cells": list(cells.values()),
            }
        )
    return rows


def _total_rows(audit: Audit, table: Table) -> list[dict[str, Any]]:
    """Average, worst class with its name, standard deviation and range of each attack."""
    totals = {row[0].text: _by_attack(audit, table, row) for row in table.totals}
    for attack, cell in totals["worst"].items():
        name = totals["worst is"][attack]["now"]
        cell["note"] = f"is {name.text} {name.others}".rstrip()
    return [{"name": name, "cells": list(totals[total].values())} for total, name in TOTAL_NAMES.items()]


def _by_attack(audit: Audit, table: Table, row: Row) -> dict[str, dict[str, Any]]:
    """The cells of a row that show rates, by attack: now, and where they are shown, before and the change."""
    places = list(zip(table.columns, row, strict=True))[2 if audit.head_norms is None else 3 :]
    found = {}
    for attack, group in groupby(places, key=lambda place: place[0].over or place[0].head):
        cells = [cell for _, cell in group]
        was, now, change = cells if len(cells) > 1 else (None, cells[0], None)
        found[attack] = {"attack": attack, "was": was, "now": now, "change": change, "note": ""}
    return found


def _bar(entry: ClassRate, attack: str, *, before: bool) -> Bar:
    return Bar(
        rate=entry.rate,
        lower=entry.lower,
        upper=entry.upper,
        look="worst" if entry.worst else "faint" if attack == CLEAN else "plain",
        before=before,
    )


# Parts


def _yaml(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100).rstrip()


def _asset(name: str) -> str:
    return files("robustfair.report").joinpath("templates", name).read_text(encoding="utf-8").strip()
