"""Small data sets in the layouts that the loaders read, written with Pillow and pyarrow directly."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = {"_type": "Image"}


def class_label(names: Sequence[str]) -> dict[str, Any]:
    """The hub's description of a column of class indices."""
    return {"_type": "ClassLabel", "names": list(names)}


def pixels(count: int, *, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    """Random uint8 images (count, C, size, size)."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def picture(image: np.ndarray) -> Image.Image:
    """(C, H, W) with one or three channels as a Pillow image."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def png(image: np.ndarray) -> bytes:
    """(C, H, W) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def cells(images: np.ndarray) -> list[dict[str, Any]]:
    """Images as the hub stores them in a table."""
    return [{"bytes": png(image), "path": None} for image in images]


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], features: Mapping[str, Any] | None = None) -> None:
    """A parquet file with the hub's column types in its schema, or without them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": dict(features)}})})
    pq.write_table(table, path, row_group_size=3)


def write_images(root: Path, classes: Mapping[str, np.ndarray]) -> None:
    """An image folder: class name -> images (N, C, H, W)."""
    for name, images in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for position, image in enumerate(images):
            picture(image).save(root / name / f"{position:03d}.png")


def write_stl10(folder: Path, *, each: int = 1, unlabelled: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """STL-10's binary version, columns first and labels from 1: `each` images a class to train on, two to test on.

    Returns:
        The labelled images, the two last; those without labels.
    """
    folder.mkdir(parents=True)
    images, rest = pixels(10 * each + 2, size=96), pixels(unlabelled, size=96, seed=1)
    for name, rows, labels in (("train", images[:-2], [*range(1, 11)] * each), ("test", images[-2:], [10, 3])):
        (folder / f"{name}_X.bin").write_bytes(rows.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes(labels))
    (folder / "unlabeled_X.bin").write_bytes(rest.transpose(0, 1, 3, 2).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    (folder / "fold_indices.txt").write_text("0 1\n")
    return images, rest
