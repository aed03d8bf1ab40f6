from __future__ import annotations

from dataclasses import replace

import pytest

from reference.audits import made_audit
from robustfair.errors import ConfigError, DataError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.result import Audit
from robustfair.report.layout import render
from robustfair.report.table import (
    before_after_table,
    both_attacks,
    class_rates,
    class_table,
    percent,
    points,
    shown_attacks,
    summary_lines,
)


def test_class_table_exact(small):
    assert render(class_table(small)).splitlines()[2:13] == [
        " class        images  head norm                clean              pgd-20",
        " " + "─" * 71,
        " a                 4      1.250  100.0 [51.0, 100.0]   75.0 [30.1, 95.4]",
        " b                 2      1.000  100.0 [34.2, 100.0]   *50.0 [9.5, 90.5]",
        " c         no images      0.500",
        "",
        " average                         100.0 [61.0, 100.0]   66.7 [30.0, 90.3]",
        _worst_row(small),
        " worst is                                all classes                   b",
        "                                         with images",
        " std                                             0.0                12.5",
    ]
    assert render(class_table(small)).startswith("net on toy, linf eps 8/255, percent right\n")


def _worst_row(audit: Audit) -> str:
    cells = []
    for attack, value in (("clean", "100.0"), ("pgd-20", "50.0")):
        lower, upper = audit.worst_interval(attack)
        cells.append(f"{value} [{100 * lower:.1f}, {100 * upper:.1f}]")
    return f" worst{cells[0]:>46}{cells[1]:>20}"


def test_before_after_table_exact(small, small_repaired):
    assert render(before_after_table(small, small_repaired, ["pgd-20"])).splitlines()[2:14] == [
        "                      pgd-20",
        " class        images  before   after                 change",
        " " + "─" * 58,
        " a                 4    75.0   *50.0   -25.0 [-60.9, +27.6]",
        " b                 2   *50.0   100.0   +50.0 [-39.8, +89.8]",
        " c         no images",
        "",
        " average                66.7    66.7     0.0 [-42.4, +42.4]",
        " worst                  50.0    50.0    0.0 [-75.0, +100.0]",
        " worst is                  b       a",
        " std                    12.5    25.0                  +12.5",
        " range                  25.0    50.0  +25.0 [-86.7, +100.0]",
    ]


def test_summary_lines_name_the_worst_class_and_are_aligned(small):
    lines = summary_lines(small)
    assert lines[0].startswith("clean   average 100.0 [61.0, 100.0]  worst class 100.0 [")
    assert lines[1].startswith("pgd-20  average 66.7 [30.0, 90.3]    worst class 50.0 [")
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["all classes with images", "b"]


def test_robust_is_a_column_only_beside_several_attacks(small, large):
    assert shown_attacks(small) == ("clean", "pgd-20")
    assert shown_attacks(large(3)) == ("clean", "pgd-20", "cw-20", "robust")


def test_class_rates_keep_the_order_of_the_data_set(small):
    rates = class_rates(small, "pgd-20")
    assert [(r.correct, r.n, r.worst) for r in rates] == [(3, 4, False), (1, 2, True), (0, 0, False)]
    assert percent(rates[2].rate) == percent(rates[2].lower) == "n/a"


def test_where_all_classes_are_equal_none_is_marked_worst():
    labels = [c for c in range(10) for _ in range(3)]
    names = ("airplane", *(f"class {c}" for c in range(1, 10)))
    audit = made_audit(labels, {"clean": labels, "pgd-20": [(y + 1) % 10 for y in labels]}, names)
    text = render(class_table(audit))
    assert text.count("*") == 1, "the caption alone"
    (worst_is,) = [line for line in text.splitlines() if line.startswith(" worst is")]
    assert worst_is.split() == ["worst", "is", "all", "classes", "all", "classes"]
    assert [line.rsplit(", ", 1)[1] for line in summary_lines(audit)] == ["all classes", "all classes"]
    assert not any(rate.worst for rate in class_rates(audit, "pgd-20"))


def test_classes_that_share_the_worst_accuracy_are_all_marked():
    """Two of four and one of two are the same accuracy; three of four are more."""
    labels = [0] * 4 + [1] * 2 + [2] * 4
    audit = made_audit(labels, {"clean": [0, 0, 1, 1, 1, 0, 2, 2, 2, 0]}, ("airplane", "b", "c"))
    assert [rate.worst for rate in class_rates(audit, "clean")] == [True, True, False]
    assert summary_lines(audit)[0].endswith(", airplane and 1 other")
    lines = render(class_table(audit)).splitlines()
    assert sum("*50.0" in line for line in lines) == 2
    at = next(i for i, line in enumerate(lines) if line.startswith(" worst is"))
    assert (lines[at].split()[-1], lines[at + 1].split()) == ("airplane", ["and", "1", "other"])
    changed = render(before_after_table(audit, audit)).splitlines()
    assert sum(line.count("*50.0") for line in changed) == 4


def test_a_change_is_marked_where_the_paired_test_decides(undecided):
    before, after = undecided
    entry = compare(before, after).under("clean")
    a, b = entry.classes[:2]
    assert a.difference.upper < 0, "by its interval alone class 0 would have changed"
    assert not a.significant
    assert b.significant
    lines = render(before_after_table(before, after, ["clean"])).splitlines()
    rows = {line.split("  ")[0].strip(): line for line in lines[4:-4]}
    assert [name for name, line in rows.items() if "†" in line] == ["class 1", "average", "worst", "range"]
    assert entry.worst.sure
    assert entry.range.sure
    text = f"{points(entry.worst.change)}† [{points(entry.worst.lower)}, {points(entry.worst.upper)}]"
    assert rows["worst"].endswith(text)


def test_robust_is_compared_where_both_audits_hold_the_same_attacks(large):
    audit = large(3)
    more = replace(audit, predictions={**audit.predictions, "fgsm": audit.predictions["clean"]})
    assert both_attacks(audit, audit) == ["clean", "pgd-20", "cw-20", "robust"]
    assert both_attacks(audit, more) == both_attacks(more, audit) == ["clean", "pgd-20", "cw-20"]


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
