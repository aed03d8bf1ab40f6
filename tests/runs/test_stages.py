"""Recipes of stages, run on small images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reference.layouts import write_stl10
from reference.runs import BRIEF
from robustfair.data import load_dataset
from robustfair.data.edits import Edited
from robustfair.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RecipeError,
    RobustFairError,
    RobustFairWarning,
)
from robustfair.objectives import Objective
from robustfair.runs.folder import RunFolder
from robustfair.runs.load import load_target
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.repair import repair_run
from robustfair.runs.run import prepare, train
from robustfair.runs.stages import StageDone, run_stages


def recipe(tmp_path: Path, stages: str, **flags: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{BRIEF}stages:\n{stages}")
    return read_recipe(str(path), flags)


def weights(folder: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / checkpoint / "weights.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


ALL = """
- train: standard
- edit: upweight(times=2)
- train: pgd-at
  start: scratch
- edit: long-tail(factor=4)
- train: trades + ccr(begin=1)
  only: [head]
  epochs: 2
- repair: hwnwb
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StageDone]]:
    tmp_path = tmp_path_factory.mktemp("stages")
    told: list[StageDone] = []
    run_stages(recipe(tmp_path, ALL), tmp_path / "run", on_stage=told.append)
    return tmp_path / "run", told


def test_every_stage_is_a_run_folder_of_its_own(done: tuple[Path, list[StageDone]]) -> None:
    run, told = done
    names = ["1-train", "2-edit", "3-train", "4-edit", "5-train", "6-repair"]
    assert [stage.folder.path.name for stage in told] == names
    assert json.loads((run / "manifest.json").read_text())["stages"] == names
    for name in names:
        folder = RunFolder(run / "stages" / name)
        assert folder.manifest()["status"] == "complete"
        read_recipe(str(folder.recipe), {})
    again = read_recipe(str(run / "stages" / "5-train" / "recipe.yaml"), {})
    assert (again.train, again.epochs, again.only) == ("trades + ccr(begin=1)", 2, ("head",))
    assert again.start == str(run / "stages" / "3-train")
    assert again.images == str(run / "stages" / "4-edit" / "images.safetensors")


def test_the_recipe_of_a_stage_repeats_it(done: tuple[Path, list[StageDone]], tmp_path: Path) -> None:
    stage = done[0] / "stages" / "5-train"
    train(read_recipe(str(stage / "recipe.yaml"), {}), tmp_path / "again")
    assert same(weights(stage), weights(tmp_path / "again"))


def test_a_stage_starts_from_the_model_before_it_or_from_scratch(done: tuple[Path, list[StageDone]]) -> None:
    stages = done[0] / "stages"
    before, after = weights(stages / "3-train"), weights(stages / "5-train")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(moved) == 2, "the head alone was trained"
    own = read_recipe(str(stages / "3-train" / "recipe.yaml"), {})
    assert own.start == "scratch"
    drawn = prepare(own).model.state_dict()
    assert not same(weights(stages / "1-train"), drawn)


def test_the_validation_images_are_those_of_the_images_as_they_are(done: tuple[Path, list[StageDone]]) -> None:
    stages = done[0] / "stages"
    hashes = {RunFolder(stages / name).manifest()["split_hash"] for name in ("1-train", "3-train", "5-train")}
    assert len(hashes) == 1
    first, third, fifth = (
        prepare(read_recipe(str(stages / name / "recipe.yaml"), {})) for name in ("1-train", "3-train", "5-train")
    )
    for ready in (third, fifth):
        assert ready.validation is not None
        assert first.validation is not None
        assert torch.equal(ready.validation.images, first.validation.images)
        seen = {image.numpy().tobytes() for image in ready.train.images}
        assert not seen & {image.numpy().tobytes() for image in ready.validation.images}
    assert len(first.train) == 90
    assert len(third.train) > 90
    assert fifth.train.class_counts().tolist() == sorted(fifth.train.class_counts().tolist(), reverse=True)


def test_an_edit_asks_the_model_before_it_and_says_what_it_did(done: tuple[Path, list[StageDone]]) -> None:
    stages = done[0] / "stages"
    ready = prepare(read_recipe(str(stages / "1-train" / "recipe.yaml"), {}))
    model = RunFolder(stages / "1-train").read()[0]
    with torch.no_grad():
        wrong = int((model(ready.train.images.float() / 255).argmax(1) != ready.train.labels).sum())
    edited = Edited.read(stages / "2-edit" / "images.safetensors")
    assert len(edited.index) == 90 + 2 * wrong
    assert wrong > 0
    assert f"upweight(times=2): 90 images became {90 + 2 * wrong}, by class [" in done[1][1].text
    counts = RunFolder(stages / "4-edit").manifest()["images_per_class"]
    assert sum(counts["before"]) == 90 + 2 * wrong


def test_the_model_of_the_whole_is_that_of_the_last_stage_that_leaves_one(done: tuple[Path, list[StageDone]]) -> None:
    target = load_target(str(done[0]))
    assert target.checkpoint == "repaired"
    expected = weights(done[0] / "stages" / "6-repair", "repaired")
    assert same(dict(target.model.state_dict()), expected)
    assert "6-repair" in target.label


def test_a_run_of_stages_that_is_killed_goes_on_to_the_same_end(
    done: tuple[Path, list[StageDone]], tmp_path: Path
) -> None:
    """Killed in the middle of whatever it does, several times, at moments that the clock chooses."""
    recipe(tmp_path, ALL)
    src = str(Path(__file__).parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": src, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    base = [sys.executable, "-m", "robustfair.cli", "train"]
    begun = [*base, "recipe.yaml", "--out", "run", "--quiet"]
    resumed = [*base, "--resume", "--out", "run", "--quiet"]
    for seconds in (3.0, 4.0, 5.0):
        command = resumed if (tmp_path / "run" / "manifest.json").exists() else begun
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    command = resumed if (tmp_path / "run" / "manifest.json").exists() else begun
    last = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert last.returncode == 0, last.stderr
    for name in ("1-train", "3-train", "5-train"):
        assert same(weights(done[0] / "stages" / name), weights(tmp_path / "run" / "stages" / name))


def test_stages_that_are_over_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustfair.runs import stages

    plain = recipe(tmp_path, "- train: standard\n- repair: hwnwb\n")

    def interrupted(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "repair_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stages(plain, tmp_path / "run")
    before = (tmp_path / "run" / "stages" / "1-train" / "manifest.json").stat().st_mtime_ns
    told: list[StageDone] = []
    run_stages(plain, tmp_path / "run", resume=True, on_stage=told.append)
    assert told[0].text == "stage 1-train: was there already"
    assert (tmp_path / "run" / "stages" / "1-train" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ("- repair: hwnwb\n", RecipeError, r"stage 1 \(repair: hwnwb\) works on the model before it and there is none"),
        ("- edit: upweight\n- train: standard\n", RecipeError, r"stage 1 \(edit: upweight\) works on the model before"),
        (
            "- train: standard\n  start: previous\n",
            RecipeError,
            r"stage 1 \(train: standard\) works on the model before",
        ),
        ("- edit: long-tail\n", RecipeError, "no stage trains or repairs"),
        ("- train: standard\n- edit: shuffle\n", RobustFairError, "unknown edit 'shuffle'.*long-tail"),
        ("- train: standard\n- edit: upweight(times=-2)\n", ConfigError, "upweight: times"),
        ("- train: standard\n- repair: hwnb\n", RobustFairError, "unknown repair 'hwnb'"),
        ("- train: standard\n- train: standard + ccm\n", RobustFairError, "ccm sets attack.eps"),
        ("- train: standard\n- train: standard\n  epochs: 0\n", ConfigError, "epochs"),
        ("- train: standard\n- train: standard\n  only: [hat]\n", ConfigError, "schedule: only must be names of"),
    ],
)
def test_a_mistake_in_the_last_stage_shows_before_the_first(
    tmp_path: Path, stages: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_stages(recipe(tmp_path, stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_recipe_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    run_stages(recipe(tmp_path, "- train: standard\n"), tmp_path / "run")
    with pytest.raises(RecipeError, match="--resume: stages is"):
        run_stages(recipe(tmp_path, "- train: standard\n- repair: hwnwb\n"), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_stages(recipe(tmp_path, "- train: standard\n"), tmp_path / "run")


# A run that starts from weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("start")
    (tmp_path / "recipe.yaml").write_text(f"{BRIEF}train: standard\n")
    train(read_recipe(str(tmp_path / "recipe.yaml"), {}), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("start", ["", "checkpoints/last/weights.safetensors"])
def test_a_run_starts_from_a_run_or_a_weight_file(trained: Path, tmp_path: Path, start: str) -> None:
    """With a rate of 0 it ends where it began."""
    flags = {"start": str(trained / start), "lr": 0.0, "weight_decay": 0.0}
    train(read_recipe(str(trained.parent / "recipe.yaml"), flags), tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(trained)
    parameters = [name for name in theirs if "running" not in name and "tracked" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in parameters)


def test_weights_that_do_not_fit_are_refused_with_what_to_give(trained: Path, tmp_path: Path) -> None:
    flags = {"start": str(trained), "width": 6}
    with pytest.raises(ModelError, match="do not fit small-cnn of width 6 with 10 classes: give --model and --width"):
        train(read_recipe(str(trained.parent / "recipe.yaml"), flags), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_resumed_run_needs_its_start_no_more(trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "start")
    flags = {"start": str(tmp_path / "start"), "epochs": 2}
    plain = read_recipe(str(trained.parent / "recipe.yaml"), flags)

    def interrupt(state: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(plain, tmp_path / "run", on_epoch=interrupt)
    train(plain, tmp_path / "whole")
    shutil.rmtree(tmp_path / "start")
    train(plain, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_images_of_an_edit_that_changed_are_refused(done: tuple[Path, list[StageDone]], tmp_path: Path) -> None:
    own = read_recipe(str(done[0] / "stages" / "5-train" / "recipe.yaml"), {"limit_per_class": 11})
    with pytest.raises(RobustFairError, match="its images changed since an edit of 90"):
        prepare(own)
    assert len(load_dataset("digits").train) > 90


# Keys beside the stages, and folders of stages


def test_start_and_images_beside_the_stages_are_those_of_the_first(trained: Path, tmp_path: Path) -> None:
    text = "- train: standard\n  lr: 0.0\n  weight_decay: 0.0\n- edit: long-tail(factor=4)\n- train: pgd-at\n"
    plain = recipe(tmp_path, text, start=str(trained))
    run_stages(plain, tmp_path / "run")
    ours, theirs = weights(tmp_path / "run" / "stages" / "1-train"), weights(trained)
    parameters = [name for name in theirs if "running" not in name and "tracked" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in parameters)
    edit = tmp_path / "run" / "stages" / "2-edit" / "images.safetensors"
    run_stages(recipe(tmp_path, "- train: standard\n", images=str(edit)), tmp_path / "edited")
    own = read_recipe(str(tmp_path / "edited" / "stages" / "1-train" / "recipe.yaml"), {})
    assert (own.start, own.images) == ("scratch", str(edit))
    with pytest.raises(RecipeError, match="recipe: start is nothing, which does not exist"):
        run_stages(recipe(tmp_path, "- train: standard\n", start="nothing"), tmp_path / "none")


def test_a_first_stage_may_ask_the_model_that_the_recipe_starts_from(trained: Path, tmp_path: Path) -> None:
    text = "- edit: upweight(times=1)\n- train: standard\n  start: scratch\n"
    run_stages(recipe(tmp_path, text, start=str(trained)), tmp_path / "run")
    assert len(Edited.read(tmp_path / "run" / "stages" / "1-edit" / "images.safetensors").index) > 90


def test_a_repaired_run_keeps_where_its_training_started(trained: Path, tmp_path: Path) -> None:
    train(read_recipe(str(trained.parent / "recipe.yaml"), {"start": str(trained)}), tmp_path / "run")
    repair_run(str(tmp_path / "run"), "hwnwb", tmp_path / "repaired")
    run_stages(read_recipe(str(tmp_path / "repaired" / "recipe.yaml"), {}), tmp_path / "again")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again" / "stages" / "1-train"))


@pytest.mark.parametrize("changed", ["- train: standard\n- edit: long-tail(factor=2)\n- train: pgd-at\n"])
def test_a_stage_that_is_over_is_held_to_the_recipe(tmp_path: Path, changed: str) -> None:
    begun = recipe(tmp_path, "- train: standard\n- edit: long-tail(factor=4)\n- train: pgd-at\n")
    run_stages(begun, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe(tmp_path, changed).to_yaml())
    with pytest.raises(RecipeError, match=r"stage 2 is edit: long-tail\(factor=2\), but .* was made by long-tail"):
        run_stages(recipe(tmp_path, changed), tmp_path / "run", resume=True)


def test_an_edit_is_no_run_to_go_on_with_and_no_model(done: tuple[Path, list[StageDone]]) -> None:
    edit = done[0] / "stages" / "2-edit"
    with pytest.raises(CheckpointError, match=r"holds an edit of training images \(upweight\(times=2\)\), which no"):
        train(read_recipe(str(done[0] / "stages" / "1-train" / "recipe.yaml"), {}), edit, resume=True)
    with pytest.raises(CheckpointError, match="and no model"):
        load_target(str(edit))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("- train: standard\n- train: standard\n  start: nowhere\n", "stage 2 .train. starts from nowhere"),
        ("- train: standard\n- repair: hwnwb\n- repair: hwnwb\n", "stage 3 repairs what a repair left"),
        ("- train: standard\n- edit: add\n", "add: data must be given, got"),
        ("- train: standard\n- edit: long-tail\n  seed: abc\n", "stage 2: seed must be a whole number"),
        ("- train: standard\n  start: 5\n", "stage 1: start must be text"),
        ("- train: standard\n- train: pgd-at + variance-fat(pad_to=2)\n", "variance-fat: pad_to must be none, or at "),
        ("- train: standard\n- train: pgd-at + dafa(compat=official)\n", "dafa: compat must be none on pgd-at"),
        ("- train: standard\n- train: rslad\n", "rslad: teacher must be given"),
        ("- train: standard\n- repair: logit-adjustment(prior='1,2')\n", "logit-adjustment: prior must be 10 numbers"),
        ("- train: standard\n- edit: add(data=nowhere)\n", "unknown data set 'nowhere'"),
        ("- train: standard\n- edit: pseudo-label(data=nowhere)\n", "unknown data set 'nowhere'"),
        ("- train: standard\n  images: x\n", "stage 1 .train. has images: it takes no .* plugin, images, stages"),
    ],
)
def test_what_cannot_be_done_later_is_refused_before_the_first(tmp_path: Path, stages: str, message: str) -> None:
    with pytest.raises(RobustFairError, match=message):
        run_stages(recipe(tmp_path, stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_flag_that_a_stage_overrides_is_said(tmp_path: Path) -> None:
    with pytest.warns(RobustFairWarning, match="stage 2 keeps its own epochs, 2"):
        recipe(tmp_path, "- train: standard\n- train: standard\n  epochs: 2\n", epochs=1)


def test_a_teacher_labels_images_that_have_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HWNwB's setting for STL-10: a network trained on the labelled part labels the rest, then one trains on both."""
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    write_stl10(tmp_path / "data" / "stl10_binary", each=4, unlabelled=30)
    stages = """
- train: standard
- edit: pseudo-label(data=stl10/unlabelled)
- train: pgd-at
  start: scratch
"""
    run_stages(recipe(tmp_path, stages, data="stl10", image_size=8), tmp_path / "run")
    edited = Edited.read(tmp_path / "run/stages/2-edit/images.safetensors")
    assert (edited.rows, edited.added) == (60, ("stl10/unlabelled",))
    teacher = RunFolder(tmp_path / "run/stages/1-train").read()[0].eval()
    rest = load_dataset("stl10/unlabelled", image_size=8).only
    with torch.no_grad():
        expected = teacher(rest.images / 255).argmax(1)
    assert torch.equal(edited.labels[30:], expected)
    assert edited.index.tolist() == list(range(60))


def test_images_without_labels_are_neither_added_nor_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTFAIR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    write_stl10(tmp_path / "data" / "stl10_binary", each=4, unlabelled=30)
    given = {"data": "stl10", "image_size": 8}
    stages = "- edit: add(data=stl10/unlabelled)\n- train: standard"
    with pytest.raises(DataError, match="its labels would not mean the same; add images without them by pseudo-label"):
        run_stages(recipe(tmp_path, stages, **given), tmp_path / "added")
    with pytest.raises(DataError, match="stl10/unlabelled: its images have no labels: train on labelled ones, and add"):
        run_stages(recipe(tmp_path, "- train: standard", **given | {"data": "stl10/unlabelled"}), tmp_path / "alone")


def test_stages_that_select_nothing_need_no_validation_images_for_an_edit(tmp_path: Path) -> None:
    stages = "- {train: standard, select: last}\n- edit: upweight(times=1)\n- {train: standard, select: last}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{BRIEF}stages:\n{stages}".replace("validation: 0.25\nselect: last\n", "validation: 0\n"))
    run_stages(read_recipe(str(path), {}), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "stages" / "2-edit" / "manifest.json").read_text())
    assert sum(manifest["images_per_class"]["before"]) == 120


def test_a_teacher_that_expects_other_pixels_is_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustfair.runs import stages

    def check(objective: Objective, *rest: object) -> None:
        if objective.name == "ard":
            raise ModelError("teacher of ard is given pixels in [0, 1] and expects others")

    monkeypatch.setattr(stages, "check_teachers", check)
    (tmp_path / "other_pixels.py").write_text(
        "import robustfair as rf\nnet = lambda: rf.create_model('small-cnn', in_channels=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="teacher of ard is given pixels"):
        run_stages(recipe(tmp_path, "- train: standard\n- train: ard(teacher='other_pixels:net')\n"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
