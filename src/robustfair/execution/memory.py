"""How the C library of a CPU run treats freed memory: kept for the next pass, or given back to the system.

A forward and backward pass allocates and frees hundreds of megabytes. glibc's default hands large blocks back at every
free, and each new one then costs a page fault per 4 KiB, which is a fifth of the time of a float32 pass over 128
CIFAR-10 images (`python -m benchmarks.tried`). Nothing that is computed changes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's `mallopt`."""
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
DEFAULT = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))
"""Where glibc's own adaptive thresholds end once blocks of 32 MiB have been freed."""

_depth = 0


@contextmanager
def kept_memory(device: torch.device | str) -> Iterator[None]:
    """Keep freed memory inside this scope on a CPU under glibc; do nothing elsewhere. Scopes may nest.

    On leaving the outermost scope what is free goes back to the system.
    """
    global _depth
    libc = _glibc() if torch.device(device).type == "cpu" else None
    if libc is None:
        yield
        return
    _depth += 1
    if _depth == 1:
        _set(libc, KEEP)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _set(libc, DEFAULT)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _set(libc: ctypes.CDLL, options: tuple[tuple[int, int], ...]) -> None:
    for option, value in options:
        libc.mallopt(option, value)
