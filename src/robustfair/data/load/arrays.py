"""Arrays in files: which of them are the images and labels of which part, and in what form they are taken."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robustfair.data.load.decode import bytes_hint
from robustfair.data.load.parts import listed, role_of
from robustfair.errors import DataError

IMAGE_KEYS = ("images", "x", "image")
LABEL_KEYS = ("labels", "y", "label")


def array_keys(path: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Part -> "images", "labels" -> name of the array; and the names of arrays that are neither."""
    found: dict[str, dict[str, str]] = {}
    rest = []
    for name in names:
        first, _, behind = name.partition("_")
        before, _, last = name.rpartition("_")
        for role, key in ((role_of(first), behind), (role_of(last), before), ("", name)):
            what = "images" if key in IMAGE_KEYS else "labels" if key in LABEL_KEYS else None
            if role is not None and what is not None:
                other = found.setdefault(role, {}).setdefault(what, name)
                if other != name:
                    raise DataError(f"{path}: {other} and {name} both are the {what} of one part: keep one of them")
                break
        else:
            rest += [] if name == "class_names" else [name]
    plain = found.pop("", {})
    if not any("images" in keys for keys in found.values()):
        found = {"train": {**found.get("train", {}), **plain}}
    elif len(found) == 1:
        ((role, keys),) = found.items()
        if "images" in plain or ("labels" in plain and "labels" in keys):
            raise DataError(
                f"{path}: {listed(list(plain.values()))} beside {listed(list(keys.values()))}: a part of its own or "
                "the whole. Name the part of every array, as in train_images and test_images"
            )
        found = {role: {**plain, **keys}}
    elif plain:
        rest += plain.values()
    order = [role for role in ("train", "test", "validation") if role in found]
    return {role: found[role] for role in order}, rest


def load_npz(path: Path) -> np.lib.npyio.NpzFile:
    """An archive of arrays, opened.

    Raises:
        DataError: it is none, or cannot be read.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise DataError(f"{path} is no .npz archive")
    return arrays


def load_npy(path: Path) -> np.ndarray:
    """An array, mapped and not read.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def channels_first(path: Path, images: np.ndarray) -> np.ndarray:
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


def is_unlabelled(labels: np.ndarray) -> bool:
    """Whether labels (N,) say of every image that it has none."""
    return bool((labels == -1).all())


def class_indices(path: Path, labels: np.ndarray) -> np.ndarray:
    """Whole numbers (N,) or (N, 1) as int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        one = labels.dtype.kind in "biuf" and bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())
        reason = (
            "one-hot rows, or several labels an image that happen to be one: for the first store labels.argmax(1)"
            if one
            else "several labels an image (multi-label), where every image needs one class: store one number an image"
        )
        raise DataError(f"{path}: labels must be whole numbers (N,), got {labels.dtype} {labels.shape}: {reason}")
    if labels.ndim == 2:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be whole numbers (N,), got {labels.dtype} {labels.shape}")
    return labels.astype(np.int64)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
