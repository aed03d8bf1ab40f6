"""A Python file of the user's own, named by --plugin or by the recipe of a run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from reference.commands import AUDIT, Command, Refuses, training
from reference.runs import changes, history, tensors, tree
from robustfair.registry import BUNDLES, EDITS, METHODS, MODELS, OBJECTIVES, REPAIRS
from robustfair.runs.recipe import read_recipe

PLUGIN = '''
import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from robustfair.methods import Method
from robustfair.models.networks.small_cnn import SmallCNN
from robustfair.objectives import PGDAT
from robustfair.registry import METHODS, MODELS, OBJECTIVES, REPAIRS


@MODELS.register("own-net")
class OwnNet(SmallCNN):
    name = "own-net"


@OBJECTIVES.register("own-at")
@dataclass(frozen=True, kw_only=True)
class OwnAT(PGDAT):
    """Adversarial training of a user."""

    name: ClassVar[str] = "own-at"


@METHODS.register("own-radius")
@dataclass(frozen=True, kw_only=True)
class OwnRadius(Method):
    """A radius of a user's own."""

    name: ClassVar[str] = "own-radius"
    claims: ClassVar[frozenset[str]] = frozenset({"attack.eps"})
    factor: float = 0.5

    def attack(self, attack, batch, state, run):
        return replace(attack, eps=self.factor * attack.eps)


@REPAIRS.register("own-shift")
@dataclass(frozen=True, kw_only=True)
class OwnShift:
    """A bias of a user's own."""

    name: ClassVar[str] = "own-shift"
    needs_data: ClassVar[bool] = False
    by: float = 1.0

    def __call__(self, model):
        new = copy.deepcopy(model)
        with torch.no_grad():
            new.head.bias += self.by
        return new

    def describe(self):
        return f"every bias rises by {self.by:g}"
'''
OWN = "own-at + own-radius"


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Forgets all plugins, as a fresh process does; at the end of a test too."""
    registries = (OBJECTIVES, METHODS, BUNDLES, MODELS, REPAIRS, EDITS)
    known = [(registry, [*registry]) for registry in registries]

    def run() -> None:
        for registry, names in known:
            registry._entries = {name: registry.get(name) for name in names}
        for name in [name for name in sys.modules if name.startswith("robustfair_plugin_")]:
            del sys.modules[name]

    run()
    yield run
    run()


@pytest.fixture
def plugin(place: Path, forget: Callable[[], None]) -> str:
    """The plugin's file, named from the working folder."""
    (place / "mine").mkdir()
    (place / "mine" / "own.py").write_text(PLUGIN)
    return "mine/own.py"


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("objectives", "own-at", "Adversarial training of a user"),
        ("methods", "own-radius", "A radius of a user's own"),
        ("repairs", "own-shift", "A bias of a user's own"),
    ],
)
def test_list_names_what_a_plugin_adds(
    command: Command, plugin: str, forget: Callable[[], None], kind: str, name: str, text: str
) -> None:
    usual = command("list", kind, "--json").json()
    assert name not in usual
    assert command("list", kind, "--plugin", plugin, "--json").json() == usual | {name: text}
    forget()
    assert command("list", "--plugin", plugin, kind, "--json").json() == usual | {name: text}


def test_explain_knows_a_plugin(place: Path, command: Command, plugin: str, forget: Callable[[], None]) -> None:
    assert command("explain", OWN).code == 2
    outcome = command("explain", OWN, "--plugin", plugin)
    assert (outcome.code, outcome.err) == (0, "")
    assert "own-at: Adversarial training of a user" in outcome.out.splitlines()
    assert "  acts in: attack" in outcome.out.splitlines()
    forget()
    (place / "own.yaml").write_text(f"train: {OWN}\nplugin: [{plugin}]\n")
    assert command("explain", "own.yaml").out.endswith(outcome.out)


def test_several_plugins_of_one_name_in_two_folders(place: Path, command: Command, plugin: str) -> None:
    (place / "other").mkdir()
    (place / "other" / "own.py").write_text(PLUGIN.replace("own-", "other-"))
    both = ["--plugin", plugin, "--plugin", "other/own.py"]
    assert command("explain", "other-at + own-radius + other-radius", "--allow", "attack.eps", *both).code == 0
    outcome = command("train", *both, *training("other-at + own-radius", epochs=1)[1:])
    assert outcome.code == 0, outcome.err
    stored = read_recipe(str(place / "new" / "recipe.yaml"), {})
    assert stored.plugin == (str(place / plugin), str(place / "other" / "own.py"))


def test_a_run_names_its_plugin_and_loads_it_by_itself_from_any_folder(
    place: Path, command: Command, plugin: str, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*training(OWN), "--plugin", plugin, "--quiet").code == 0
    assert history(place / "new")[0]["per_class"]["eps"] == pytest.approx([0.05] * 10)
    monkeypatch.chdir(place / "notes")
    for words in (["train", "--out", "../new", "--resume"], ["explain", "../new/recipe.yaml"]):
        forget()
        outcome = command(*words)
        assert outcome.code == 0, outcome.err
    forget()
    assert command("train", "../new/recipe.yaml", "--out", "../again").code == 0
    assert tensors(place / "again") == tensors(place / "new")
    forget()
    outcome = command("repair", "../new", "--out", "../mended", "--method", "own-shift(by=2)")
    assert outcome.code == 0, outcome.err
    before = read_recipe("../new/recipe.yaml", {})
    assert read_recipe("../mended/recipe.yaml", {}).plugin == before.plugin == (str(place / plugin),)


@pytest.mark.parametrize("attacks", [[], ["--attacks", "clean", "--limit-per-class", "1"]], ids=["alone", "audited"])
def test_a_repair_of_a_plugin_is_kept_in_the_recipe_of_the_repaired_run(
    place: Path, command: Command, plugin: str, forget: Callable[[], None], attacks: list[str]
) -> None:
    words = ["repair", "run", "--out", "new", "--method", "own-shift", *attacks]
    assert command(*words).code == 2
    outcome = command(*words, "--plugin", plugin)
    assert outcome.code == 0, outcome.err
    assert json.loads((place / "new" / "manifest.json").read_text())["repair"] == "own-shift"
    assert read_recipe("new/recipe.yaml", {}).plugin == (str(place / plugin),)
    forget()
    assert command("train", "new/recipe.yaml", "--out", "staged").code == 0
    weights = "checkpoints/repaired/weights.safetensors"
    assert (place / "staged" / "stages" / "2-repair" / weights).read_bytes() == (place / "new" / weights).read_bytes()


def test_a_stage_may_be_a_repair_of_a_plugin_without_training(place: Path, command: Command, plugin: str) -> None:
    (place / "plan.yaml").write_text("data: digits\nstages:\n- repair: own-shift\n  start: run\n")
    outcome = command("train", "plan.yaml", "--plugin", plugin, "--out", "new")
    assert outcome.code == 0, outcome.err
    entry = {"train": "standard", "plugin": [plugin]}
    (place / "plan.yaml").write_text(yaml.safe_dump({"data": "digits", "stages": [entry]}))
    outcome = command("train", "plan.yaml", "--out", "other")
    assert outcome.code == 2
    assert "stage 1 (train) has plugin" in outcome.err


def test_measuring_a_run_runs_no_file_that_its_recipe_names(
    place: Path, command: Command, plugin: str, forget: Callable[[], None]
) -> None:
    assert command(*training(OWN, model="own-net", epochs=1), "--plugin", plugin, "--quiet").code == 0
    forget()
    fog = ["corruptions", "new", "--which", "fog", "--severities", "1", "--limit-per-class", "1"]
    for words in (["audit", "new", *AUDIT], fog):
        outcome = command(*words)
        assert (outcome.code, outcome.out) == (2, "")
        said = f"unknown model 'own-net': .*; its recipe names {place / plugin}, .*: name it with --plugin\n"
        assert re.search(said, outcome.err), outcome.err
    assert command("audit", "new", *AUDIT, "--plugin", plugin).code == 0
    forget()
    assert command(*fog, "--plugin", plugin).code == 0
    assert command("audit", "new", *AUDIT, "--checkpoint", "bset").err.startswith("robustfair: unknown checkpoint")


def test_a_run_whose_plugin_is_gone_is_audited_and_repaired_without_it(
    place: Path, command: Command, plugin: str, forget: Callable[[], None]
) -> None:
    assert command(*training(OWN, epochs=1), "--plugin", plugin, "--quiet").code == 0
    shutil.rmtree(place / "mine")
    forget()
    assert command("audit", "new", *AUDIT, "--quiet").err == ""
    outcome = command("repair", "new", "--out", "mended")
    assert (outcome.code, outcome.err.count("\n")) == (0, 1)
    assert outcome.err.startswith(f"warning: new names the plugin {place / plugin}, which is gone")
    before = tree(place)
    outcome = command("train", "--out", "new", "--resume")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"plugin {place / plugin} is no Python file" in outcome.err
    assert changes(before, tree(place)) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def broken(:\n", "line 1: SyntaxError"),
        ("\nraise SystemExit(3)\n", "line 2: SystemExit: 3"),
        ("from robustfair.registry import REPAIRS\nREPAIRS.register('hwnwb')(int)\n", "line 2: "),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        training(),
        ["explain", "trades"],
        ["list", "repairs"],
        ["repair", "run", "--out", "new"],
        ["audit", "run", *AUDIT],
        ["corruptions", "run", "--which", "fog"],
    ],
    ids=lambda words: words[0],
)
def test_a_plugin_that_does_not_run_is_one_line(
    place: Path, refuses: Refuses, forget: Callable[[], None], words: list[str], text: str, said: str
) -> None:
    (place / "bad.py").write_text(text)
    refuses([*words, "--plugin", "bad.py"], ("plugin", "bad.py", said))
    refuses([*words, "--plugin", "gone.py"], ("gone.py is no Python file",))


def test_a_stored_audit_takes_no_plugin(refuses: Refuses, plugin: str) -> None:
    refuses(["audit", "baseline.json", "--plugin", plugin], ("flags of a stored audit", "'--plugin'"))
