from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robustfair.data.load import cache


def test_root_prefers_our_variable_then_the_desktop_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("ROBUSTFAIR_CACHE", "/own")
    assert cache.cache_root() == Path("/own")
    monkeypatch.delenv("ROBUSTFAIR_CACHE")
    assert cache.cache_root() == Path("/xdg/robustfair")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path("/home/someone/.cache/robustfair")


def test_path_depends_on_name_part_and_identity(tmp_path: Path) -> None:
    keys = [("a", "train", [1]), ("a", "test", [1]), ("b", "train", [1]), ("a", "train", [2])]
    paths = {cache.cache_path(tmp_path, *key) for key in keys}
    assert len(paths) == 4
    assert cache.cache_path(tmp_path, "a", "train", [1]) in paths
    odd = cache.cache_path(tmp_path, "../cifar10-c/fog/3", "test", None)
    assert odd.parent == tmp_path
    assert odd.name.startswith("cifar10-c-fog-3-test-")


def test_what_is_written_is_read_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    tensors = {"images": torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2), "labels": torch.tensor([4])}
    cache.write(path, tensors, {"about": "text"})
    found = cache.read(path)
    assert found is not None
    assert found[1] == {"about": "text"}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    assert list(path.parent.iterdir()) == [path]
    assert cache.read(tmp_path / "missing.safetensors") is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    cache.write(path, {"images": torch.zeros(1)}, {"about": "old"})

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="decoded data is not cached"):
        cache.write(path, {"images": torch.ones(1)}, {"about": "new"})
    found = cache.read(path)
    assert found is not None
    assert found[1] == {"about": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_root_that_cannot_be_a_folder_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        cache.write(tmp_path / "file" / "x.safetensors", {"images": torch.zeros(1)}, {})


def test_what_a_killed_writing_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x-train-1.safetensors"
    for left in (".x-train-1-abc.tmp", ".x-train-2-abc.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / ".tmpXYZ").write_bytes(b"half")
    cache.write(path, {"images": torch.zeros(1)}, {})
    assert {entry.name for entry in tmp_path.iterdir()} == {".x-train-2-abc.tmp", path.name}


def test_what_is_written_meanwhile_lies_in_a_folder_that_bears_the_name_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    usual = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.extend(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*") if entry.is_file())
        return usual(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    cache.write(tmp_path / "x.safetensors", {"images": torch.zeros(1)}, {})
    (name,) = seen
    assert name.startswith(".x-")
    assert name.endswith(".tmp/x.safetensors")


def test_of_two_writings_at_a_time_one_stays_and_none_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    content: tuple[Any, ...] = (tmp_path / "x.safetensors", {"images": torch.ones(2)}, {"about": "the same"})
    usual = Path.replace

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", usual)
        cache.write(*content)
        return usual(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    cache.write(*content)
    assert not recwarn.list
    assert cache.read(content[0]) is not None
    assert list(tmp_path.iterdir()) == [content[0]]
