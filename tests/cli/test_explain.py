"""`robustfair explain` as a user meets it."""

from __future__ import annotations

from pathlib import Path

from reference.commands import Command
from reference.runs import CFA, changes, tree


def test_explain_says_who_edits_what(command: Command) -> None:
    outcome = command("explain", "trades(eps=8/255) + ccm + ema", "--epochs", 5)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "  attack: 10 steps of 2/255 in linf" in lines
    assert lines[lines.index("  sets: attack.eps") - 1] == "  acts in: attack, at_epoch"
    assert any(line.startswith("  note: ccm begins at epoch 10") for line in lines)


def test_explain_runs_nothing(place: Path, command: Command) -> None:
    before = tree(place)
    assert command("explain", CFA).code == 0
    assert command("explain", "demo").code == 0
    assert changes(before, tree(place)) == []


def test_stages_are_explained_one_by_one(place: Path, command: Command) -> None:
    (place / "two.yaml").write_text(
        "stages:\n- train: trades + ccm\n- edit: long-tail\n- train: pgd-at + ema\n- repair: hwnwb\n"
    )
    outcome = command("explain", "two.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line for line in outcome.out.splitlines() if line.startswith("stage ")]
    assert lines == [
        "stage 1, train: trades + ccm",
        "stage 2, edit: long-tail",
        "stage 3, train: pgd-at + ema",
        "stage 4, repair: hwnwb",
    ]
    assert outcome.out.count("acts in:") == 2


def test_a_bundle_is_explained_with_what_it_became_and_refused_beside_its_parts(command: Command) -> None:
    outcome = command("explain", "trades + cfa")
    assert (outcome.code, outcome.err) == (0, "")
    assert "  stands for: ccm, ccr, fawa\n" in outcome.out
    refused = command("explain", "trades + cfa + ccm")
    assert refused.code == 2
    assert "cfa stands for ccm, ccr, fawa and ccm is listed too" in refused.err
