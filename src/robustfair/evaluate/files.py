"""Audits on disk: JSON for counts, npz for what a model predicts image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from robustfair.errors import CheckpointError
from robustfair.files import read_arrays, read_json


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


def read_pair(json_path: Path, npz_path: Path, *schemas: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of an audit hold.

    Raises:
        CheckpointError: one is missing, cut or foreign.
    """
    for missing in (file for file in (json_path, npz_path) if not file.is_file()):
        raise CheckpointError(f"{missing} does not exist: an audit is a .json file and the .npz file beside it")
    return read_json(json_path, *schemas), read_arrays(npz_path)
