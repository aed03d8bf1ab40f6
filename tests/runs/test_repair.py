"""Repairs of runs, each in a folder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.runs import changes, tree
from robustfair.errors import CheckpointError, ConfigError, ModelError, RobustFairError, UnknownNameError
from robustfair.models import head_norms
from robustfair.runs.folder import RunFolder
from robustfair.runs.load import Target, load_target
from robustfair.runs.recipe import Stage, read_recipe
from robustfair.runs.repair import repair_run


def test_a_repaired_run_is_a_run_of_its_own(run: Path, tmp_path: Path) -> None:
    source = tree(run)
    before = load_target(str(run))
    after, text = repair_run(str(run), "hwnwb", tmp_path / "repaired")
    assert changes(source, tree(run)) == []
    torch.testing.assert_close(head_norms(after.model), torch.ones(10))
    old = head_norms(before.model)
    assert f"{old.min():.3f} to {old.max():.3f}" in text
    assert after.checkpoint == "repaired"
    assert after.meta["repaired_from"] == {"run": str(run), "checkpoint": "best"}
    for key in ("class_names", "data", "threat", "epoch", "candidate"):
        assert after.meta[key] == before.meta[key]
    folder = RunFolder(tmp_path / "repaired")
    manifest = folder.manifest()
    assert (manifest["status"], manifest["repair"]) == ("complete", "hwnwb")
    for key in ("model", "class_names", "data", "recipe", "threat", "seed"):
        assert manifest[key] == RunFolder(run).manifest()[key]
    stage = Stage(does="repair", what="hwnwb")
    assert read_recipe(str(folder.recipe), {}) == read_recipe(str(run / "recipe.yaml"), {}).then(stage)


def test_the_repair_of_a_repair_names_the_run_it_came_from(run: Path, tmp_path: Path) -> None:
    repair_run(str(run), "hwnwb", tmp_path / "repaired")
    with pytest.raises(ModelError, match=f"is repaired already: repair the run it came from, {run}"):
        repair_run(str(tmp_path / "repaired"), "hwnwb", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_repair_that_did_not_come_to_its_end_is_ended_by_the_same_call_alone(run: Path, tmp_path: Path) -> None:
    """As an earlier version left it too: a manifest without a status, and no weights."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    repair_run(str(run), "hwnwb", whole)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    (out / "history.jsonl").unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "status"}))
    left = tree(out)
    for changed in ({"method": "hwnwb(target_norm=mean)"}, {"checkpoint": "last"}):
        with pytest.raises(CheckpointError, match=r"already holds a run: .* or repeat the repair that was begun here"):
            repair_run(str(run), **({"method": "hwnwb", "checkpoint": None} | changed), out=out)  # type: ignore[arg-type]
        assert changes(left, tree(out)) == []
    repair_run(str(run), "hwnwb", out)
    assert set(changes(tree(whole), tree(out))) <= {"manifest.json"}
    assert RunFolder(out).manifest()["status"] == "complete"
    with pytest.raises(CheckpointError, match=r"already holds a run: choose another folder$"):
        repair_run(str(run), "hwnwb", out)


@pytest.mark.parametrize(
    ("source", "method", "out", "error"),
    [
        ("run", "hwnb", "new", UnknownNameError),
        ("run", "hwnwb(target_norm=one)", "new", ConfigError),
        ("run", "hwnwb + hwnwb", "new", RobustFairError),
        ("run", "hwnwb", "run", CheckpointError),
        ("run", "hwnwb", "run/manifest.json", CheckpointError),
        ("run", "hwnwb", "run/manifest.json/new", CheckpointError),
        ("absent", "hwnwb", "new", CheckpointError),
        ("cache", "hwnwb", "new", CheckpointError),
    ],
)
def test_repairs_that_cannot_be_leave_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    method: str,
    out: str,
    error: type[Exception],
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(error):
        repair_run(source, method, Path(out))
    assert changes(before, tree(tmp_path)) == []


def test_a_head_that_cannot_be_repaired_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_zero_row(*args: Any, **keys: Any) -> Target:
        target = load_target(*args, **keys)
        with torch.no_grad():
            target.model.head.weight[4] = 0
        return target

    monkeypatch.setattr("robustfair.runs.repair.load_target", with_a_zero_row)
    with pytest.raises(ModelError, match=r"head rows of classes \[4\] are zero"):
        repair_run(str(run), "hwnwb", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_repaired_run_keeps_the_history_of_its_training(run: Path, tmp_path: Path) -> None:
    repair_run(str(run), "hwnwb", tmp_path / "repaired")
    kept = RunFolder(tmp_path / "repaired").history()
    assert kept == RunFolder(run).history()
    assert len(kept) > 0
