"""Where images come from: a name of the catalogue or a path, to a source that can be identified cheaply and decoded.

A source knows its parts and its identity (paths, sizes, times of change) without opening a picture, so that a load
which finds its cache file needs neither pyarrow nor Pillow. Packed data sets need neither at all.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from robustfair.config import needed
from robustfair.data.catalog import CATALOG, CatalogEntry
from robustfair.data.decode import (
    Decoded,
    Picture,
    bytes_hint,
    decode_pictures,
    numbered_names,
    resize_arrays,
    share_shape,
)
from robustfair.data.pack import HEADER, Pack, find_pack, pack_stem, read_pack
from robustfair.data.split import stratified_split
from robustfair.errors import DataError, UnknownNameError
from robustfair.registry import canonical

T = TypeVar("T")

_ROLES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"})
_IMAGE_KEYS = ("images", "x", "image")
_LABEL_KEYS = ("labels", "y", "label")
_SEVERITIES = 5
_BATCH = 256


class Source(Protocol):
    """A place that images come from.

    Attributes:
        name: how messages and cache files call it.
        entry: its row of the catalogue, or what a pack says of itself; None for another path.
        parts: "train" and/or "test", known before anything is decoded.
        identity: what its pixels depend on, as JSON; None if decoding is no work and nothing is to be cached.
    """

    @property
    def name(self) -> str: ...

    @property
    def entry(self) -> CatalogEntry | None: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> object | None: ...

    def decode(self, image_size: int | None) -> Decoded:
        """All parts in memory, with shared names and one (C, H, W)."""
        ...


def find_source(name_or_path: str | Path) -> Source:
    """The source that a user means: a name of the catalogue first, then a path (`./cifar10` is always a path).

    Raises:
        UnknownNameError: neither a name nor an existing path, but written like a name; shows the nearest ones.
        DataError: the path does not exist or holds no images.
    """
    if not str(name_or_path).strip():
        raise DataError("data: the name is empty: give a name such as cifar10, or a path")
    head, *rest = str(name_or_path).split("/")
    entry = CATALOG.get(canonical(head)) if isinstance(name_or_path, str) else None
    if entry is not None and (not rest or (entry.selectors and rest != [""])):
        return _named(entry, rest)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _at(path.resolve(), path.resolve().stem if path.is_file() else path.resolve().name, None, {})
    if isinstance(name_or_path, str) and not rest and not path.suffix:
        raise UnknownNameError("data set", name_or_path, CATALOG)
    raise DataError(f"data path {str(path)!r} does not exist")


def by_role(items: Iterable[tuple[str, T]], parts: tuple[str, ...]) -> dict[str, list[T]]:
    """Sort named pieces into "train" and "test" by the last word of their name that means a split.

    Validation pieces are the test part where there is no test piece. Pieces of other splits (`extra`, `unlabeled`) are
    left out; where no name means a split, all pieces are "train". If `parts` has one entry, all pieces are that part.

    >>> by_role([("train-0", 1), ("extra-0", 2), ("valid/0", 3)], ("train", "test"))
    {'train': [1], 'test': [3]}
    """
    items = list(items)
    if len(parts) == 1:
        return {parts[0]: [item for _, item in items]}
    roles: dict[str, list[T]] = {}
    for name, item in items:
        if role := _role(name):
            roles.setdefault(role, []).append(item)
    validation = roles.pop("validation", None)
    if validation and "test" not in roles:
        roles["test"] = validation
    if not roles:
        return {"train": [item for _, item in items]}
    return {part: roles[part] for part in ("train", "test") if part in roles}


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's digits: 1,797 grey 8x8 images with values 0 to 16, scaled to 0 to 255; part "train" alone."""

    entry: CatalogEntry
    name: str = "digits"
    parts: tuple[str, ...] = ("train",)
    identity: object | None = None

    def decode(self, image_size: int | None) -> Decoded:
        with needed("scikit-learn", "the digits data set"):
            from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        labels = digits.target.astype(np.int64)
        names = tuple(str(name) for name in digits.target_names)
        return Decoded(parts={"train": (resize_arrays(images, image_size), labels)}, class_names=names)


@dataclass(frozen=True, kw_only=True)
class Npz:
    """An `.npz` of decoded images: keys `images`, `labels`, or the same behind `train_` and `test_`."""

    path: Path
    name: str
    parts: tuple[str, ...]
    entry: CatalogEntry | None = None
    identity: object | None = None

    @classmethod
    def open(cls, path: Path, name: str) -> Npz:
        with _load_npz(path) as arrays:
            if HEADER in arrays:
                raise DataError(
                    f"{path} is a part of a packed data set: give it back its name, like cifar10.1-of-2.npz"
                )
            parts = tuple(part for part in ("train", "test") if any(f"{part}_{key}" in arrays for key in _IMAGE_KEYS))
        return cls(path=path, name=name, parts=parts or ("train",))

    def decode(self, image_size: int | None) -> Decoded:
        images, labels = {}, {}
        with _load_npz(self.path) as arrays:
            try:
                names = tuple(str(name) for name in arrays["class_names"]) if "class_names" in arrays else ()
                for part in self.parts:
                    prefixes = ("", f"{part}_") if len(self.parts) == 1 else (f"{part}_",)
                    images[part] = resize_arrays(
                        _channels_first(self.path, self._array(arrays, prefixes, _IMAGE_KEYS)), image_size
                    )
                    labels[part] = _class_indices(self.path, self._array(arrays, prefixes, _LABEL_KEYS))
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{self.path} cannot be read: {_first_line(error)}") from error
        images = share_shape(self.name, images)
        return Decoded(
            parts={part: (images[part], labels[part]) for part in self.parts},
            class_names=names or numbered_names(self.name, labels.values()),
        )

    def _array(self, arrays: Mapping[str, np.ndarray], prefixes: Sequence[str], keys: Sequence[str]) -> np.ndarray:
        for key in (prefix + key for prefix in prefixes for key in keys):
            if key in arrays:
                return arrays[key]
        allowed = ", ".join(prefixes[-1] + key for key in keys)
        raise DataError(f"{self.path}: no array of {keys[0]} ({allowed}), it holds {', '.join(arrays) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The parts that `robustfair.data.pack` wrote, with the names and the augmentation that they were packed with."""

    name: str
    entry: CatalogEntry
    pack: Pack

    @classmethod
    def open(cls, pack: Pack, name: str, entry: CatalogEntry | None) -> Packed:
        about = pack.contents
        if entry is not None:
            return cls(name=name, entry=entry, pack=pack)
        own = CatalogEntry(name=about.name, summary="packed", num_classes=len(about.class_names), augment=about.augment)
        return cls(name=about.name, entry=own, pack=pack)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.pack.contents.shapes)

    @property
    def identity(self) -> object:
        return [_stamp(file) for file in self.pack.files]

    def decode(self, image_size: int | None) -> Decoded:
        decoded = read_pack(self.pack)
        parts = {part: (resize_arrays(images, image_size), labels) for part, (images, labels) in decoded.parts.items()}
        return replace(decoded, parts=parts)


@dataclass(frozen=True, kw_only=True)
class CorruptionFiles:
    """The corruption benchmark as its authors ship it: `<corruption>.npy`, five severities each, and `labels.npy`."""

    folder: Path
    name: str
    corruption: str
    severity: int
    entry: CatalogEntry
    parts: tuple[str, ...] = ("test",)
    identity: object | None = None

    def decode(self, image_size: int | None) -> Decoded:
        files = {canonical(path.stem): path for path in self.folder.glob("*.npy") if path.stem != "labels"}
        if self.corruption not in files:
            raise UnknownNameError("corruption", self.corruption, files)
        path = files[self.corruption]
        images, labels = _load_npy(path), _load_npy(self.folder / "labels.npy")
        if len(images) != len(labels) or len(images) % _SEVERITIES:
            raise DataError(
                f"{path}: expected {_SEVERITIES} severities of equal length and as many labels, "
                f"got {len(images)} images and {len(labels)} labels"
            )
        count = len(images) // _SEVERITIES
        rows = slice((self.severity - 1) * count, self.severity * count)
        pixels = resize_arrays(_channels_first(path, np.array(images[rows])), image_size)
        indices = _class_indices(self.folder / "labels.npy", np.array(labels[rows]))
        return Decoded(parts={"test": (pixels, indices)}, class_names=self.entry.class_names)


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """`root/<class>/...` or `root/<split>/<class>/...`; classes are the folder names of all splits, as sorted text."""

    name: str
    entry: CatalogEntry | None
    class_names: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[int, Path]]]
    """Part -> (class index, file) per image, classes in order, files of a class sorted by path."""

    @classmethod
    def open(cls, root: Path, name: str, entry: CatalogEntry | None) -> ImageFolder:
        found = _class_folders(root, entry)
        names = sorted({class_name for folders in found.values() for class_name in folders})
        shared = set(names).intersection(*found.values())
        if not shared and names:
            raise DataError(f"{name}: the parts {', '.join(found)} of {root} have no class folder in common")
        files = {
            part: [(names.index(label), file) for label in sorted(folders) for file in _pictures(folders[label])]
            for part, folders in found.items()
        }
        for part, listed in files.items():
            if not listed:
                raise DataError(f"{name}: no images in the {part} part of {root}; expected <class>/<image> below it")
        return cls(name=name, entry=entry, class_names=tuple(names), files=files)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def identity(self) -> object:
        stamps = {part: [(label, *_stamp(file)) for label, file in listed] for part, listed in self.files.items()}
        return [self.class_names, stamps]

    def decode(self, image_size: int | None) -> Decoded:
        images = {
            part: decode_pictures(self.name, _in_batches(listed), len(listed), image_size)
            for part, listed in self.files.items()
        }
        images = share_shape(self.name, images)
        labels = {part: np.array([label for label, _ in listed], np.int64) for part, listed in self.files.items()}
        return Decoded(parts={part: (images[part], labels[part]) for part in images}, class_names=self.class_names)


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """Parquet files in the hub's layout, or the Arrow files of a saved data set."""

    name: str
    entry: CatalogEntry | None
    files: Mapping[str, Sequence[Path]]
    wanted: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def identity(self) -> object:
        stamps = {part: [_stamp(file) for file in listed] for part, listed in self.files.items()}
        return [stamps, dict(self.wanted)]

    def decode(self, image_size: int | None) -> Decoded:
        from robustfair.data.tables import Selection, decode_tables, open_file

        shards = {part: [open_file(file) for file in listed] for part, listed in self.files.items()}
        return decode_tables(
            self.name, shards, entry=self.entry, selection=Selection(self.wanted), image_size=image_size
        )


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A named data set on the Hugging Face hub."""

    name: str
    entry: CatalogEntry
    wanted: Mapping[str, str]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.entry.parts

    @property
    def identity(self) -> object:
        return [self.entry.hub, self.entry.config, dict(self.wanted)]

    def decode(self, image_size: int | None) -> Decoded:
        from robustfair.data.tables import Selection, decode_tables, open_hub

        splits = open_hub(self.entry)
        pieces = [(split, shard) for split, shards in splits.items() for shard in shards]
        parts = by_role(pieces, self.parts)
        if set(parts) != set(self.parts):
            raise DataError(
                f"{self.name}: expected {' and '.join(self.parts)}, {self.entry.hub} has {', '.join(splits)}"
            )
        return decode_tables(
            self.name, parts, entry=self.entry, selection=Selection(self.wanted), image_size=image_size
        )


def hold_out(decoded: Decoded, fraction: float) -> Decoded:
    """Split the only part of a source into "train" and "test", stratified, always with the same seed."""
    images, labels = decoded.parts["train"]
    train, test = (index.numpy() for index in stratified_split(torch.from_numpy(labels), fraction))
    parts = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return Decoded(parts=parts, class_names=decoded.class_names, groups=decoded.groups, group_names=decoded.group_names)


def _named(entry: CatalogEntry, values: Sequence[str]) -> Source:
    if not entry.hub:
        return Digits(entry=entry)
    name = "/".join([entry.name, *values])
    wanted = _wanted(entry, values)
    folder = _local_folder(entry)
    return Hub(name=name, entry=entry, wanted=wanted) if folder is None else _at(folder, name, entry, wanted)


def _wanted(entry: CatalogEntry, values: Sequence[str]) -> dict[str, str]:
    """Column -> canonical value, from what follows the name in `cifar10-c/gaussian_noise/3`."""
    if not entry.selectors:
        return {}
    severities = [str(severity) for severity in range(1, _SEVERITIES + 1)]
    if len(values) != len(entry.selectors) or values[-1] not in severities:
        got = "/".join([entry.name, *values])
        raise DataError(
            f"{got}: name a corruption and a severity of 1 to {_SEVERITIES}, as in {entry.name}/gaussian_noise/3"
        )
    return {column: canonical(value) for column, value in zip(entry.selectors, values, strict=True)}


def _local_folder(entry: CatalogEntry) -> Path | None:
    """The folder of a named data set under ROBUSTFAIR_DATA in any spelling; None if there is none."""
    root = os.environ.get("ROBUSTFAIR_DATA")
    if not root:
        return None
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"ROBUSTFAIR_DATA is {root!r}, which is not a folder")
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and canonical(folder.name) in entry.folder_names:
            inner = folder / entry.config if entry.config else folder
            return (inner if inner.is_dir() else folder).resolve()
    return None


def _at(path: Path, name: str, entry: CatalogEntry | None, wanted: Mapping[str, str]) -> Source:
    """The source at an existing path, by what lies there."""
    pack = find_pack(path, pack_stem(name) if entry is not None and entry.selectors else None)
    if pack is not None:
        return Packed.open(pack, name, entry)
    if path.is_file():
        if path.suffix == ".npz":
            return Npz.open(path, name)
        if path.suffix == ".parquet":
            return TableFiles(name=name, entry=entry, files={"train": [path]}, wanted=wanted)
        raise DataError(f"{path} is a file of unknown kind; expected .npz, .parquet or a folder of images")
    if entry is not None and entry.selectors and (path / "labels.npy").is_file():
        corruption, severity = wanted.values()
        return CorruptionFiles(folder=path, name=name, corruption=corruption, severity=int(severity), entry=entry)
    parts = entry.parts if entry is not None else ("train", "test")
    tables = _saved_files(path) or [(str(file.relative_to(path)), file) for file in _walk(path, {".parquet"})]
    if tables:
        return TableFiles(name=name, entry=entry, files=by_role(tables, parts), wanted=wanted)
    return ImageFolder.open(path, name, entry)


def _saved_files(root: Path) -> list[tuple[str, Path]]:
    """(split, file) of a folder written by `save_to_disk`; empty if it is none."""
    if (root / "dataset_dict.json").is_file():
        splits = [root / split for split in _json(root / "dataset_dict.json").get("splits", [])]
    elif (root / "state.json").is_file():
        splits = [root]
    else:
        return []
    files = []
    for folder in splits:
        state = _json(folder / "state.json")
        split = folder.name if folder != root else str(state.get("_split") or "train")
        files += [(split, folder / item["filename"]) for item in state.get("_data_files", [])]
    for _, file in files:
        if not file.is_file():
            raise DataError(f"saved data set {root} is not whole, {file} is missing")
    return files


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error
    return value if isinstance(value, dict) else {}


def _class_folders(root: Path, entry: CatalogEntry | None) -> dict[str, dict[str, Path]]:
    """Part -> class name -> folder."""
    top = _subfolders(root)
    splits = [folder for folder in top if _role(folder.name) and _subfolders(folder)]
    if splits:
        parts = by_role([(folder.name, folder) for folder in splits], ("train", "test"))
        return {part: {child.name: child for child in _subfolders(folders[0])} for part, folders in parts.items()}
    if not top:
        raise DataError(f"{root} holds no images: expected <class>/<image>, parquet files or a saved data set")
    return {(entry.parts[0] if entry else "train"): {folder.name: folder for folder in top}}


def _subfolders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return _walk(folder, _PICTURES)


def _walk(root: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files below `root` with one of these suffixes, sorted; what lies in hidden folders is left out."""
    found = []
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    wanted = frozenset(suffixes)
    return sorted(file for file in found if file.suffix.lower() in wanted)


def _role(name: str) -> str | None:
    """The split that the last telling word of a path means: "data/train-00000-of-00005.parquet" is "train"."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        for role, words in _ROLES.items():
            if word in words:
                return role
    return None


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _in_batches(listed: Sequence[tuple[int, Path]]) -> Iterable[list[Picture]]:
    for start in range(0, len(listed), _BATCH):
        yield [Picture(str(file), file) for _, file in listed[start : start + _BATCH]]


def _load_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise DataError(f"{path} is no .npz archive")
    return arrays


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error


def _channels_first(path: Path, images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with one or three channels, as contiguous (N, C, H, W)."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
        is_number = images.dtype != np.uint8 and images.dtype.kind in "iuf" and images.size > 0
        hint = f"; {bytes_hint(float(images.min()), float(images.max()))}" if is_number else ""
        raise DataError(
            f"{path}: images must be uint8 (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, "
            f"got {images.dtype} {images.shape}{hint}"
        )
    return np.ascontiguousarray(images)


def _class_indices(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be whole numbers (N,), got {labels.dtype} {labels.shape}")
    return labels.astype(np.int64)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
