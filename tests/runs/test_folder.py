"""The folder of a run: what it refuses, what it holds, and which of its checkpoints is meant."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.runs import changes, cut_in_half, tree
from robustfair.errors import CheckpointError, DivergedError, ModelError, UnknownNameError
from robustfair.models import create_model, describe_model
from robustfair.runs.checkpoint import Checkpoint, write_checkpoint
from robustfair.runs.folder import SCHEMA, RunFolder, environment
from robustfair.training.state import ScoredWeights, TrainState


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was begun and has no epoch yet."""
    folder = RunFolder(tmp_path / "run")
    folder.create("train: trades\n", {"seed": 3, "status": "running"})
    return folder


def state(epoch: int, **parts: Any) -> TrainState:
    history = tuple({"epoch": number, "loss": 1 / number} for number in range(1, epoch + 1))
    weights = {"w": torch.full((2,), float(epoch))}
    return TrainState(epoch=epoch, step=epoch * 5, weights=weights, optimizer={}, methods={}, history=history, **parts)


def add(folder: RunFolder, name: str, **meta: Any) -> torch.nn.Module:
    """A checkpoint of a small network of its own."""
    model = create_model("small-cnn", in_channels=1, width=2, num_classes=3)
    about = {"model": describe_model(model), "candidate": name, "epoch": 1, **meta}
    write_checkpoint(folder.checkpoints / name, Checkpoint(model.state_dict(), {}, about))
    return model


def test_a_folder_is_free_while_it_is_absent_or_empty(tmp_path: Path) -> None:
    RunFolder(tmp_path / "absent").require_free()
    RunFolder(tmp_path).require_free()
    assert not RunFolder(tmp_path).exists()


def test_a_folder_with_anything_in_it_is_not_free(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="already holds a run: choose another folder, or --resume"):
        folder.require_free()
    with pytest.raises(CheckpointError, match=r"is not empty: choose another folder$"):
        RunFolder(tmp_path).require_free()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "file").touch()
    for path, message in ((tmp_path / ".hidden", "is not empty"), (tmp_path / ".hidden" / "file", "is a file")):
        with pytest.raises(CheckpointError, match=message):
            RunFolder(path).require_free()


def test_creating_makes_the_folders_above_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b" / "run")
    folder.create("train: trades\n", {"seed": 3})
    assert list(tree(tmp_path)) == ["a", "a/b", "a/b/run", "a/b/run/manifest.json", "a/b/run/recipe.yaml"]
    assert folder.exists()
    assert folder.recipe.read_text() == "train: trades\n"
    assert folder.manifest() == {"schema": SCHEMA, "seed": 3}


@pytest.mark.parametrize("out", ["run", "empty"])
def test_an_owner_leaves_nothing_and_a_second_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "empty").mkdir()
    before, folder = tree(tmp_path), RunFolder(tmp_path / out)
    with folder.owned() as killed:
        assert not killed
        folder.require_free()
        message = rf"^--out {re.escape(str(folder.path))} is in use by process {os.getpid()} on "
        with pytest.raises(CheckpointError, match=message), folder.owned():
            pytest.fail("two own it")
    assert changes(before, tree(tmp_path)) == []


@pytest.mark.parametrize("moved", [(), ("recipe.yaml",), ("recipe.yaml", "history.jsonl", "checkpoints")])
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_killed_beginning_left_counts_for_nothing(tmp_path: Path, moved: tuple[str, ...], whole: bool) -> None:
    """Files are moved out only once the manifest is there: without it, what lies beside is a user's own."""
    folder = RunFolder(tmp_path)
    new = RunFolder(tmp_path / ".new")
    (new.checkpoints / "repaired").mkdir(parents=True)
    for file in (new.recipe, new.path / "history.jsonl", new.path / "manifest.json"):
        if whole or file.name != "manifest.json":
            file.write_text("{}")
    (tmp_path / ".lock").touch()
    for name in moved:
        (new.path / name).rename(tmp_path / name)
    if moved and not whole:
        with pytest.raises(CheckpointError, match=r"is not empty: choose another folder$"):
            folder.require_free()
        return
    folder.require_free()
    folder.create("train: trades\n", {"seed": 3})
    assert list(tree(tmp_path)) == [".lock", "manifest.json", "recipe.yaml"]
    assert folder.recipe.read_text() == "train: trades\n"


@pytest.mark.parametrize("name", ["recipe.yaml", "notes.txt"])
def test_a_file_of_a_user_is_no_left_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty"):
        RunFolder(tmp_path).require_free()


def test_a_filling_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder(tmp_path).filling({"seed": 3}) as new:
            new.recipe.write_text("half")
            raise ZeroDivisionError

    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert changes(before, tree(tmp_path)) == []


def test_a_repair_is_no_training_to_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for status, more in (("running", ", or repeat the repair that was begun here$"), ("complete", "another folder$")):
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        folder.create("train: trades\n", {"repaired_from": {"run": "runs/old"}, "status": status})
        with pytest.raises(CheckpointError, match="holds a repair of runs/old, which no training began"):
            folder.require_training()
        with pytest.raises(CheckpointError, match=f"already holds a run: .*{more}"):
            folder.require_free()


def test_resuming_clears_what_killed_writings_left_and_nothing_of_others(folder: RunFolder) -> None:
    folder.save(state(1), {})
    before = tree(folder.path)
    others = {".report.html.7.tmp": b"an audit writes", "audit": None, "audit/.x.json.7.tmp": b"it too"}
    (folder.audits).mkdir()
    for name, content in others.items():
        if content is not None:
            (folder.path / name).write_bytes(content)
    for name in (".manifest.json.7.tmp", ".history.jsonl.7.tmp"):
        (folder.path / name).write_text("half")
    (folder.checkpoints / ".best.new").mkdir()
    (folder.path / ".new").mkdir()
    folder.resume_state()
    assert changes(before, tree(folder.path)) == sorted(others)


def test_creating_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="file/run"):
        RunFolder(tmp_path / "file" / "run").create("train: trades\n", {})
    assert changes(before, tree(tmp_path)) == []


def test_a_manifest_is_updated_key_by_key(folder: RunFolder) -> None:
    folder.update_manifest(status="complete", epochs_done=4)
    assert folder.manifest() == {"schema": SCHEMA, "seed": 3, "status": "complete", "epochs_done": 4}
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut or damaged"),
        ('{"schema": "robustfair.run/1", "se', "cut or damaged"),
        ("[]", "schema"),
        ('{"schema": "robustfair.run/2"}', "has schema 'robustfair.run/2', not 'robustfair.run/1'"),
    ],
)
def test_a_damaged_manifest_is_named(folder: RunFolder, text: str, message: str) -> None:
    (folder.path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        folder.manifest()


@pytest.mark.parametrize("name", ["absent", "file", "folder"])
def test_what_holds_no_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "checkpoints").mkdir(parents=True)
    folder = RunFolder(tmp_path / name)
    for read in (folder.require_run, folder.manifest, folder.read, folder.resume_state):
        with pytest.raises(CheckpointError, match=f"{name} holds no run"):
            read()


# Epochs


def test_every_epoch_adds_a_line_and_a_checkpoint(folder: RunFolder) -> None:
    for epoch in (1, 2):
        folder.save(state(epoch), {"model": "net"})
    assert folder.history() == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    assert folder.available() == ["last"]
    resumed = folder.resume_state()
    assert resumed is not None
    assert (resumed.epoch, resumed.step, resumed.history) == (2, 10, state(2).history)
    assert torch.equal(resumed.weights["w"], torch.full((2,), 2.0))


def test_before_the_first_epoch_there_is_nothing_to_resume(folder: RunFolder) -> None:
    (folder.path / "history.jsonl").write_text('{"epoch": 1, "lo')
    assert folder.resume_state() is None
    assert folder.history() == []


def test_resuming_drops_history_ahead_of_the_checkpoint(folder: RunFolder) -> None:
    folder.save(state(1), {})
    with (folder.path / "history.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 9.0}\n{"epoch": 3, "lo')
    assert [record["epoch"] for record in folder.history()] == [1, 2]
    resumed = folder.resume_state()
    assert resumed is not None
    assert resumed.history == state(1).history
    assert (folder.path / "history.jsonl").read_text() == '{"epoch": 1, "loss": 1.0}\n'


@pytest.mark.parametrize("text", ["", '{"epoch": 1, "lo'])
def test_history_behind_the_checkpoint_is_damage(folder: RunFolder, text: str) -> None:
    folder.save(state(1), {})
    (folder.path / "history.jsonl").write_text(text)
    before = tree(folder.path)
    with pytest.raises(CheckpointError, match=r"history\.jsonl"):
        folder.resume_state()
    assert changes(before, tree(folder.path)) == []


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_without_its_state_is_damage_and_not_a_new_run(folder: RunFolder, name: str) -> None:
    best = ScoredWeights("model", 1, 0.5, state(1).weights)
    folder.save(state(1, best=best), {})
    (folder.checkpoints / name / "state.json").unlink()
    before = tree(folder.path)
    with pytest.raises(CheckpointError, match=name):
        folder.resume_state()
    assert changes(before, tree(folder.path)) == []


def test_a_divergence_leaves_its_report_and_the_checkpoints(folder: RunFolder) -> None:
    folder.save(state(1), {})
    before = tree(folder.checkpoints)
    report = {"epoch": 1, "step": 7, "lr": 0.1, "class_state": {"ccm": {"scale": [0.5, None]}}}
    folder.record_divergence(DivergedError(report))
    assert json.loads((folder.path / "diverged.json").read_text()) == report
    assert folder.manifest()["status"] == "diverged"
    assert changes(before, tree(folder.checkpoints)) == []


# Models


def test_what_is_read_without_a_name(folder: RunFolder) -> None:
    for name in ("last", "best", "repaired"):
        model = add(folder, name)
        read, checkpoint, found = folder.read()
        assert found == name
        assert checkpoint.meta["candidate"] == name
        assert not read.training
        assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_is_read_by_its_name(folder: RunFolder) -> None:
    models = {name: add(folder, name) for name in ("last", "best", "ema")}
    assert folder.available() == ["best", "ema", "last"]
    for name, model in models.items():
        read, _, found = folder.read(name)
        assert found == name
        assert torch.equal(read.head.weight, model.head.weight)
    with pytest.raises(UnknownNameError, match=r"unknown checkpoint of .*run 'bset': did you mean best"):
        folder.read("bset")
    with pytest.raises(UnknownNameError):
        folder.read("../checkpoints/best")


def test_leftovers_of_a_killed_write_are_no_checkpoints(folder: RunFolder) -> None:
    add(folder, "last")
    add(folder, ".ema.new")
    (folder.checkpoints / "notes").mkdir()
    assert folder.available() == ["last"]


def test_a_swap_that_was_killed_between_its_renames_still_reads(folder: RunFolder) -> None:
    model = add(folder, "last")
    os.rename(folder.checkpoints / "last", folder.checkpoints / ".last.old")
    read, _, name = folder.read()
    assert name == "last"
    assert torch.equal(read.head.weight, model.head.weight)
    assert folder.available() == ["last"]


def test_without_a_checkpoint_the_missing_one_is_named(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="last does not exist: has the run finished its first epoch"):
        folder.read()


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", "state.json"])
def test_a_cut_checkpoint_is_named(folder: RunFolder, file: str) -> None:
    add(folder, "best")
    cut_in_half(folder.checkpoints / "best" / file)
    with pytest.raises(CheckpointError, match="best"):
        folder.read("best")


def test_weights_of_another_checkpoint_are_noticed(folder: RunFolder) -> None:
    add(folder, "best")
    add(folder, "last")
    (folder.checkpoints / "last" / "weights.safetensors").replace(folder.checkpoints / "best" / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"best/weights\.safetensors is damaged"):
        folder.read("best")


def test_weights_that_do_not_fit_their_description_are_no_traceback(folder: RunFolder) -> None:
    add(folder, "best", model=describe_model(create_model("small-cnn", in_channels=1, width=3, num_classes=3)))
    with pytest.raises((CheckpointError, ModelError), match="best"):
        folder.read("best")


def test_the_environment_is_json_and_names_the_versions() -> None:
    about = json.loads(json.dumps(environment()))
    assert about["versions"]["python"] == platform.python_version()
    assert about["versions"]["torch"] == torch.__version__
    assert about["hardware"]["threads"] == torch.get_num_threads()
    assert about["hardware"]["cpu"]
    assert about["command"]
