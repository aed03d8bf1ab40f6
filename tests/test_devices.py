"""Devices by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustfair.devices import resolve_device
from robustfair.errors import ConfigError


def test_a_name_and_a_device_mean_the_same() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nonsense", "", "cpu:x", "meta", torch.device("meta"), 1.5, None], ids=str)
def test_what_is_no_device_is_one_clear_error(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: device must be auto, cpu, or a GPU that torch sees, got .*$"):
        resolve_device(name)
