from __future__ import annotations

from dataclasses import replace

import pytest

from reference.audits import made_audit, random_audit
from robustfair.errors import UnknownNameError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.report.sheet import Sheet, sheet_of
from robustfair.report.table import percent, points, span


def texts(sheet: Sheet, row: int) -> list[str]:
    return [cell.text for cell in (*sheet.rows, *sheet.totals)[row]]


def test_an_audit_in_words(small) -> None:
    sheet = sheet_of(small)
    assert sheet.title == "net on toy, linf eps 8/255, percent right"
    assert [(column.over, column.head) for column in sheet.columns] == [
        ("", "class"),
        ("", "images"),
        ("", "clean"),
        ("", "pgd-20"),
    ]
    assert [texts(sheet, row) for row in range(3)] == [
        ["a", "4", "100.0", "75.0"],
        ["b", "2", "100.0", "50.0"],
        ["c", "no images", "", ""],
    ]
    assert texts(sheet, 3) == ["average", "", "100.0", "66.7"]
    assert texts(sheet, 5) == ["worst is", "", "all classes", "b"]
    assert [cell.others for cell in sheet.totals[2]] == ["", "", "with images", ""]
    assert [cell.mark for cell in sheet.rows[1]] == ["", "", "", "worst"]
    assert sheet.rows[0][3].interval == "[30.1, 95.4]"
    assert sheet.rows[0][3].half == "44.9"
    assert sheet.totals[1][3].interval == span(*small.worst_interval("pgd-20"))


def test_a_comparison_in_words(small, small_repaired) -> None:
    found = compare(small, small_repaired)
    sheet = sheet_of(found)
    heads = ["before", "after", "change", "lost/won", "p"]
    assert [column.head for column in sheet.columns] == ["class", "images", *heads, *heads]
    assert [column.over for column in sheet.columns] == ["", "", *["clean"] * 5, *["pgd-20"] * 5]
    assert texts(sheet, 0)[7:] == ["75.0", "50.0", "-25.0", "1/0", "1.000"]
    assert texts(sheet, 1)[7:] == ["50.0", "100.0", "+50.0", "0/1", "1.000"]
    assert texts(sheet, 2) == ["c", "no images", *[""] * 10]
    assert texts(sheet, 5)[7:] == ["b", "a", "", "", ""]
    entry = found.under("pgd-20")
    worst = sheet.totals[1][9]
    assert worst.interval == f"[{points(entry.worst.lower)}, {points(entry.worst.upper)}]"
    assert worst.half == percent(max(entry.worst.upper, -entry.worst.lower))
    assert [cell.mark for cell in sheet.rows[0]].count("worst") == 1, "all are equal on clean images"
    assert "95 %" in sheet.notes[0]


def test_only_a_change_beyond_chance_is_marked() -> None:
    labels = [0] * 100 + [1] * 100
    before = made_audit(labels, {"clean": [2] * 60 + [0] * 40 + [1] * 100})
    sheet = sheet_of(compare(before, made_audit(labels, {"clean": labels}), level=0.99))
    assert [row[4].mark for row in (*sheet.rows, *sheet.totals)] == ["sure", "", "", "sure", "sure", "", "sure"]
    assert "99 %" in sheet.notes[0]
    assert "p at most 0.01" in sheet.notes[3]


def test_robust_is_shown_beside_several_attacks_or_on_demand(small, small_repaired) -> None:
    one, two = random_audit(1), random_audit(2)
    overs = [column.over for column in sheet_of(compare(one, two)).columns]
    assert list(dict.fromkeys(overs)) == ["", "clean", "pgd-20", "cw-50(restarts=5)", "robust"]
    assert "robust" not in [column.over for column in sheet_of(compare(small, small_repaired)).columns]
    some = sheet_of(compare(one, two, attacks=["pgd-20", "robust"]))
    assert list(dict.fromkeys(column.over for column in some.columns)) == ["", "pgd-20", "robust"]
    assert sheet_of(compare(small, small_repaired), ["robust"]).columns[2].over == "robust"
    with pytest.raises(UnknownNameError, match="pgd-2"):
        sheet_of(small, ["pgd-2"])


def test_what_the_rates_are_is_said() -> None:
    audit = replace(random_audit(1), groups=(0, 0, 1, 1))
    groups = read_groups("superclass", audit)
    fine, coarse = (sheet_of(regroup(audit, groups, within=within)) for within in ("class", "group"))
    assert (fine.columns[0].head, texts(fine, 0)[:2]) == ("group", ["group 0", "40"])
    assert fine.notes[1] == "An image counts as right if its class is."
    assert coarse.notes[1].endswith("the rates under attack are upper bounds.")
    clean = sheet_of(regroup(audit, groups, within="group"), ["clean"])
    assert clean.notes[1] == "An image counts as right if any class of its group is predicted."
    short = replace(audit, settings={**audit.settings, "pgd-20": {"ran": {"pgd-20": 0.25}}})
    assert sheet_of(short).notes[1] == "Upper bounds under attack: the time budget left pgd-20 at 25 %."
    assert sheet_of(short, ["clean"]).notes == ("Intervals: 95 %, Wilson; for worst, bootstrap.",)
    assert "net: the time budget left pgd-20 at 25 %" in sheet_of(compare(audit, short)).notes[-1]


@pytest.mark.parametrize("within", ["class", "group"])
def test_a_cut_attack_is_said_below_groups_as_below_classes(within) -> None:
    audit = random_audit(1)
    short = replace(audit, groups=(0, 0, 1, 1), settings={**audit.settings, "pgd-20": {"ran": {"pgd-20": 0.25}}})
    rates = regroup(short, read_groups("superclass", short), within=within)
    assert sheet_of(rates).notes[-1] == sheet_of(short).notes[-1]
    assert "the time budget left pgd-20 at 25 %" in sheet_of(rates).notes[-1]
    assert not any("time budget" in note for note in sheet_of(rates, ["clean"]).notes)
    assert ("aimed at another class" in " ".join(sheet_of(rates).notes)) == (within == "group")
