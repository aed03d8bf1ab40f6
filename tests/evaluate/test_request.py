"""Audits of a target as they are asked for: the images, the threat, the journal, the thorough checks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reference.layouts import pixels, write_images
from robustfair.data import load_dataset
from robustfair.errors import ConfigError, DataError, ModelError, RobustFairWarning, UnknownNameError
from robustfair.evaluate import request as requests
from robustfair.evaluate.diagnostics.base import Diagnostic
from robustfair.evaluate.plan import BATCH_SIZE
from robustfair.evaluate.request import AuditRequest, audit_target
from robustfair.evaluate.run import audit
from robustfair.runs.load import Target, load_target

QUICK = AuditRequest(attacks="clean,pgd-2", limit_per_class=3, device="cpu")


def test_a_named_set_is_audited_on_its_test_part() -> None:
    test = load_dataset("digits").test
    assert AuditRequest(attacks="clean", data="digits").dataset()[0].fingerprint == test.fingerprint
    limited = AuditRequest(attacks="clean", data="digits", limit_per_class=4).dataset()[0]
    assert limited.fingerprint == test.limit_per_class(4).fingerprint
    assert AuditRequest(attacks="clean", data="digits", image_size=12).dataset()[0].images.shape[2:] == (12, 12)


def test_a_source_without_parts_is_audited_whole(tmp_path: Path, run: Path) -> None:
    np.savez(tmp_path / "images.npz", images=pixels(6), labels=np.arange(6) % 3)
    assert len(AuditRequest(attacks="clean", data=str(tmp_path / "images.npz")).dataset()[0]) == 6
    for name in "ab":
        write_images(tmp_path / "folder" / "test", {name: pixels(2)})
        write_images(tmp_path / "folder" / "train", {name: pixels(3)})
    assert len(AuditRequest(attacks="clean", data=str(tmp_path / "folder")).dataset()[0]) == 4


def test_the_data_of_the_run_stand_in_for_none() -> None:
    default = {
        "name": "digits",
        "fingerprint": load_dataset("digits", image_size=12).train.fingerprint,
        "image_size": 12,
    }
    assert AuditRequest(attacks="clean").dataset(default)[0].images.shape[2:] == (12, 12)
    assert AuditRequest(attacks="clean", data="digits", image_size=16).dataset(default)[0].images.shape[2:] == (16, 16)
    with pytest.raises(DataError, match="add --data"):
        AuditRequest(attacks="clean").dataset({})


def test_the_audit_of_a_run_is_that_of_its_model(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK)
    data = load_dataset("digits").test.limit_per_class(3)
    expected = audit(target.model, data, attacks=["clean", "pgd-2"], eps=0.1)
    assert found.model == target.label
    assert found.threat == expected.threat
    for attack in ("clean", "pgd-2"):
        assert torch.equal(found.prediction(attack), expected.prediction(attack))


def test_what_is_asked_goes_before_what_the_run_says(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, replace(QUICK, eps="8/255", step_size="1/255", seed=4, norm="L_inf"))
    assert (found.threat.norm, found.threat.eps, found.threat.step_size) == ("linf", 8 / 255, 1 / 255)
    assert found.provenance["seed"] == 4
    assert audit_target(target, replace(QUICK, norm="L2")).threat.eps == 128 / 255
    assert audit_target(target, replace(QUICK, norm="Linf")).threat.eps == 0.1


def test_classes_must_be_those_of_training(run: Path, tmp_path: Path) -> None:
    target = load_target(str(run))
    np.savez(
        tmp_path / "letters.npz", images=pixels(20, channels=1), labels=np.arange(20) % 10, class_names=[*"abcdefghij"]
    )
    with pytest.raises(DataError, match=r"was trained on the classes 0, 1, 2, 3, .* and letters has a, b, c, d"):
        audit_target(target, replace(QUICK, data=str(tmp_path / "letters.npz")))
    np.savez(tmp_path / "nine.npz", images=pixels(18, channels=1), labels=np.arange(18) % 9)
    with pytest.raises(DataError, match="labels would not mean the same"):
        audit_target(target, replace(QUICK, data=str(tmp_path / "nine.npz")))


def test_a_foreign_model_needs_as_many_outputs_as_classes() -> None:
    class Net(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(64, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1))

    found = audit_target(Target(model=Net(10), label="net", meta={}), replace(QUICK, data="digits"))
    assert (found.model, found.threat.eps, found.num_classes) == ("net", 8 / 255, 10)
    with pytest.raises(ModelError, match="7 outputs, data has 10 classes"):
        audit_target(Target(model=Net(7), label="net", meta={}), replace(QUICK, data="digits"))


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
        audit_target(load_target(str(run)), replace(QUICK, **keys))


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
            audit_target(load_target(str(run)), replace(request, **spelt), out=folder)
        kept = folder or run / "audit"
        assert len(list(kept.glob("unfinished-*"))) == 1
    moved = shutil.copytree(run, tmp_path / "moved")
    if folder is None:
        kept = moved / "audit"
    with pytest.warns(RobustFairWarning):
        audit_target(load_target(str(moved)), replace(request, eps="8/255"), out=folder)
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
            audit_target(load_target(str(run)), replace(request, **spelt))
    assert len(list((run / "audit").glob("unfinished-*"))) == kept


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keys of every call of the thorough checks, which find nothing; a pass of time is a minute."""
    calls: list[dict[str, Any]] = []

    def found(*given: Any, **keys: Any) -> tuple[Diagnostic, ...]:
        calls.append(keys)
        return (Diagnostic(code="not-converged", severity="note", text="Stub.", advice="None."),)

    monkeypatch.setattr(requests, "diagnose_gradients", found)
    return calls


def test_thorough_checks_follow_the_audit_with_its_precision_and_what_is_left_of_its_time(
    run: Path, checked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    target = load_target(str(run))
    request = replace(QUICK, checks=True, precision="bf16", seed=4, batch_size=7)
    heard: list[str] = []
    found = audit_target(target, request, on_progress=lambda attack, done, total: heard.append(attack))
    assert [check["code"] for check in found.provenance["checks"]] == ["not-converged"]
    target.model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 60.0))
    audit_target(target, replace(request, max_minutes=500))
    first, second = checked
    assert (first["precision"], first["seed"], first["batch_size"], first["max_minutes"]) == ("bf16", 4, 7, None)
    assert (set(heard), second["on_progress"]) == ({"clean", "pgd-2"}, None)
    first["on_progress"]("pgd-100", 1, 2)
    assert heard[-1] == "pgd-100"
    assert second["max_minutes"] == pytest.approx(500 - now[0] / 60)
    assert now[0] > 0


def test_an_audit_that_took_all_the_time_says_that_nothing_was_checked(run: Path) -> None:
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True, max_minutes=1e-9))
    assert found.complete, "a single turn of an attack is never cut"
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert "pgd-20 at 0 %, pgd-100 at 0 %" in cut["text"]


def test_interrupted_checks_leave_the_audit(
    run: Path, checked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **keys: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(requests, "diagnose_gradients", stopped)
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True))
    assert found.complete
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert cut["text"] == "Not all checks for masked gradients were made: they were interrupted."


def test_checks_that_fail_leave_the_audit_and_say_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*given: Any, **keys: Any) -> None:
        raise ModelError("the model cannot be attacked at all")

    monkeypatch.setattr(requests, "diagnose_gradients", failed)
    found = audit_target(load_target(str(run)), replace(QUICK, checks=True))
    assert found.complete
    (cut,) = (check for check in found.provenance["checks"] if check["code"] == "checks-cut")
    assert cut["text"] == "Not all checks for masked gradients were made: the model cannot be attacked at all."
    assert "time" not in cut["advice"]
