"""Files are judged by their bytes, and no code in them is run."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from robustfair.errors import CheckpointError
from robustfair.models.weight_file import StandIn, read_weight_file, require_weight_file, stand_ins

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.tensor([1.0, -1.0])}


class EasyDict(dict):  # type: ignore[type-arg]
    """A dict with attributes, as option files are often read into."""


class Names(list):  # type: ignore[type-arg]
    """A list of its own class."""


@dataclasses.dataclass
class Options:
    lr: float = 0.1
    steps: tuple[int, ...] = (1, 2)


class Colour(enum.Enum):
    RED = 1


class Outer:
    class Inner:
        value = 3


PLAIN = {
    "numpy number": np.float64(91.2),
    "numpy array": np.arange(3),
    "numpy type": np.dtype("float32"),
    "namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
    "dict": EasyDict(lr=0.1, nested=EasyDict(x=1)),
    "list": Names(["a", "b"]),
    "dataclass": Options(),
    "enum": Colour.RED,
    "class": Options,
    "class within a class": Outer.Inner(),
    "path": pathlib.Path("a/b"),
    "partial": functools.partial(max, 3),
    "time": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "deque": deque([1, 2]),
    "function": os.path.join,
    "module": nn.Sequential(nn.Linear(2, 2)),
}


def _same(content: dict[str, Any]) -> bool:
    return content.keys() == STATE.keys() and all(torch.equal(content[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("name", ["w", "w.pth.tar", "w.t7", "w.pkl", "w.PTH", "w.pt", "w.safetensors", "w.json"])
def test_a_name_decides_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for write in (
        lambda: save_file(STATE, path),
        lambda: torch.save(STATE, path),
        lambda: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    ):
        write()
        require_weight_file(path)
        assert _same(read_weight_file(path))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_objects_beside_the_weights_are_skipped(tmp_path: Path, name: str, zipped: bool, protocol: int) -> None:
    content = {"net": OrderedDict(STATE), "about": {"first": PLAIN[name], "all": [PLAIN[name], 3]}, "epoch": 7}
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    torch.save(content, tmp_path / "w", **options)
    read = read_weight_file(tmp_path / "w")
    assert _same(read["net"])
    assert read["epoch"] == 7
    found = list(stand_ins(read))
    assert {where for where, _ in found} == {"about.first", "about.all"}
    assert all("." in what for _, what in found)
    assert read["about"]["all"][1] == 3


def test_plain_values_stay_what_they_are(tmp_path: Path) -> None:
    counts = defaultdict(list)
    counts["a"].append(1)
    kept = {"counts": counts, "set": {1, 2}, "size": torch.Size([2]), "type": torch.float16, "bytes": b"\x00\xff"}
    parameters = {"w": nn.Parameter(torch.ones(2)), "half": torch.ones(2).half(), "view": torch.arange(9.0)[::2]}
    for protocol in (2, 4):
        torch.save({"args": argparse.Namespace(), **kept, **parameters}, tmp_path / "w", pickle_protocol=protocol)
        read = read_weight_file(tmp_path / "w")
        assert list(stand_ins(read)) == [("args", "argparse.Namespace")]
        assert {name: read[name] for name in kept} == kept
        assert all(torch.equal(read[name], value) for name, value in parameters.items())


def test_tensors_with_attributes_are_tensors(tmp_path: Path) -> None:
    tensor, parameter = torch.arange(3.0), nn.Parameter(torch.ones(2))
    tensor.tag = parameter.tag = argparse.Namespace()  # type: ignore[attr-defined]
    torch.save({"tensor": tensor, "parameter": parameter}, tmp_path / "w")
    read = read_weight_file(tmp_path / "w")
    assert torch.equal(read["tensor"], tensor)
    assert torch.equal(read["parameter"], parameter)


def test_content_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"args": argparse.Namespace()}
    content["self"] = content
    torch.save(content, tmp_path / "w")
    with pytest.raises(CheckpointError, match="cut, corrupt or not a weight file"):
        read_weight_file(tmp_path / "w")


@pytest.mark.parametrize("name", ["namespace", "module", "numpy array"])
def test_objects_in_place_of_weights_are_named(tmp_path: Path, name: str) -> None:
    for content in (PLAIN[name], {"model": PLAIN[name], "epoch": 3}, [PLAIN[name]]):
        torch.save(content, tmp_path / "w")
        with pytest.raises(CheckpointError, match=r"holds the Python object \S+ where weights .* only its state_dict"):
            read_weight_file(tmp_path / "w")


class Runs:
    """Pickles as a call, which leaves a file where it is made."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = function, args, state

    def __reduce__(self) -> Any:
        return self.call if self.call[2] is not None else self.call[:2]


class Holder:
    """Takes what it is built from as its state."""

    def __init__(self, state: Any) -> None:
        self.state = state


def _attacks(mark: Path) -> dict[str, Any]:
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    system = Runs(os.system, touch)
    return {
        "os.system": system,
        "eval": Runs(eval, write),
        "exec": Runs(exec, write),
        "state": Holder({"deep": [Holder(system)]}),
        "state of a call": Runs(argparse.Namespace, state={"x": Runs(eval, write)}),
        "open": Runs(open, str(mark), "w"),
        "path": Runs(pathlib.Path.touch, mark),
        "partial": Runs(functools.partial, os.system, touch),
        "in a dict": EasyDict({Runs(eval, f"{write} or 1"): 1}),
        "in a list": Names([system]),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", _attacks(Path("x")))
def test_no_code_of_a_file_is_run(tmp_path: Path, name: str, zipped: bool, protocol: int) -> None:
    mark = tmp_path / "was_run"
    attack = _attacks(mark)[name]
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    for content in ({**STATE, "extra": attack}, {"net": STATE, "args": argparse.Namespace(x=attack)}, attack):
        torch.save(content, tmp_path / "w", **options)
        if name == "path" and content is not attack:
            assert list(stand_ins(read_weight_file(tmp_path / "w")))  # a call like any other, and not made
        else:
            with pytest.raises(CheckpointError, match="can run code is never read") as caught:
                read_weight_file(tmp_path / "w")
            assert "\n" not in str(caught.value)
        assert not mark.exists()
    torch.load(tmp_path / "w", weights_only=False)
    assert mark.exists() or name == "partial"  # to a reader that runs code the file is a weapon indeed


PICKLES = {
    "a dotted name": b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93\x8c\x04TEXT\x85R.",
    "getattr on a module": b"\x80\x02c__builtin__\ngetattr\ncposixpath\nos\nX\x06\x00\x00\x00system\x86R"
    b"X\x04\x00\x00\x00TEXT\x85R.",
    "an instance": b"(X\x04\x00\x00\x00TEXTiposix\nsystem\n.",
    "an object": b"(cposix\nsystem\nX\x04\x00\x00\x00TEXTo.",
    "a call of what getattr gave": b"\x80\x02c__builtin__\ngetattr\ncfunctools\npartial\n"
    b"X\x08\x00\x00\x00__call__\x86R)R.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_written_by_hand_run_nothing(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "was_run"
    text = f"touch {mark}".encode()
    pickled = PICKLES[name].replace(b"\x8c\x04TEXT", b"\x8c" + bytes([len(text)]) + text)
    pickled = pickled.replace(b"X\x04\x00\x00\x00TEXT", b"X" + len(text).to_bytes(4, "little") + text)
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", "3\n")
        archive.writestr("w/byteorder", "little")
    with pytest.raises(CheckpointError, match="holds the Python object"):
        read_weight_file(tmp_path / "w")
    assert not mark.exists()


def test_a_file_cannot_change_the_functions_that_read_it(tmp_path: Path) -> None:
    before = vars(torch._utils._rebuild_tensor_v2).copy()
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00evilK\x01sb."
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", "3\n")
    with pytest.raises(CheckpointError):
        read_weight_file(tmp_path / "w")
    assert vars(torch._utils._rebuild_tensor_v2) == before


def _zip(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return content.getvalue()


def _tar(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return content.getvalue()


def _npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, w=np.zeros(3))
    return content.getvalue()


def _scripted() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), content)
    return content.getvalue()


FOREIGN = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "pointer of Git LFS.*git lfs",
    ),
    "page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "a web page.*fetch it again"),
    "denied": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "json": (json.dumps({"weight_map": {"a": "b.safetensors"}}).encode(), "a JSON file.*name the file that holds"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file.*Convert the weights"),
    "keras zip": (_zip("metadata.json", "config.json", "model.weights.h5"), "a model of Keras"),
    "npz": (_npz(), r"an archive of numpy arrays \(.npz\)"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(300), "an array of numpy"),
    "script": (_scripted(), "a TorchScript archive.*torch.jit.load"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.9.0:" + bytes(300), "a model of ONNX"),
    "saved model": (b"\x08\x01\x12\xfa\x01" + bytes(300), "a SavedModel of TensorFlow"),
    "frozen": (b"\n\x1f\n\x05input\x12\x0bPlaceholder*" + bytes(300), "a frozen graph of TensorFlow"),
    "lite": (b"\x1c\x00\x00\x00TFL3" + bytes(300), "TensorFlow Lite"),
    "tar": (_tar("model.pt"), "a tar archive.*name the weight file inside"),
    "old tar": (_tar("sys_info", "pickle", "tensors", "storages"), "torch's format of before 2017"),
    "gzip": (gzip.compress(b"x" * 600), "a gzip archive.*Unpack"),
    "zip": (_zip("model.pt"), "a zip archive.*name the weight file inside"),
    "pickle": (pickle.dumps({"w": [1.0]}), "a plain pickle.*torch.save"),
    "text": (b"import torch\n" * 9, "cut, corrupt or not a weight file"),
    "zeros": (bytes(4096), "cut, corrupt or not a weight file"),
    "empty": (b"", "cut, corrupt or not a weight file"),
    "cut safetensors": (save(STATE)[:-1], "cut, corrupt or not a weight file"),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str, suffix: str) -> None:
    content, message = FOREIGN[name]
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weight_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_stand_in_lets_everything_pass() -> None:
    stand_in = StandIn(1, key=2)
    stand_in["a"] = 1
    stand_in.append(3)
    assert stand_in.__setstate__({"path": "x"}) is None
    assert stand_in.path == ""
