"""Packed data sets: a few small `.npz` files, lossless, read back with numpy and the standard library alone.

The codec of the images is `robustfair.data.codec`.

`NAME.1-of-2.npz` holds the first half of the rows of every split, and beside them:
    robustfair.pack JSON text: schema, part, parts, what the whole data set is, fingerprints of this file's rows
    SPLIT_labels    labels of the rows, in the smallest unsigned type
    SPLIT_pixels    the streams one after the other: blocks of rows, in them channels, in them contexts
    SPLIT_sizes     their lengths in bytes, (blocks, channels * 8)
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from robustfair.data.codec import CONTEXTS, blocks, decode, encode
from robustfair.data.load.decode import Decoded, fingerprint
from robustfair.errors import ConfigError, DataError
from robustfair.grammar import read_path
from robustfair.registry import canonical

if TYPE_CHECKING:
    from robustfair.data.datasets import Splits

T = TypeVar("T")
Rows = dict[str, tuple[np.ndarray, np.ndarray]]
"""Split -> images uint8 (N, C, H, W) and labels int64 (N,)."""

SCHEMA = "robustfair.pack/1"
HEADER = "robustfair.pack"

_PART_NAME = re.compile(r"(?P<stem>[^.].*)\.(?P<part>[1-9]\d*)-of-(?P<parts>[1-9]\d*)\.npz")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a pack holds, written alike into each of its files.

    Attributes:
        name: of the data set.
        augment: its default augmentation.
        class_names: one name per class.
        groups: super-class index per class, or None.
        group_names: names of the super-classes.
        shapes: split -> (N, C, H, W).
        fingerprints: split -> `ImageDataset.fingerprint` of the whole split.
    """

    name: str
    augment: str
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None
    group_names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprints: Mapping[str, str]

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Contents:
        """From the JSON of a header."""
        return cls(
            name=str(value["name"]),
            augment=str(value["augment"]),
            class_names=tuple(str(name) for name in value["class_names"]),
            groups=None if value["groups"] is None else tuple(int(group) for group in value["groups"]),
            group_names=tuple(str(name) for name in value["group_names"]),
            shapes={split: _shape(shape) for split, shape in value["shapes"].items()},
            fingerprints={split: str(value["fingerprints"][split]) for split in value["shapes"]},
        )


@dataclass(frozen=True, kw_only=True)
class Pack:
    """All files of one packed data set, in order, and what they hold together."""

    files: tuple[Path, ...]
    contents: Contents


def write_pack(data: Splits, folder: Path | str, *, parts: int = 2) -> list[Path]:
    """Pack a data set into `parts` files of about equal size, written whole or not at all.

    Args:
        data: train and/or test part; names, groups and default augmentation are kept with them.
        folder: made if missing.
        parts: number of files.

    Returns:
        The files, `NAME.1-of-PARTS.npz` first.

    Raises:
        ConfigError: fewer parts than one, or more than images.
        DataError: `folder` is a file or holds a pack of that name, or images have no pixels.
    """
    folder = read_path(folder)
    one = next(iter(data.parts.values()))
    stem = pack_stem(one.name)
    _require_free(folder, stem)
    for split, part in data.parts.items():
        if 0 in part.images.shape[1:]:
            raise DataError(f"{one.name}: images of the {split} part have no pixels, shape {tuple(part.images.shape)}")
    splits = {
        split: (part.images.cpu().numpy(), part.labels.cpu().numpy(), part.fingerprint)
        for split, part in data.parts.items()
    }
    most = max(len(labels) for _, labels, _ in splits.values())
    if not 1 <= parts <= most:
        raise ConfigError("pack", "parts", allowed=f"1 to {most}, the number of images", got=parts)
    contents = Contents(
        name=one.name,
        augment=one.augment,
        class_names=one.class_names,
        groups=one.groups,
        group_names=one.group_names,
        shapes={split: images.shape for split, (images, _, _) in splits.items()},
        fingerprints={split: digest for split, (_, _, digest) in splits.items()},
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / _part_name(stem, number, parts) for number in range(1, parts + 1)]
    spares = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files]
    try:
        for number, spare in enumerate(spares, start=1):
            rows = {split: _rows_of(images, labels, number, parts) for split, (images, labels, _) in splits.items()}
            _write_part(spare, rows, contents, number, parts)
        for spare, path in zip(spares, files, strict=True):
            spare.replace(path)
    finally:
        for spare in spares:
            spare.unlink(missing_ok=True)
    return files


def find_pack(path: Path, stem: str | None = None) -> Pack | None:
    """The pack in a folder, or the one that a file belongs to by its name; None if there is no such file.

    Args:
        path: an existing folder or file.
        stem: take only files of this name out of a folder.

    Raises:
        DataError: a part is missing, foreign, cut, or of another pack; or the folder holds several packs.
    """
    found = _found_parts(path, stem)
    if not found:
        return None
    folder = path if path.is_dir() else path.parent
    if len(found) > 1:
        names = ", ".join(next(iter(files.values())).name for files in found.values())
        raise DataError(f"{folder} holds several packed data sets ({names}): name one of these files")
    ((name, count), files) = next(iter(found.items()))
    missing = [_part_name(name, part, count) for part in range(1, count + 1) if part not in files]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}: a packed data set needs all of its {count} parts")
    ordered = tuple(files[part] for part in range(1, count + 1))
    headers = [_checked(file, _read_header) for file in ordered]
    for file, (contents, _) in zip(ordered, headers, strict=True):
        if contents != headers[0][0]:
            raise DataError(
                f"{file} is of another pack than {ordered[0].name}: they were not written together, pack the data again"
            )
    return Pack(files=ordered, contents=headers[0][0])


def read_pack(pack: Pack) -> Decoded:
    """Decode and verify a whole pack.

    Raises:
        DataError: a file is damaged; names it.
    """
    contents = pack.contents
    parts: Rows = {
        split: (np.empty(shape, np.uint8), np.empty(shape[0], np.int64)) for split, shape in contents.shapes.items()
    }
    for part, file in enumerate(pack.files, start=1):
        for split, (images, labels) in read_part(file).items():
            for whole, rows in zip(parts[split], (images, labels), strict=True):
                whole[_bounds(len(whole), part, len(pack.files))] = rows
    for split, (images, labels) in parts.items():
        if fingerprint(images, labels, contents.class_names) != contents.fingerprints[split]:
            raise DataError(
                f"{pack.files[0]} and its other parts are whole, but not together the {split} part that was packed: "
                "pack the data again"
            )
    return Decoded(
        parts=parts, class_names=contents.class_names, groups=contents.groups, group_names=contents.group_names
    )


def read_part(path: Path) -> Rows:
    """Decode and verify one file alone: its rows of every split.

    Raises:
        DataError: it is no part of a pack, or damaged.
    """
    return _checked(path, _read_part)


def pack_stem(name: str) -> str:
    """What the files of a data set are called.

    >>> pack_stem("cifar10-c/Gaussian_noise/3")
    'cifar10-c-gaussian-noise-3'
    """
    return canonical(re.sub(r"[^\w.-]+", "-", name)).strip("-.") or "data"


def _part_name(stem: str, part: int, parts: int) -> str:
    return f"{stem}.{part}-of-{parts}.npz"


def _found_parts(path: Path, stem: str | None) -> dict[tuple[str, int], dict[int, Path]]:
    """(stem, number of parts) -> part -> file, of the packs in a folder or of the one that a file belongs to."""
    parts = None
    if path.is_file():
        match = _PART_NAME.fullmatch(path.name)
        if match is None:
            return {}
        path, stem, parts = path.parent, match["stem"], int(match["parts"])
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for file in sorted(path.iterdir()):
        match = _PART_NAME.fullmatch(file.name)
        if match and file.is_file() and stem in (None, match["stem"]) and parts in (None, int(match["parts"])):
            found.setdefault((match["stem"], int(match["parts"])), {})[int(match["part"])] = file
    return found


def _require_free(folder: Path, stem: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder for the packed data set")
    for file in sorted(folder.iterdir()) if folder.exists() else ():
        match = _PART_NAME.fullmatch(file.name)
        if match and match["stem"] == stem:
            raise DataError(f"{file} exists and is not overwritten: choose another folder, or delete it")


def _bounds(count: int, part: int, parts: int) -> slice:
    """The rows of part 1, 2, ... of `parts`.

    >>> [_bounds(5, part, 2) for part in (1, 2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return slice(count * (part - 1) // parts, count * part // parts)


def _rows_of(images: np.ndarray, labels: np.ndarray, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    rows = _bounds(len(labels), part, parts)
    return images[rows], labels[rows]


def _shape(value: Sequence[int]) -> tuple[int, ...]:
    count, channels, height, width = (int(length) for length in value)
    return count, channels, height, width


# One file


def _write_part(path: Path, rows: Rows, contents: Contents, part: int, parts: int) -> None:
    digests = {split: fingerprint(*arrays, contents.class_names) for split, arrays in rows.items()}
    header = {"schema": SCHEMA, "part": part, "parts": parts, "contents": asdict(contents), "fingerprints": digests}
    arrays: dict[str, np.ndarray] = {HEADER: np.array(json.dumps(header))}
    smallest = np.min_scalar_type(len(contents.class_names))
    for split, (images, labels) in rows.items():
        streams = [encode(images[block]) for block in blocks(images.shape)]
        lengths = [[len(stream) for stream in block] for block in streams]
        pixels = b"".join(stream for block in streams for stream in block)
        arrays[f"{split}_labels"] = labels.astype(smallest)
        arrays[f"{split}_pixels"] = np.frombuffer(pixels, np.uint8)
        arrays[f"{split}_sizes"] = np.array(lengths, np.int64).reshape(len(streams), images.shape[1] * CONTEXTS)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())


def _checked(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is cut, damaged or no part of a packed data set: {reason}") from error


def _read_header(path: Path) -> tuple[Contents, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        header = json.loads(str(arrays[HEADER])) if HEADER in arrays else {}
    if header.get("schema") != SCHEMA:
        raise DataError(f"{path} is no part of a packed data set: its schema is {header.get('schema')}, not {SCHEMA}")
    contents = Contents.read(header["contents"])
    named = _PART_NAME.fullmatch(path.name)
    part, parts = int(header["part"]), int(header["parts"])
    if named and (int(named["part"]), int(named["parts"])) != (part, parts):
        raise DataError(f"{path} holds part {part} of {parts} of {contents.name}: give it back that name")
    return contents, header


def _read_part(path: Path) -> Rows:
    contents, header = _read_header(path)
    rows: Rows = {}
    with np.load(path, allow_pickle=False) as arrays:
        for split, (total, *shape) in contents.shapes.items():
            bounds = _bounds(total, header["part"], header["parts"])
            images = np.empty((bounds.stop - bounds.start, *shape), np.uint8)
            pixels, sizes = memoryview(arrays[f"{split}_pixels"]), arrays[f"{split}_sizes"]
            spans = itertools.pairwise([0, *sizes.ravel().cumsum().tolist()])
            for block, lengths in zip(blocks(images.shape), sizes, strict=True):
                streams = [pixels[slice(*span)] for span in itertools.islice(spans, len(lengths))]
                images[block] = decode(streams, images[block].shape)
            labels = arrays[f"{split}_labels"].astype(np.int64)
            if fingerprint(images, labels, contents.class_names) != header["fingerprints"][split]:
                raise DataError(f"{path} is damaged: its {split} images are not those that were packed, copy it again")
            rows[split] = images, labels
    return rows
