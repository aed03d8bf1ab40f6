"""A run that takes a third of a second, and what a folder holds before and after a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CFA = "trades(beta=2) + ccm(begin=1) + ccr(begin=1) + ema(decay=0.5)"

TINY: dict[str, Any] = {
    "data": "digits",
    "model": "small-cnn",
    "width": 4,
    "limit_per_class": 20,
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.5,
    "schedule": "constant",
    "eps": "0.1",
    "steps": 1,
    "validation": 0.3,
    "device": "cpu",
}
"""Keys of a recipe. With `CFA` selection takes the average of the first epoch: best, last and average all differ."""

BRIEF = """
data: digits
limit_per_class: 12
model: small-cnn
width: 4
epochs: 1
batch_size: 32
steps: 1
eps: 0.1
validation: 0.25
select: last
"""
"""The keys that the files of brief recipes of stages begin with."""

CLOCK = ("seconds", "images_per_second")
"""Keys of a history record that no two runs share."""


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below `root` with its bytes; None for a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def changes(before: dict[str, bytes | None], after: dict[str, bytes | None]) -> list[str]:
    """Paths that are new, gone or changed."""
    return sorted(
        path for path in before.keys() | after.keys() if before.get(path, "absent") != after.get(path, "absent")
    )


def history(run: Path) -> list[dict[str, Any]]:
    """The records of a run without those of the clock."""
    file = run / "history.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def tensors(run: Path) -> dict[str, bytes | None]:
    """The bytes of every tensor file of a run, by its path: two runs are the same if these are."""
    return {name: content for name, content in tree(run / "checkpoints").items() if name.endswith(".safetensors")}


def cut_in_half(file: Path) -> None:
    """What a full disk or a broken copy leaves."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
