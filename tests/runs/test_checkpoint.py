from __future__ import annotations

import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustfair.errors import CheckpointError
from robustfair.files import read_json, write_bytes, write_json, write_text
from robustfair.runs import checkpoint as module
from robustfair.runs.checkpoint import (
    META,
    STATE,
    WEIGHTS,
    Checkpoint,
    clear_writings,
    has_checkpoint,
    read_checkpoint,
    read_state,
    write_checkpoint,
    write_state,
)
from robustfair.training.state import ScoredWeights, TrainState

Differences = Callable[[TrainState, TrainState], list[str]]


def checkpoint(fill: float = 1.0, **meta: Any) -> Checkpoint:
    weights = {"head.weight": torch.full((3, 4), fill), "norm.num_batches_tracked": torch.tensor(7)}
    return Checkpoint(weights, {"method/ccm/scale": torch.full((3,), fill)}, {"epoch": 2, **meta})


def state(epoch: int, *, best: bool = False) -> TrainState:
    def tensors(*names: str) -> dict[str, Tensor]:
        return {name: torch.full((2, 2), float(epoch)) for name in names}

    return TrainState(
        epoch=epoch,
        step=10 * epoch,
        weights={**tensors("a.weight"), "count": torch.tensor(epoch)},
        optimizer=tensors("a.weight"),
        methods={"ema": tensors("a.weight", "b/c"), "ccm": tensors("scale"), "idle": {}},
        objective="trades",
        exports={"ema": tensors("a.weight")},
        best=ScoredWeights("ema", epoch if best else 1, 0.25 * epoch, tensors("a.weight"), 0.5),
        history=tuple({"epoch": e} for e in range(1, epoch + 1)),
    )


def equal(read: Checkpoint, wrote: Checkpoint) -> bool:
    pairs = ((read.weights, wrote.weights), (read.tensors, wrote.tensors))
    return all(
        one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
        for one, two in pairs
    ) and all(read.meta[key] == value for key, value in wrote.meta.items())


def test_round_trip_of_every_type_and_layout(tmp_path: Path) -> None:
    weights = {
        "float": torch.randn(2, 3),
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(2).bfloat16(),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "needs grad": torch.randn(2, requires_grad=True),
    }
    shared = torch.randn(4)
    wrote = Checkpoint(weights, {"one": shared, "two": shared, "part": shared[:2]}, {"epoch": 1, "names": ["ä", "b"]})
    write_checkpoint(tmp_path / "deep" / "last", wrote)
    read = read_checkpoint(tmp_path / "deep" / "last")
    assert equal(read, wrote)
    assert not any(tensor.requires_grad for tensor in read.weights.values())


def test_nothing_beside_the_folder_is_left(tmp_path: Path) -> None:
    for fill in (1.0, 2.0, 3.0):
        write_checkpoint(tmp_path / "last", checkpoint(fill))
        assert [path.name for path in tmp_path.iterdir()] == ["last"]
        assert sorted(path.name for path in (tmp_path / "last").iterdir()) == sorted([META, STATE, WEIGHTS])
        assert equal(read_checkpoint(tmp_path / "last"), checkpoint(fill))


@pytest.mark.parametrize("name", [WEIGHTS, STATE, META])
@pytest.mark.parametrize("cut", ["nothing left", "half", "one byte short", "gone"])
def test_a_cut_file_is_noticed_and_named(tmp_path: Path, name: str, cut: str) -> None:
    folder = tmp_path / "last"
    write_checkpoint(folder, checkpoint())
    content = (folder / name).read_bytes()
    if cut == "gone":
        (folder / name).unlink()
    else:
        size = {"nothing left": 0, "half": len(content) // 2, "one byte short": len(content) - 2}[cut]
        (folder / name).write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_one_changed_bit_is_noticed(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "last", checkpoint())
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_a_file_of_another_checkpoint_is_noticed(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "last", checkpoint(1.0))
    write_checkpoint(tmp_path / "best", checkpoint(2.0))
    shutil.copy(tmp_path / "best" / name, tmp_path / "last" / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / "last")
    (tmp_path / "last" / WEIGHTS).rename(tmp_path / "aside")
    (tmp_path / "last" / STATE).rename(tmp_path / "last" / WEIGHTS)
    (tmp_path / "aside").rename(tmp_path / "last" / STATE)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "last")


@pytest.mark.parametrize(
    "text",
    ['{"schema": "robustfair.checkpoint/2", "files": {}}', '{"epoch": 2}', "[]", "3", "null", "not json", "\x00", ""],
)
def test_a_foreign_description_is_refused(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "last", checkpoint())
    (tmp_path / "last" / META).write_text(text)
    with pytest.raises(CheckpointError, match=META):
        read_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("files", [{}, None, {WEIGHTS: {}}])
def test_a_description_that_lists_no_files_is_refused(tmp_path: Path, files: object) -> None:
    write_checkpoint(tmp_path / "last", checkpoint())
    meta = json.loads((tmp_path / "last" / META).read_text())
    meta["files"] = files
    (tmp_path / "last" / META).write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    shutil.copy(tmp_path / "last" / STATE, tmp_path / "last" / WEIGHTS)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "last")


def test_no_checkpoint_is_an_error_that_says_so(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path / "last")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "last")
    (tmp_path / "last").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "last")


class Killed(BaseException):
    """Stands for the end of the process: nothing in the library may catch it and go on."""


STAGES = ("save", "write_json", "rename", "second rename", "last flush", "final rmtree")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_of_a_write_the_old_or_the_new_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = tmp_path / "last"
    write_checkpoint(folder, checkpoint(1.0))
    kill_at(monkeypatch, stage, folder)
    with pytest.raises(Killed):
        write_checkpoint(folder, checkpoint(2.0))
    monkeypatch.undo()
    expected = checkpoint(1.0 if STAGES.index(stage) < 3 else 2.0)
    assert has_checkpoint(folder)
    assert equal(read_checkpoint(folder), expected)
    write_checkpoint(folder, checkpoint(3.0))
    assert equal(read_checkpoint(folder), checkpoint(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: str, folder: Path) -> None:
    """End the write right before `save` and `write_json`, right after the others."""
    renames = 0
    rename, flush, rmtree = Path.rename, module.flush, shutil.rmtree

    def before(*_: object, **__: object) -> None:
        raise Killed

    def counted_rename(self: Path, target: Path) -> Path:
        nonlocal renames
        moved = rename(self, target)
        renames += 1
        if (stage, renames) in (("rename", 1), ("second rename", 2)):
            raise Killed
        return moved

    def last_flush(path: Path) -> None:
        flush(path)
        if path == folder.parent:
            raise Killed

    def final_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if renames == 2:
            next(Path(path).iterdir()).unlink()
            raise Killed
        rmtree(path, ignore_errors=ignore_errors)

    if stage in ("save", "write_json"):
        monkeypatch.setattr(module, stage, before)
    monkeypatch.setattr(Path, "rename", counted_rename)
    if stage == "last flush":
        monkeypatch.setattr(module, "flush", last_flush)
    if stage == "final rmtree":
        monkeypatch.setattr(module.shutil, "rmtree", final_rmtree)


def test_a_first_write_that_is_killed_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "last"
    kill_at(monkeypatch, "write_json", folder)
    with pytest.raises(Killed):
        write_checkpoint(folder, checkpoint())
    monkeypatch.undo()
    assert not has_checkpoint(folder)
    write_checkpoint(folder, checkpoint())
    assert equal(read_checkpoint(folder), checkpoint())


def test_a_training_state_comes_back_whole(tmp_path: Path, differences: Differences) -> None:
    for epoch in (1, 2, 3):
        wrote = state(epoch, best=epoch != 3)
        write_state(tmp_path, wrote, {"model": {"name": "m"}, "class_names": ["a"]})
        read = read_state(tmp_path, wrote.history)
        if epoch < 3:
            assert differences(wrote, read) == []
    assert (read.epoch, read.objective) == (3, "trades")
    assert read.best is not None
    assert (read.best.epoch, read.best.score) == (2, 0.5), "best/ is written when it is new only"
    assert read_checkpoint(tmp_path / "last").meta["class_names"] == ["a"]
    assert read_checkpoint(tmp_path / "ema").meta["candidate"] == "ema"


def test_records_ahead_of_the_checkpoint_are_left_out(tmp_path: Path) -> None:
    write_state(tmp_path, state(2), {})
    history = [{"epoch": epoch} for epoch in (1, 2, 3)]
    assert [record["epoch"] for record in read_state(tmp_path, history).history] == [1, 2]


def test_what_killed_writings_left_is_cleared_and_what_can_be_read_stays(tmp_path: Path) -> None:
    for name in ("last", "best"):
        write_checkpoint(tmp_path / name, checkpoint())
    (tmp_path / "best").rename(tmp_path / ".best.old")
    for left in (".last.old", ".best.new", ".ema.new"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "weights.safetensors").write_bytes(b"half")
    clear_writings(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".best.old", "last"]
    assert equal(read_checkpoint(tmp_path / "best"), checkpoint())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_and_the_old_file_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": [value]})
    assert read_json(path) == {"loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_text_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(target, name, full)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "new\n")
        monkeypatch.undo()
        assert path.read_text() == "old\n"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_an_error_of_writing_names_the_file_and_not_its_temporary(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "a.bin", tmp_path / "a.bin"):
        with files_end_at(10), pytest.raises(OSError, match=r"No such file|File too large") as caught:
            write_bytes(path, bytes(100))
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_an_error_of_the_disk_and_the_old_one_stays(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "last", checkpoint(1.0))
    with files_end_at(100), pytest.raises(OSError, match=r"File too large: .*weights\.safetensors"):
        write_checkpoint(tmp_path / "last", checkpoint(2.0))
    assert equal(read_checkpoint(tmp_path / "last"), checkpoint(1.0))


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"class_names": ["Käfer", "鸟"]})
    assert read_json(tmp_path / "a.json") == {"class_names": ["Käfer", "鸟"]}
    json.loads((tmp_path / "a.json").read_bytes().decode("utf-8"))
