"""Audits and comparisons as text, in the form that a user asked for: table, json, markdown or latex."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from robustfair.evaluate.compare import Comparison, compare
from robustfair.evaluate.diagnostics.base import Diagnostic
from robustfair.evaluate.diagnostics.results import diagnose, diagnose_change
from robustfair.evaluate.gates import GateResult
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.result import Audit
from robustfair.report.console import ALL_ROWS, Screen
from robustfair.report.layout import render
from robustfair.report.rates import image_lines, member_lines, summary_lines
from robustfair.report.table import before_after_table, class_table, comparison_table, group_table, table_of
from robustfair.report.text import latex, markdown

SEVERITY = {"warn": "warning", "note": "note"}


def audit_lines(result: Audit, screen: Screen = ALL_ROWS) -> list[str]:
    """An audit in text: class table, a line per attack, diagnostics."""
    lines = [*summary_lines(result), *image_lines(result), *member_lines(result), *_diagnostic_lines(diagnose(result))]
    return [render(class_table(result), screen), *map(screen.fold, lines)]


def audit_text(
    result: Audit,
    form: str,
    *,
    baseline: Audit | None = None,
    rates: GroupRates | None = None,
    checked: Sequence[GateResult] = (),
    screen: Screen = ALL_ROWS,
) -> str:
    """An audit, its groups and its gates as "table" (without the gates), "json", "markdown" or "latex"."""
    if form == "json":
        about = result.to_dict()
        if baseline is not None:
            about["comparison"] = compare(baseline, result).to_dict()
        if rates is not None:
            about["by_group"] = rates.to_dict()
        if checked:
            about["gates"] = [gate.to_dict() for gate in checked]
        return json.dumps(about, allow_nan=False)
    if form == "table":
        shown = audit_lines(result, screen) if baseline is None else before_after_lines(baseline, result, screen)
        return "\n".join([*shown, *([] if rates is None else [render(group_table(rates), screen)])])
    write = {"markdown": markdown, "latex": latex}[form]
    first = result if baseline is None else compare(baseline, result)
    return "\n".join(write(table_of(part)) for part in (first, rates) if part is not None)


def before_after_lines(before: Audit, after: Audit, screen: Screen = ALL_ROWS) -> list[str]:
    """Two audits in text: classes side by side, a line per attack, diagnostics of the second and of the change."""
    lines = [
        *(f"before  {line}" for line in summary_lines(before)),
        *(f"after   {line}" for line in summary_lines(after)),
        *image_lines(after),
        *_diagnostic_lines([*diagnose(after), *diagnose_change(before, after)]),
    ]
    return [render(before_after_table(before, after), screen), *map(screen.fold, lines)]


def comparison_text(
    found: Sequence[Comparison], form: str, screen: Screen = ALL_ROWS, grouped: Sequence[Comparison] = ()
) -> str:
    """Comparisons as "table", "json", "markdown" or "latex"; `grouped` are the same ones by group."""
    if form == "json":
        dicts = [one.to_dict() for one in found]
        for about, by_group in zip(dicts, grouped, strict=False):
            about["by_group"] = by_group.to_dict()
        return json.dumps(dicts if len(dicts) > 1 else dicts[0], allow_nan=False)
    parts = [*found, *grouped]
    if form == "table":
        return "\n".join(render(comparison_table(one), screen) for one in parts)
    return "\n".join({"markdown": markdown, "latex": latex}[form](table_of(one)) for one in parts)


def _diagnostic_lines(found: Iterable[Diagnostic]) -> list[str]:
    return [f"{SEVERITY[each.severity]}: {each.text} {each.advice}" for each in found]
