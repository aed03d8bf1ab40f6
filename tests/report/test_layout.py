"""What every kind of table looks like in a narrow terminal, and in a poor encoding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len

from reference.audits import random_audit
from robustfair.evaluate.compare import compare
from robustfair.evaluate.corruptions import CorruptionAudit
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.evaluate.result import Audit
from robustfair.report.console import Screen
from robustfair.report.corruptions import corruption_table
from robustfair.report.layout import render
from robustfair.report.table import Table, before_after_table, class_table, comparison_table, group_table
from robustfair.report.words import short_names
from robustfair.values import Threat

CLASSES = ("a", "traffic sign, speed limit in kilometres", "東京タワー東京タワー", "Zürich")
ATTACKS = {"cw-50": "cw-50(restarts=5, keep=best)"}
WIDTHS = (60, 80, 100, 120, 200)


def audit_of(seed: int) -> Audit:
    audit = random_audit(seed, keeps=0.4 + 0.2 * seed)
    names = {name: ATTACKS.get(name.split("(")[0], name) for name in audit.attacks}
    return replace(
        audit,
        predictions={names[name]: column for name, column in audit.predictions.items()},
        settings={names[name]: settings for name, settings in audit.settings.items()},
        broken_by={},
        class_names=CLASSES,
        head_norms=[1.0, 1.5, 1.25, 2.125],
        groups=(0, 0, 1, 1),
        group_names=("signs", "places"),
    )


def corruptions() -> CorruptionAudit:
    audit = audit_of(1)
    names = ("gaussian_noise", "fog", "snow")
    return CorruptionAudit(
        model="net",
        data="toy",
        class_names=CLASSES,
        index=audit.index,
        labels=audit.labels,
        severities=(1, 2, 3, 4, 5),
        clean=audit.predictions["clean"],
        predictions={name: audit.predictions["pgd-20"].expand(5, -1).clone() for name in names},
    )


TABLES: dict[str, Callable[[], Table]] = {
    "classes": lambda: class_table(audit_of(1)),
    "before and after": lambda: before_after_table(audit_of(1), audit_of(2)),
    "comparison": lambda: comparison_table(compare(audit_of(1), audit_of(2))),
    "groups": lambda: group_table(regroup(audit_of(1), read_groups("superclass", audit_of(1)))),
    "corruptions": lambda: corruption_table(corruptions()),
}


def numbers(table: Table) -> Counter[str]:
    """The cells of a table that hold numbers, one entry a number or interval."""
    cells = [cell for row in (*table.above, *table.rows, *table.totals) for cell in row[table.labels :]]
    return Counter(text for cell in cells if not cell.is_name for text in (cell.text, cell.interval) if text)


def printed(text: str) -> Counter[str]:
    return Counter(word for word in re.findall(r"\[[^][]+\]|[^\s*†!]+", text))


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_too_long_and_no_number_is_lost(kind: str, width: int) -> None:
    table = TABLES[kind]()
    text = render(table, Screen(width=width))
    assert max(map(cell_len, text.splitlines())) <= width
    missing = numbers(table) - printed(text)
    assert not missing
    assert not numbers(table) - printed(render(table))
    for attack in {column.over or column.head for column in table.columns}:
        assert attack.partition("(")[0] in text


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_fits_is_as_it_is_without_a_width(kind: str) -> None:
    table = TABLES[kind]()
    wide = render(table)
    widest = max(map(cell_len, wide.splitlines()))
    assert render(table, Screen(width=max(120, widest))) == wide


def test_intervals_go_below_before_attacks_do() -> None:
    table = class_table(random_audit(1))
    shapes = []
    for width in (None, 102, 101, 77, 76, 60):
        text = render(table, Screen(width=width))
        shapes.append((text.count("──\n"), bool(re.search(r"\d \[", text))))
    assert shapes == [(1, True), (1, True), (1, False), (1, False), (2, True), (3, True)]


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("width", [None, 80])
def test_what_an_encoding_lacks_is_drawn_or_escaped_and_columns_stay_in_line(
    kind: str, encoding: str, width: int | None
) -> None:
    table = TABLES[kind]()
    text = render(table, Screen(width=width, encoding=encoding))
    text.encode(encoding)
    assert " ---" in text
    assert width is None or max(map(len, text.splitlines())) <= width
    assert not numbers(table) - printed(text)
    names = {"ascii": r"Z\xfcrich", "cp1252": "Zürich"}
    assert kind in ("groups", "corruptions") or names[encoding] in text
    if kind == "classes" and width is None:
        rows = text.partition(" ---")[2].partition("\n")[2].splitlines()[:3]
        assert len(set(map(len, rows))) == 1


def test_long_names_stay_apart() -> None:
    names = [f"traffic_sign_speed_limit_{i}_kilometres_per_hour" for i in range(12)]
    short = short_names(names, 16)
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 16
    assert short_names(["cat", "dog"], 16) == ["cat", "dog"]


def test_a_terminal_shows_the_lowest_and_the_highest_of_very_many_rows(large: Callable[..., Audit]) -> None:
    audit = large(1000)
    text = render(class_table(audit), Screen(width=120, terminal=True))
    rate = audit.rate("robust")
    shown = [int(number) for number in re.findall(r"^ class (\d+) ", text, re.M)]
    assert len(shown) == 30
    assert shown == sorted(shown)
    ranked = rate.sort(stable=True).indices.tolist()
    assert set(shown) == set(ranked[:20] + ranked[-10:])
    assert "970 of 1,000 rows are left out: shown are the 20 lowest and the 10 highest by accuracy under robust" in (
        re.sub(r"\s+", " ", text)
    )
    assert " worst is " in text
    for everything in (Screen(), Screen(width=120)):
        assert len(re.findall(r"^ class \d+ ", render(class_table(audit), everything), re.M)) % 1000 == 0
    hundred = render(class_table(large(100)), Screen(width=120, terminal=True))
    assert "left out" not in hundred
    assert len(set(re.findall(r"^ (class \d+) ", hundred, re.M))) == 100


def test_a_terminal_shows_the_largest_changes_of_very_many_rows(large: Callable[..., Audit]) -> None:
    before = large(200)
    after = replace(before, predictions={**before.predictions, "pgd-20": before.predictions["cw-20"]})
    for table in (before_after_table(before, after), comparison_table(compare(before, after))):
        text = re.sub(r"\s+", " ", render(table, Screen(width=80, terminal=True)))
        assert "170 of 200 rows are left out: shown are the 20 lowest and the 10 highest by change under" in text


def test_titles_and_notes_are_folded_and_escapes_in_names_are_text(small: Audit) -> None:
    audit = replace(small, model="[bold]net" * 8, class_names=("[red]a[/red]", "b\x1b[31m", "c"))
    text = render(class_table(audit), Screen(width=60))
    assert "\x1b" not in text
    assert "b?[31m" in text
    assert "[red]a[/red]" in text
    assert audit.threat == Threat()
