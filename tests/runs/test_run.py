"""From a recipe to a run: what is built, what is written, and that a stopped run goes on as if it had not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reference.layouts import pixels
from reference.runs import CFA, TINY, changes, history, tensors, tree
from robustfair.data import load_dataset
from robustfair.data.split import split_hash, stratified_split
from robustfair.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    DivergedError,
    RecipeError,
    RobustFairWarning,
    UnknownNameError,
)
from robustfair.methods import CCM, CCR, EMA
from robustfair.objectives import PGDAT, Standard, Trades
from robustfair.repairs import HWNwB
from robustfair.runs.composition import plan_of, plans_of, read_composition, read_repair
from robustfair.runs.recipe import Recipe, read_recipe, shipped_recipes
from robustfair.runs.run import RESOLVED, prepare, resolve_device, train
from robustfair.training.fit import Fitted
from robustfair.training.selection import SPLIT_SEED
from robustfair.training.state import TrainState


def recipe(composition: str = CFA, **keys: Any) -> Recipe:
    return read_recipe(composition, TINY | keys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted, list[TrainState]]:
    """A run from its start to its end: folder, result, and the state after every epoch."""
    out, states = tmp_path_factory.mktemp("runner") / "run", []
    fitted = train(recipe(), out, on_epoch=states.append)
    return out, fitted, states


# Compositions


def test_a_composition_becomes_configs_in_its_order() -> None:
    objective, methods = read_composition("EMA(decay=0.9) + Trades(beta=3, eps=4/255) + ccr + CCM(begin=2)")
    assert objective == Trades(beta=3.0, eps=4 / 255)
    assert methods == [EMA(decay=0.9), CCR(), CCM(begin=2)]


def test_defaults_reach_the_objective_and_no_method() -> None:
    defaults = {"norm": "l2", "eps": 0.5, "step_size": 0.1, "steps": 3}
    objective, methods = read_composition("pgd_at + ema", defaults)
    assert objective == PGDAT(norm="l2", eps=0.5, step_size=0.1, steps=3)
    assert methods == [EMA()]
    assert read_composition("standard", defaults)[0] == Standard()


def test_a_value_given_twice_must_agree() -> None:
    assert read_composition("trades(eps=51/255, norm=L_2)", {"eps": 0.2, "norm": "l2"})[0].eps == 0.2
    with pytest.raises(RecipeError, match=r"eps is 8/255 in trades\(eps=8/255\) and 0\.2 beside it: give it once"):
        read_composition("trades(eps=8/255)", {"eps": 0.2})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tradez", UnknownNameError, "did you mean trades"),
        ("trades + cmm", UnknownNameError, "did you mean ccm"),
        ("trades(betta=1)", UnknownNameError, "unknown key of trades 'betta': did you mean beta"),
        ("trades(beta=six)", ConfigError, "trades: beta must be"),
        ("trades + ema(decay=2)", ConfigError, "ema: decay must be"),
        ("ccm", RecipeError, r"exactly one objective \(.*pgd-at, .*trades\), found none"),
        ("trades + standard", RecipeError, "found trades and standard"),
        ("trades + trades", RecipeError, "found trades and trades"),
        ("trades +", RecipeError, "expected a name"),
    ],
)
def test_compositions_that_name_nothing_or_too_much(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_composition(text)


def test_a_plan_refuses_a_clash_before_anything_is_read() -> None:
    with pytest.raises(ConflictError, match="ccm is listed twice"):
        plan_of("trades + ccm + ccm", ())
    with pytest.raises(ConflictError, match="needs the loss term 'consistency'"):
        plan_of("pgd-at + ccr", ())
    assert plan_of(CFA, ["attack.eps"]).allow == {"attack.eps"}


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_the_plan_of_a_shipped_recipe_is_that_of_its_keys(name: str) -> None:
    given = read_recipe(name, {"data": "digits"})
    trained = [stage.what for stage in given.stages if stage.does == "train"] or [given.train]
    plans = [plan for _, plan in plans_of(name) if plan is not None]
    for plan, what in zip(plans, trained, strict=True):
        assert plan.objective.name in what
        if given.eps is not None:
            assert plan.objective.eps == given.eps


def test_a_repair_is_read_with_its_settings() -> None:
    assert read_repair("HWNwB") == HWNwB()
    assert read_repair("hwnwb(target_norm=mean, keep_bias=false)") == HWNwB(target_norm="mean", keep_bias=False)
    for text, error in [
        ("hwnb", UnknownNameError),
        ("hwnwb + hwnwb", RecipeError),
        ("hwnwb(norm=1)", UnknownNameError),
        ("", RecipeError),
    ]:
        with pytest.raises(error):
            read_repair(text)


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "", "cuda:99", "cpu:x"):
        with pytest.raises(ConfigError, match="device must be auto, cpu, or a GPU that torch sees"):
            resolve_device(name)


# What a recipe builds


def test_every_key_reaches_what_it_names() -> None:
    keys = {
        "schedule": "one-cycle",
        "milestones": (0.25,),
        "gamma": 0.5,
        "warmup": 0.3,
        "momentum": 0.8,
        "weight_decay": 1e-3,
        "nesterov": True,
        "cycle_momentum": True,
        "norm": "l2",
        "eps": 0.5,
        "step_size": 0.25,
        "steps": 4,
        "image_size": 12,
        "augment": "crop",
        "only": ("head",),
        "allow": ("attack.eps",),
    }
    ready = prepare(recipe(**keys))
    for key in (*list(keys)[1:8], "epochs", "lr", "batch_size"):
        assert getattr(ready.schedule, key) == getattr(ready.recipe, key)
    assert ready.schedule.kind == "one-cycle"
    assert ready.plan.objective == Trades(beta=2.0, norm="l2", eps=0.5, step_size=0.25, steps=4)
    assert [method.name for method in ready.plan.methods] == ["ccm", "ccr", "ema"]
    assert ready.plan.allow == {"attack.eps"}
    assert ready.validation is not None
    assert ready.train.images.shape[1:] == ready.validation.images.shape[1:] == (1, 12, 12)
    assert (ready.train.class_counts() + ready.validation.class_counts()).tolist() == [20] * 10
    assert (ready.model.width, ready.model.in_channels, ready.model.num_classes) == (4, 1, 10)
    assert len(ready.schedule.trainable(ready.model)) == 2
    assert ready.augment.padding == 4
    assert not ready.augment.flip


def test_the_first_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (
        prepare(recipe(composition, seed=seed)) for composition, seed in [(CFA, 0), ("pgd-at", 0), (CFA, 1)]
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.model.conv1.weight, two.model.conv1.weight)
    assert not torch.equal(one.model.conv1.weight, other.model.conv1.weight)


def test_images_that_name_more_classes_make_a_wider_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "three.npz", images=pixels(12), labels=np.arange(12) % 3)
    model = prepare(recipe(data=str(tmp_path / "three.npz"), limit_per_class=None)).model
    assert (model.num_classes, model.in_channels) == (3, 3)


def test_preparing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(recipe())
    assert tree(tmp_path) == {}


def test_methods_that_would_not_act_are_remarked_on(tmp_path: Path) -> None:
    assert prepare(recipe("trades + ccm(begin=1)", select="last")).remarks == []
    late = recipe("trades + ccm + ema(begin=7)", epochs=1, limit_per_class=5, select="last")
    assert [text.split()[0] for text in prepare(late).remarks] == ["ccm", "ema"]
    with pytest.warns(RobustFairWarning) as caught:
        train(late, tmp_path / "run")
    assert [str(warning.message) for warning in caught] == prepare(late).remarks


def test_a_selection_on_few_images_is_warned_of_once(tmp_path: Path) -> None:
    few = recipe("pgd-at", validation=0.2, limit_per_class=20, epochs=1, select="worst")
    assert prepare(few).remarks == []
    with pytest.warns(RobustFairWarning) as caught:
        train(few, tmp_path / "run")
    assert [str(warning.message) for warning in caught] == [
        "weights are selected on 4 validation images of a class, and fewer than 30 leave the choice to chance: "
        "give `validation` a larger share, or take `select=last`"
    ]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"data": "digit"}, UnknownNameError),
        ({"model": "cnn-small"}, UnknownNameError),
        ({"only": ("hat",)}, ConfigError),
        ({"augment": "flip"}, UnknownNameError),
        ({"device": "gpu"}, ConfigError),
        ({"epochs": 0}, ConfigError),
        ({"validation": 0.0}, ConfigError),
        ({"validation": 1.0}, ConfigError),
        ({"validation": float("nan")}, ConfigError),
        ({"augment": "crop", "image_size": 4}, ConfigError),
    ],
    ids=str,
)
def test_what_cannot_run_leaves_no_folder(tmp_path: Path, keys: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        train(recipe(**keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_only_fit_can_refuse_leaves_no_folder_either(tmp_path: Path) -> None:
    """So that the same command, mended, may write there."""
    with pytest.raises(ConfigError, match="rslad: teacher must be given"):
        train(recipe("rslad"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A run on disk


def test_a_run_holds_what_design_promises(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, _, _ = finished
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "manifest.json", "history.jsonl", "checkpoints"}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"best", "last", "ema"}
    stored = read_recipe(str(out / "recipe.yaml"), {})
    assert None not in {getattr(stored, key) for key in RESOLVED}
    assert dataclasses.replace(stored, **{key: getattr(recipe(), key) for key in RESOLVED}) == recipe()


def test_the_manifest_tells_what_ran_where(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, fitted, _ = finished
    manifest = json.loads((out / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["schema"] == "robustfair.run/1"
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"python", "robustfair", "numpy"} <= manifest["versions"].keys()
    assert {"system", "cpu", "threads"} <= manifest["hardware"].keys()
    assert isinstance(manifest["command"], str)
    assert manifest["model"] == {
        "name": "small-cnn",
        "num_classes": 10,
        "in_channels": 1,
        "width": 4,
        "mean": [0.5],
        "std": [0.5],
    }
    assert manifest["class_names"] == list("0123456789")
    assert manifest["data"]["name"] == "digits"
    assert manifest["data"]["fingerprint"] == load_dataset("digits").train.fingerprint
    assert manifest["recipe"] == CFA
    assert manifest["threat"] == {"norm": "linf", "eps": 0.1, "step_size": 0.025}
    assert (manifest["seed"], manifest["status"], manifest["epochs_done"]) == (0, "complete", 2)
    assert manifest["selected"] == {
        "candidate": fitted.chosen.candidate,
        "epoch": fitted.chosen.epoch,
        "rule": "average+worst",
    }
    assert manifest["wall_seconds"] >= 0
    assert manifest["images_per_second"] > 0
    labels = load_dataset("digits").train.limit_per_class(20).labels
    assert any(split_hash(part) in manifest.values() for part in stratified_split(labels, 0.3, seed=SPLIT_SEED))


def test_every_epoch_has_a_line_of_history(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, fitted, _ = finished
    lines = (out / "history.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert records == list(fitted.history)
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["step"] for record in records] == [18, 36]
    for record in records:
        assert set(record["validation"]) == {"model", "ema"}
        for counts, images in (
            (record["train"], 14),
            (record["validation"]["model"], 6),
            (record["validation"]["ema"], 6),
        ):
            assert counts["count"] == [images] * 10
            for kind in ("clean", "robust"):
                assert all(0 <= hits <= images for hits in counts[kind])
        assert len(record["head_norms"]) == 10
        assert {"eps", "weight", "coef.label", "coef.consistency"} <= record["per_class"].keys()
        assert record["lr"] == 0.5
        assert record["seconds"] > 0
    first, second = records
    assert first["per_class"]["eps"] == pytest.approx([0.1] * 10)
    expected = [0.1 * (0.3 + hits / 14) for hits in first["train"]["robust"]]
    assert second["per_class"]["eps"] == pytest.approx(expected, rel=1e-5)


def test_checkpoints_are_the_weights_of_their_epochs(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, fitted, states = finished
    chosen = fitted.chosen
    at = states[chosen.epoch - 1]
    expected = {
        "last": states[-1].weights,
        "ema": states[-1].exports["ema"],
        "best": ({"model": at.weights} | at.exports)[chosen.candidate],
    }
    for name, weights in expected.items():
        stored = load_file(out / "checkpoints" / name / "weights.safetensors")
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[key], weights[key]) for key in stored)
    assert all(torch.equal(value, expected["best"][key]) for key, value in fitted.model.state_dict().items())
    assert not fitted.model.training


def test_checkpoints_say_what_they_are(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, fitted, _ = finished
    found = {
        name: json.loads((out / "checkpoints" / name / "state.json").read_text()) for name in ("best", "last", "ema")
    }
    for meta in found.values():
        assert meta["schema"] == "robustfair.checkpoint/1"
        assert meta["data"]["name"] == "digits"
        assert meta["threat"] == {"norm": "linf", "eps": 0.1, "step_size": 0.025}
        assert meta["class_names"] == list("0123456789")
    assert (found["best"]["candidate"], found["best"]["epoch"]) == (fitted.chosen.candidate, fitted.chosen.epoch)
    assert (found["ema"]["candidate"], found["ema"]["epoch"]) == ("ema", 2)
    assert (found["last"]["epoch"], found["last"]["step"], found["last"]["methods"]) == (2, 36, ["ccm", "ccr", "ema"])


def test_callbacks_follow_the_run(tmp_path: Path) -> None:
    seen: list[Any] = []
    train(
        recipe("pgd-at", limit_per_class=10),
        tmp_path / "run",
        on_start=lambda ready, state: seen.append((ready.recipe.train, state)),
        on_step=lambda epoch, step: seen.append((epoch, step)),
        on_epoch=lambda state: seen.append(state.epoch),
    )
    steps = [[(epoch, step) for step in range(9)] for epoch in range(2)]
    assert seen == [("pgd-at", None), *steps[0], 1, *steps[1], 2]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(recipe("trades + ema", epochs=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_two_runs_of_a_recipe_are_the_same(tmp_path: Path, finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, _, _ = finished
    torch.manual_seed(5)
    train(recipe(), tmp_path / "run")
    assert tensors(tmp_path / "run") == tensors(out)
    assert history(tmp_path / "run") == history(out)


def test_a_folder_that_holds_anything_is_not_touched(
    tmp_path: Path, finished: tuple[Path, Fitted, list[TrainState]]
) -> None:
    out, _, _ = finished
    (tmp_path / "notes.txt").write_text("keep")
    for folder, message in (
        (out, "already holds a run"),
        (tmp_path, "is not empty"),
        (tmp_path / "notes.txt", "is a file"),
    ):
        before = tree(folder)
        with pytest.raises(CheckpointError, match=message):
            train(recipe(), folder)
        assert changes(before, tree(folder)) == []


# Runs that stop


class StopError(Exception):
    """What ends a run from inside."""


def stop_at(position: tuple[int, int]) -> Callable[[int, int], None]:
    def on_step(epoch: int, step: int) -> None:
        if (epoch, step) == position:
            raise StopError

    return on_step


@pytest.mark.parametrize("position", [(0, 0), (0, 17), (1, 0), (1, 7), (1, 17)], ids=str)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, finished: tuple[Path, Fitted, list[TrainState]], position: tuple[int, int]
) -> None:
    whole, fitted, _ = finished
    with pytest.raises(StopError):
        train(recipe(), tmp_path, on_step=stop_at(position))
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "running"
    assert len(history(tmp_path)) == position[0]
    torch.manual_seed(9)
    resumed = train(recipe(), tmp_path, resume=True)
    assert tensors(tmp_path) == tensors(whole)
    assert history(tmp_path) == history(whole)
    assert (resumed.chosen.candidate, resumed.chosen.epoch) == (fitted.chosen.candidate, fitted.chosen.epoch)
    ends = [json.loads((out / "manifest.json").read_text()) for out in (whole, tmp_path)]
    for key in ("status", "selected", "epochs_done", "data", "threat", "seed"):
        assert ends[0][key] == ends[1][key]


def test_history_ahead_of_the_checkpoint_is_cut_back(
    tmp_path: Path, finished: tuple[Path, Fitted, list[TrainState]]
) -> None:
    whole, _, _ = finished
    with pytest.raises(StopError):
        train(recipe(), tmp_path, on_step=stop_at((1, 3)))
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write((whole / "history.jsonl").read_text().splitlines()[1].replace('"loss": ', '"loss": 9') + "\n")
        file.write('{"epoch": 3, "st')
    train(recipe(), tmp_path, resume=True)
    assert history(tmp_path) == history(whole)


def test_history_behind_the_checkpoint_is_damage(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(recipe(), tmp_path, on_step=stop_at((1, 3)))
    (tmp_path / "history.jsonl").write_text("")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="history"):
        train(recipe(), tmp_path, resume=True)
    assert changes(before, tree(tmp_path)) == []


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Recipe) if field.name not in ("device", "stages")]
)
def test_going_on_with_another_key_names_it(finished: tuple[Path, Fitted, list[TrainState]], field: str) -> None:
    out, _, _ = finished
    began = recipe()
    old = getattr(began, field)
    other = {"select": "last", "schedule": "cosine", "norm": "l2", "precision": "bf16", "optimizer": "adam"}
    other |= {"plugin": ("mine.py",)}
    new = other.get(
        field,
        1 if old is None else f"{old}x" if isinstance(old, str) else (0.3,) if isinstance(old, tuple) else old + 1,
    )
    before = tree(out)
    with pytest.raises(RecipeError, match=f"--resume: {field} is .*, but .* was begun with"):
        train(dataclasses.replace(began, **{field: new}), out, resume=True)
    assert changes(before, tree(out)) == []


def test_a_finished_run_may_move_to_another_device(finished: tuple[Path, Fitted, list[TrainState]]) -> None:
    out, fitted, _ = finished
    before = tree(out)
    resumed = train(recipe(device="auto"), out, resume=True)
    assert changes(before, tree(out)) == []
    assert (resumed.chosen.candidate, resumed.chosen.epoch) == (fitted.chosen.candidate, fitted.chosen.epoch)


def test_going_on_with_other_images_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "images.npz"
    np.savez(source, images=pixels(40, channels=1), labels=np.arange(40) % 10)
    keys = {"data": str(source), "limit_per_class": None}
    with pytest.raises(StopError):
        train(recipe(**keys), tmp_path / "run", on_step=stop_at((1, 0)))
    np.savez(source, images=pixels(40, channels=1, seed=1), labels=np.arange(40) % 10)
    before = tree(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"images of .* changed since"):
        train(recipe(**keys), tmp_path / "run", resume=True)
    assert changes(before, tree(tmp_path / "run")) == []


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="holds no run"):
            train(recipe(), folder, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resuming_where_nothing_was_begun_says_how_to_begin(tmp_path: Path) -> None:
    (tmp_path / "killed" / ".new").mkdir(parents=True)
    (tmp_path / "killed" / ".lock").touch()
    with pytest.raises(CheckpointError, match=r"holds no run to go on with: .* leave --resume out to begin one there"):
        train(recipe("trades", epochs=1), tmp_path / "killed", resume=True)
    train(recipe("trades", epochs=1), tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ema(decay=0.5)", "ema(decay=0.5) + awp", r"recipe is .* \+ awp.* by .*recipe\.yaml, but .* begun with"),
        (" + ema(decay=0.5)", "", "recipe is "),
        ("trades(beta=2)", "mart", "recipe is .*mart"),
        ("seed: 0", "seed: 1", "seed is 1 by .*, but the run was begun with 0"),
        ("\neps: ", "\neps: 1/255 #", "threat is .*0.0039.*begun with .*0.1"),
        ("validation: 0.3", "validation: 0.2", "split_hash is "),
        ("width: 4", "width: 8", "fit: resume must be the state of a run with the same weights"),
        ("optimizer: sgd", "optimizer: adam", "fit: resume must be the state of a run with the same values of the opt"),
    ],
)
def test_a_recipe_that_was_changed_in_the_folder_is_one_line(
    tmp_path: Path, finished: tuple[Path, Fitted, list[TrainState]], old: str, new: str, message: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    kept = tensors(tmp_path / "run"), history(tmp_path / "run")
    with pytest.raises((RecipeError, ConfigError), match=message) as caught:
        train(read_recipe(str(file), {}), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)
    assert (tensors(tmp_path / "run"), history(tmp_path / "run")) == kept


def test_a_divergence_is_recorded_and_raised(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train(recipe(lr=1e9), tmp_path)
    assert json.loads((tmp_path / "diverged.json").read_text(), parse_constant=pytest.fail) == caught.value.report
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "diverged"
