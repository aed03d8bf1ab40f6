"""Damaged files of a run: refused in one line, and left as they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reference.commands import AUDIT, FAST, Command
from reference.runs import changes, cut_in_half, tree


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [cut_in_half, lambda path: path.write_bytes(b""), Path.unlink], ids=["cut", "empty", "gone"]
)
@pytest.mark.parametrize(
    "argv",
    [
        ["audit", "run", "--checkpoint", "best", *AUDIT],
        ["audit", "run", "--checkpoint", "last", *AUDIT],
        ["repair", "run", "--out", "new", "--checkpoint", "best"],
        ["train", "--out", "run", "--resume"],
    ],
    ids=["audit best", "audit last", "repair", "resume"],
)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    place: Path, command: Command, argv: list[str], name: str, damage: Callable[[Path], Any]
) -> None:
    for checkpoint in ("best", "last"):
        damage(place / "run" / "checkpoints" / checkpoint / name)
    before = tree(place)
    outcome = command(*argv)
    assert changes(before, tree(place)) == []
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .*(best|last).*\n", outcome.err)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("manifest.json", ["train", "--out", "run", "--resume"]),
        ("manifest.json", ["repair", "run", "--out", "new"]),
        ("recipe.yaml", ["train", "--out", "run", "--resume"]),
        ("recipe.yaml", ["audit", "run", *AUDIT]),
        ("recipe.yaml", ["repair", "run", "--out", "new"]),
        ("history.jsonl", ["train", "--out", "run", "--resume"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_damaged_run_folder_is_refused_and_left_as_it_is(
    place: Path, command: Command, name: str, argv: list[str]
) -> None:
    cut_in_half(place / "run" / name)
    before = tree(place)
    outcome = command(*argv)
    assert changes(before, tree(place)) == []
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .+\n", outcome.err)


@pytest.mark.parametrize("damage", [cut_in_half, lambda path: path.write_bytes(b"")], ids=["cut", "empty"])
def test_a_damaged_journal_is_refused_and_left_as_it_is(
    place: Path, command: Command, damage: Callable[[Path], Any]
) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    command(*audit, "--max-minutes", "1e-9")
    (left,) = (place / "run" / "audit").glob("unfinished-*")
    damage(left)
    before = tree(place)
    outcome = command(*audit)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .*unfinished-\w+\.safetensors is damaged .*delete it.*\n", outcome.err)
    assert changes(before, tree(place)) == []
