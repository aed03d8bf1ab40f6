"""Devices by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from robustfair.cli.app import main
from robustfair.errors import ConfigError, RobustFairWarning
from robustfair.execution import device as devices
from robustfair.execution.device import resolve_device, warn_of_slow_bf16


def test_a_name_and_a_device_mean_the_same() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nonsense", "", "cpu:x", "meta", torch.device("meta"), 1.5, None], ids=str)
def test_what_is_no_device_is_one_clear_error(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: device must be auto, cpu, or a GPU that torch sees, got .*$"):
        resolve_device(name)


SLOW = "this processor has no bf16 instructions: precision fp32 is about ten times faster here"


def test_only_bf16_on_a_cpu_without_its_instructions_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    with pytest.warns(RobustFairWarning, match=SLOW):
        warn_of_slow_bf16("bf16", cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_bf16("fp32", cpu)
        warn_of_slow_bf16("bf16", torch.device("cuda"))
        monkeypatch.setattr(devices, "has_bf16", lambda device: True)
        warn_of_slow_bf16("bf16", cpu)


def test_commands_say_in_one_line_that_bf16_is_slow_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    small = ["--data", "digits", "--model", "small-cnn", "--width", "2", "--epochs", "1", "--batch-size", "500"]
    for precision in ("fp32", "bf16"):
        run = str(tmp_path / precision)
        for command in (["train", "standard", *small, "--out", run], ["audit", run, "--attacks", "fgsm"]):
            assert main([*command, "--precision", precision, "--quiet"]) == 0
            assert capsys.readouterr().err.count(f"warning: {SLOW}\n") == (precision == "bf16")
