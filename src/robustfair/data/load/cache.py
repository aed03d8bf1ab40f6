"""Decoded data sets on disk: one safetensors file a part, written whole or not at all.

The file's key says where the pixels came from; a file that is missing, cut or not ours reads as None and is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from robustfair.grammar import read_path

VERSION = 1
"""Part of every key: raise it when decoding gives other pixels for the same source."""


def cache_root() -> Path:
    """`ROBUSTFAIR_CACHE`, else `$XDG_CACHE_HOME/robustfair`, else `~/.cache/robustfair`."""
    if own := os.environ.get("ROBUSTFAIR_CACHE"):
        return read_path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (read_path(shared) if shared else Path.home() / ".cache") / "robustfair"


def cache_path(root: Path, name: str, part: str, identity: object) -> Path:
    """The file of one part: readable name, then a key of everything the pixels depend on (`identity`, as JSON)."""
    digest = hashlib.sha256(json.dumps([VERSION, name, part, identity]).encode()).hexdigest()
    return root / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}-{part}-{digest[:20]}.safetensors"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and header of a cache file, memory-mapped, or None if it is not a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write atomically; a folder that cannot be written to costs a warning and the next decode, not this load.

    It is written in a folder of its own, where all that a killed writing leaves lies: the next one removes it. Of two
    at a time the first removes the other's, whose content is the same.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp"))
        save_file(dict(tensors), temporary / path.name, metadata=dict(header))
        with (temporary / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        (temporary / path.name).replace(path)
        for left in path.parent.glob(f".{path.stem}-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        found = read(path)
        if found is None or found[1] != dict(header):
            warnings.warn(f"decoded data is not cached, {path.parent} cannot be written: {error}", stacklevel=2)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
