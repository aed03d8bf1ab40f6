"""Benchmarks in the files that their authors publish: CIFAR (python and binary version), MNIST and its kin, STL-10.

The python version of CIFAR is pickles. They are read by an unpickler that knows nothing but the arrays, text and
containers of these files: whatever else a pickle asks for is refused before it is made.
"""

from __future__ import annotations

import gzip
import pickle
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from robustfair.data.load.parts import listed
from robustfair.data.load.scan import Folder
from robustfair.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_STL_SIDE = 96
_STL_PIXELS = 3 * _STL_SIDE * _STL_SIDE
_STL_FOLDS = "fold_indices.txt"
"""Ten subsets of STL-10's training images, which nothing here reads."""
_IDX = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?P<gz>\.gz)?")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a part: images uint8 (N, C, H, W), labels int64 (N,), super-classes (N,) if the files have them."""

    images: np.ndarray
    labels: np.ndarray
    coarse: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """The original files of one benchmark.

    Attributes:
        layout: what messages call it.
        parts: "train" and "test" -> its files, in order; of idx files images and labels in turn.
        read: the rows of the files of one part.
        names: file of the class names, if there is one.
        coarse_names: file of the names of the super-classes, if there is one.
        unread: further files of the layout.
        notes: what was left out, a line each.
    """

    layout: str
    parts: Mapping[str, Sequence[Path]]
    read: Callable[[Sequence[Path]], Iterator[Rows]]
    names: Path | None = None
    coarse_names: Path | None = None
    unread: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> list[Path]:
        """Every file that is read."""
        named = [file for file in (self.names, self.coarse_names) if file is not None]
        return [*(file for files in self.parts.values() for file in files), *dict.fromkeys(named)]

    def class_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the classes and of the super-classes; empty where the files have none."""
        if self.names is None:
            return (), ()
        if self.names.suffix == ".txt":
            coarse = () if self.coarse_names is None else _text_names(self.coarse_names)
            return _text_names(self.names), coarse
        about = load_pickle(self.names)
        return _names(about.get("label_names", about.get("fine_label_names"))), _names(about.get("coarse_label_names"))


def find_originals(owner: str, root: Folder) -> Files | None:
    """The original files of a benchmark in a folder or below; None if there are none.

    Raises:
        DataError: they are not whole, or there are several benchmarks.
    """
    found = [files for folder in root.walk() for files in _in_folder(owner, folder)]
    if len(found) > 1:
        folders = [str(files.all[0].parent) for files in found]
        raise DataError(
            f"{owner}: {root.path} holds the original files of several data sets ({listed(folders)}): name the folder "
            "of one of them, with nothing else in it"
        )
    if not found:
        return None
    read = {*found[0].all, *found[0].unread}
    rest = [file.name for folder in root.walk() for file in (*folder.pictures, *folder.others) if file not in read]
    left = (f"left out: {listed(rest)} (no files of that layout)",) if rest else ()
    notes = (f"read as {found[0].layout}", *found[0].notes, *left)
    return replace(found[0], notes=notes)


def find_unlabelled(owner: str, root: Folder, name: str, layout: str) -> Files:
    """STL-10's images without labels, as the train part of one class.

    Args:
        name: of their file.
        layout: where it is expected, for the message.

    Raises:
        DataError: there is no such file.
    """
    file = root.by_name().get(name)
    if file is None:
        raise DataError(f"{owner}: {root.path} holds no {name}: expected {layout}, of STL-10's binary version")
    return Files(layout="the images without labels of STL-10", parts={"train": [file]}, read=_read_stl)


def _in_folder(owner: str, folder: Folder) -> list[Files]:
    at = {file.name: file for file in folder.others}
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    python, binary = "the python version of", "the binary version of"
    found = []
    if not at.keys().isdisjoint(batches):
        parts = {"train": batches, "test": ["test_batch"]}
        found.append(_whole(owner, at, f"{python} CIFAR-10", parts, _read_pickles, names="batches.meta"))
    if "meta" in at and not at.keys().isdisjoint(("train", "test")):
        parts = {"train": ["train"], "test": ["test"]}
        found.append(_whole(owner, at, f"{python} CIFAR-100", parts, _read_pickles, names="meta"))
    if not at.keys().isdisjoint(f"{name}.bin" for name in batches):
        parts = {"train": [f"{name}.bin" for name in batches], "test": ["test_batch.bin"]}
        found.append(_whole(owner, at, f"{binary} CIFAR-10", parts, _read_binary, names="batches.meta.txt"))
    if {"train.bin", "fine_label_names.txt"} <= at.keys():
        parts = {"train": ["train.bin"], "test": ["test.bin"]}
        fine, coarse = "fine_label_names.txt", "coarse_label_names.txt"
        layout = f"{binary} CIFAR-100"
        found.append(_whole(owner, at, layout, parts, _read_binary_fine, names=fine, coarse_names=coarse))
    if not at.keys().isdisjoint(("train_X.bin", "test_X.bin")):
        parts = {part: [f"{part}_X.bin", f"{part}_y.bin"] for part in ("train", "test")}
        files = _whole(owner, at, "the binary version of STL-10", parts, _read_stl, names="class_names.txt")
        unread = tuple(at[name] for name in ("unlabeled_X.bin", _STL_FOLDS) if name in at)
        notes = ("left out: unlabeled_X.bin (its images have no labels)",) if "unlabeled_X.bin" in at else ()
        found.append(replace(files, unread=unread, notes=notes))
    return [*found, *_idx(owner, folder.path, at)]


def _whole(
    owner: str,
    at: Mapping[str, Path],
    layout: str,
    parts: Mapping[str, Sequence[str]],
    read: Callable[[Sequence[Path]], Iterator[Rows]],
    names: str,
    coarse_names: str = "",
) -> Files:
    missing = [name for files in parts.values() for name in files if name not in at]
    if missing:
        folder = next(iter(at.values())).parent
        raise DataError(f"{owner}: {folder} is not the whole of {layout}: {listed(missing)} missing, unpack it again")
    files = {part: [at[name] for name in named] for part, named in parts.items()}
    return Files(layout=layout, parts=files, read=read, names=at.get(names), coarse_names=at.get(coarse_names))


def _idx(owner: str, folder: Path, at: Mapping[str, Path]) -> list[Files]:
    """MNIST's format: a file of images and a file of labels a part; of a file and its .gz the file."""
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    packed = []
    for name, file in sorted(at.items()):
        if match := _IDX.fullmatch(name):
            if match["gz"] and name.removesuffix(".gz") in at:
                packed.append(name)
                continue
            part = "train" if match["part"] == "train" else "test"
            sets.setdefault(match["set"], {})[part, match["what"]] = file
    found = []
    for held in sets.values():
        parts = [part for part in ("train", "test") if (part, "images") in held or (part, "labels") in held]
        missing = [f"{part} {what}" for part in parts for what in ("images", "labels") if (part, what) not in held]
        if missing:
            raise DataError(f"{owner}: the idx files in {folder} are not whole: no file of the {listed(missing)}")
        files = {part: [held[part, "images"], held[part, "labels"]] for part in parts}
        notes = (f"left out: {listed(packed)} (unpacked beside it)",) if packed else ()
        found.append(Files(layout="idx files, as of MNIST", parts=files, read=_read_idx, notes=notes))
    return found


# Pickles


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, numbers, text, lists and dictionaries; keys as text.

    Raises:
        DataError: it holds anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            value = _Unpickler(file, encoding="bytes").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__} and no dictionary")
        return {_text(key): item.value() if isinstance(item, _Array) else item for key, item in value.items()}
    except Exception as error:  # a damaged pickle raises whatever its reader stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as a pickle of arrays, numbers and text: {reason}; unpack the original file again, "
            "or store the images in an .npz (images, labels)"
        ) from error


@dataclass
class _Type:
    """Stands for a numpy dtype: whole numbers alone."""

    code: str
    order: str = "|"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = _text(state[1])

    def dtype(self) -> np.dtype:
        if not re.fullmatch("[iu][1248]", self.code) or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"an array of type {self.order}{self.code}, where whole numbers are expected")
        return np.dtype(self.order.replace("|", "=") + self.code)


@dataclass
class _Array:
    """Stands for a numpy array until its bytes are known."""

    state: tuple[Any, ...] = field(default=())

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, kind, fortran, raw = state
        self.state = (raw, kind, shape, "F" if fortran else "C")

    def value(self) -> np.ndarray:
        raw, kind, shape, order = self.state
        if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError("an array without type or bytes")
        return np.frombuffer(raw, kind.dtype()).reshape(shape, order=order)


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    return _Array((raw, kind, shape, _text(order)))


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): lambda code, *_: _Type(_text(code)),
    ("_codecs", "encode"): _encoded,
    **{
        (f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
"""What a pickle of the original files asks for, and what it gets."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return _KNOWN[module, name]

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside of it")


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, value)) if isinstance(value, list) else ()


# Rows


def _read_pickles(files: Sequence[Path]) -> Iterator[Rows]:
    for file in files:
        held = load_pickle(file)
        pixels, labels = held.get("data"), held.get("fine_labels", held.get("labels"))
        coarse = held.get("coarse_labels")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
            raise DataError(f"{file}: expected data, uint8 (N, {_PIXELS}), it holds {listed(list(held))}")
        yield _rows(file, pixels, labels, coarse)


def _read_binary(files: Sequence[Path]) -> Iterator[Rows]:
    for file in files:
        rows = _records(file, 1)
        yield _rows(file, rows[:, 1:], rows[:, 0])


def _read_binary_fine(files: Sequence[Path]) -> Iterator[Rows]:
    for file in files:
        rows = _records(file, 2)
        yield _rows(file, rows[:, 2:], rows[:, 1], rows[:, 0])


def _records(file: Path, labels: int) -> np.ndarray:
    raw = np.frombuffer(_bytes(file), np.uint8)
    if len(raw) == 0 or len(raw) % (labels + _PIXELS):
        raise DataError(f"{file} is cut: {len(raw):,} bytes are no multiple of {labels + _PIXELS}, unpack it again")
    return raw.reshape(-1, labels + _PIXELS)


def _read_stl(files: Sequence[Path]) -> Iterator[Rows]:
    """Images, column after column, with a file of labels from 1, or without one."""
    size = files[0].stat().st_size
    if size == 0 or size % _STL_PIXELS:
        raise DataError(f"{files[0]} is cut: {size:,} bytes are no multiple of {_STL_PIXELS}, unpack it again")
    columns = np.memmap(files[0], np.uint8, "r").reshape(-1, 3, _STL_SIDE, _STL_SIDE)
    labels = np.zeros(len(columns), np.int64)
    if len(files) > 1:
        labels = np.frombuffer(_bytes(files[1]), np.uint8).astype(np.int64) - 1
        if len(labels) != len(columns):
            raise DataError(f"{files[0]} holds {len(columns):,} images and {files[1].name} {len(labels):,} labels")
    yield Rows(images=columns.transpose(0, 1, 3, 2), labels=labels)


def _read_idx(files: Sequence[Path]) -> Iterator[Rows]:
    images, labels = (_idx_array(file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    if len(images) != len(labels):
        raise DataError(f"{files[0]} holds {len(images):,} images and {files[1].name} {len(labels):,} labels")
    yield Rows(images=images[:, None], labels=labels.astype(np.int64))


def _idx_array(file: Path, dimensions: int) -> np.ndarray:
    raw = _bytes(file)
    start = 4 * (1 + dimensions)
    shape = [int(size) for size in np.frombuffer(raw[4:start], ">u4")] if len(raw) >= start else []
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) != start + int(np.prod(shape)):
        raise DataError(f"{file} is no whole idx file of bytes in {dimensions} dimensions: get the original file again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _rows(file: Path, pixels: np.ndarray, labels: Any, coarse: Any = None) -> Rows:
    given = {"labels": labels} if coarse is None else {"labels": labels, "coarse_labels": coarse}
    for name, value in given.items():
        array = np.asarray(value)
        if array.shape != (len(pixels),) or array.dtype.kind not in "iu":
            raise DataError(f"{file}: expected {name}, {len(pixels)} whole numbers, one an image")
    return Rows(
        images=pixels.reshape(-1, 3, _SIDE, _SIDE),
        labels=np.asarray(labels).astype(np.int64),
        coarse=None if coarse is None else np.asarray(coarse).astype(np.int64),
    )


def _bytes(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}; get the original file again") from error


def _text_names(file: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _bytes(file).decode("utf-8", "replace").splitlines() if line.strip())
