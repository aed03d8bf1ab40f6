"""Runs whose training images are edited before all training, and runs that train twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.runs import TINY, tensors
from robustfair.data import load_dataset
from robustfair.data.edits import Edited, profile
from robustfair.errors import ConfigError, DataError, RecipeError, RobustFairWarning, UnknownNameError
from robustfair.repairs import PostHocLogitAdjustment
from robustfair.runs.composition import plan_of, plans_of
from robustfair.runs.folder import RunFolder
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.repair import repair_run
from robustfair.runs.run import prepare, train
from robustfair.runs.stages import run_stages

LONG = {key: value for key, value in TINY.items() if key not in ("eps", "steps")} | {
    "edit": "long-tail(factor=4)",
    "select": "last",
}


def recipe(what: str = "standard", **keys: Any) -> Recipe:
    return read_recipe(what, LONG | keys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    train(recipe("standard + class-balanced(b=0.9)"), out)
    return out


# An edit before all training


def test_only_what_is_trained_on_is_thinned() -> None:
    whole, thinned = prepare(recipe(edit=None)), prepare(recipe())
    assert whole.train.class_counts().tolist() == [14] * 10
    assert thinned.train.class_counts().tolist() == profile(14, 10, 4)
    assert whole.validation is not None
    assert thinned.validation is not None
    assert torch.equal(whole.validation.images, thinned.validation.images)
    assert thinned.validation.class_counts().tolist() == [6] * 10, "held out before the edit: as many of every class"
    assert torch.equal(thinned.splits.test.images, load_dataset("digits").test.images)
    before = Counter(image.numpy().tobytes() for image in whole.train.images)
    assert not Counter(image.numpy().tobytes() for image in thinned.train.images) - before


def test_the_same_images_are_left_whatever_the_seed_of_the_run() -> None:
    one, two = (prepare(recipe(seed=seed)).train.images for seed in (0, 1))
    assert torch.equal(one, two)
    other = prepare(recipe(edit="long-tail(factor=4, seed=1)")).train.images
    assert not torch.equal(one, other)


def test_a_run_says_what_it_trained_on_and_is_repeated_by_its_recipe(finished: Path, tmp_path: Path) -> None:
    known = RunFolder(finished).manifest()
    assert known["images_per_class"] == profile(14, 10, 4)
    assert known["data"]["edit"] == "long-tail(factor=4)"
    assert known["data"]["fingerprint"] == load_dataset("digits").train.fingerprint
    kept = read_recipe(str(finished / "recipe.yaml"), {})
    assert kept.edit == "long-tail(factor=4)"
    train(kept, tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(finished)
    with pytest.raises(RecipeError, match=r"--resume: edit is none, but .* was begun with"):
        train(recipe("standard + class-balanced(b=0.9)", edit=None), finished, resume=True)


def test_a_resumed_run_goes_on_with_the_same_images(finished: Path, tmp_path: Path) -> None:
    def interrupt(state: Any) -> None:
        raise KeyboardInterrupt

    plain = recipe("standard + class-balanced(b=0.9)")
    with pytest.raises(KeyboardInterrupt):
        train(plain, tmp_path / "run", on_epoch=interrupt)
    train(plain, tmp_path / "run", resume=True)
    assert tensors(tmp_path / "run") == tensors(finished)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            "upweight",
            RecipeError,
            "recipe: edit is upweight, which asks a model, and none is trained yet: make it a st",
        ),
        ("long-tial", UnknownNameError, "did you mean long-tail"),
        ("long-tail(factor=0.5)", ConfigError, "long-tail: factor must be"),
        ("long-tail + long-tail", RecipeError, "names 2 edits: give one"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, edit: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(recipe(edit=edit), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "r.yaml").write_text(f"data: digits\ntrain: standard\nedit: {edit}\n")
    with pytest.raises(error, match=message):
        plans_of(str(tmp_path / "r.yaml"))


def test_methods_refuse_classes_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logit-adjustment: prior must be 10 numbers, one a class, got 2"):
        train(recipe('standard + logit-adjustment(prior="1, 2")'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_edit_is_in_the_plan_and_for_all_stages(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("data: digits\ntrain: standard\nedit: long-tail\n")
    ((said, plan),) = plans_of(str(tmp_path / "one.yaml"))
    assert said == "before all training, edit: long-tail"
    assert plan is not None
    assert plan_of(str(tmp_path / "one.yaml")) == plan
    stages = "data: digits\nedit: long-tail\nstages:\n- train: standard\n- repair: hwnwb\n"
    (tmp_path / "two.yaml").write_text(stages)
    assert [said for said, _ in plans_of(str(tmp_path / "two.yaml"))] == [
        "before all training, edit: long-tail",
        "stage 1, train: standard",
        "stage 2, repair: hwnwb",
    ]
    (tmp_path / "three.yaml").write_text("data: digits\nstages:\n- train: standard\n  edit: long-tail\n")
    with pytest.raises(
        RecipeError, match="stage 1 needs one of train, repair and edit, as text; it has train and edit"
    ):
        read_recipe(str(tmp_path / "three.yaml"), {})


# Training twice


def test_jtt_repeats_what_the_first_model_got_wrong(tmp_path: Path) -> None:
    """On a long tail, for three epochs in all: the second model starts anew, on 1 + 20 copies of the errors."""
    flags = {key: value for key, value in LONG.items() if key != "select"}
    with pytest.warns(RobustFairWarning, match="stage 1 keeps its own"):
        plain = read_recipe("jtt", flags)
    short = json.loads(json.dumps(plain.values()))
    short["stages"][0]["epochs"] = 1
    (tmp_path / "jtt.yaml").write_text(json.dumps(short))
    with pytest.warns(RobustFairWarning, match="weights are selected on"):
        run_stages(read_recipe(str(tmp_path / "jtt.yaml"), {}), tmp_path / "run")
    stages = tmp_path / "run" / "stages"
    first, second = (read_recipe(str(stages / name / "recipe.yaml"), {}) for name in ("1-train", "3-train"))
    assert (first.epochs, first.schedule, first.select, second.start) == (1, "constant", "last", "scratch")
    ready = prepare(first)
    model = RunFolder(stages / "1-train").read("last")[0]
    with torch.no_grad():
        wrong = (model(ready.train.images.float() / 255).argmax(1) != ready.train.labels).tolist()
    assert 0 < sum(wrong) < len(wrong)
    times = Counter(Edited.read(stages / "2-edit" / "images.safetensors").index.tolist())
    assert [times[row] for row in range(len(wrong))] == [21 if error else 1 for error in wrong]
    counts = RunFolder(stages / "3-train").manifest()["images_per_class"]
    assert sum(counts) == len(wrong) + 20 * sum(wrong)
    drawn = prepare(second).model.state_dict()
    assert torch.equal(drawn["head.weight"], prepare(first).model.state_dict()["head.weight"]), "from scratch"


# A repair that reads the run


def test_a_repair_takes_its_prior_from_the_run(finished: Path, tmp_path: Path) -> None:
    counts = torch.tensor(profile(14, 10, 4), dtype=torch.float64)
    before, checkpoint, _ = RunFolder(finished).read()
    after, text = repair_run(str(finished), "logit-adjustment", tmp_path / "counts")
    shift = torch.log(counts / counts.sum())
    torch.testing.assert_close(after.model.head.bias, before.head.bias - shift.float(), rtol=0, atol=1e-5)
    assert torch.equal(after.model.head.weight, before.head.weight)
    assert "logit-adjustment: the log of the prior counts taken off the head's bias; " in text
    assert after.meta["images_per_class"] == checkpoint.meta["images_per_class"] == counts.long().tolist()
    assert RunFolder(tmp_path / "counts").manifest()["images_per_class"] == counts.long().tolist()

    after, _ = repair_run(str(finished), "logit-adjustment(prior=predicted)", tmp_path / "predicted")
    held = prepare(read_recipe(str(finished / "recipe.yaml"), {})).validation
    expected = PostHocLogitAdjustment(prior="predicted", images=held)(before)
    assert torch.equal(after.model.head.bias, expected.head.bias)
    assert not torch.equal(after.model.head.bias, before.head.bias)


def test_a_run_that_lacks_what_a_repair_reads_is_refused(finished: Path, tmp_path: Path) -> None:
    train(recipe(validation=0.0, epochs=1), tmp_path / "none-held")
    with pytest.raises(ConfigError, match="logit-adjustment: prior must be counts or numbers where the run held"):
        repair_run(str(tmp_path / "none-held"), "logit-adjustment(prior=predicted)", tmp_path / "repaired")
    state = tmp_path / "none-held" / "checkpoints" / "last" / "state.json"
    meta = json.loads(state.read_text())
    state.write_text(json.dumps({key: value for key, value in meta.items() if key != "images_per_class"}))
    with pytest.raises(ConfigError, match=r"logit-adjustment: counts must be given, got None\. A run records them"):
        repair_run(str(tmp_path / "none-held"), "logit-adjustment", tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists()


def test_a_run_on_images_that_changed_is_not_measured_on(finished: Path, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(finished, tmp_path / "run")
    for state in run.glob("checkpoints/*/state.json"):
        meta = json.loads(state.read_text())
        meta["data"]["fingerprint"] = "other"
        state.write_text(json.dumps(meta))
    with pytest.raises(DataError, match="the images of digits changed since"):
        repair_run(str(run), "logit-adjustment(prior=predicted)", tmp_path / "repaired")
