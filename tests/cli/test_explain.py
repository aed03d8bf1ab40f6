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
