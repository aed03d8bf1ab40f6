"""What is written into the cards: rows of the results, and no card that says other than they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cards import CARDS, MARK, NOTHING, terms, written
from benchmarks.measure import ROOT


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_a_card_says_what_the_kept_results_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert written(path.stem, text) == text


def write(path: Path, *tables: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tables": tables}), encoding="utf-8")


def test_costs_and_changes_stand_below_the_mark_and_words_above_it_stay(tmp_path: Path) -> None:
    costs = [
        {"method": "ccr", "base": "trades", "ratio": 1.0349, "low": 0.99, "high": 1.1},
        {"method": "ccr, slowly", "base": "mart", "ratio": 2.0, "low": 2.0, "high": 2.0},
        {"method": "ccm", "base": "pgd-at", "ratio": 9.0, "low": 9.0, "high": 9.0},
    ]
    write(tmp_path / "methods-cpu" / "cost.json", {"title": "Cost", "rows": costs})
    change = {"row": "trades-ccr", "base": "trades", "robust": 0.51, "robust_worst": 2.0}
    change |= {"robust_worst_low": 0.5, "robust_worst_high": 3.5, "plain": -1.0, "plain_low": -2.0, "plain_high": 0.2}
    other = {**change, "row": "trades-cfa"}
    write(
        tmp_path / "fairness-cpu" / "cifar10.json",
        {"title": "Rows", "rows": []},
        {"title": "Changes, seed by seed, against the base", "rows": [change, other]},
    )
    card = f"# Card\n\n## Measured\n\nBy hand.\n\n{MARK}\n\nOld.\n"
    above, _, below = written("ccr", card, tmp_path).partition(MARK)
    assert above == "# Card\n\n## Measured\n\nBy hand.\n\n"
    assert "takes 1.03 times one of `trades`" in below
    assert "(slowly) takes 2.00 times one of `mart`" in below
    assert "ccm" not in below
    assert "9.0" not in below
    rows = [line for line in below.splitlines() if line.startswith("| cifar10")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[4:-1] == ["+0.5", "+2.0 (+0.5 to +3.5)", "-1.0 (-2.0 to +0.2)"]
    assert "beyond chance in 1 of 1 rows,\nabove the plain baseline's in 0 of 1." in below
    assert written("ccr", above + MARK + below, tmp_path) == above + MARK + below
    assert "Old." not in below


def test_what_is_measured_takes_the_place_of_the_word_that_nothing_is(tmp_path: Path) -> None:
    row = {"method": "ccr", "base": "trades", "ratio": 1.0, "low": 1.0, "high": 1.0}
    write(tmp_path / "methods-cpu" / "cost.json", {"title": "Cost", "rows": [row]})
    assert written("ccr", f"## Measured\n\n{NOTHING}\n", tmp_path).startswith(f"## Measured\n\n{MARK}\n\nCost: ")


def test_without_results_the_words_stay_alone(tmp_path: Path) -> None:
    assert written("ccr", "# Card\n\nBy hand.\n", tmp_path) == "# Card\n\nBy hand.\n"


def test_a_row_belongs_to_what_it_names_and_not_to_the_parts_of_a_bundle() -> None:
    assert terms("trades-cfa") == {"trades", "cfa"}
    assert terms("fair-tat-fawa") == {"pgd-at", "fair-tat", "fawa"}
    assert terms("absld") == {"rslad", "absld"}
    assert "jtt" in terms("jtt")


def test_the_results_are_kept_where_the_cards_say() -> None:
    assert (ROOT / "results" / "methods-cpu" / "cost.json").exists()
