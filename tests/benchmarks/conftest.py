"""Scripts set the number of threads of the process: put it back. bf16 is taken for fast, so that all ways are run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import measure


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "has_bf16", lambda device: True)
