"""What is written into the cards: lines of the reports, between the marks, and no card that says other than they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cards import BEGIN, CARDS, END, RESULTS, concerned, inserted, main, measured, terms
from benchmarks.measure import SCHEMA

ENDS = ("", "_low", "_high")


@pytest.mark.parametrize("name", sorted(concerned(RESULTS)))
def test_a_card_says_what_the_kept_results_say(name: str) -> None:
    text, path = measured(name, RESULTS), CARDS / f"{name}.md"
    if text:
        assert inserted(path.read_bytes(), text, path) == path.read_bytes()


def write(path: Path, settings: dict[str, Any], *tables: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "settings": settings, "tables": tables}), encoding="utf-8")


def line(**given: Any) -> dict[str, Any]:
    """Of the report of objectives; lines differ in what they say."""
    rates = {f"{kind}{what}{end}": 10.0 for kind in ("clean", "pgd20") for what in ("", "_worst") for end in ENDS}
    usual = {"norm": "linf", "eps": "8/255", "seconds": 9, "commit": "abc", "clean_worst_class": "cat"}
    return {**usual, **rates, "pgd20_worst_class": "cat", **given}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    lines = [
        line(what="pgd-at", names=["pgd-at"]),
        line(what="pgd-at + ema", names=["pgd-at", "ema"]),
        line(what="pgd-at + swa", names=["pgd-at", "swa"]),
        line(what="pgd-at, idbh-strong", names=["pgd-at", "idbh-strong"]),
        line(what="pgd-at", names=["pgd-at"], norm="l2"),
    ]
    about = {"images": 20, "epochs": 1, "test_images": 50, "data": "some", "model": "small-cnn", "width": 2, "seed": 0}
    write(folder / "objectives-cpu" / "objectives.json", about, {"title": "", "rows": lines})
    costs = [
        {"method": "ccr", "base": "trades", "ratio": 1.0349, "low": 0.99, "high": 1.1},
        {"method": "ccr, slowly", "base": "mart", "ratio": 2.0, "low": 2.0, "high": 2.0},
        {"method": "ccm", "base": "pgd-at", "ratio": 9.0, "low": 9.0, "high": 9.0},
    ]
    write(folder / "methods-cpu" / "cost.json", {}, {"title": "Cost", "rows": costs})
    change = {"row": "trades-ccr", "base": "trades", "robust": 0.51, "robust_worst": 2.0}
    change |= {"robust_worst_low": 0.5, "robust_worst_high": 3.5, "plain": -1.0, "plain_low": -2.0, "plain_high": 0.2}
    alone = {**change, "row": "dafa", "robust_worst_low": None, "robust_worst_high": None}
    write(
        folder / "fairness-cpu" / "cifar10.json",
        {},
        {"title": "Rows", "rows": []},
        {"title": "Changes, seed by seed, against the base", "rows": [change, {**change, "row": "trades-cfa"}, alone]},
    )
    return folder


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the lines of tables that begin so."""
    return [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith(f"| {start}")
    ]


def test_a_card_shows_its_trainings_and_plain_pgd_at_beside_them(results: Path) -> None:
    def shown(name: str) -> list[str]:
        return [" ".join(row[:2]) for row in rows(measured(name, results), "pgd")]

    assert shown("ema") == ["pgd-at linf, 8/255", "pgd-at + ema linf, 8/255"]
    assert shown("idbh") == ["pgd-at linf, 8/255", "pgd-at, idbh-strong linf, 8/255"]
    assert len(shown("pgd-at")) == 5
    assert "10.0 (10.0 to 10.0) cat" in measured("ema", results)
    assert measured("trades-of-tomorrow", results) == ""


def test_a_card_shows_costs_and_changes_and_counts_what_holds(results: Path) -> None:
    text = measured("ccr", results)
    assert "an epoch takes 1.03 times one of `trades`, turn by turn 0.99 to 1.10" in text
    assert "an epoch (slowly) takes 2.00 times one of `mart`" in text
    assert "9.0" not in text
    (row,) = rows(text, "cifar10")
    assert row[1:] == ["`trades + ccr(begin=2)`", "`trades`", "+0.5", "+2.0 (+0.5 to +3.5)", "-1.0 (-2.0 to +0.2)"]
    assert measured("dafa", results) == "", "one seed shows no interval"
    assert "beyond chance in 1 of 1 rows, and above the plain baseline's in 0 of 1." in text


def test_a_row_belongs_to_what_it_names_and_not_to_the_parts_of_a_bundle() -> None:
    assert terms("trades-cfa") == {"trades", "cfa"}
    assert terms("fair-tat-fawa") == {"pgd-at", "fair-tat", "fawa"}
    assert terms("absld") == {"rslad", "absld"}
    assert "jtt" in terms("jtt")


def write_cards(folder: Path, **texts: bytes) -> Path:
    folder.mkdir()
    for name in ("pgd-at", "ema", "swa", "idbh", "ccm", "ccr", "cfa"):
        text = texts.get(name.replace("-", "_"), f"# {name}\r\n\n{BEGIN}\nold\n{END}\n\nafter \xe9".encode())
        (folder / f"{name}.md").write_bytes(text)
    return folder


def test_cards_are_written_between_the_marks_and_nowhere_else(results: Path, tmp_path: Path) -> None:
    folder = write_cards(tmp_path / "cards", ema=f"{BEGIN}{END}".encode())
    (folder / "other.md").write_text("without marks")
    for _ in range(2):
        main(["--results", str(results), "--cards", str(folder)])
        for name in ("pgd-at", "ccr", "cfa"):
            text = f"# {name}\r\n\n{BEGIN}\n{measured(name, results)}\n{END}\n\nafter \xe9"
            assert (folder / f"{name}.md").read_bytes() == text.encode()
        assert (folder / "ema.md").read_text() == f"{BEGIN}\n{measured('ema', results)}\n{END}"
    assert (folder / "other.md").read_text() == "without marks"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"no marks", "swa.md needs one"),
        (f"{END}{BEGIN}".encode(), "swa.md needs one"),
        (f"{BEGIN}{BEGIN}{END}".encode(), "swa.md needs one"),
        (None, "no card "),
    ],
)
def test_a_card_that_cannot_take_the_text_stops_all_of_them(
    text: bytes | None, told: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_cards(tmp_path / "cards", **({} if text is None else {"swa": text}))
    if text is None:
        (folder / "swa.md").unlink()
    before = (folder / "ema.md").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["--results", str(results), "--cards", str(folder)])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "ema.md").read_bytes() == before
