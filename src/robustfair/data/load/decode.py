"""Pictures (encoded bytes or files) to one uint8 array (N, C, H, W): decoded in threads, straight into their place."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robustfair.data.load.memory import require_memory
from robustfair.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_MAX_CLASSES = 100_000
_ORIENTATION = 0x0112
_MODES = {"1": "1-bit grey", "P": "palette"}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """All that a source holds, in memory.

    Attributes:
        parts: "train" and/or "test" -> images uint8 (N, C, H, W) and labels int64 (N,).
        class_names: (C,) names, shared by all parts.
        groups: (C,) super-class index per class, or None.
        group_names: names of the super-classes.
        notes: what was left out or converted, a line each.
    """

    parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None = None
    group_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Picture(NamedTuple):
    """One encoded image, and how an error names it."""

    where: str
    content: bytes | Path


def decode_parts(
    owner: str,
    parts: Mapping[str, tuple[Iterable[Sequence[Picture]], int]],
    image_size: int | None,
    converted: Counter[str],
) -> dict[str, np.ndarray]:
    """Decode the pictures of every part, with one (C, H, W); what all of them take is checked at the first.

    Args:
        parts: part -> its pictures in batches, and how many they are.
        converted: counts the pictures of every kind whose pixels are not kept as they are stored.

    Returns:
        Part -> uint8 (N, C, H, W).

    Raises:
        DataError: as `decode_pictures`; a part is empty, or the parts differ in height or width; or they do not fit in
            memory.
    """
    left = sum(count for _, count in parts.values())
    images = {}
    for part, (batches, count) in parts.items():
        images[part] = decode_pictures(owner, batches, count, image_size, converted, left=left)
        left -= count
    return share_shape(owner, images)


def decode_pictures(
    owner: str,
    batches: Iterable[Sequence[Picture]],
    count: int,
    image_size: int | None,
    converted: Counter[str] | None = None,
    *,
    left: int | None = None,
) -> np.ndarray:
    """Decode `count` pictures.

    Grey pictures stay one channel while all of them are grey; every mode but grey and RGB becomes RGB.

    Args:
        converted: counts the pictures of every kind whose pixels are not kept as they are stored.
        left: how many pictures will be held beside what is held now, where these are not all.

    Returns:
        uint8 (count, C, H, W).

    Raises:
        DataError: a picture cannot be decoded, or differs in size from the first and `image_size` is None; or there is
            no memory for all of them.
    """
    canvas = _Canvas(owner, count, count if left is None else left)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            pixels = pool.map(lambda picture: _decode(picture, image_size), batch)
            for picture, (array, changes) in zip(batch, pixels, strict=True):
                canvas.add(picture.where, array)
                if converted is not None:
                    converted.update(changes)
    if converted is not None and canvas.widened:
        converted["grey, among colour: repeated to RGB"] += canvas.widened
    return canvas.images


def conversion_notes(converted: Mapping[str, int]) -> tuple[str, ...]:
    """What `decode_pictures` counted, a line each.

    >>> conversion_notes({"CMYK to RGB": 2})
    ('converted: 2 images (CMYK to RGB)',)
    """
    return tuple(
        f"converted: {count:,} image{'s' if count > 1 else ''} ({kind})" for kind, count in sorted(converted.items())
    )


def resize_arrays(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Bring decoded images, uint8 (N, C, H, W), to `image_size`; None keeps them."""
    if image_size is None or images.shape[2:] == (image_size, image_size):
        return images
    from PIL import Image

    resized = np.empty((*images.shape[:2], image_size, image_size), dtype=np.uint8)
    for row, channels in enumerate(images):
        for plane, channel in enumerate(channels):
            resized[row, plane] = np.asarray(_fit(Image.fromarray(channel), image_size))
    return resized


def share_shape(owner: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give all parts one (C, H, W): grey parts beside colour ones become colour.

    Raises:
        DataError: a part is empty, or the parts differ in height or width.
    """
    for role, images in parts.items():
        if len(images) == 0:
            raise DataError(f"{owner}: the {role} part holds no images")
    sizes = {images.shape[2:] for images in parts.values()}
    if len(sizes) > 1:
        text = ", ".join(f"{role} {images.shape[2]}x{images.shape[3]}" for role, images in parts.items())
        raise DataError(f"{owner}: parts differ in size ({text}); pass `image_size` to bring all to one size")
    channels = max(images.shape[1] for images in parts.values())
    return {role: _widen(images, channels) for role, images in parts.items()}


def numbered_names(owner: str, labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """Names "0" to the highest label, for sources without names.

    Raises:
        DataError: the highest label cannot be a class index, all are -1, or the lowest is 1, which can mean two things.
    """
    held = [part for part in labels if len(part)]
    lowest = min((int(part.min()) for part in held), default=0)
    highest = max((int(part.max()) for part in held), default=-1)
    if highest >= _MAX_CLASSES:
        raise DataError(
            f"{owner}: labels outside the range, {highest} is no class index (at most {_MAX_CLASSES} classes)"
        )
    if held and highest == lowest == -1:
        raise DataError(f"{owner}: no image has a label (all are -1): name a data set with labels")
    if lowest == 1:
        raise DataError(
            f"{owner}: labels run from 1 to {highest} and none is 0: they count from one, or class 0 has no images. "
            "For the first store labels - 1; for the second name all classes (an .npz: the array class_names; a table: "
            "a ClassLabel column)"
        )
    return tuple(str(label) for label in range(highest + 1))


def super_classes(
    owner: str, labels: Mapping[str, np.ndarray], coarse: Mapping[str, np.ndarray], num_classes: int
) -> tuple[int, ...] | None:
    """Super-class per class, read off the images of all parts; None unless every class has an image to read it off.

    Raises:
        DataError: two images of one class are of two super-classes.
    """
    found: dict[int, int] = {}
    for part, classes in labels.items():
        for label, group in np.unique(np.stack([classes, coarse[part]], axis=1), axis=0).tolist():
            if found.setdefault(label, group) != group:
                raise DataError(f"{owner}: class {label} has two super-classes, {found[label]} and {group}")
    if set(found) != set(range(num_classes)):
        return None
    return tuple(found[label] for label in range(num_classes))


def bytes_hint(lowest: float, highest: float) -> str:
    """How to store images whose values are no bytes, by the range of the values.

    >>> bytes_hint(0.0, 1.0), bytes_hint(-2.1, 2.64)[:43]
    ('store (255 * x).round() as uint8', 'values from -2.1 to 2.64 look already norma')
    """
    if lowest < 0 or not highest <= 255:
        return (
            f"values from {lowest:.3g} to {highest:.3g} look already normalised, which a model does itself: "
            "store the pixels before that, as uint8 from 0 to 255"
        )
    return "store (255 * x).round() as uint8" if highest <= 1 else "store them as uint8"


def fingerprint(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Hexadecimal SHA-256 of pixels (N, C, H, W), labels (N,) and class names; of nothing else."""
    digest = hashlib.sha256(json.dumps([class_names, list(images.shape)]).encode())
    for array in (images, labels):
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


class _Canvas:
    """The array under construction: allocated at the first picture, widened once should colour follow grey."""

    def __init__(self, owner: str, count: int, left: int) -> None:
        self._owner, self._count, self._left, self._filled = owner, count, left, 0
        self._grey = 0
        self.images = np.empty((0, 1, 0, 0), dtype=np.uint8)

    @property
    def widened(self) -> int:
        """Grey pictures that were repeated to RGB."""
        return self._grey if self.images.shape[1] > 1 else 0

    def add(self, where: str, array: np.ndarray) -> None:
        """Append one picture, uint8 (C, H, W)."""
        if self._filled == 0:
            require_memory(self._owner, self._left, array.shape)
            self.images = np.empty((self._count, *array.shape), dtype=np.uint8)
        if array.shape[1:] != self.images.shape[2:]:
            got, first = (f"{height}x{width}" for height, width in (array.shape[1:], self.images.shape[2:]))
            raise DataError(
                f"{self._owner}: {where} is {got} pixels and the first image {first}; "
                "pass `image_size` to bring all to one size"
            )
        if array.shape[0] > self.images.shape[1]:
            self.images = _widen(self.images, array.shape[0])
        self.images[self._filled] = array
        self._grey += array.shape[0] == 1
        self._filled += 1


def _decode(picture: Picture, image_size: int | None) -> tuple[np.ndarray, list[str]]:
    """One picture, uint8 (C, H, W), and in what its pixels differ from the stored ones."""
    from PIL import Image, ImageOps

    source = io.BytesIO(picture.content) if isinstance(picture.content, bytes) else picture.content
    try:
        with Image.open(source) as image:
            changes = _changes(image)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has {image.mode} pixels; save it with 8 bits a channel")
            plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
            array = np.asarray(plain if image_size is None else _fit(plain, image_size))
    except Exception as error:  # the decoders raise whatever their format stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if (len(picture.content) if isinstance(picture.content, bytes) else _size(picture.content)) == 0:
            reason = "it is empty (0 bytes)"
        raise DataError(
            f"image {picture.where} cannot be decoded: {reason}; replace it, or remove it to leave it out"
        ) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1), changes


def _changes(image: Image.Image) -> list[str]:
    """What decoding will change in a picture that is open and not yet read."""
    changes = []
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        changes.append(f"{_MODES.get(image.mode, image.mode)} to RGB: transparency is dropped")
    elif image.mode not in ("L", "RGB"):
        changes.append(f"{_MODES.get(image.mode, image.mode)} to RGB")
    if ";16" in str(getattr(image, "tile", "")):
        changes.append("16 bits a channel to 8")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        changes.append("several frames: the first is kept")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        changes.append("turned as its EXIF orientation says")
    return changes


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the shorter side has `size` pixels, keep the centre square."""
    from PIL import Image, ImageOps

    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def _widen(images: np.ndarray, channels: int) -> np.ndarray:
    return images if images.shape[1] == channels else np.repeat(images, channels, axis=1)
