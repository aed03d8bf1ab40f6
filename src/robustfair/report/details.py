"""The end of the report: all metrics, the settings of the attacks, where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import Audit
from robustfair.grammar import format_eps
from robustfair.report.rates import shown_attacks, strongest
from robustfair.report.table import Cell, Column, Table, name_cell
from robustfair.report.words import percent

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


def metrics_table(audit: Audit, before: Mapping[str, Audit], *, paired: bool) -> Table:
    """All scalars of the summary that are known in some column, a row each."""
    columns: list[tuple[Audit | None, str, Mapping[str, Any]]] = []
    for attack in shown_attacks(audit):
        if paired:
            other = before.get(attack)
            columns.append((other, attack, other.summary(attack) if other is not None else {}))
        columns.append((audit, attack, audit.summary(attack)))
    rows = {
        METRIC_NAMES.get(key, (key, "number"))[0]: [
            _metric(key, summary[key], of, attack) if of is not None else "" for of, attack, summary in columns
        ]
        for key, value in columns[-1][2].items()
        if not isinstance(value, list)
    }
    heads = [
        Column(head="before" if paired and not place % 2 else "after", over=attack) if paired else Column(head=attack)
        for place, (_, attack, _) in enumerate(columns)
    ]
    return _plain_table(
        "The error matrix is the confusion matrix without its diagonal, each column divided by the images of its true "
        "class.",
        [Column(head="Metric"), *heads],
        {name: cells for name, cells in rows.items() if set(cells) - {"n/a", ""}},
    )


def _plain_table(title: str, columns: Sequence[Column], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table of texts, by the name of their row."""
    cells = ((name_cell(name), *(Cell(text=text) for text in texts)) for name, texts in rows.items())
    return Table(title=title, columns=tuple(columns), rows=tuple(cells))


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


def vectors_table(audit: Audit) -> Table:
    """The metrics that have a value per class, under the strongest attack, in percent."""
    found = {key: value for key, value in audit.summary(strongest(audit)).items() if isinstance(value, list)}
    cells = [[Cell(text=percent(value)) for value in values] for values in zip(*found.values(), strict=True)]
    return Table(
        title="Percent. Errors are natural where the clean image is wrong already, boundary where only the attack "
        "breaks it.",
        columns=(Column(head="Class"), *(Column(head=VECTOR_NAMES.get(key, key)) for key in found)),
        rows=tuple((name_cell(name), *row) for name, row in zip(audit.class_names, cells, strict=True)),
    )


def settings_table(audit: Audit) -> Table:
    """Every setting of every attack."""
    shown = {attack: _shown_settings(audit, attack) for attack in audit.attacks}
    keys = list(dict.fromkeys(key for settings in shown.values() for key in settings))
    return _plain_table(
        "Settings of each attack; radius and step in pixel units, images in [0, 1]",
        [Column(head=head, side="left") for head in ("Attack", *keys)],
        {attack: [_plain(settings.get(key, "")) for key in keys] for attack, settings in shown.items()},
    )


def _shown_settings(audit: Audit, attack: str) -> dict[str, Any]:
    """The settings of one attack; of a strong one what its parts are called, how far they ran and what they broke."""
    settings = dict(audit.settings.get(attack, {}))
    settings.pop("members", None)
    ran = settings.pop("ran", None)
    if ran is not None:
        settings["ran"] = ", ".join(f"{100 * share:.0f} % of {member}" for member, share in ran.items())
        settings["broke"] = ", ".join(f"{member} {int(n.sum())}" for member, n in audit.fell_to(attack).items())
    return settings


def provenance(audit: Audit, baseline: Audit | None) -> list[tuple[str, str]]:
    """Where the numbers come from, a line each."""
    entries = [("data fingerprint", audit.fingerprint), *flat(audit.provenance)]
    if baseline is not None:
        entries += [(f"before: {name}", value) for name, value in flat(baseline.provenance)]
    return [(name, value) for name, value in entries if value]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as lines: {"versions": {"torch": "2.13"}} is ("versions, torch", "2.13")."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        lines += flat(value, f"{name}, ") if isinstance(value, Mapping) else [(name, _plain(value))]
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return format_eps(value) if len(repr(value)) > 6 and "/" in format_eps(value) else f"{value:.6g}"
    return ", ".join(_plain(item) for item in value) if isinstance(value, list | tuple) else str(value)
