"""Audits on disk: JSON for counts, npz for what a model predicts image by image; each written whole or not at all."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustfair.checkpoint import read_json, write_bytes
from robustfair.errors import CheckpointError


def paths(path: Path) -> tuple[Path, Path]:
    """The JSON and npz files of one audit. The stem may hold dots, so only our own suffixes are cut off.

    >>> [path.name for path in paths(Path("audit/clean,pgd-20.json"))]
    ['clean,pgd-20.json', 'clean,pgd-20.npz']
    """
    stem = path.name.removesuffix(".json").removesuffix(".npz")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.npz")


def points_path(json_path: Path) -> Path:
    """Where the attacked images of an audit lie, if they were kept."""
    return json_path.with_name(f"{json_path.name.removesuffix('.json')}.points.safetensors")


def write_arrays(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write tensors on the CPU by name, compressed and without pickle; an earlier file is replaced."""
    content = io.BytesIO()
    np.savez_compressed(content, **{name: column.numpy() for name, column in columns.items()})  # type: ignore[arg-type]
    write_bytes(path, content.getbuffer())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, with text by name in the header; an earlier file is replaced."""
    write_bytes(path, save({name: value.contiguous() for name, value in tensors.items()}, dict(header or {})))


def left_beside(path: Path) -> list[Path]:
    """What writings of `path` left that were killed."""
    return [file for file in path.parent.glob(".*.tmp") if file.name.startswith(f".{path.name}.")]


def read_arrays(path: Path) -> dict[str, Tensor]:
    """What `write_arrays` wrote.

    Raises:
        CheckpointError: the file is cut or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): the file is cut or damaged") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote.

    Raises:
        CheckpointError: the file is cut or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): the file is cut or damaged") from None


def read_pair(json_path: Path, npz_path: Path, *schemas: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of an audit hold.

    Raises:
        CheckpointError: one is missing, cut or foreign.
    """
    for missing in (file for file in (json_path, npz_path) if not file.is_file()):
        raise CheckpointError(f"{missing} does not exist: an audit is a .json file and the .npz file beside it")
    return read_json(json_path, *schemas), read_arrays(npz_path)


def as_json(value: Any) -> Any:
    """Tensors and tuples as lists, numbers that are not finite as null.

    >>> as_json({"rate": (0.5, float("nan"))})
    {'rate': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
