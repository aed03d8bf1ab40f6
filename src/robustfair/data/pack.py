"""Packed data sets: a few small `.npz` files, lossless, read back with numpy and the standard library alone.

A pixel is guessed from its left, upper and upper-left neighbours by the median edge detector of LOCO-I (Weinberger,
Seroussi and Sapiro, IEEE Trans. Image Processing 9(8), 2000). Of colour images green is coded so, the other channels as
their difference to it. The error of the guess, modulo 256, goes into one of eight streams, by how much the neighbours
differ, and every stream gets Huffman codes of its own from zlib, where LOCO-I adapts a Golomb code per context. The
guess needs earlier anti-diagonals only, so that decoding takes a whole one of many images at a time.

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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

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
_CONTEXTS = 8
_LEVELS = (2, 5, 9, 14, 21, 32, 52)
"""Sum of two differences between neighbours up to which a pixel is in context 0, 1, ...: about even on photographs."""
_CONTEXT_OF = np.searchsorted(_LEVELS, np.arange(4 * 255 + 1)).astype(np.uint8)
_BLOCK_PIXELS = 2**22
"""Pixels of a channel that are coded together; part of the format, and what bounds the memory of decoding."""


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
        streams = [_encode(images[block]) for block in _blocks(images.shape)]
        lengths = [[len(stream) for stream in block] for block in streams]
        pixels = b"".join(stream for block in streams for stream in block)
        arrays[f"{split}_labels"] = labels.astype(smallest)
        arrays[f"{split}_pixels"] = np.frombuffer(pixels, np.uint8)
        arrays[f"{split}_sizes"] = np.array(lengths, np.int64).reshape(len(streams), images.shape[1] * _CONTEXTS)
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
            for block, lengths in zip(_blocks(images.shape), sizes, strict=True):
                streams = [pixels[slice(*span)] for span in itertools.islice(spans, len(lengths))]
                images[block] = _decode(streams, images[block].shape)
            labels = arrays[f"{split}_labels"].astype(np.int64)
            if fingerprint(images, labels, contents.class_names) != header["fingerprints"][split]:
                raise DataError(f"{path} is damaged: its {split} images are not those that were packed, copy it again")
            rows[split] = images, labels
    return rows


# Pixels


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows that are coded together, for images (N, C, H, W)."""
    step = max(1, _BLOCK_PIXELS // (shape[2] * shape[3]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _encode(images: np.ndarray) -> list[bytes]:
    """uint8 (N, C, H, W) to C * 8 streams."""
    count, _, height, width = images.shape
    order = np.concatenate(_diagonals(height, width))
    planes = images.transpose(1, 2, 3, 0).astype(np.int16)
    first, *others = _channel_order(len(planes))
    streams = []
    for plane in (planes[first], *(planes[channel] - planes[first] for channel in others)):
        padded = np.zeros((height + 1, width + 1, count), np.int16)
        padded[1:, 1:] = plane
        guess, context = _predict(padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1])
        error = (plane - guess).astype(np.uint8).reshape(-1, count)[order]
        context = context.reshape(-1, count)[order]
        streams += [_huffman(error[context == number]) for number in range(_CONTEXTS)]
    return streams


def _decode(streams: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
    """The inverse of `_encode`, for images of `shape` (N, C, H, W)."""
    count, channels, height, width = shape
    stride = width + 1
    # Position of every pixel in a plane that has one row of zeros above and one column of zeros before it.
    diagonals = [(at // width + 1) * stride + at % width + 1 for at in _diagonals(height, width)]
    images = np.empty((channels, height, width, count), np.uint8)
    base = np.zeros(((height + 1) * stride, count), np.int16)
    for position, channel in enumerate(_channel_order(channels)):
        errors = [_Stream(part) for part in streams[position * _CONTEXTS : (position + 1) * _CONTEXTS]]
        plane = np.zeros_like(base)
        for at in diagonals:
            guess, context = _predict(plane[at - 1], plane[at - stride], plane[at - stride - 1])
            error = np.empty(context.shape, np.uint8)
            for number, stream in enumerate(errors):
                here = context == number
                error[here] = stream.take(int(np.count_nonzero(here)))
            plane[at] = ((error + guess + base[at]) & 255) - base[at]
        images[channel] = (plane + base).reshape(height + 1, stride, count)[1:, 1:]
        if position == 0:
            base = plane
    return images.transpose(3, 0, 1, 2)


class _Stream:
    """Errors of one context, taken from the front."""

    def __init__(self, packed: memoryview) -> None:
        self._values = np.frombuffer(zlib.decompress(packed), np.uint8)
        self._taken = 0

    def take(self, count: int) -> np.ndarray:
        self._taken += count
        return self._values[self._taken - count : self._taken]


def _predict(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of left, above and left + above - corner, and the context: how much the three differ."""
    guess = np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))
    return guess, _CONTEXT_OF[np.abs(left - corner) + np.abs(corner - above)]


def _channel_order(channels: int) -> list[int]:
    """The middle channel (green) first: the others are coded by their difference to it.

    >>> _channel_order(3), _channel_order(1)
    ([1, 0, 2], [0])
    """
    middle = channels // 2
    return [middle, *(channel for channel in range(channels) if channel != middle)]


def _diagonals(height: int, width: int) -> list[np.ndarray]:
    """Row-major positions of each anti-diagonal, from the upper left corner on.

    >>> [positions.tolist() for positions in _diagonals(2, 3)]
    [[0], [1, 3], [2, 4], [5]]
    """
    row, column = np.divmod(np.arange(height * width), width)
    order = np.argsort(row + column, kind="stable")
    return np.split(order, np.cumsum(np.bincount(row + column))[:-1])


def _huffman(values: np.ndarray) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(values.tobytes()) + coder.flush()
