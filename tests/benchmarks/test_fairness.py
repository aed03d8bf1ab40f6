"""The comparison of fairness methods: what is there is not done again, and rows meet their base seed by seed."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fairness
from benchmarks.fairness import ENTRIES, SCALES, Entry, Scale, main, wanted
from robustfair.errors import UnknownNameError
from robustfair.evaluate.result import load_audit
from robustfair.runs.composition import plan_of_recipe
from robustfair.runs.recipe import read_recipe

TINY = Scale(
    keys={
        **fairness.COMMON,
        "data": "digits",
        "limit_per_class": 20,
        "model": "small-cnn",
        "width": 4,
        "eps": 0.2,
        "step_size": 0.1,
        "epochs": 1,
        "lr": 0.05,
        "validation": 0.2,
    },
    test_images=60,
    autoattack_images=20,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "cifar10", TINY)
    monkeypatch.setattr(fairness, "ATTACKS", ("apgd-ce(steps=2)",))
    monkeypatch.setattr(fairness, "AUTOATTACK", "apgd-t(steps=2, targets=2)")
    rows = {
        "base": Entry(train="trades"),
        "more": Entry(train="trades", start="base", keys={"epochs": 1, "schedule": "constant"}),
        "ccr": Entry(train="trades + ccr(begin=1)", base="base"),
        "taught": Entry(train="rslad(teacher={base})", base="base"),
    }
    monkeypatch.setattr(fairness, "ENTRIES", rows)


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    given = ["--runs", str(folder / "runs"), "--out", str(folder / "out"), *arguments]
    return main(given).as_json()


@pytest.mark.usefixtures("tiny")
def test_rows_are_trained_audited_compared_and_not_done_again(tmp_path: Path) -> None:
    found = run(tmp_path, "--seeds", "0", "1", "--autoattack", "base")
    rows, changes, agreement = (table["rows"] for table in found["tables"])
    assert [row["row"] for row in rows] == ["base", "more", "ccr", "taught"]
    assert [(row["row"], row["base"], row["seeds"]) for row in changes] == [("ccr", "base", 2), ("taught", "base", 2)]
    (line,) = agreement
    assert (line["row"], line["images"]) == ("base", 40)
    audits = [load_audit(tmp_path / "out" / "cifar10" / f"base-{seed}.audit.json") for seed in (0, 1)]
    assert {each.threat.eps for each in audits} == {TINY.keys["eps"]}
    assert rows[0]["clean_each"] == pytest.approx([100 * each.average("clean") for each in audits])
    assert rows[0]["robust_worst_each"] == pytest.approx([100 * each.worst("robust").value for each in audits])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = run(tmp_path, "--seeds", "0", "1", "--autoattack", "base")
    assert again["tables"] == found["tables"]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert run(tmp_path, "--seeds", "0", "1", "--report")["tables"] == found["tables"]


@pytest.mark.usefixtures("tiny")
def test_an_audit_is_enough_to_report_and_a_start_is_trained_for_who_needs_it(tmp_path: Path) -> None:
    run(tmp_path, "--seeds", "0", "--only", "more")
    assert sorted(path.name for path in (tmp_path / "runs" / "cifar10").iterdir()) == ["base-0", "more-0"]
    with pytest.raises(UnknownNameError, match="ccr"):
        fairness.report(_asked(only=["cr"]))
    assert wanted("cifar10", ["more", "ccr"]) == ["base", "more", "ccr"]
    assert wanted("cifar10-lt", None) == []


def _asked(**given: Any) -> Any:
    return Namespace(**{"autoattack": [], "report": False, "seeds": [0], "scale": "cifar10", **given})


@pytest.mark.parametrize("name", list(ENTRIES))
def test_every_row_composes_and_its_base_is_a_row(name: str) -> None:
    entry = ENTRIES[name]
    for other in filter(None, (entry.base, *entry.asks)):
        assert set(entry.on) <= set(ENTRIES[other].on)
    assert set(entry.on) <= set(SCALES)
    composition = entry.train.format(**dict.fromkeys(entry.asks, "runs/x"))
    for scale in entry.on:
        recipe = read_recipe(composition, entry.keys_on(scale))
        assert recipe.stages or plan_of_recipe(recipe)
