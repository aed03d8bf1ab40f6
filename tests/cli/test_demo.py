"""`robustfair demo` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reference.commands import TEN, Command
from reference.runs import TINY, changes, tree
from robustfair.cli import demo
from robustfair.cli.demo import run_demo
from robustfair.errors import CheckpointError
from robustfair.evaluate.result import load_audit
from robustfair.runs.recipe import read_recipe


def test_demo_trains_audits_repairs_and_reports(place: Path, command: Command) -> None:
    (place / "runs" / "demo").mkdir(parents=True)
    outcome = command("demo", "--epochs", 2)
    assert outcome.code == 0, outcome.err
    base = place / "runs" / "demo-2"
    assert {path.name for path in base.iterdir()} == {"trained", "repaired"}
    for name in ("trained", "repaired"):
        assert (base / name / "manifest.json").is_file()
        assert (base / name / "report.html").stat().st_size > 10_000
        (stored,) = (base / name / "audit").glob("*.json")
        attacks = json.loads(stored.read_text())["attacks"]
        assert list(attacks) == ["clean", "pgd-20", "cw-50(restarts=5)"]
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert any(line.startswith("before  ") and "cw-50" in line for line in lines)
    assert any(line.startswith("after   ") and "cw-50" in line for line in lines)
    assert "Traceback" not in outcome.err
    assert changes({}, tree(place / "runs" / "demo")) == []


def test_the_demo_is_train_repair_and_two_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {key: TINY[key] for key in ("width", "limit_per_class", "batch_size", "eps", "steps")}

    def small_recipe(what: str, overrides: dict[str, Any]) -> Any:
        return read_recipe(what, overrides | (small if what == "demo" else {}))

    monkeypatch.setattr(demo, "read_recipe", small_recipe)
    monkeypatch.setattr(demo, "DEMO_ATTACKS", "clean,pgd-2,cw-3(restarts=2)")
    monkeypatch.chdir(tmp_path)
    for out in ("runs/demo", "runs/demo-2"):
        lines = "\n".join(run_demo(None, seed=1, epochs=2, quiet=True)).splitlines()
        assert lines[0].startswith("hwnwb: head norms ")
        wrote = [Path(line.removeprefix("wrote ")) for line in lines if line.startswith("wrote ")]
        assert Path(out, "repaired", "report.html") in wrote
        assert all(path.is_file() for path in wrote)
        recipe = read_recipe(f"{out}/trained/recipe.yaml", {})
        assert (recipe.seed, recipe.epochs, recipe.stages) == (1, 2, ())
        assert json.loads(Path(out, "repaired", "manifest.json").read_text())["repair"] == "hwnwb"
        before, after = (load_audit(next(Path(out, name, "audit").glob("*.json"))) for name in ("trained", "repaired"))
        assert before.attacks == after.attacks == ("clean", "pgd-2", "cw-3(restarts=2)")
        assert before.fingerprint == after.fingerprint
        for part, found in (("before", before), ("after", after)):
            (line,) = [line for line in lines if line.startswith(part) and line.split()[1] == "pgd-2"]
            assert f"average {100 * found.average('pgd-2'):.1f} " in line
        assert not list(Path(out).rglob("*unfinished-*"))


@pytest.mark.parametrize(("name", "message"), [("folder", "is not empty"), ("file", "is a file")])
def test_the_demo_touches_nothing_that_is_there(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("keep")
    (tmp_path / "file").write_text("keep")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        list(run_demo(tmp_path / name, seed=0, epochs=1, quiet=True))
    assert changes(before, tree(tmp_path)) == []
