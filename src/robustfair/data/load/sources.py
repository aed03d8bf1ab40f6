"""Places that images come from, each a source that can be identified cheaply and decoded.

A source knows its parts and its identity (paths, sizes, times of change) without opening a picture, so that a load
which finds its cache file needs neither pyarrow nor Pillow. Packed data sets need neither at all.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from robustfair.data.catalog import DOMAINS, CatalogEntry
from robustfair.data.corruptions.names import SEVERITIES
from robustfair.data.load.arrays import (
    IMAGE_KEYS,
    LABEL_KEYS,
    array_keys,
    channels_first,
    class_indices,
    first_line,
    is_unlabelled,
    load_npy,
    load_npz,
)
from robustfair.data.load.decode import (
    Decoded,
    Picture,
    conversion_notes,
    decode_parts,
    numbered_names,
    resize_arrays,
    share_shape,
    super_classes,
)
from robustfair.data.load.folders import Listing, list_images
from robustfair.data.load.memory import require_memory
from robustfair.data.load.originals import Files
from robustfair.data.load.parts import as_parts, by_role, listed
from robustfair.data.load.scan import Folder
from robustfair.data.pack import HEADER, Pack, read_pack
from robustfair.data.split import stratified_split
from robustfair.errors import DataError, UnknownNameError, needed
from robustfair.grammar import canonical_key
from robustfair.registry import canonical

_BATCH = 256
Rows = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
"""Which rows of a table are read: columns, and the combinations of their values; none of either reads all."""
ALL_ROWS: Rows = ((), ())


class Source(Protocol):
    """A place that images come from.

    Attributes:
        name: how messages and cache files call it.
        entry: its row of the catalogue, or what a pack says of itself; None for another path.
        parts: "train" and/or "test", known before anything is decoded.
        identity: what its pixels depend on, as JSON; None if decoding is no work and nothing is to be cached.
        notes: what is left out of it, and how its names were read, a line each.
    """

    @property
    def name(self) -> str: ...

    @property
    def entry(self) -> CatalogEntry | None: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> object | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def decode(self, image_size: int | None) -> Decoded:
        """All parts in memory, with shared names and one (C, H, W); a part whose images have no labels is left out."""
        ...


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's digits: 1,797 grey 8x8 images with values 0 to 16, scaled to 0 to 255; part "train" alone."""

    entry: CatalogEntry
    name: str = "digits"
    parts: tuple[str, ...] = ("train",)
    identity: object | None = None
    notes: tuple[str, ...] = ()

    def decode(self, image_size: int | None) -> Decoded:
        table = np.loadtxt(_digits_file(), delimiter=",")  # 64 values of an image, then its class
        images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[:, None]
        labels = table[:, -1].astype(np.int64)
        names = tuple(str(digit) for digit in range(10))
        return Decoded(parts={"train": (resize_arrays(images, image_size), labels)}, class_names=names)


@dataclass(frozen=True, kw_only=True)
class Npz:
    """An `.npz` of decoded images: keys `images`, `labels`, or the same with a part, as in `val_images`, `x_train`."""

    path: Path
    name: str
    keys: Mapping[str, Mapping[str, str]]
    """"train", "test", "validation" -> "images", "labels" -> key of the array."""
    entry: CatalogEntry | None = None
    identity: object | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, name: str) -> Npz:
        with load_npz(path) as arrays:
            if HEADER in arrays:
                raise DataError(
                    f"{path} is a part of a packed data set: give it back its name, like cifar10.1-of-2.npz"
                )
            keys, rest = array_keys(path, list(arrays))
        notes = (f"left out: the arrays {listed(rest)} (neither images nor labels of a part)",) if rest else ()
        return cls(path=path, name=name, keys=keys, notes=notes)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(as_parts(self.keys)[0])

    def decode(self, image_size: int | None) -> Decoded:
        images = {}
        with load_npz(self.path) as arrays:
            try:
                names = tuple(str(name) for name in arrays["class_names"]) if "class_names" in arrays else ()
                held = {role: self._labels(arrays, role) for role in self.keys}
                unlabelled = {role for role, labels in held.items() if len(held) > 1 and is_unlabelled(labels)}
                parts, notes = as_parts({role: (role, labels) for role, labels in held.items()}, unlabelled)
                for part, (role, _) in parts.items():
                    pixels = arrays[self._key(arrays, role, "images")]
                    images[part] = resize_arrays(channels_first(self.path, pixels), image_size)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{self.path} cannot be read: {first_line(error)}") from error
        images = share_shape(self.name, images)
        labels = {part: values for part, (_, values) in parts.items()}
        return Decoded(
            parts={part: (images[part], labels[part]) for part in parts},
            class_names=names or numbered_names(self.name, labels.values()),
            notes=tuple(notes),
        )

    def _labels(self, arrays: Mapping[str, np.ndarray], role: str) -> np.ndarray:
        """(N,) int64; empty for a part without an array of labels beside parts that have one."""
        if "labels" not in self.keys[role] and any("labels" in keys for keys in self.keys.values()):
            return np.empty(0, np.int64)
        return class_indices(self.path, arrays[self._key(arrays, role, "labels")])

    def _key(self, arrays: Mapping[str, np.ndarray], role: str, what: str) -> str:
        if what in self.keys[role]:
            return self.keys[role][what]
        allowed = ", ".join(f"{role}_{key}" for key in (IMAGE_KEYS if what == "images" else LABEL_KEYS))
        raise DataError(f"{self.path}: no array of {what} ({allowed}), it holds {', '.join(arrays) or 'none'}")


def _digits_file() -> Path:
    """The table that scikit-learn brings along. To import the package for it would take longer than all the rest.

    Raises:
        RobustFairError: scikit-learn is not installed.
        DataError: it holds no such file.
    """
    with needed("scikit-learn", "the digits data set"):
        found = find_spec("sklearn")
        if found is None:
            raise ModuleNotFoundError(name="sklearn")
    (root,) = found.submodule_search_locations or ("",)
    path = Path(root, "datasets", "data", "digits.csv.gz")
    if not path.exists():
        raise DataError(f"digits: scikit-learn has no {path}: install scikit-learn again")
    return path


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The parts that `robustfair.data.pack` wrote, with the names and the augmentation that they were packed with."""

    name: str
    entry: CatalogEntry
    pack: Pack
    notes: tuple[str, ...] = ()

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
    """The corruption benchmark as its authors ship it: `<corruption>.npy`, five severities each, and `labels.npy`.

    Attributes:
        corruptions: canonical names; of several the images follow one another.
        severity: from 1.
    """

    folder: Path
    name: str
    corruptions: tuple[str, ...]
    severity: int
    entry: CatalogEntry
    parts: tuple[str, ...] = ("test",)
    identity: object | None = None
    notes: tuple[str, ...] = ()

    def decode(self, image_size: int | None) -> Decoded:
        files = {canonical(path.stem): path for path in self.folder.glob("*.npy") if path.stem != "labels"}
        missing = [name for name in self.corruptions if name not in files]
        if missing and len(self.corruptions) == 1:
            raise UnknownNameError("corruption", missing[0], files)
        if missing:
            raise DataError(f"{self.name}: {self.folder} lacks {listed([f'{canonical_key(n)}.npy' for n in missing])}")
        found = [self._rows(files[name]) for name in self.corruptions]
        images = share_shape(self.name, {str(name): pixels for name, (pixels, _) in enumerate(found)})
        pixels = resize_arrays(np.concatenate(list(images.values())), image_size)
        labels = np.concatenate([indices for _, indices in found])
        return Decoded(parts={"test": (pixels, labels)}, class_names=self.entry.class_names)

    def _rows(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one corruption at the severity."""
        images, labels = load_npy(path), load_npy(self.folder / "labels.npy")
        if len(images) != len(labels) or len(images) % len(SEVERITIES):
            raise DataError(
                f"{path}: expected {len(SEVERITIES)} severities of equal length and as many labels, "
                f"got {len(images)} images and {len(labels)} labels"
            )
        count = len(images) // len(SEVERITIES)
        rows = slice((self.severity - 1) * count, self.severity * count)
        pixels = channels_first(path, np.array(images[rows]))
        return pixels, class_indices(self.folder / "labels.npy", np.array(labels[rows]))


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """`root/<class>/...` or `root/<split>/<class>/...`; classes are the folder names of all splits, as sorted text."""

    name: str
    entry: CatalogEntry | None
    class_names: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[int, Path]]]
    """Part -> (class index, file) per image, classes in order, files of a class sorted by path."""

    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, root: Folder, name: str, entry: CatalogEntry | None) -> ImageFolder:
        if entry is None:
            return cls.of(list_images(name, root, None), name, None)
        known = DOMAINS if entry.domains else ()
        found = list_images(name, root, entry.parts[0], layout=entry.layout, domains=entry.domains, known_domains=known)
        return cls.of(found, name, entry)

    @classmethod
    def of(cls, found: Listing, name: str, entry: CatalogEntry | None) -> ImageFolder:
        files, notes = found.files, found.notes
        if entry is not None and entry.only:
            files = {part: rows for part, rows in files.items() if part == entry.only}
            if not files:
                raise DataError(f"{name}: there is no {entry.only} part: expected {entry.layout}")
            notes = (*notes, "left out: the train part")
        return cls(name=name, entry=entry, class_names=found.class_names, files=files, notes=notes)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def identity(self) -> object:
        stamps = {part: [(label, *_stamp(file)) for label, file in rows] for part, rows in self.files.items()}
        return [self.class_names, stamps]

    def decode(self, image_size: int | None) -> Decoded:
        converted: Counter[str] = Counter()
        pictures = {part: (_in_batches(rows), len(rows)) for part, rows in self.files.items()}
        images = decode_parts(self.name, pictures, image_size, converted)
        labels = {part: np.array([label for label, _ in rows], np.int64) for part, rows in self.files.items()}
        return Decoded(
            parts={part: (images[part], labels[part]) for part in images},
            class_names=self.class_names,
            notes=conversion_notes(converted),
        )


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """Parquet files in the hub's layout, or the Arrow files of a saved data set."""

    name: str
    entry: CatalogEntry | None
    files: Mapping[str, Sequence[Path]]
    """"train", "test", "validation" -> its files."""
    rows: Rows = ALL_ROWS
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(as_parts(self.files)[0])

    @property
    def identity(self) -> object:
        stamps = {part: [_stamp(file) for file in files] for part, files in self.files.items()}
        return [stamps, _as_json(self.rows)]

    def decode(self, image_size: int | None) -> Decoded:
        from robustfair.data.load.tables import Selection, decode_tables, open_file

        shards = {part: [open_file(file) for file in files] for part, files in self.files.items()}
        return decode_tables(
            self.name, shards, entry=self.entry, selection=Selection(*self.rows), image_size=image_size
        )


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A named data set on the Hugging Face hub."""

    name: str
    entry: CatalogEntry
    rows: Rows = ALL_ROWS
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.entry.parts

    @property
    def identity(self) -> object:
        return [self.entry.hub, self.entry.config, _as_json(self.rows)]

    def decode(self, image_size: int | None) -> Decoded:
        from robustfair.data.load.tables import Selection, decode_tables, open_hub

        splits = open_hub(self.entry)
        pieces = [(split, shard) for split, shards in splits.items() for shard in shards]
        roles, notes = by_role(self.name, pieces, self.parts)
        if set(as_parts(roles)[0]) != set(self.parts):
            raise DataError(
                f"{self.name}: expected {' and '.join(self.parts)}, {self.entry.hub} has {', '.join(splits)}"
            )
        decoded = decode_tables(
            self.name, roles, entry=self.entry, selection=Selection(*self.rows), image_size=image_size
        )
        return replace(decoded, notes=(*notes, *decoded.notes))


@dataclass(frozen=True, kw_only=True)
class Originals:
    """The files of a benchmark as its authors publish them."""

    name: str
    entry: CatalogEntry | None
    files: Files

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.files.parts)

    @property
    def identity(self) -> object:
        return [self.files.layout, [_stamp(file) for file in self.files.all]]

    @property
    def notes(self) -> tuple[str, ...]:
        return self.files.notes

    def decode(self, image_size: int | None) -> Decoded:
        images, labels, coarse = {}, {}, {}
        for part, paths in self.files.parts.items():
            rows = list(self.files.read(paths))
            shape = (sum(len(piece.labels) for piece in rows), *rows[0].images.shape[1:])
            require_memory(self.name, shape[0], shape[1:])
            whole = np.concatenate([piece.images for piece in rows], out=np.empty(shape, np.uint8))
            images[part] = resize_arrays(whole, image_size)
            labels[part] = np.concatenate([piece.labels for piece in rows])
            coarse[part] = np.concatenate([piece.labels if piece.coarse is None else piece.coarse for piece in rows])
        names, group_names = self.files.class_names()
        names = names or (self.entry.class_names if self.entry else ()) or numbered_names(self.name, labels.values())
        groups = super_classes(self.name, labels, coarse, len(names)) if group_names else None
        return Decoded(
            parts={part: (images[part], labels[part]) for part in images},
            class_names=names,
            groups=groups,
            group_names=group_names if groups else (),
        )


def hold_out(decoded: Decoded, fraction: float) -> Decoded:
    """Split the only part of a source into "train" and "test", stratified, always with the same seed."""
    images, labels = decoded.parts["train"]
    train, test = (index.numpy() for index in stratified_split(torch.from_numpy(labels), fraction))
    parts = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return replace(decoded, parts=parts)


def _as_json(rows: Rows) -> dict[str, tuple[str, ...]]:
    """Column -> values, one each for every combination."""
    columns, wanted = rows
    return dict(zip(columns, zip(*wanted, strict=True), strict=True))


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _in_batches(rows: Sequence[tuple[int, Path]]) -> Iterable[list[Picture]]:
    for start in range(0, len(rows), _BATCH):
        yield [Picture(str(file), file) for _, file in rows[start : start + _BATCH]]
