"""`robustfair train` as a user meets it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.commands import AUDIT, Command, flag, training
from reference.runs import history, tensors
from robustfair.cli.app import app
from robustfair.runs.recipe import Recipe, read_recipe


def test_train_says_on_stderr_what_runs_and_on_stdout_where_it_is(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ema"))
    assert outcome.code == 0
    first, *images, few, one, two = outcome.err.splitlines()
    assert first.startswith("trades + ema on 140 images of digits, small-cnn with 1,674 parameters, 2 epochs")
    assert images[0] == "digits, train part: 140 images of 10 classes (14 each)"
    assert images[1] == "digits, validation part: 60 images of 10 classes (6 each)"
    assert images[2].startswith("digits, test part: 359 images of 10 classes (0: 36, 1: 36, 2: 35, ")
    assert len(images) == 3
    assert few.startswith("warning: weights are selected on 6 validation images of a class")
    assert few.endswith("give --validation a larger share, or take --select last")
    assert [line.split()[:2] for line in (one, two)] == [["epoch", "1"], ["epoch", "2"]]
    result, following = outcome.out.splitlines()
    assert result.startswith("new: 2 epochs; the model is '")
    assert following.startswith("next: robustfair audit new ")


def test_quiet_json_prints_one_line_of_json_and_nothing_else(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ema"), "--select", "last", "--json", "--quiet")
    assert outcome.err == ""
    selected = json.loads((place / "new" / "manifest.json").read_text())["selected"]
    assert outcome.json() == {
        "out": "new",
        "candidate": selected["candidate"],
        "epoch": selected["epoch"],
        "epochs": 2,
    }


def test_the_stored_recipe_repeats_the_run_bit_for_bit(place: Path, command: Command) -> None:
    assert command("train", "run/recipe.yaml", "--out", "new").code == 0
    assert tensors(place / "new") == tensors(place / "run")
    assert history(place / "new") == history(place / "run")
    assert (place / "new" / "recipe.yaml").read_bytes() == (place / "run" / "recipe.yaml").read_bytes()


def test_a_flag_overrides_a_recipe_file(place: Path, command: Command) -> None:
    assert command("train", "run/recipe.yaml", "--out", "new", "--seed", 3).code == 0
    begun, other = (read_recipe(str(place / name / "recipe.yaml"), {}) for name in ("run", "new"))
    assert other == dataclasses.replace(begun, seed=3)
    assert tensors(place / "new") != tensors(place / "run")


def sample(hint: Any) -> tuple[list[str], Any]:
    """Words for a flag of this type, and the value they mean."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [choices[-1]], choices[-1]
    if typing.get_origin(hint) is tuple:
        word, value = sample(choices[0])
        return word, (value,)
    if choices:
        return sample(choices[0])
    return {int: (["3"], 3), float: (["0.25"], 0.25), str: (["word"], "word"), bool: ([], True)}[hint]


KEYS = [(key, hint) for key, hint in typing.get_type_hints(Recipe).items() if key not in ("train", "stages")]


@pytest.mark.parametrize("spelling", [flag, lambda key: f"--{key}"], ids=["hyphens", "underscores"])
@pytest.mark.parametrize(("key", "hint"), KEYS, ids=[key for key, _ in KEYS])
def test_every_key_of_a_recipe_is_a_flag(key: str, hint: Any, spelling: Callable[[str], str]) -> None:
    words, value = sample(hint)
    argv = ["train", "trades", "--out", "new", spelling(key), *words]
    given = vars(bound(argv)["flags"])
    assert {name for name, found in given.items() if found is not None} == {key}
    meant = tuple(str(Path(word).resolve()) for word in value) if key == "plugin" else value
    assert getattr(read_recipe("trades", {"data": "digits", key: given[key]}), key) == meant


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--compile"], {"compile": True}),
        (["--no-compile"], {"compile": False}),
        (["--compile", "auto"], {"compile": "auto"}),
        (["--compile", "--seed", "3"], {"compile": True, "seed": 3}),
        (["--precision", "auto", "--compile=auto"], {"precision": "auto", "compile": "auto"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_precision_and_compilation_may_be_left_to_the_machine(words: list[str], meant: dict[str, Any]) -> None:
    given = vars(bound(["train", "trades", "--out", "new", *words])["flags"])
    assert {key: value for key, value in given.items() if value is not None} == meant


def bound(argv: list[str]) -> dict[str, Any]:
    """The arguments of the command that `argv` names, read and not run."""
    return app.parse_args(argv, exit_on_error=False, print_error=False)[1].arguments


def test_step_size_has_the_alias_alpha() -> None:
    argv = ["train", "trades", "--out", "new", "--alpha", "2/255"]
    assert bound(argv)["flags"].step_size == "2/255"
    assert bound(["audit", "run", "--alpha", "2/255"])["step_size"] == "2/255"


@pytest.mark.parametrize(("norm", "stored"), [("Linf", "linf"), ("l_inf", "linf"), ("L2", "l2"), ("L_2", "l2")])
def test_norms_in_any_usual_spelling(place: Path, command: Command, norm: str, stored: str) -> None:
    outcome = command(*training(norm=norm, epochs=1, limit_per_class=5), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"]["norm"] == stored
    assert command("audit", "new", "--norm", norm, *AUDIT, "--json").json()["threat"]["norm"] == stored


def test_a_radius_given_twice_may_agree(place: Path, command: Command) -> None:
    composition = "pgd-at(eps=51/255, step_size=0.1, steps=2, norm=l2)"
    assert command(*training(composition, eps="0.2", step_size="0.1", steps=2, norm="l2", epochs=1)).code == 0
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"]["eps"] == 0.2


def test_what_a_composition_says_reaches_the_attack(place: Path, command: Command) -> None:
    assert command(*training("pgd-at(eps=0.2)", eps=None, epochs=1)).code == 0
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"] == {
        "norm": "linf",
        "eps": 0.2,
        "step_size": 0.05,
    }
    assert history(place / "new")[0]["per_class"]["eps"] == pytest.approx([0.2] * 10)


def test_warnings_are_one_line_each(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ccm", eps="0.031", epochs=1), "--quiet")
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert any("0.031 is 7.91/255, not 8/255" in line for line in lines)
    assert sum("ccm begins at epoch 10" in line for line in lines) == 1


def test_a_flag_that_the_objective_would_ignore_is_not_taken_in_silence(place: Path, command: Command) -> None:
    outcome = command(*training("standard", eps="0.2", steps=None, epochs=1), "--quiet")
    assert "eps" in outcome.err


@pytest.mark.parametrize("out", [".", "empty", "new/deeper", "../place/empty/"])
def test_a_run_may_fill_an_empty_folder(tmp_path: Path, place: Path, command: Command, out: str) -> None:
    (place / "empty").mkdir()
    with contextlib.chdir(place / "empty" if out == "." else place):
        outcome = command(*training(out=out, epochs=1))
        assert outcome.code == 0, outcome.err
        assert (Path(out) / "manifest.json").is_file()
        assert command("train", "--out", out, "--resume").code == 0
    assert [path.name for path in place.rglob(".*")] == []


def test_a_class_without_training_images_is_named_before_training(place: Path, command: Command) -> None:
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
    arrays = {"test_images": images, "test_labels": labels}
    np.savez("gap.npz", train_images=images, train_labels=np.where(labels == 3, 4, labels), **arrays)
    outcome = command(*training(data="gap.npz", limit_per_class=None, epochs=1))
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    (named,) = [number for number, line in enumerate(lines) if "gap: no training image of class 3: " in line]
    assert lines[named].startswith("warning: ")
    assert named < next(number for number, line in enumerate(lines) if line.startswith("epoch"))
    assert any(line.startswith("gap, train part: 30 images of 10 classes (0: 3, ") for line in lines)
    assert any(line.endswith("3, 9: 3), none of 3") for line in lines)
    np.savez("gap.npz", train_images=images, train_labels=labels + 1, test_images=images, test_labels=labels + 1)
    outcome = command(*training(data="gap.npz", limit_per_class=None, out="other"))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "labels run from 1 to 10 and none is 0: they count from one, or class 0 has no images" in outcome.err
    assert not Path("other").exists()


def test_the_help_of_train_tells_every_key(command: Command) -> None:
    text = command("train", "--help").out
    for field in dataclasses.fields(Recipe):
        if field.name not in ("train", "stages"):
            assert flag(field.name) in text
