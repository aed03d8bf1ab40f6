from __future__ import annotations

from dataclasses import replace

import pytest

from reference.audits import made_audit, random_audit
from robustfair.errors import ConfigError, DataError, UnknownNameError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.evaluate.result import Audit
from robustfair.report.layout import render
from robustfair.report.rates import both_attacks, class_rates, shown_attacks, summary_lines
from robustfair.report.table import (
    Table,
    before_after_table,
    class_table,
    comparison_table,
    group_table,
    table_of,
)
from robustfair.report.words import percent, points, span


def texts(table: Table, row: int) -> list[str]:
    return [cell.text for cell in (*table.rows, *table.totals)[row]]


def test_an_audit_in_words(small) -> None:
    table = table_of(small)
    assert table.title == "net on toy, linf eps 8/255, percent right"
    assert [(column.over, column.head) for column in table.columns] == [
        ("", "class"),
        ("", "images"),
        ("", "clean"),
        ("", "pgd-20"),
    ]
    assert [texts(table, row) for row in range(3)] == [
        ["a", "4", "100.0", "75.0"],
        ["b", "2", "100.0", "50.0"],
        ["c", "no images", "", ""],
    ]
    assert texts(table, 3) == ["average", "", "100.0", "66.7"]
    assert texts(table, 5) == ["worst is", "", "all classes", "b"]
    assert [cell.others for cell in table.totals[2]] == ["", "", "with images", ""]
    assert [cell.mark for cell in table.rows[1]] == ["", "", "", "worst"]
    assert table.rows[0][3].interval == "[30.1, 95.4]"
    assert table.rows[0][3].half == "44.9"
    assert table.totals[1][3].interval == span(*small.worst_interval("pgd-20"))


def test_a_comparison_in_words(small, small_repaired) -> None:
    found = compare(small, small_repaired)
    table = table_of(found)
    heads = ["before", "after", "change", "lost/won", "p"]
    assert [column.head for column in table.columns] == ["class", "images", *heads, *heads]
    assert [column.over for column in table.columns] == ["", "", *["clean"] * 5, *["pgd-20"] * 5]
    assert texts(table, 0)[7:] == ["75.0", "50.0", "-25.0", "1/0", "1.000"]
    assert texts(table, 1)[7:] == ["50.0", "100.0", "+50.0", "0/1", "1.000"]
    assert texts(table, 2) == ["c", "no images", *[""] * 10]
    assert texts(table, 5)[7:] == ["b", "a", "", "", ""]
    entry = found.under("pgd-20")
    worst = table.totals[1][9]
    assert worst.interval == f"[{points(entry.worst.lower)}, {points(entry.worst.upper)}]"
    assert worst.half == percent(max(entry.worst.upper, -entry.worst.lower))
    assert [cell.mark for cell in table.rows[0]].count("worst") == 1, "all are equal on clean images"
    assert "95 %" in table.notes[0]


def test_only_a_change_beyond_chance_is_marked() -> None:
    labels = [0] * 100 + [1] * 100
    before = made_audit(labels, {"clean": [2] * 60 + [0] * 40 + [1] * 100})
    table = table_of(compare(before, made_audit(labels, {"clean": labels}), level=0.99))
    assert [row[4].mark for row in (*table.rows, *table.totals)] == ["sure", "", "", "sure", "sure", "", "sure"]
    assert "99 %" in table.notes[0]
    assert "p at most 0.01" in table.notes[3]


def test_robust_is_shown_beside_several_attacks_or_on_demand(small, small_repaired) -> None:
    one, two = random_audit(1), random_audit(2)
    overs = [column.over for column in table_of(compare(one, two)).columns]
    assert list(dict.fromkeys(overs)) == ["", "clean", "pgd-20", "cw-50(restarts=5)", "robust"]
    assert "robust" not in [column.over for column in table_of(compare(small, small_repaired)).columns]
    some = table_of(compare(one, two, attacks=["pgd-20", "robust"]))
    assert list(dict.fromkeys(column.over for column in some.columns)) == ["", "pgd-20", "robust"]
    assert table_of(compare(small, small_repaired), ["robust"]).columns[2].over == "robust"
    with pytest.raises(UnknownNameError, match="pgd-2"):
        table_of(small, ["pgd-2"])


def test_what_the_rates_are_is_said() -> None:
    audit = replace(random_audit(1), groups=(0, 0, 1, 1))
    groups = read_groups("superclass", audit)
    fine, coarse = (table_of(regroup(audit, groups, within=within)) for within in ("class", "group"))
    assert (fine.columns[0].head, texts(fine, 0)[:2]) == ("group", ["group 0", "40"])
    assert fine.notes[1] == "An image counts as right if its class is."
    assert coarse.notes[1].endswith("the rates under attack are upper bounds.")
    clean = table_of(regroup(audit, groups, within="group"), ["clean"])
    assert clean.notes[1] == "An image counts as right if any class of its group is predicted."
    short = replace(audit, settings={**audit.settings, "pgd-20": {"ran": {"pgd-20": 0.25}}})
    assert table_of(short).notes[1] == "Upper bounds under attack: the time budget left pgd-20 at 25 %."
    assert table_of(short, ["clean"]).notes == ("Intervals: 95 %, Wilson; for worst, bootstrap.",)
    assert "net: the time budget left pgd-20 at 25 %" in table_of(compare(audit, short)).notes[-1]


@pytest.mark.parametrize("within", ["class", "group"])
def test_a_cut_attack_is_said_below_groups_as_below_classes(within) -> None:
    audit = random_audit(1)
    short = replace(audit, groups=(0, 0, 1, 1), settings={**audit.settings, "pgd-20": {"ran": {"pgd-20": 0.25}}})
    rates = regroup(short, read_groups("superclass", short), within=within)
    assert table_of(rates).notes[-1] == table_of(short).notes[-1]
    assert "the time budget left pgd-20 at 25 %" in table_of(rates).notes[-1]
    assert not any("time budget" in note for note in table_of(rates, ["clean"]).notes)
    assert ("aimed at another class" in " ".join(table_of(rates).notes)) == (within == "group")


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


def test_comparison_table_exact(small, small_repaired) -> None:
    found = compare(small, small_repaired)
    entry = found.under("pgd-20")
    lines = render(comparison_table(found, ["pgd-20"])).splitlines()
    assert lines[:7] == [
        "net -> net repaired on toy, linf eps 8/255, percent right",
        "",
        "                      pgd-20",
        " class        images  before   after                 change  lost/won      p",
        " " + "─" * 75,
        " a                 4    75.0   *50.0   -25.0 [-60.9, +27.6]       1/0  1.000",
        " b                 2   *50.0   100.0   +50.0 [-39.8, +89.8]       0/1  1.000",
    ]
    assert lines[7:11] == [
        " c         no images",
        "",
        " average                66.7    66.7     0.0 [-42.4, +42.4]       1/1  1.000",
        f" worst                  50.0    50.0{f'0.0 [{points(entry.worst.lower)}, {points(entry.worst.upper)}]':>23}",
    ]
    assert lines[11] == " worst is                  b       a"


def test_a_change_beyond_chance_bears_a_mark_and_numbers_stay_in_line() -> None:
    before, after = random_audit(1, images=600, keeps=0.4), random_audit(2, images=600, keeps=0.8)
    lines = render(comparison_table(compare(before, after), ["robust"])).splitlines()[5:8]
    assert all("†" in line for line in lines)
    same = render(comparison_table(compare(before, before), ["robust"]))
    assert "†" not in same.partition("* worst")[0]
    mixed = render(comparison_table(compare(before, after), ["clean", "robust"])).splitlines()[5:8]
    assert len({line.rindex("[") for line in mixed}) == 1


def test_group_table_exact() -> None:
    audit = replace(random_audit(1), groups=(0, 0, 1, 1))
    groups = regroup(audit, read_groups("superclass", audit))
    lines = render(group_table(groups, ["clean", "robust"])).splitlines()
    (first, second), (low, high) = groups.rate("clean").tolist(), groups.average_interval("clean")
    assert lines[2].split() == ["group", "images", "clean", "robust"]
    assert lines[4].split()[:3] == ["group", "0", "40"]
    assert f"{percent(first)} [" in lines[4]
    assert f"{percent(second)} [" in lines[5]
    assert f"[{percent(low)}, {percent(high)}]" in lines[7]
    marked = sum(len(groups.worst(attack).indices) for attack in ("clean", "robust"))
    assert sum(line.count("*") for line in lines[4:6]) == marked > 0


def test_brackets_and_escapes_in_names_of_a_comparison_are_text(small, small_repaired) -> None:
    names = ("[red]a[/red]", "b\x1b[31m", "c")
    one, two = (replace(audit, class_names=names, model="[bold]net") for audit in (small, small_repaired))
    text = render(comparison_table(compare(one, two)))
    assert "[red]a[/red]" in text
    assert "b?[31m" in text
    assert "\x1b" not in text
    assert "[bold]net -> [bold]net" in text
    with pytest.raises(UnknownNameError, match="attack of this comparison"):
        comparison_table(compare(one, two), ["cw-20"])
