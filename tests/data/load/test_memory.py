from __future__ import annotations

from pathlib import Path

import pytest

from robustfair.data.load import memory
from robustfair.errors import DataError


def test_what_is_free_here_is_a_number_of_bytes() -> None:
    free = memory.free_memory()
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200"}, 500),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, 0),
        ({"memory.max": "max", "memory.current": "700"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_a_container_counts(
    files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    monkeypatch.setattr(memory, "_of_machine", lambda: 5000)
    assert memory.free_memory() == (5000 if free is None else free)


def test_sizes_that_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * 3 * 32 * 32)
    memory.require_memory("mine", 10, (3, 32, 32))
    with pytest.raises(DataError, match=r"^mine: 10 images of 33x33 take .* free: an `image_size` of at most 32 would"):
        memory.require_memory("mine", 10, (3, 33, 33))
    with pytest.raises(DataError, match=r"no size of them would fit, or take fewer$"):
        memory.require_memory("mine", 1000, (3, 33, 33))
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    memory.require_memory("mine", 10, (3, 33, 33))
