"""`robustfair compare` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference.commands import TEN, Command, Refuses, case
from reference.runs import changes, tree

COMPARING = [
    case("compare", "at least two runs or audits, got 0"),
    case("compare run", "at least two runs or audits, got 1"),
    case("compare stored/before run", "run holds no audit: run robustfair audit run"),
    case("compare stored/before notes", "notes holds no audit"),
    case("compare stored/before absent.json", "absent.json does not exist"),
    case("compare stored/before run/manifest.json", "run/manifest"),
    case("compare stored/before stored/fewer", "not of the same images (40 and 30)"),
    case("compare stored/before stored/pixels", "not of the same images", "with other pixels"),
    case("compare stored/before stored/letters", "over different classes", "(0, 1, 2 and 7 more)"),
    case("compare stored/before stored/radius", "under different threats, linf eps 0.1 and linf eps 0.2"),
    case("compare stored/before stored/step --paired", "pgd-2 ran with step_size", "same settings"),
    case("compare stored/before stored/step", "pgd-2 ran with step_size", "same settings"),
    case("compare stored/before stored/after stored/fewer", "not of the same images (40 and 30)"),
    case("compare stored/before stored/after --attacks fgsm", "unknown attack of both audits 'fgsm'", "pgd-2"),
    case(["compare", "stored/before", "stored/after", "--attacks", ""], "unknown attack of both audits ''"),
    case("compare stored/before stored/after --format html", "--format", "markdown"),
    case("compare stored/before stored/after --pared", "--paired"),
    case("compare stored/before stored/after --out notes/plan.txt/x", "notes/plan.txt"),
    case("compare stored/before stored/after --out notes", "out must be a file name", "notes/comparison.txt"),
]


@pytest.mark.parametrize(("argv", "fragments"), COMPARING)
def test_wrong_use_is_one_line_and_changes_nothing(
    refuses: Refuses, argv: list[str], fragments: tuple[str, ...]
) -> None:
    refuses(argv, fragments)


def test_two_stored_audits_side_by_side(place: Path, command: Command) -> None:
    before = tree(place)
    outcome = command("compare", "stored/before", "stored/after")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:2] == [name, "4"] for line in lines) == 1
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "pgd-2" in line for line in lines)
    notes = [line for line in outcome.err.splitlines() if line.startswith("note: stored/")]
    assert len(notes) == 2
    assert changes(before, tree(place)) == []


def test_paired_tests_of_two_runs(place: Path, command: Command) -> None:
    for run in ("run", "repaired"):
        assert command("audit", run, "--attacks", "clean,pgd-2", "--limit-per-class", 4).code == 0
    outcome = command("compare", "run", "repaired", "--paired")
    assert outcome.code == 0, outcome.err
    for word in ("McNemar", "Holm", "pgd-2", "clean", "worst"):
        assert word in outcome.out
    found = command("compare", "run", "repaired", "--paired", "--json").json()
    assert found["schema"] == "robustfair.compare/1"
    assert list(found["attacks"]) == ["clean", "pgd-2", "robust"]
    arrays = [np.load(next((place / run / "audit").glob("*.npz"))) for run in ("run", "repaired")]
    hits = [stored["pgd-2"] == stored["labels"] for stored in arrays]
    average = found["attacks"]["pgd-2"]["average"]
    assert (average["lost"], average["won"]) == (int((hits[0] & ~hits[1]).sum()), int((~hits[0] & hits[1]).sum()))
    assert average["change"] == pytest.approx(hits[1].mean() - hits[0].mean())
    assert [tested["name"] for tested in found["attacks"]["pgd-2"]["classes"]] == list(TEN)


def test_comparisons_of_some_attacks_in_other_forms(place: Path, command: Command) -> None:
    pair = ["compare", "stored/before", "stored/after"]
    only = command(*pair, "--attacks", "PGD_2", "--json").json()
    assert list(only["attacks"]) == ["pgd-2"]
    for attacks, chosen in (
        ("robust", ["robust"]),
        ("Robust", ["robust"]),
        ("clean,robust", ["clean", "robust"]),
        ("robust, PGD_2", ["robust", "pgd-2"]),
    ):
        outcome = command(*pair, "--paired", "--attacks", attacks, "--json")
        assert outcome.code == 0, outcome.err
        assert list(outcome.json()["attacks"]) == chosen
    for form, mark in (("markdown", "|"), ("latex", r"\begin{tabular}")):
        outcome = command(*pair, "--format", form)
        assert outcome.code == 0
        assert mark in outcome.out
    outcome = command(*pair, "--paired", "--out", "deep/table.txt")
    assert outcome.out == "wrote deep/table.txt\n"
    assert (place / "deep" / "table.txt").read_text() == command(*pair, "--paired").out


def test_a_third_is_compared_with_the_first(place: Path, command: Command) -> None:
    outcome = command("compare", "stored/before", "stored/after", "stored/before", "--json")
    found = outcome.json()
    assert len(found) == 2
    assert found[1]["attacks"]["pgd-2"]["average"]["change"] == 0
    assert found[1]["attacks"]["pgd-2"]["average"]["p"] == 1
