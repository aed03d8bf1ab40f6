"""One packed split read pixel by pixel in plain Python, from the description of the format alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CONTEXTS = 8
BLOCK_PIXELS = 2**22


def read_split(files: Sequence[Path], split: str) -> tuple[np.ndarray, list[int]]:
    """Images (N, C, H, W) and labels, the rows of all files one after the other."""
    images, labels = [], []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            _, channels, height, width = json.loads(str(arrays["robustfair.pack"]))["contents"]["shapes"][split]
            rows = arrays[f"{split}_labels"].tolist()
            pixels, sizes = arrays[f"{split}_pixels"].tobytes(), arrays[f"{split}_sizes"].tolist()
        at, left = 0, len(rows)
        for lengths in sizes:
            streams = []
            for length in lengths:
                streams.append(list(zlib.decompress(pixels[at : at + length])))
                at += length
            count = min(left, max(1, BLOCK_PIXELS // (height * width)))
            images.append(decode_block(streams, count, channels, height, width))
            left -= count
        assert at == len(pixels)
        assert left == 0
        labels += rows
    return np.concatenate(images), labels


def decode_block(streams: list[list[int]], count: int, channels: int, height: int, width: int) -> np.ndarray:
    """One block of images; consumes `streams`, one list per channel and context."""
    images = np.zeros((count, channels, height, width), int)
    middle = channels // 2
    for place, channel in enumerate(sorted(range(channels), key=lambda c: (c != middle, c))):
        plane = images[:, channel] * 0
        reference = images[:, middle] if place else plane.copy()
        for diagonal in range(height + width - 1):
            for row in range(height):
                column = diagonal - row
                for image in range(count if 0 <= column < width else 0):
                    left = int(plane[image, row, column - 1]) if column else 0
                    above = int(plane[image, row - 1, column]) if row else 0
                    corner = int(plane[image, row - 1, column - 1]) if row and column else 0
                    guess = sorted((left, above, left + above - corner))[1]
                    rough = abs(left - corner) + abs(corner - above)
                    context = sum(rough > level for level in (2, 5, 9, 14, 21, 32, 52))
                    error = streams[place * CONTEXTS + context].pop(0)
                    base = int(reference[image, row, column])
                    value = (base + guess + error) % 256
                    images[image, channel, row, column] = value
                    plane[image, row, column] = value - base
    assert not any(streams)
    return images.astype(np.uint8)
