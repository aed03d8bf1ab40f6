"""Runs that stop: finished, diverged, interrupted."""

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

from reference.commands import AUDIT, INTERRUPTED, Command, training
from reference.runs import CFA, changes, history, tree
from robustfair.runs import run as runner


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "--json"], ["--resume", "--epochs", "2"]])
def test_resuming_a_finished_run_changes_nothing(place: Path, command: Command, words: list[str]) -> None:
    before = tree(place)
    outcome = command("train", "--out", "run", *words)
    assert outcome.code == 0, outcome.err
    assert changes(before, tree(place)) == []
    assert "Traceback" not in outcome.err


def test_resuming_with_the_recipe_it_was_begun_with(place: Path, command: Command) -> None:
    before = tree(place)
    assert command(*training(CFA, out="run"), "--resume").code == 0
    assert command("train", "run/recipe.yaml", "--out", "run", "--resume").code == 0
    assert changes(before, tree(place)) == []


def test_a_run_that_diverges_at_once_says_where(place: Path, command: Command) -> None:
    outcome = command(*training(lr="1e9"))
    assert outcome.code == 1
    assert outcome.out == ""
    said = [line for line in outcome.err.splitlines() if line.startswith("robustfair: ")]
    assert outcome.err.splitlines()[-1:] == said
    assert "Traceback" not in outcome.err
    report = json.loads((place / "new" / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert f"epoch {report['epoch']}, step {report['step']}, counted from 0 (lr 1e+09)" in said[0]
    assert "the last checkpoint" not in said[0]
    assert json.loads((place / "new" / "manifest.json").read_text())["status"] == "diverged"
    refused = command("audit", "new", *AUDIT)
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_a_run_that_diverges_later_keeps_the_epochs_before(place: Path, command: Command) -> None:
    keys = {"lr": "0.1", "gamma": "1e12", "milestones": 0.5, "schedule": "multistep"}
    outcome = command(*training("trades + ccm(begin=1) + ema", **keys))
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("robustfair: the loss is not finite")
    report = json.loads((place / "new" / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert {"epoch", "step", "lr", "class_state", "per_class", "train"} <= report.keys()
    seen = history(place / "new")
    assert [record["epoch"] for record in seen] == [1]
    robust, count = seen[0]["train"]["robust"], seen[0]["train"]["count"]
    expected = [0.3 + hits / n for hits, n in zip(robust, count, strict=True)]
    assert report["class_state"]["ccm"]["scale"] == pytest.approx(expected)
    manifest = json.loads((place / "new" / "manifest.json").read_text())
    assert (manifest["status"], manifest["epochs_done"]) == ("diverged", 1)
    for checkpoint in ("best", "last", "ema"):
        assert command("audit", "new", "--checkpoint", checkpoint, *AUDIT).code == 0
    files = tree(place / "new" / "checkpoints")
    again = command("train", "--out", "new", "--resume")
    assert again.code == 1
    assert changes(files, tree(place / "new" / "checkpoints")) == []


def test_control_c_is_one_line_and_exit_130(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **keys: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "fit", interrupt)
    outcome = command(*training(), "--select", "last", "--quiet")
    assert outcome.code == 130
    assert outcome.err == f"{INTERRUPTED}\n"


def test_a_run_interrupted_by_a_signal_goes_on_with_resume(place: Path, command: Command) -> None:
    argv = training(CFA, epochs=400, limit_per_class=4)
    kept = {name: value for name, value in os.environ.items() if name != "ROBUSTFAIR_CACHE"}  # kernels, compiled before
    process = subprocess.Popen(
        [sys.executable, "-m", "robustfair.cli", *argv],
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        until = time.monotonic() + 60
        while not (place / "new" / "checkpoints" / "last").exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == INTERRUPTED
    assert json.loads((place / "new" / "manifest.json").read_text())["status"] == "running"
    assert 0 < len(history(place / "new")) < 400
    assert command("audit", "new", *AUDIT).code == 0
