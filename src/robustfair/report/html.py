"""The report: one HTML file that reads offline, on a telephone, on paper and in the dark.

The page forbids itself every request (its content security policy names no source), and all of it is readable without
the script, which only re-orders the class table. This module turns an audit into finished words and drawings; the order
of the page is in `templates/report.html.j2`, its looks in `templates/report.css`.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from robustfair import metrics
from robustfair.errors import ConfigError, needed
from robustfair.evaluate.compare import AttackComparison, Difference, PairedTest, check_comparable, compare_under
from robustfair.evaluate.diagnostics.results import diagnose, diagnose_change
from robustfair.evaluate.gates import GateResult
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.files import write_text
from robustfair.grammar import format_eps, read_path
from robustfair.registry import REPORTS
from robustfair.report import figures
from robustfair.report.figures import Bar, Curve
from robustfair.report.sheet import sheet_of
from robustfair.report.table import (
    CHANGES,
    SURE,
    ClassRate,
    both_attacks,
    class_rates,
    percent,
    points,
    points_span,
    shown_attacks,
    span,
    threat_words,
)

METRIC_NAMES = {
    "average": ("Average accuracy, %", "percent"),
    "class_mean": ("Mean over classes, %", "percent"),
    "worst": ("Worst class, %", "percent"),
    "worst_class": ("Worst class is", "class"),
    "worst_5pct": ("Mean of the worst 5 % of classes, %", "percent"),
    "worst_10pct": ("Mean of the worst 10 % of classes, %", "percent"),
    "best": ("Best class, %", "percent"),
    "best_class": ("Best class is", "class"),
    "range": ("Range, best - worst, points", "percent"),
    "std": ("Standard deviation of classes, points", "percent"),
    "nsd": ("Standard deviation / mean", "number"),
    "spectral_norm": ("Spectral norm of the error matrix", "number"),
    "l1_norm": ("Largest column sum of the error matrix", "number"),
    "head_norm_ratio": ("Head norms, largest / smallest", "number"),
    "head_norm_correlation": ("Correlation of head norm and accuracy", "number"),
}
"""How a scalar of `Audit.summary` is called and printed; one that is not listed is printed under its own name."""

VECTOR_NAMES = {
    "natural_error": "Natural error",
    "boundary_error": "Boundary error",
    "cfns": "Share of all errors, as true class",
    "cfps": "Share of all errors, as prediction",
    "one_vs_rest_accuracy": "One-vs-rest accuracy",
}

SEVERITIES = {"warn": "Warning", "note": "Note"}

PAIRS = 10
"""Rows of the table of the largest errors."""
MOST_DRAWN, DRAWN = 100, 50
"""A map of errors of more classes shows so many of them, those in the largest errors."""


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
    path = read_path(path)
    if path.is_dir():
        raise ConfigError("report", "path", allowed="a file name", got=str(path), hint=f"Try {path / 'report.html'}.")
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
    with needed("jinja2", "a report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    if baseline is not None:
        check_comparable(baseline, audit)
    environment = Environment(
        loader=PackageLoader("robustfair.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    attacks = shown_attacks(audit)
    before = {} if baseline is None else dict.fromkeys(both_attacks(baseline, audit), baseline)
    compared = {attack: compare_under(other, audit, attack) for attack, other in before.items()}
    script = _asset("report.js")
    page = environment.get_template("report.html.j2").render(
        title=title or f"Robustness by class: {audit.model}",
        lead=_lead(audit, baseline),
        facts=_facts(audit, baseline),
        findings=_findings(audit, baseline),
        gates=[{"status": gate.status, "line": gate.line} for gate in gates],
        groups=None if rates is None else sheet_of(rates),
        attacks=attacks,
        has_baseline=baseline is not None,
        has_norms=audit.head_norms is not None,
        tiles=[_tile(audit, before.get(attack), attack) for attack in attacks],
        tiles_note=_tiles_note(audit),
        classes=_class_rows(audit, before, compared),
        totals=_total_rows(audit, before, compared),
        classes_note=_classes_note(baseline),
        classes_caption=f"Accuracy of each class of {audit.data} under {', '.join(attacks)}, percent, with intervals",
        confusion=_confusion(audit, before),
        norms=_norm_figures(audit, baseline),
        history=_history_figures(history or (), audit.class_names),
        history_note=_history_note(history or ()),
        metrics=_metric_rows(audit, before, paired=baseline is not None),
        vectors=_vector_rows(audit),
        settings=_settings(audit),
        provenance=_provenance(audit, baseline),
        recipe=_yaml(recipe),
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode("utf-8", "replace").decode()


def strongest(audit: Audit) -> str:
    """The attack of lowest average, the first one on ties; "clean" where there is no other."""
    return min(audit.attacks[1:] or audit.attacks, key=audit.average)


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
    under = _under(audit, attack)
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


def _under(audit: Audit, attack: str) -> str:
    """The column in words: "on clean images", "under pgd-20", "under both attacks together"."""
    if attack in audit.attacks:
        return "on clean images" if attack == CLEAN else f"under {attack}"
    number = len(audit.attacks) - 1
    return "under both attacks together" if number == 2 else f"under all {number} attacks together"


def _facts(audit: Audit, baseline: Audit | None) -> list[tuple[str, str]]:
    facts = [("Model", audit.model)]
    if baseline is not None:
        facts.append(("Compared with", baseline.model))
    split = f", {audit.split} split" if audit.split else ""
    facts += [
        ("Data", f"{audit.data}{split}"),
        ("Images", f"{len(audit.labels):,} in {audit.num_classes} classes"),
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
        "rug": Markup(figures.rug(audit.rate(attack).tolist(), average=average, worst=worst.indices, label=words)),
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
        f"{CHANGES} Bold, with {SURE} What may be nothing is printed light."
    )


def _class_rows(
    audit: Audit, before: Mapping[str, Audit], compared: Mapping[str, AttackComparison]
) -> list[dict[str, Any]]:
    attacks = shown_attacks(audit)
    now = {attack: class_rates(audit, attack) for attack in attacks}
    was = {attack: class_rates(other, attack) for attack, other in before.items()}
    rows = []
    for c, name in enumerate(audit.class_names):
        entries = {attack: now[attack][c] for attack in attacks}
        worst_under = [attack for attack, entry in entries.items() if entry.worst]
        rows.append(
            {
                "name": name,
                "n": entries[CLEAN].n,
                "norm": f"{audit.head_norms[c]:.3f}" if audit.head_norms is not None else "",
                "worst": f"worst under {', '.join(worst_under)}" if worst_under else "",
                "sort_keys": " ".join(f"{entry.rate:.6f}" if entry.n else "none" for entry in entries.values()),
                "cells": [
                    _class_cell(attack, entries[attack], was[attack][c], compared[attack].classes[c])
                    if attack in compared
                    else _class_cell(attack, entries[attack])
                    for attack in attacks
                ],
            }
        )
    return rows


def _class_cell(
    attack: str, now: ClassRate, was: ClassRate | None = None, tested: PairedTest | None = None
) -> dict[str, Any]:
    if not now.n:
        return {"attack": attack, "absent": True}
    drawn = [_bar(was, attack, before=True)] if was is not None else []
    drawn.append(_bar(now, attack, before=False))
    return {
        "attack": attack,
        "absent": False,
        "worst": now.worst,
        "rate": percent(now.rate),
        "was": "" if was is None else percent(was.rate),
        **(
            {"span": span(now.lower, now.upper), "change": "", "mark": ""}
            if tested is None
            else _change_words(tested.difference, sure=tested.significant)
        ),
        "bars": Markup(figures.bars(drawn)),
    }


def _change_words(change: Difference, *, sure: bool) -> dict[str, Any]:
    """The change, its interval, and the style class and the mark that say whether it is more than chance."""
    return {
        "span": points_span(change),
        "change": f"{points(change.change)}{'†' if sure else ''}",
        "mark": "sure" if sure else "unsure",
    }


def _bar(entry: ClassRate, attack: str, *, before: bool) -> Bar:
    return Bar(
        rate=entry.rate,
        lower=entry.lower,
        upper=entry.upper,
        look="worst" if entry.worst else "faint" if attack == CLEAN else "plain",
        before=before,
    )


def _total_rows(
    audit: Audit, before: Mapping[str, Audit], compared: Mapping[str, AttackComparison]
) -> list[dict[str, Any]]:
    """Average, worst class, standard deviation and range of each column."""
    attacks = shown_attacks(audit)

    def cell(attack: str, value: float, interval: tuple[float, float] | None = None, note: str = "") -> dict[str, Any]:
        shown = "" if interval is None else span(*interval)
        words = {"value": percent(value), "was": "", "change": "", "mark": "", "span": shown, "note": note}
        return {"attack": attack, **words}

    def changed(attack: str, value: Difference, *, sure: bool, note: str = "") -> dict[str, Any]:
        return cell(attack, value.after, note=note) | {"was": percent(value.before), **_change_words(value, sure=sure)}

    def of(attack: str) -> dict[str, dict[str, Any]]:
        """The cells of one column, by the name of their row."""
        worst, spread = audit.worst(attack), metrics.std(audit.rate(attack))
        entry = compared.get(attack)
        if entry is None:
            return {
                "Average": cell(attack, audit.average(attack), audit.average_interval(attack)),
                "Worst class": cell(attack, worst.value, audit.worst_interval(attack), f"is {worst.words}"),
                "Standard deviation": cell(attack, spread),
                "Range": cell(attack, metrics.accuracy_range(audit.rate(attack))),
            }
        was = metrics.std(before[attack].rate(attack))
        return {
            "Average": changed(attack, entry.average.difference, sure=entry.average.significant),
            "Worst class": changed(attack, entry.worst, sure=entry.worst.sure, note=f"is {worst.words}"),
            "Standard deviation": cell(attack, spread) | {"was": percent(was), "change": points(spread - was)},
            "Range": changed(attack, entry.range, sure=entry.range.sure),
        }

    columns = [of(attack) for attack in attacks]
    return [{"name": name, "cells": [column[name] for column in columns]} for name in columns[0]]


# Confusion


def _confusion(audit: Audit, before: Mapping[str, Audit]) -> dict[str, Any]:
    attack = strongest(audit)
    counts = audit.confusion(attack).tolist()
    other = before[attack].confusion(attack).tolist() if attack in before else None
    top = max(figures.largest_error(matrix) for matrix in (counts, other) if matrix is not None)
    note = (
        "A column is a true class, a row what it was taken for. Shades show errors as a share of the true class; "
        "the outlined diagonal, what is right, is off that scale."
    )
    errors, classes = _errors(counts), None
    if audit.num_classes > MOST_DRAWN:
        largest = (c for _, pred, true in errors for c in (true, pred))
        classes = sorted(list(dict.fromkeys([*largest, *range(DRAWN)]))[:DRAWN])
        note += f" Drawn are the {DRAWN} of {audit.num_classes:,} classes in the largest errors."
    return {
        "under": _under(audit, attack),
        "note": note,
        "top": percent(top),
        "legend_label": f"Scale of errors, from 0 to {percent(top)} percent of a true class; outlined cells are right",
        "steps": [f"h{step}" for step in range(1, figures.HEAT_STEPS + 1)],
        "drawing": Markup(figures.heat_map(counts, audit.class_names, top=top, classes=classes)),
        "before": None
        if other is None
        else Markup(figures.heat_map(other, audit.class_names, top=top, classes=classes)),
        "pairs": _pairs(errors[:PAIRS], counts, audit.class_names),
    }


def _errors(counts_pred_true: Sequence[Sequence[int]]) -> list[tuple[float, int, int]]:
    """Every error as its share of the true class, the predicted and the true class; the largest share first."""
    size = len(counts_pred_true)
    columns = [sum(row[true] for row in counts_pred_true) for true in range(size)]
    errors = [
        (counts_pred_true[pred][true] / columns[true], pred, true)
        for true in range(size)
        for pred in range(size)
        if pred != true and counts_pred_true[pred][true]
    ]
    return sorted(errors, key=lambda error: -error[0])


def _pairs(
    errors: Sequence[tuple[float, int, int]], counts_pred_true: Sequence[Sequence[int]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Errors in words."""
    return [
        {
            "true": names[true],
            "predicted": names[pred],
            "share": percent(share),
            "count": counts_pred_true[pred][true],
            "n": sum(row[true] for row in counts_pred_true),
        }
        for share, pred, true in errors
    ]


# Head norms


def _norm_figures(audit: Audit, baseline: Audit | None) -> list[dict[str, Any]]:
    attack = shown_attacks(audit)[-1]
    drawn = [(audit, attack)] if attack == CLEAN else [(audit, CLEAN), (audit, attack)]
    if baseline is not None:
        drawn = [(baseline, strongest(baseline)), (audit, strongest(audit))]
    return [
        _norm_figure(of, under, "" if baseline is None else "Before. " if of is baseline else "After. ")
        for of, under in drawn
        if of.head_norms is not None
    ]


def _norm_figure(audit: Audit, attack: str, prefix: str) -> dict[str, Any]:
    assert audit.head_norms is not None
    rate = audit.rate(attack)
    correlation = metrics.head_norm_correlation(torch.tensor(audit.head_norms), rate)
    if int((~rate.isnan()).sum()) < 3:
        words = "Too few classes for a correlation."
    elif math.isnan(correlation):
        words = "No correlation can be given: the norms, or the accuracies, are all equal."
    else:
        words = f"Pearson correlation {correlation:.2f}."
    drawing = figures.scatter(
        audit.head_norms,
        rate.tolist(),
        audit.class_names,
        worst=audit.worst(attack).indices,
        x_label="head norm",
        y_label=f"{attack} accuracy, %",
    )
    ratio = f" Largest norm / smallest: {audit.head_norm_ratio:.2f}."
    return {"drawing": Markup(drawing), "caption": prefix + words + ratio}


# History


def _history_note(history: Sequence[Mapping[str, Any]]) -> str:
    note = "Training images are counted in the forward passes that trained, in training mode, before each step."
    if any(record.get("validation") for record in history):
        note += " Validation images are held out of training, and weights are selected on them, never on test images."
    return note


def _history_figures(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Loss, learning rate, accuracy on training and validation images, and whatever differs between classes."""
    if not history:
        return []
    x = [record["epoch"] for record in history]
    charts: list[tuple[str, list[Curve], bool]] = [
        (key_title, [Curve(name=key, y=[record.get(key) for record in history], labelled=False)], False)
        for key, key_title in (("loss", "Training loss"), ("lr", "Learning rate"))
    ]
    charts.append(("Training images, accuracy in %", _tally_curves([r.get("train") for r in history]), True))
    candidates = list(dict.fromkeys(name for r in history for name in r.get("validation") or {}))
    for name in candidates:
        tallies = [(r.get("validation") or {}).get(name) for r in history]
        charts.append((f"Validation, {name}, accuracy in %", _tally_curves(tallies), True))
    part = "robust" if any((r.get("train") or {}).get("robust") for r in history) else "clean"
    accuracy = [_rates(r.get("train"), part) for r in history]
    worst = _lowest(accuracy[-1], names)
    charts.append((f"Classes, {part} training accuracy in %", _class_curves(accuracy, names, worst), True))
    for key in dict.fromkeys(key for r in history for key in r.get("per_class") or {}):
        values = [(r.get("per_class") or {}).get(key) for r in history]
        if any(_differs(v) for v in values):
            charts.append((f"Classes, {_quantity(key)}", _class_curves(values, names, worst), False))
    charts.append(("Classes, head norm", _class_curves([r.get("head_norms") for r in history], names, worst), False))
    return [
        {"drawing": Markup(figures.line_chart(x, curves, title=title, share=share)), "caption": ""}
        for title, curves, share in charts
        if any(value is not None for curve in curves for value in curve.y)
    ]


def _quantity(key: str) -> str:
    if key == "eps":
        return "training radius"
    return f"coefficient of {key.removeprefix('coef.')}" if key.startswith("coef.") else f"loss {key}"


def _tally_curves(tallies: Sequence[Mapping[str, Any] | None]) -> list[Curve]:
    curves = []
    for part, dashed in (("clean", True), ("robust", False)):
        rates = [_rates(tally, part) for tally in tallies]
        if not any(rates):
            continue
        average = [_average(tally, part) for tally in tallies]
        lowest = [min((v for v in r or () if v is not None), default=None) for r in rates]
        curves.append(Curve(name=f"{part} average", y=average, dashed=dashed))
        curves.append(Curve(name=f"{part} worst", y=lowest, look="worst", dashed=dashed))
    return curves


def _rates(tally: Mapping[str, Any] | None, part: str) -> list[float | None] | None:
    """Accuracy per class of a history record; None for a class without images, or where that pass was not made."""
    if not tally or tally.get(part) is None:
        return None
    return [hit / n if n else None for hit, n in zip(tally[part], tally["count"], strict=True)]


def _average(tally: Mapping[str, Any] | None, part: str) -> float | None:
    if not tally or tally.get(part) is None or not sum(tally["count"]):
        return None
    return sum(tally[part]) / sum(tally["count"])


def _class_curves(
    per_class: Sequence[Sequence[float | None] | None], names: Sequence[str], worst: Sequence[int]
) -> list[Curve]:
    """One curve a class. Named are the worst classes, which stand out, and the lowest and the highest at the end."""
    last = per_class[-1]
    ends = {*_lowest(last, names)[:1], *_lowest([None if v is None else -v for v in last or ()], names)[:1], *worst}
    return [
        Curve(
            name=name,
            y=[None if row is None else row[c] for row in per_class],
            look="worst" if c in worst else "faint",
            labelled=c in ends,
        )
        for c, name in enumerate(names)
    ]


def _lowest(values: Sequence[float | None] | None, names: Sequence[str]) -> tuple[int, ...]:
    """The classes of smallest value, none where there is no value or all are equal, see `WorstClass`."""
    numbers = torch.tensor([math.nan if value is None else value for value in values or ()], dtype=torch.float64)
    return () if bool(numbers.isnan().all()) else WorstClass.of(numbers, names).indices


def _differs(values: Sequence[float | None] | None) -> bool:
    present = [value for value in values or () if value is not None]
    return bool(present) and max(present) - min(present) > 1e-6 * max(abs(v) for v in present)


# Tables at the end


def _metric_rows(audit: Audit, before: Mapping[str, Audit], *, paired: bool) -> dict[str, Any]:
    """All scalars of the summary that are known in some column, a row each."""
    columns: list[tuple[Audit | None, str, Mapping[str, Any]]] = []
    for attack in shown_attacks(audit):
        if paired:
            other = before.get(attack)
            columns.append((other, attack, other.summary(attack) if other is not None else {}))
        columns.append((audit, attack, audit.summary(attack)))
    keys = [key for key, value in columns[-1][2].items() if not isinstance(value, list)]
    rows = [
        {
            "name": METRIC_NAMES.get(key, (key, "number"))[0],
            "cells": [
                _metric(key, summary[key], of, attack) if of is not None else "" for of, attack, summary in columns
            ],
        }
        for key in keys
    ]
    return {
        "rows": [row for row in rows if set(row["cells"]) - {"n/a", ""}],
        "caption": "The error matrix is the confusion matrix without its diagonal, each column divided by the images "
        "of its true class.",
    }


def _extreme(audit: Audit, attack: str, *, best: bool) -> str:
    """Whose accuracy is lowest, or highest, and who shares it."""
    rate = audit.rate(attack)
    return WorstClass.of(-rate if best else rate, audit.class_names).words


def _metric(key: str, value: Any, audit: Audit, attack: str) -> str:
    kind = METRIC_NAMES.get(key, (key, "number"))[1]
    if kind == "class":
        return _extreme(audit, attack, best=key == "best_class")
    if kind == "percent":
        return percent(value)
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _vector_rows(audit: Audit) -> dict[str, Any]:
    """The metrics that have a value per class, under the strongest attack, in percent."""
    attack = strongest(audit)
    summary = audit.summary(attack)
    keys = [key for key, value in summary.items() if isinstance(value, list)]
    return {
        "under": _under(audit, attack),
        "columns": [VECTOR_NAMES.get(key, key) for key in keys],
        "rows": [
            {"name": name, "cells": [percent(summary[key][c]) for key in keys]}
            for c, name in enumerate(audit.class_names)
        ],
    }


def _settings(audit: Audit) -> dict[str, Any]:
    shown = {attack: _shown_settings(audit, attack) for attack in audit.attacks}
    keys = list(dict.fromkeys(key for settings in shown.values() for key in settings))
    return {
        "columns": keys,
        "rows": [
            {"attack": attack, "cells": [_plain(settings.get(key, "")) for key in keys]}
            for attack, settings in shown.items()
        ],
    }


def _shown_settings(audit: Audit, attack: str) -> dict[str, Any]:
    """The settings of one attack; of a strong one what its parts are called, how far they ran and what they broke."""
    settings = dict(audit.settings.get(attack, {}))
    settings.pop("members", None)
    ran = settings.pop("ran", None)
    if ran is not None:
        settings["ran"] = ", ".join(f"{100 * share:.0f} % of {member}" for member, share in ran.items())
        settings["broke"] = ", ".join(f"{member} {int(n.sum())}" for member, n in audit.fell_to(attack).items())
    return settings


def _provenance(audit: Audit, baseline: Audit | None) -> list[tuple[str, str]]:
    entries = [("data fingerprint", audit.fingerprint), *_flat(audit.provenance)]
    if baseline is not None:
        entries += [(f"before: {name}", value) for name, value in _flat(baseline.provenance)]
    return [(name, value) for name, value in entries if value]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as lines: {"versions": {"torch": "2.13"}} is ("versions, torch", "2.13")."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += _flat(value, f"{name}, ") if isinstance(value, Mapping) else [(name, _plain(value))]
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return format_eps(value) if len(repr(value)) > 6 and "/" in format_eps(value) else f"{value:.6g}"
    return ", ".join(_plain(item) for item in value) if isinstance(value, list | tuple) else str(value)


def _yaml(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100).rstrip()


def _asset(name: str) -> str:
    return files("robustfair.report").joinpath("templates", name).read_text(encoding="utf-8").strip()
