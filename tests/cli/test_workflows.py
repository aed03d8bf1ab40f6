"""What the commands do beyond training: audits of a target, repairs of a run, the demo."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reference.layouts import pixels, write_images
from reference.runs import CFA, TINY, changes, tree
from robustfair.cli import workflows
from robustfair.cli.workflows import (
    AuditRequest,
    audit_lines,
    audit_target,
    before_after_lines,
    run_demo,
    write_outputs,
)
from robustfair.data import load_dataset
from robustfair.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RobustFairError,
    RobustFairWarning,
    UnknownNameError,
)
from robustfair.evaluate.audit import BATCH_SIZE, audit, load_audit
from robustfair.evaluate.columns import Sweeper
from robustfair.evaluate.diagnostics.diagnostic import Finding
from robustfair.models import head_norms
from robustfair.runs.folder import RunFolder
from robustfair.runs.load import Target, load_target
from robustfair.runs.recipe import Stage, read_recipe
from robustfair.runs.repair import repair_run
from robustfair.runs.run import train

QUICK = AuditRequest(attacks="clean,pgd-2", limit_per_class=3, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("workflows") / "run"
    train(read_recipe(CFA, TINY), out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run that a test may write into; decoded images are cached elsewhere."""
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(trained, tmp_path / "run")


# Images of an audit


def test_a_named_set_is_audited_on_its_test_part() -> None:
    test = load_dataset("digits").test
    assert AuditRequest(attacks="clean", data="digits").images()[0].fingerprint == test.fingerprint
    limited = AuditRequest(attacks="clean", data="digits", limit_per_class=4).images()[0]
    assert limited.fingerprint == test.limit_per_class(4).fingerprint
    assert AuditRequest(attacks="clean", data="digits", image_size=12).images()[0].images.shape[2:] == (12, 12)


def test_a_source_without_parts_is_audited_whole(tmp_path: Path, run: Path) -> None:
    np.savez(tmp_path / "images.npz", images=pixels(6), labels=np.arange(6) % 3)
    assert len(AuditRequest(attacks="clean", data=str(tmp_path / "images.npz")).images()[0]) == 6
    for name in "ab":
        write_images(tmp_path / "folder" / "test", {name: pixels(2)})
        write_images(tmp_path / "folder" / "train", {name: pixels(3)})
    assert len(AuditRequest(attacks="clean", data=str(tmp_path / "folder")).images()[0]) == 4


def test_the_data_of_the_run_stand_in_for_none() -> None:
    default = {
        "name": "digits",
        "fingerprint": load_dataset("digits", image_size=12).train.fingerprint,
        "image_size": 12,
    }
    assert AuditRequest(attacks="clean").images(default)[0].images.shape[2:] == (12, 12)
    assert AuditRequest(attacks="clean", data="digits", image_size=16).images(default)[0].images.shape[2:] == (16, 16)
    with pytest.raises(DataError, match="add --data"):
        AuditRequest(attacks="clean").images({})


# Auditing a target


def test_the_audit_of_a_run_is_that_of_its_model(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK, quiet=True)
    data = load_dataset("digits").test.limit_per_class(3)
    expected = audit(target.model, data, attacks=["clean", "pgd-2"], eps=0.1)
    assert found.model == target.label
    assert found.threat == expected.threat
    for attack in ("clean", "pgd-2"):
        assert torch.equal(found.prediction(attack), expected.prediction(attack))


def test_what_is_asked_goes_before_what_the_run_says(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, replace(QUICK, eps="8/255", step_size="1/255", seed=4, norm="L_inf"), quiet=True)
    assert (found.threat.norm, found.threat.eps, found.threat.step_size) == ("linf", 8 / 255, 1 / 255)
    assert found.provenance["seed"] == 4
    assert audit_target(target, replace(QUICK, norm="L2"), quiet=True).threat.eps == 128 / 255
    assert audit_target(target, replace(QUICK, norm="Linf"), quiet=True).threat.eps == 0.1


def test_classes_must_be_those_of_training(run: Path, tmp_path: Path) -> None:
    target = load_target(str(run))
    np.savez(
        tmp_path / "letters.npz", images=pixels(20, channels=1), labels=np.arange(20) % 10, class_names=[*"abcdefghij"]
    )
    with pytest.raises(DataError, match=r"was trained on the classes 0, 1, 2, 3, .* and letters has a, b, c, d"):
        audit_target(target, replace(QUICK, data=str(tmp_path / "letters.npz")), quiet=True)
    np.savez(tmp_path / "nine.npz", images=pixels(18, channels=1), labels=np.arange(18) % 9)
    with pytest.raises(DataError, match="labels would not mean the same"):
        audit_target(target, replace(QUICK, data=str(tmp_path / "nine.npz")), quiet=True)


def test_a_foreign_model_needs_as_many_outputs_as_classes() -> None:
    class Net(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(64, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1))

    found = audit_target(Target(model=Net(10), label="net", meta={}), replace(QUICK, data="digits"), quiet=True)
    assert (found.model, found.threat.eps, found.num_classes) == ("net", 8 / 255, 10)
    with pytest.raises(ModelError, match="7 outputs, data has 10 classes"):
        audit_target(Target(model=Net(7), label="net", meta={}), replace(QUICK, data="digits"), quiet=True)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"attacks": ""}, ConfigError),
        ({"attacks": "pdg-2"}, UnknownNameError),
        ({"eps": "8"}, ConfigError),
        ({"eps": ""}, ConfigError),
        ({"norm": "l1"}, ConfigError),
        ({"image_size": 0}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"limit_per_class": 0}, ConfigError),
        ({"precision": "fp16"}, ConfigError),
        ({"device": "gpu"}, ConfigError),
        ({"data": "digit"}, UnknownNameError),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(run: Path, keys: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        audit_target(load_target(str(run)), replace(QUICK, **keys), quiet=True)


def test_progress_is_a_line_an_attack_where_stderr_is_no_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audit_target(load_target(str(run)), QUICK)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["digits, test part", *found.attacks]
    audit_target(load_target(str(run)), QUICK, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("out", "others"), [(None, 1), ("elsewhere", 2)])
def test_the_same_threat_finds_the_same_journal_in_any_spelling(
    run: Path, tmp_path: Path, out: str | None, others: int
) -> None:
    folder = None if out is None else tmp_path / out
    request = AuditRequest(attacks="square(queries=20),pgd-2", limit_per_class=2, max_minutes=1e-9)
    for spelt in (
        {"eps": "8/255"},
        {"eps": "0.03137254901960784", "norm": "L_inf"},
        {"eps": str(8 / 255), "step_size": "2/255"},
    ):
        with pytest.warns(RobustFairWarning, match="The same command goes on"):
            audit_target(load_target(str(run)), replace(request, **spelt), out=folder, quiet=True)
        kept = folder or run / "audit"
        assert len(list(kept.glob("unfinished-*"))) == 1
    moved = shutil.copytree(run, tmp_path / "moved")
    if folder is None:
        kept = moved / "audit"
    with pytest.warns(RobustFairWarning):
        audit_target(load_target(str(moved)), replace(request, eps="8/255"), out=folder, quiet=True)
    assert len(list(kept.glob("unfinished-*"))) == others


@pytest.mark.parametrize(
    ("one", "other", "kept"),
    [
        ({}, {"batch_size": BATCH_SIZE}, 1),
        ({}, {"attacks": "clean,square(queries=20),pgd-2"}, 1),
        ({}, {"attacks": "square(queries=20),PGD_2,clean", "batch_size": BATCH_SIZE}, 1),
        ({}, {"attacks": "pgd-2,square(queries=20)"}, 2),
        ({}, {"batch_size": 7}, 2),
    ],
)
def test_the_same_audit_finds_the_same_journal_in_any_spelling(
    run: Path, one: dict[str, Any], other: dict[str, Any], kept: int
) -> None:
    request = AuditRequest(attacks="square(queries=20),pgd-2", limit_per_class=2, max_minutes=1e-9)
    for spelt in (one, other):
        with pytest.warns(RobustFairWarning, match="The same command goes on"):
            audit_target(load_target(str(run)), replace(request, **spelt), quiet=True)
    assert len(list((run / "audit").glob("unfinished-*"))) == kept


# Thorough checks


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keys of every call of the thorough checks, which find nothing; a pass of time is a minute."""
    calls: list[dict[str, Any]] = []

    def found(*given: Any, **keys: Any) -> tuple[Finding, ...]:
        calls.append(keys)
        return (Finding(code="not-converged", severity="note", text="Stub.", advice="None."),)

    monkeypatch.setattr(workflows, "thorough_findings", found)
    return calls


def test_thorough_checks_follow_the_audit_with_its_precision_and_what_is_left_of_its_time(
    run: Path, checked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    target = load_target(str(run))
    request = replace(QUICK, checks=True, precision="bf16", seed=4, batch_size=7)
    found = audit_target(target, request, quiet=True)
    assert [check["code"] for check in found.provenance["checks"]] == ["not-converged"]
    target.model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 60.0))
    audit_target(target, replace(request, max_minutes=500), quiet=True)
    first, second = checked
    assert (first["precision"], first["seed"], first["batch_size"], first["max_minutes"]) == ("bf16", 4, 7, None)
    assert callable(first["on_progress"])
    assert second["max_minutes"] == pytest.approx(500 - now[0] / 60)
    assert now[0] > 0


def test_an_audit_that_took_all_the_time_says_that_nothing_was_checked(run: Path) -> None:
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True, max_minutes=1e-9), quiet=True)
    assert found.complete, "a single turn of an attack is never cut"
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert "pgd-20 at 0 %, pgd-100 at 0 %" in cut["text"]


def test_interrupted_checks_leave_the_audit(
    run: Path, checked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **keys: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflows, "thorough_findings", stopped)
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True), quiet=True)
    assert found.complete
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert cut["text"] == "Not all checks for masked gradients were made: they were interrupted."


def test_checks_that_fail_leave_the_audit_and_say_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*given: Any, **keys: Any) -> None:
        raise ModelError("the model cannot be attacked at all")

    monkeypatch.setattr(workflows, "thorough_findings", failed)
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True), quiet=True)
    assert found.complete
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert cut["text"] == "Not all checks for masked gradients were made: the model cannot be attacked at all."
    assert "time" not in cut["advice"]


# What an audit leaves


def test_outputs_of_a_run_lie_in_its_folder(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK, quiet=True)
    paths = write_outputs(target, found)
    assert [path.suffix for path in paths] == [".json", ".npz", ".html"]
    assert [path.parent for path in paths] == [run / "audit", run / "audit", run]
    read = load_audit(paths[0])
    assert read.to_dict() == found.to_dict()
    assert "trades(beta=2)" in paths[2].read_text(encoding="utf-8")


def test_outputs_lie_where_the_user_says(run: Path, tmp_path: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK, quiet=True)
    before = tree(run)
    paths = write_outputs(target, found, out=tmp_path / "a" / "b", report=tmp_path / "c" / "page.html")
    assert [path.parent for path in paths] == [tmp_path / "a" / "b", tmp_path / "a" / "b", tmp_path / "c"]
    assert changes(before, tree(run)) == []
    assert len(write_outputs(target, found, html=False)) == 2
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_the_journal_of_a_finished_audit_goes_when_it_is_saved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    target, folder = load_target(str(run)), None if out is None else tmp_path / out
    kept = folder or run / "audit"
    found = audit_target(target, QUICK, out=folder, quiet=True)
    (journal,) = kept.iterdir()
    assert journal.name.startswith("unfinished-")
    monkeypatch.delattr(Sweeper, "_attack")
    again = audit_target(target, QUICK, out=folder, quiet=True)
    assert again.correct("pgd-2").tolist() == found.correct("pgd-2").tolist()
    left = journal.with_name(f".{journal.name}.123.tmp")
    left.write_bytes(b"half")
    write_outputs(target, again, out=folder)
    assert journal.exists(), "which audit it was is not known"
    write_outputs(target, again, request=replace(QUICK, checks=True), out=folder)
    assert {path.suffix for path in kept.iterdir()} == {".json", ".npz"}


def test_the_journal_of_an_audit_that_was_cut_stays(run: Path) -> None:
    target, request = load_target(str(run)), AuditRequest(attacks="square(queries=20)", max_minutes=1e-9)
    with pytest.warns(RobustFairWarning, match="goes on"):
        found = audit_target(target, request, quiet=True)
    write_outputs(target, found, request=request)
    assert len(list((run / "audit").glob("unfinished-*"))) == 1


def test_a_model_from_elsewhere_leaves_nothing_unasked(run: Path, tmp_path: Path) -> None:
    target = replace(load_target(str(run)), folder=None, checkpoint=None, meta={})
    found = audit_target(target, replace(QUICK, data="digits"), quiet=True)
    assert write_outputs(target, found) == []


def test_file_names_are_plain_and_tell_the_audit(run: Path) -> None:
    target = load_target(str(run))
    request = AuditRequest(attacks="clean,cw-2(restarts=2, step_size=1/255)", limit_per_class=1, eps="8/255", seed=3)
    path, *_ = write_outputs(target, audit_target(target, request, quiet=True))
    assert not set(path.name) & set(' /\\:*?"<>|()')
    for part in ("clean", "cw-2", "linf", "8", "best", "seed-3"):
        assert part in path.name
    assert load_audit(path).attacks == ("clean", "cw-2(restarts=2, step_size=1/255)")


def test_a_report_of_two_audits_of_other_images_is_refused_before_anything_is_written(run: Path) -> None:
    target = load_target(str(run))
    first, other = (audit_target(target, replace(QUICK, limit_per_class=n), quiet=True) for n in (2, 3))
    before = tree(run)
    with pytest.raises(RobustFairError, match="not of the same images"):
        write_outputs(target, first, baseline=other)
    assert changes(before, tree(run)) == []


def test_lines_of_one_audit_and_of_two(run: Path, tmp_path: Path) -> None:
    before = load_target(str(run))
    after, _ = repair_run(str(run), "hwnwb", tmp_path / "repaired")
    first, second = (audit_target(target, QUICK, quiet=True) for target in (before, after))
    single = "\n".join(audit_lines(first)).splitlines()
    assert [line.split()[0] for line in single if line.split()[1:2] == ["3"]] == list("0123456789")
    assert [line.split()[0] for line in single if " average " in line and "worst class" in line] == ["clean", "pgd-2"]
    double = "\n".join(before_after_lines(first, second)).splitlines()
    for part in ("before", "after"):
        assert [line.split()[1] for line in double if line.startswith(f"{part}  ")] == ["clean", "pgd-2"]
    assert any(line.startswith("note: Fewer than 30 images") for line in single)


# Repairs


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


# The demo


def test_the_demo_is_train_repair_and_two_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {key: TINY[key] for key in ("width", "limit_per_class", "batch_size", "eps", "steps")}

    def small_recipe(what: str, overrides: dict[str, Any]) -> Any:
        return read_recipe(what, overrides | (small if what == "demo" else {}))

    monkeypatch.setattr(workflows, "read_recipe", small_recipe)
    monkeypatch.setattr(workflows, "DEMO_ATTACKS", "clean,pgd-2,cw-3(restarts=2)")
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


def test_a_repaired_run_keeps_the_history_of_its_training(run: Path, tmp_path: Path) -> None:
    repair_run(str(run), "hwnwb", tmp_path / "repaired")
    kept = RunFolder(tmp_path / "repaired").history()
    assert kept == RunFolder(run).history()
    assert len(kept) > 0
