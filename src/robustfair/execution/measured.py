"""What is fastest on this machine, by a few timed passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

TIMES = 3
"""How often a pass is timed; the fastest counts, since others on the machine can only slow it down."""
BETTER = 0.9
"""Share of the time of the first of several ways below which another is taken: timings are not exact."""


def seconds(run: Callable[[Tensor], object], images: Tensor) -> float:
    """Of the fastest of some passes of `run` on images (B, C, H, W), after one that is not timed."""
    taken = []
    for _ in range(TIMES + 1):
        _wait(images.device)
        began = time.perf_counter()
        run(images)
        _wait(images.device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def fastest(ways: Mapping[str, float]) -> str:
    """The way that takes the fewest seconds, or the first where none is clearly faster.

    >>> fastest({"fp32": 1.0, "bf16": 0.95}), fastest({"fp32": 1.0, "bf16": 0.5})
    ('fp32', 'bf16')
    """
    first, best = next(iter(ways)), min(ways, key=ways.__getitem__)
    return best if ways[best] < BETTER * ways[first] else first


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within it torch computes with so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
