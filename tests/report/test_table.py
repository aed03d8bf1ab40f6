from __future__ import annotations

from dataclasses import replace

import pytest

from robustfair.errors import ConfigError, DataError
from robustfair.evaluate.audit import Audit
from robustfair.report.layout import render
from robustfair.report.table import (
    before_after_table,
    change_of_average,
    changes,
    class_rates,
    class_table,
    percent,
    points,
    shown_attacks,
    summary_lines,
)


def test_class_table_exact(small):
    assert render(class_table(small)).splitlines()[2:12] == [
        " class        images  head norm                 clean              pgd-20",
        " " + "─" * 72,
        " a                 4      1.250  *100.0 [51.0, 100.0]   75.0 [30.1, 95.4]",
        " b                 2      1.000   100.0 [34.2, 100.0]   *50.0 [9.5, 90.5]",
        " c         no images      0.500",
        "",
        " average                          100.0 [61.0, 100.0]   66.7 [30.0, 90.3]",
        _worst_row(small),
        " worst is                                           a                   b",
        " std                                              0.0                12.5",
    ]
    assert render(class_table(small)).startswith("net on toy, linf eps 8/255, percent right\n")


def _worst_row(audit: Audit) -> str:
    cells = []
    for attack, value in (("clean", "100.0"), ("pgd-20", "50.0")):
        lower, upper = audit.worst_interval(attack)
        cells.append(f"{value} [{100 * lower:.1f}, {100 * upper:.1f}]")
    return f" worst{cells[0]:>47}{cells[1]:>20}"


def test_before_after_table_exact(small, small_repaired):
    assert render(before_after_table(small, small_repaired, ["pgd-20"])).splitlines()[2:14] == [
        "                      pgd-20",
        " class        images  before   after                change",
        " " + "─" * 57,
        " a                 4    75.0   *50.0  -25.0 [-60.9, +27.6]",
        " b                 2   *50.0   100.0  +50.0 [-39.8, +89.8]",
        " c         no images",
        "",
        " average                66.7    66.7    0.0 [-42.4, +42.4]",
        " worst                  50.0    50.0                   0.0",
        " worst is                  b       a",
        " std                    12.5    25.0                 +12.5",
        " range                  25.0    50.0                 +25.0",
    ]


def test_summary_lines_name_the_worst_class_and_are_aligned(small):
    lines = summary_lines(small)
    assert lines[0].startswith("clean   average 100.0 [61.0, 100.0]  worst class 100.0 [")
    assert lines[1].startswith("pgd-20  average 66.7 [30.0, 90.3]    worst class 50.0 [")
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["a", "b"]


def test_robust_is_a_column_only_beside_several_attacks(small, large):
    assert shown_attacks(small) == ("clean", "pgd-20")
    assert shown_attacks(large(3)) == ("clean", "pgd-20", "cw-20", "robust")


def test_class_rates_keep_the_order_of_the_data_set(small):
    rates = class_rates(small, "pgd-20")
    assert [(r.correct, r.n, r.worst) for r in rates] == [(3, 4, False), (1, 2, True), (0, 0, False)]
    assert percent(rates[2].rate) == percent(rates[2].lower) == "n/a"


def test_changes_are_paired_over_the_images(small, small_repaired):
    a, b, absent = changes(small, small_repaired, "pgd-20")
    assert (a.value, b.value) == (-0.25, 0.5)
    assert a.lower < a.value < a.upper
    assert not a.sure
    assert percent(absent.value) == "n/a"
    assert change_of_average(small, small_repaired, "pgd-20").value == 0
    assert [c.sure for c in changes(small, small, "clean")] == [False] * 3


def test_brackets_and_escapes_in_names_are_text(small):
    audit = replace(small, class_names=("[red]a[/red]", "b\x1b[31m", "c"), model="[bold]net")
    text = render(class_table(audit))
    assert "[red]a[/red]" in text
    assert "b?[31m" in text
    assert "\x1b" not in text
    assert "[bold]net" in text


def test_audits_that_cannot_be_compared(small, small_repaired, large):
    with pytest.raises(DataError, match="different classes"):
        before_after_table(small, large(3))
    other = replace(small_repaired, index=small.index + 1)
    with pytest.raises(DataError, match="not of the same images"):
        before_after_table(small, other)
    with pytest.raises(ConfigError, match="cw-20"):
        before_after_table(small, small_repaired, ["cw-20"])
    with pytest.raises(ConfigError, match="at least one"):
        before_after_table(small, small_repaired, [])


def test_before_after_takes_the_attacks_that_both_have(large):
    audit = large(3)
    fewer = replace(audit, predictions={name: audit.predictions[name] for name in ("clean", "cw-20")})
    head = render(before_after_table(fewer, audit)).splitlines()[2]
    assert head.split() == ["clean", "cw-20"]


@pytest.mark.parametrize(
    ("change", "text"), [(0.0004, "0.0"), (-0.0004, "0.0"), (0.0006, "+0.1"), (-1, "-100.0"), (float("nan"), "n/a")]
)
def test_points(change, text):
    assert points(change) == text
