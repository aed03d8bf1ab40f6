"""Every file that is ours is written whole or not at all, and read with one line for what is cut or damaged."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustfair.errors import CheckpointError


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically and flushed; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a temporary file beside it, flushed to disk, renamed over it.

    Raises:
        OSError: it cannot be written; names `path`, not the temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, *schemas: str) -> dict[str, Any]:
    """Read a JSON object, of one of these schemas where any are given.

    Raises:
        CheckpointError: missing, cut, not JSON, or of another schema.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): the file is cut or damaged") from None
    if not isinstance(value, dict) or (schemas and value.get("schema") not in schemas):
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        known = " or ".join(map(repr, schemas))
        raise CheckpointError(f"{path} has schema {found!r}, not {known}: it was written by something else")
    return value


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
