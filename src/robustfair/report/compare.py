"""Console tables of a comparison and of a grouping, in the manner of `robustfair.report.table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustfair.evaluate.compare import Comparison
from robustfair.evaluate.groups import GroupRates
from robustfair.report.layout import Sheet
from robustfair.report.sheet import sheet_of


def comparison_table(comparison: Comparison, attacks: Sequence[str] | None = None) -> Sheet:
    """Accuracy class by class before and after, the change with its paired interval and its test, under each attack.

    Args:
        attacks: None takes those of the comparison, and robust where there are several.

    Raises:
        UnknownNameError: an attack that the comparison does not hold.
    """
    return _with_legend(sheet_of(comparison, attacks))


def group_table(groups: GroupRates, attacks: Sequence[str] | None = None) -> Sheet:
    """Accuracy group by group under each attack, with Wilson intervals; arguments as for `comparison_table`."""
    return _with_legend(sheet_of(groups, attacks))


def _with_legend(sheet: Sheet) -> Sheet:
    return replace(sheet, notes=("* worst of its column.", *sheet.notes))
