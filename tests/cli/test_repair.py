"""`robustfair repair` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference.commands import AUDIT, TEN, Command
from reference.runs import changes, tensors, tree
from robustfair.runs.recipe import read_recipe


def test_a_repair_writes_a_new_run_and_leaves_the_old_one(place: Path, command: Command) -> None:
    before = tree(place)
    outcome = command("repair", "run", "--out", "new")
    assert outcome.code == 0
    assert outcome.out.startswith("hwnwb: head norms ")
    assert all(path == "new" or path.startswith("new/") for path in changes(before, tree(place)))
    old = load_file("run/checkpoints/best/weights.safetensors")
    new = load_file("new/checkpoints/repaired/weights.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"head.weight"}
    torch.testing.assert_close(new["head.weight"].norm(dim=1), torch.ones(10))
    manifest = json.loads((place / "new" / "manifest.json").read_text())
    assert manifest["repaired_from"] == {"run": "run", "checkpoint": "best"}
    assert manifest["repair"] == "hwnwb"
    assert manifest["status"] == "complete"
    assert command("audit", "new", *AUDIT, "--json").json()["threat"]["eps"] == 0.1


def test_stages_give_the_weights_of_train_then_repair(place: Path, command: Command) -> None:
    stored = read_recipe(str(place / "repaired" / "recipe.yaml"), {})
    assert [stage.does for stage in stored.stages] == ["train", "repair"]
    outcome = command("train", "repaired/recipe.yaml", "--out", "new")
    assert (outcome.code, outcome.out.count("\n")) == (0, 4)
    weights = "checkpoints/repaired/weights.safetensors"
    made = place / "new" / "stages"
    assert (made / "2-repair" / weights).read_bytes() == (place / "repaired" / weights).read_bytes()
    assert tensors(made / "1-train") == tensors(place / "run")
    assert "(repaired: " in command("audit", "new", *AUDIT, "--json").json()["model"]
    before = tree(place)
    assert command("train", "--out", "new", "--resume", "--json").json()["model"].endswith("2-repair")
    assert changes(before, tree(place)) in ([], ["new/manifest.json"])


@pytest.mark.parametrize("checkpoint", ["last", "ema"])
def test_another_checkpoint_can_be_repaired(place: Path, command: Command, checkpoint: str) -> None:
    outcome = command(
        "repair", "run", "--out", "new", "--checkpoint", checkpoint, "--method", "hwnwb(target_norm=mean)"
    )
    assert outcome.code == 0
    old = load_file(f"run/checkpoints/{checkpoint}/weights.safetensors")
    new = load_file("new/checkpoints/repaired/weights.safetensors")
    assert torch.equal(old["conv1.weight"], new["conv1.weight"])
    norms = old["head.weight"].norm(dim=1)
    torch.testing.assert_close(new["head.weight"].norm(dim=1), norms.mean().expand(10))


def test_a_repair_can_show_before_and_after(place: Path, command: Command) -> None:
    outcome = command("repair", "run", "--out", "new", "--attacks", "clean,pgd-2", "--limit-per-class", 3)
    assert outcome.code == 0
    wrote = [Path(line.removeprefix("wrote ")) for line in outcome.out.splitlines() if line.startswith("wrote ")]
    assert {path.parts[0] for path in wrote} == {"run", "new"}
    assert Path("new/report.html") in wrote
    assert not list(place.rglob("*unfinished-*"))
    for name in TEN:
        assert sum(line.split()[:2] == [name, "3"] for line in outcome.out.splitlines()) == 1
