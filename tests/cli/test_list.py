"""`robustfair list` as a user meets it."""

from __future__ import annotations

import pytest

from reference.commands import Command
from robustfair.report.listing import listing

KINDS = ["recipes", "objectives", "methods", "models", "datasets", "attacks", "repairs", "edits", "corruptions"]


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_a_line_per_entry(command: Command, kind: str) -> None:
    entries = dict(listing(kind))
    lines = command("list", kind).out.splitlines()
    assert [line.split()[0] for line in lines] == list(entries)
    assert command("list", kind, "--json").json() == entries
