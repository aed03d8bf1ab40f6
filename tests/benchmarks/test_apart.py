from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from benchmarks.apart import Apart


def counter(start: int) -> Mapping[str, Callable[..., Any]]:
    counted = [start]

    def add(by: int) -> int:
        counted[0] += by
        return counted[0]

    return {"add": add, "process": os.getpid, "threads": torch.get_num_threads, "end": lambda: os._exit(1)}


def broken() -> Mapping[str, Callable[..., Any]]:
    raise ValueError("no such network")


def test_calls_run_in_one_other_process_that_remembers_and_ends() -> None:
    torch.set_num_threads(1)
    with Apart(counter, 5) as apart:
        assert [apart("add", 2), apart("add", 3)] == [7, 10]
        assert apart("process") == apart.process.pid != os.getpid()
        assert apart("threads") == 1
    assert apart.process.exitcode == 0


def test_its_failure_is_told_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="baselines failed: ValueError: no such network"):
        Apart(broken)
    assert "in broken" in capfd.readouterr().err
    with Apart(counter, 5) as apart, pytest.raises(RuntimeError, match="failed: KeyError"):
        apart("subtract")
    with Apart(counter, 5) as apart, pytest.raises(RuntimeError, match="ended without a word"):
        apart("end")
