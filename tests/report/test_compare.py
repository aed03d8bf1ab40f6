from __future__ import annotations

from dataclasses import replace

import pytest

from reference.audits import random_audit
from robustfair.errors import UnknownNameError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.report.compare import comparison_table, group_table
from robustfair.report.layout import render
from robustfair.report.table import percent, points


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


def test_brackets_and_escapes_in_names_are_text(small, small_repaired) -> None:
    names = ("[red]a[/red]", "b\x1b[31m", "c")
    one, two = (replace(audit, class_names=names, model="[bold]net") for audit in (small, small_repaired))
    text = render(comparison_table(compare(one, two)))
    assert "[red]a[/red]" in text
    assert "b?[31m" in text
    assert "\x1b" not in text
    assert "[bold]net -> [bold]net" in text
    with pytest.raises(UnknownNameError, match="attack of this comparison"):
        comparison_table(compare(one, two), ["cw-20"])
