"""`robustfair list` as a user meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reference.commands import Command
from robustfair.report.listing import listing

KINDS = ["recipes", "objectives", "methods", "models", "datasets", "attacks", "repairs", "edits", "corruptions"]
TABLES_OF_CFA = ["table-1", "table-2", "table-3", "text-3.3"]


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_a_line_per_entry(command: Command, kind: str) -> None:
    entries = dict(listing(kind))
    lines = command("list", kind).out.splitlines()
    assert [line.split()[0] for line in lines] == list(entries)
    assert command("list", kind, "--json").json() == entries


def test_recipes_of_a_paper_stand_under_their_tables_with_what_is_reported(command: Command) -> None:
    outcome = command("list", "recipes", "cfa")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert [line.split(":")[0] for line in lines if ": " in line] == [f"cfa/{name}" for name in TABLES_OF_CFA]
    assert lines[0].endswith("table 1; reported in percent, average / worst class")
    assert "cfa/table-1/trades+cfa  best 50.1 / 26.5, last 49.3 / 21.5 autoattack  trades + cfa" in lines
    assert len([line for line in lines if line.startswith("cfa/table-1/")]) == 11


def test_a_word_finds_the_rows_that_name_it_in_every_table(command: Command) -> None:
    found = command("list", "recipes", "fawa", "--json").json()
    assert "cfa/table-3/at+fawa" in found
    assert "fawa" in found["fair-tat/table-1/cifar10/fair-tat+cfa"]
    assert all("fawa" in f"{name} {text}" for name, text in found.items())
    assert "reported in percent, average / worst class: best 49.3 / 23.1" in found["cfa/table-3/at+fawa"]


def test_rows_that_wait_or_have_nothing_to_train_say_so(command: Command) -> None:
    found = command("list", "recipes", "hwnwb-decosam/table-10", "--json").json()
    assert "(deco-sam is not there yet)" in found["hwnwb-decosam/table-10/pgd-at+deco-sam-rho-9e-5"]
    assert "not there" not in found["hwnwb-decosam/table-10/pgd-at+hwnwb"]
    found = command("list", "recipes", "confusional-spectral/table-2", "--json").json()
    assert "published weights" in found["confusional-spectral/table-2/cifar10-l2-wrn-70-16/wang-2023"]


def test_a_word_that_nothing_has_shows_the_nearest(command: Command) -> None:
    outcome = command("list", "recipes", "cfa/table-l")
    assert outcome.code == 2
    assert "unknown recipe 'cfa/table-l': did you mean cfa/table-" in outcome.err


def test_recipes_are_listed_without_torch() -> None:
    lines = ("import sys", "from robustfair.cli.app import main", "main(['list', 'recipes', 'trades'])")
    code = "; ".join((*lines, "print('torch' in sys.modules)"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout.splitlines()) > 100
