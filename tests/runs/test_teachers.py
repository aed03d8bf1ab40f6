"""Teachers that recipes name: read before anything is written, saved with the run; or the model of an earlier stage."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reference.runs import BRIEF, TINY, history, tensors
from robustfair.errors import ModelError, RecipeError, RobustFairError, RobustFairWarning
from robustfair.methods import ABSLD, Method, compose
from robustfair.objectives import ARD, RSLAD, Trades
from robustfair.runs import load
from robustfair.runs.load import load_model, load_named
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.run import load_networks, named_networks, prepare, train, with_previous
from robustfair.runs.stages import run_stages
from robustfair.training.state import TrainState
from robustfair.values import Network

FACTORIES = """
from robustfair import create_model


def net():
    return create_model("small-cnn", in_channels=1, width=2)


def five():
    return create_model("small-cnn", in_channels=1, num_classes=5, width=2)


def colour():
    return create_model("small-cnn", width=2)
"""

PLAIN = {**TINY, "select": "last", "validation": 0}


def recipe(composition: str, **keys: Any) -> Recipe:
    return read_recipe(composition, PLAIN | keys)


def weights_of(run: Path, checkpoint: str = "best") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "weights.safetensors")


def frozen(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "frozen" / "state.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, its weights as a file, and a factory."""
    shutil.copytree(trained, tmp_path / "robust")
    save_file(weights_of(trained), tmp_path / "robust.safetensors")
    (tmp_path / "teachers_of_mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = [
    "robust",
    "robust(checkpoint=best)",
    "robust.safetensors(arch=small-cnn, width=4)",
    "teachers_of_mine:net",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_is_a_run_a_weight_file_or_a_factory(place: Path, name: str) -> None:
    ready = load_networks(prepare(recipe(f'rslad(teacher="{name}") + absld')))
    objective, (method,) = ready.plan.objective, ready.plan.methods
    assert isinstance(objective, RSLAD)
    assert isinstance(objective.teacher, nn.Module)
    assert not objective.teacher.training
    assert method == ABSLD()
    assert ready.notes[0].startswith(f"rslad: teacher is {name.split('(')[0]}")
    assert any("weights from the top level" in note for note in ready.notes) == (".safetensors" in name)
    if "robust" in name:
        assert same(dict(objective.teacher.state_dict()), weights_of(place / "robust"))


def test_the_checkpoint_that_is_named_is_read(place: Path) -> None:
    ready = load_networks(prepare(recipe('ard(teacher="robust(checkpoint=ema)") + fair-ard')))
    assert isinstance(ready.plan.objective, ARD)
    teacher: Any = ready.plan.objective.teacher
    assert same(dict(teacher.state_dict()), weights_of(place / "robust", "ema"))


def test_a_run_keeps_its_teacher_and_goes_on_without_a_difference(place: Path) -> None:
    class StopError(Exception):
        pass

    def stop(state: TrainState) -> None:
        raise StopError

    composition = "rslad(teacher=robust) + absld + fair-ard"
    train(recipe(composition), place / "whole")
    with pytest.raises(StopError):
        train(recipe(composition), place / "stopped", on_epoch=stop)
    kept = {name.removeprefix("rslad/teacher/"): tensor for name, tensor in frozen(place / "stopped").items()}
    assert same(kept, weights_of(place / "robust"))
    train(recipe(composition), place / "stopped", resume=True)
    assert tensors(place / "stopped") == tensors(place / "whole")
    assert history(place / "stopped") == history(place / "whole")
    assert "teacher=robust" in (place / "whole" / "recipe.yaml").read_text()
    assert load.load_target(str(place / "whole")).checkpoint == "last"


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ("nothing/here", ModelError, "rslad: teacher: nothing/here: no such file or folder"),
        (
            "robust.safetensors",
            ModelError,
            r"weights only: add arch with .*\. Options stand in brackets: teacher=",
        ),
        ("robust.safetensors(arch=small-cnn, width=3)", ModelError, "rslad: teacher: "),
        ("robust(checkpoint=worst)", ModelError, "rslad: teacher: unknown checkpoint of robust 'worst'"),
        ("robust(check=best)", ModelError, "rslad: teacher: unknown option of robust 'check': did you mean checkpoint"),
        (
            "robust.safetensors(arch=small-cnn",
            ModelError,
            "rslad: teacher: cannot read 'robust.safe",
        ),
        (
            "robust(checkpoint=best) + ema",
            ModelError,
            r"teacher: cannot read 'robust.* \+ ema': options stand in",
        ),
        ("", ModelError, "rslad: teacher: no model is named"),
        ("teachers_of_mine:none", ModelError, "rslad: teacher: teachers_of_mine:none: cannot import it"),
        ("previous", RecipeError, "rslad: teacher is previous, which is the model before a stage"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused_before_a_folder_is_made(
    place: Path, teacher: str, error: type[RobustFairError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(recipe(f'rslad(teacher="{teacher}")'), place / "run")
    assert not (place / "run").exists()


def test_a_teacher_of_other_images_is_refused_before_a_folder_is_made(place: Path) -> None:
    for name, reason in (("colour", "channel"), ("five", "model has 5 outputs, data has 10 classes")):
        with pytest.raises(ModelError, match=f"rslad: teacher: .*{reason}"):
            train(recipe(f"rslad(teacher=teachers_of_mine:{name})"), place / "run")
    assert not (place / "run").exists()


def test_a_run_on_other_classes_is_refused_by_their_names(place: Path) -> None:
    state = place / "robust" / "checkpoints" / "best" / "state.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps(known | {"class_names": known["class_names"][::-1]}))
    with pytest.raises(ModelError, match=r"rslad: teacher: robust was trained on the classes 9, 8, .*same order"):
        train(recipe("rslad(teacher=robust)"), place / "run")


def test_what_names_a_network_is_told_by_the_type_of_the_field() -> None:
    assert named_networks(RSLAD(teacher="runs/x")) == {"teacher": "runs/x"}
    assert named_networks(RSLAD()) == named_networks(RSLAD(teacher=nn.Identity())) == {}
    assert named_networks(Trades()) == named_networks(ABSLD()) == {}


def test_a_method_may_name_a_network_too(place: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Guided(Method):
        name: ClassVar[str] = "guided"
        guide: Network = None

    assert named_networks(Guided(guide="robust")) == {"guide": "robust"}
    plan = compose(Trades(), [Guided(guide="robust")])
    ready = load_networks(dataclasses.replace(prepare(recipe("trades")), plan=plan))
    (method,) = ready.plan.methods
    assert isinstance(method, Guided)
    assert isinstance(method.guide, nn.Module)
    assert ready.notes[0].startswith("guided: guide is robust")


def test_options_in_brackets_are_those_of_a_target(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_target(what: str, *, weights: Any = None, arch: Any = None, width: Any = None, **rest: Any) -> None:
        asked.append((what, {"weights": weights, "arch": arch, "width": width, **rest}))

    monkeypatch.setattr(load, "load_target", load_target)
    load_named("timm:resnet18(weights=r18.safetensors, width=3)", num_classes=5)
    load_named("robustbench:Carmon2019Unlabeled")
    (place / "odd (1)").mkdir()
    load_named("odd (1)")
    nothing = {"weights": None, "arch": None, "width": None}
    assert asked == [
        ("timm:resnet18", nothing | {"weights": "r18.safetensors", "width": 3, "num_classes": 5}),
        ("robustbench:Carmon2019Unlabeled", nothing),
        ("odd (1)", nothing),
    ]


def test_a_model_by_its_name_for_python(place: Path) -> None:
    model = load_model("robust")
    assert same(dict(model.state_dict()), weights_of(place / "robust"))
    assert not model.training
    with pytest.warns(RobustFairWarning, match=r"robust\.safetensors: weights from the top level"):
        twin = load_model("robust.safetensors(arch=small-cnn, width=4)", num_classes=10, in_channels=1)
    assert same(dict(twin.state_dict()), dict(model.state_dict()))


# Stages

STAGES = f"""{BRIEF}stages:
- train: trades
  width: 8
- train: rslad(teacher=previous, clean_share=0.5) + absld
  start: scratch
"""


def test_the_model_of_the_stage_before_teaches(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(STAGES)
    run_stages(read_recipe(str(tmp_path / "recipe.yaml"), {}), tmp_path / "run")
    first, second = tmp_path / "run" / "stages" / "1-train", tmp_path / "run" / "stages" / "2-train"
    kept = {name.removeprefix("rslad/teacher/"): tensor for name, tensor in frozen(second).items()}
    assert same(kept, weights_of(first, "last"))
    own = read_recipe(str(second / "recipe.yaml"), {})
    assert own.train == f"rslad(teacher={first.resolve()}, clean_share=0.5) + absld"
    train(own, tmp_path / "again")
    assert same(weights_of(tmp_path / "again", "last"), weights_of(second, "last"))
    before = tensors(second)
    run_stages(read_recipe(str(tmp_path / "run" / "recipe.yaml"), {}), tmp_path / "run", resume=True)
    assert tensors(second) == before


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("- train: rslad(teacher=previous)", "stage 1 .* works on the model before it and there is none"),
        ("- train: trades\n- train: rslad(teacher=nothing/here)", "rslad: teacher: nothing/here: no such file"),
        ("- train: trades\n- train: trades(teacher=previous)", "teacher"),
    ],
)
def test_a_teacher_of_a_later_stage_is_looked_for_before_the_first(tmp_path: Path, stages: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(STAGES[: STAGES.index("- train")] + stages)
    with pytest.raises(RobustFairError, match=message):
        run_stages(read_recipe(str(path), {}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_networks_are_called_previous() -> None:
    assert with_previous("trades(regularizer=ce) + ema", "x") == "trades(regularizer=ce) + ema"
    assert with_previous("ard( teacher=runs/a )", "x") == "ard( teacher=runs/a )"
    assert with_previous("ard(teacher=previous, eps=8/255)", "a b") == 'ard(teacher="a b", eps=8/255)'
