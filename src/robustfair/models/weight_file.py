"""Read a weight file for what its bytes are, whatever it is called: safetensors, or what `torch.save` wrote.

No code of a file is ever run. What is no tensor and no plain value (an argparse.Namespace, a numpy number, a whole
pickled model) comes back as a `StandIn`, which only knows its name. Files of other formats are named for what they are.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustfair.errors import CheckpointError
from robustfair.grammar import read_path


class StandIn:
    """Takes the place of an object that a file names, and lets everything that a pickle does to it pass."""

    path: ClassVar[str] = ""
    dump_patches: ClassVar[bool] = False  # torch asks for it where an old file holds a whole module

    def __new__(cls, *_args: Any, **_options: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def _pass(self, *_args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = update = _pass


def read_weight_file(path: str | Path) -> dict[str, Any]:
    """The content of a safetensors file, or of one that `torch.save` wrote, with a `StandIn` for each foreign object.

    Raises:
        CheckpointError: no such file, cut, of another format, without tensors, or made to run a program.
    """
    path = read_path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, a weight file was expected"
        )
    read = _reader(path)
    try:
        content = read(path)
        foreign = [name for _, name in stand_ins(content)]
        empty = not holds_weights(content)
    except Exception as error:  # the readers raise whatever the bytes lead them to
        if isinstance(error, _RunsProgramError):
            raise CheckpointError(f"{path}: {error}. Do not use it; fetch it from a source that you trust") from error
        raise _damaged(path, type(error).__name__) from error
    if foreign and empty:
        raise CheckpointError(
            f"{path}: holds the Python object {foreign[0]} where weights were expected, and a file that can run code "
            "is never read. Save only its state_dict, best as safetensors"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, a state dict was expected")
    return content


def require_weight_file(path: str | Path) -> None:
    """Refuse a file that its first bytes tell to be no weight file; reads no more of it.

    Raises:
        CheckpointError: says what it is instead, and what to do.
    """
    _reader(read_path(path))


def holds_weights(value: object) -> bool:
    """Whether `value` is a state dict or leads to one; the state of an optimiser is keyed by numbers and is none."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(entry, Tensor) or holds_weights(entry) for entry in value.values())


def stand_ins(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Where foreign objects stood in the content of a file, and what they were: ("args", "argparse.Namespace")."""
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, StandIn):
        yield where, kind.path
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(entry, Tensor):
                yield from stand_ins(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from stand_ins(entry, where)


_TORCH_PICKLE = re.compile(rb"\x80.(?:\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
"""The number with which files in torch's older format begin, pickled."""
_PACKED = "Unpack it, and name the weight file inside"
_CONVERT = "Convert the weights to PyTorch first, and save its state_dict"
_FORMATS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch the file with git lfs pull"),
    (b"<", "a web page, not the file itself", "The download failed or needs a login: fetch it again"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write", _CONVERT),
    (b"\x93NUMPY", "an array of numpy", _CONVERT),
    (b"GGUF", "a GGUF file of a language model", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", _PACKED),
    (b"BZh", "a bzip2 archive", _PACKED),
    (b"\xfd7zXZ\x00", "an xz archive", _PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (b"Rar!", "a rar archive", _PACKED),
    (b"\x08\x01\x12", "a SavedModel of TensorFlow", _CONVERT),
)
_MEMBERS = (
    (r"(.*/)?constants\.pkl", "a TorchScript archive", "Save the state_dict of torch.jit.load(file)"),
    (r".*\.npy", "an archive of numpy arrays (.npz)", _CONVERT),
    (r"model\.weights\.h5|keras_metadata\.pb", "a model of Keras", _CONVERT),
    (r"(.*/)?saved_model\.pb", "a packed SavedModel of TensorFlow", _CONVERT),
    (
        r"(.*/)?(serialized_(exported_program|state_dict)\.\w+|archive_format)",
        "a program of torch.export",
        "Save the state_dict of torch.export.load(file)",
    ),
)


def _reader(path: Path) -> Callable[[Path], Any]:
    """What reads this file, by its bytes.

    Raises:
        CheckpointError: nothing here does.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors
    if head.startswith(b"PK\x03\x04"):
        return _reader_of_zip(path)
    if _TORCH_PICKLE.match(head):
        return _read_torch
    found = _other_format(path, head)
    if found is None:
        raise _damaged(path, "no known format")
    raise CheckpointError(f"{path}: is {found[0]}, not a weight file of PyTorch. {found[1]}")


def _reader_of_zip(path: Path) -> Callable[[Path], Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, type(error).__name__) from error
    for pattern, what, step in _MEMBERS:
        if any(re.fullmatch(pattern, name) for name in names):
            raise CheckpointError(f"{path}: is {what}, not a weight file. {step}")
    if not any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        raise CheckpointError(f"{path}: is a zip archive, not a weight file. {_PACKED}")
    return _read_torch


def _other_format(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that is no weight file, and what to do; None for bytes that say nothing."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what, step in _FORMATS:
        if text.startswith(magic):
            return what, step
    if text[:1] in (b"{", b"["):
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            return None
        return "a JSON file", "It describes a model or lists its parts: name the file that holds the weights"
    if head[4:8] == b"TFL3":
        return "a model of TensorFlow Lite", _CONVERT
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x3a", b"\x1a"):
        return "a model of ONNX", _CONVERT
    if head[:1] == b"\n" and b"Placeholder" in head:
        return "a frozen graph of TensorFlow", _CONVERT
    if head[257:262] == b"ustar":
        if head[:100].rstrip(b"\0") in (b"sys_info", b"pickle", b"tensors", b"storages"):
            return (
                "in torch's format of before 2017, which cannot be read without running code",
                "If you trust it, read it with torch.load and weights_only=False, and save its state_dict again",
            )
        return "a tar archive", _PACKED
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "a plain pickle",
            "If you trust it, load it where it was written, and save its weights as tensors with torch.save",
        )
    return None


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: cut, corrupt or not a weight file ({reason}). Fetch or save it again")


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> Any:
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # more than tensors and plain values, or damaged
            file.seek(0)
            # `weights_only` would choose torch's unpickler; ours admits less.
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


class _RunsProgramError(pickle.UnpicklingError):
    """A file names what only an attack on its reader would name. It would not be run; its user should know."""


_PROGRAMS = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|socket|shutil|ctypes|importlib|runpy|webbrowser)\..*"
    r"|builtins\.(eval|exec|execfile|compile|__import__|open|input|breakpoint|globals|locals|vars)|_?io\.open"
)
_REBUILDERS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_sparse_tensor",
    "_rebuild_qtensor",
    "_rebuild_device_tensor_from_cpu_tensor",
)
_PLAIN_TYPES: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "builtins.complex": complex,
    "builtins.bytearray": bytearray,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.Tensor": torch.Tensor,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
}


class _Unpickler(pickle.Unpickler):
    """Knows what tensors and plain values are made of. Every other name gives a `StandIn`, and nothing is imported.

    What can be called is therefore a `StandIn`, or in `_REBUILDERS` and `_PLAIN_TYPES`.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        module = "builtins" if module == "__builtin__" else module
        path = f"{module}.{name}"
        if _PROGRAMS.fullmatch(path):
            raise _RunsProgramError(f"holds the Python object {path}, and a file that can run code is never read")
        if path in _PLAIN_TYPES:
            return _PLAIN_TYPES[path]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if path == "_codecs.encode":  # how old pickles write bytes
            return lambda text, encoding: text.encode("latin1") if encoding == "latin1" else b""
        if path == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes, which are left aside
            return lambda rebuild, kind, args, state: rebuild(*args)
        if path == "builtins.getattr":  # how they name a class within a class, or a member of an enum
            return lambda owner, inner: _stand_in(f"{getattr(owner, 'path', '?')}.{inner}")
        if module == "torch._utils" and name in _REBUILDERS:
            rebuild = getattr(torch._utils, name)
            return lambda *args: rebuild(*args)  # a function of its own, on which a pickle may set what it likes
        return _stand_in(path)


def _stand_in(path: str) -> type[StandIn]:
    return type("StandIn", (StandIn,), {"path": path})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = SimpleNamespace(__name__="robustfair", Unpickler=_Unpickler, load=_load)
