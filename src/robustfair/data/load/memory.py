"""Whether decoded images fit in memory: said before the first of many is decoded, and refused where they do not."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from robustfair.errors import DataError, RobustFairWarning

LARGE = 10**9
"""Bytes of images from which on what they take is said before they are decoded."""
_SMALLEST_SIDE = 8
_GROUP = Path("/sys/fs/cgroup")


def require_memory(owner: str, count: int, shape: tuple[int, ...], *, doing: str = "decoding") -> None:
    """Say what `count` images of `shape` (C, H, W) take, where it is much, before they are there.

    All of them are held at a time, a byte a value, and training copies those that it trains on once more.

    Raises:
        DataError: it is more than is free; says which side of the images would fit.
    """
    channels, height, width = shape
    need, free = count * math.prod(shape), free_memory()
    images = f"{count:,} images of {height}x{width}"
    if free is not None and need > free:
        side = math.isqrt(free // (count * channels))
        hint = f"an `image_size` of at most {side} would fit" if side >= _SMALLEST_SIDE else "no size of them would fit"
        raise DataError(
            f"{owner}: {images} take {in_bytes(need)} of memory and {in_bytes(free)} are free: {hint}, or take fewer"
        )
    if need >= LARGE:
        text = f"{owner}: {doing} {images}, all held in memory, {in_bytes(need)}; training copies its part once more"
        warnings.warn(text, RobustFairWarning, stacklevel=2)


def free_memory() -> int | None:
    """Bytes that this process can take before the machine swaps, or the limit of its group ends it; None if unknown."""
    found = [free for free in (_of_machine(), _of_group()) if free is not None]
    return min(found, default=None)


def in_bytes(count: int) -> str:
    """Bytes in words.

    >>> in_bytes(200_370_000_000), in_bytes(7_526_400_000), in_bytes(180_000_000)
    ('200 GB', '7.53 GB', '0.18 GB')
    """
    return f"{count / 1e9:.3g} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"


def _of_machine() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_group() -> int | None:
    """What the control group of a container leaves; pages of files that it holds can be given back."""
    limit, used = _lines(_GROUP / "memory.max"), _lines(_GROUP / "memory.current")
    if not limit or not used or not limit[0].isdecimal():
        return None
    about = dict(line.split() for line in _lines(_GROUP / "memory.stat"))
    return max(int(limit[0]) - int(used[0]) + int(about.get("inactive_file", 0)), 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
