"""What the report draws: what is taken for what, head norms beside accuracies, and the curves of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from robustfair import metrics
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.report import figures
from robustfair.report.figures import Curve
from robustfair.report.rates import shown_attacks, strongest, under_words
from robustfair.report.table import Cell, Column, Table, name_cell
from robustfair.report.words import percent

PAIRS = 10
"""Rows of the table of the largest errors."""
MOST_DRAWN, DRAWN = 100, 50
"""A map of errors of more classes shows so many of them, those in the largest errors."""


# Confusion


def confusion(audit: Audit, before: Mapping[str, Audit]) -> dict[str, Any]:
    """The heat map under the strongest attack, the one before where there is one, and the largest errors."""
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
    maps = [
        figures.heat_map(matrix, audit.class_names, top=top, classes=classes) if matrix is not None else None
        for matrix in (counts, other)
    ]
    return {
        "under": under_words(audit, attack),
        "note": note,
        "top": percent(top),
        "legend_label": f"Scale of errors, from 0 to {percent(top)} percent of a true class; outlined cells are right",
        "steps": [f"h{step}" for step in range(1, figures.HEAT_STEPS + 1)],
        "drawing": maps[0],
        "before": maps[1],
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
) -> Table:
    """Errors in words."""
    rows = []
    for share, pred, true in errors:
        count = f"{counts_pred_true[pred][true]} of {sum(row[true] for row in counts_pred_true)}"
        cells = (percent(share), count)
        rows.append((name_cell(names[true]), name_cell(names[pred]), *(Cell(text=text) for text in cells)))
    return Table(
        title=f"The {len(errors)} largest errors",
        columns=(
            Column(head="True class", side="left"),
            Column(head="Predicted", side="left"),
            Column(head="% of class"),
            Column(head="Images"),
        ),
        rows=tuple(rows),
    )


# Head norms


def norm_figures(audit: Audit, baseline: Audit | None) -> list[dict[str, Any]]:
    """Accuracy against head norm, clean and under the last attack, or before and after; none without head norms."""
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
    return {"drawing": drawing, "caption": prefix + words + ratio}


# History


def history_note(history: Sequence[Mapping[str, Any]]) -> str:
    """What the curves count."""
    note = "Training images are counted in the forward passes that trained, in training mode, before each step."
    if any(record.get("validation") for record in history):
        note += " Validation images are held out of training, and weights are selected on them, never on test images."
    return note


def history_figures(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
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
        {"drawing": figures.line_chart(x, curves, title=title, share=share), "caption": ""}
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
    """One curve a class. The worst classes are drawn strong and named, as are the lowest and the highest at the end."""
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
