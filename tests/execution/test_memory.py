from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from robustfair.execution import memory
from robustfair.execution.memory import kept_memory

REPORT = """
import resource, torch
from pathlib import Path
from robustfair.execution.memory import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
print(faults(), resident())
with kept_memory("cpu"):
    faults()
    print(faults(), resident())
print(0, resident())
"""


@pytest.mark.skipif(memory._glibc() is None, reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_inside_the_scope_and_given_back_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True)
    before, inside, after = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    pages = (64 << 20) // resource.getpagesize()
    assert before[0] >= 20 * pages
    assert inside[0] < pages / 10
    assert inside[1] > before[1] + 0.9 * pages
    assert after[1] < before[1] + 0.1 * pages


def test_scopes_nest_and_the_outermost_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, option: int, value: int) -> None:
            calls.append((option, value))

        def malloc_trim(self, pad: int) -> None:
            calls.append((0, pad))

    monkeypatch.setattr(memory, "_glibc", Libc)
    with kept_memory("cpu"):
        with pytest.raises(ValueError, match="inside"), kept_memory(torch.device("cpu")):
            raise ValueError("inside")
        assert calls == list(memory.KEEP)
    assert calls == [*memory.KEEP, *memory.DEFAULT, (0, 0)]


def test_other_devices_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with kept_memory("cpu"), kept_memory("meta"):
        assert memory._depth == 0
