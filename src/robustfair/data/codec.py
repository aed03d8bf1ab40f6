"""Lossless codec of small images: a pixel is predicted from its neighbours, and the errors get Huffman codes.

The prediction from the left, upper and upper-left neighbours is the median edge detector of LOCO-I (Weinberger,
Seroussi and Sapiro, IEEE Trans. Image Processing 9(8), 2000). Of colour images green is coded so, the other channels as
their difference to it. The error of the prediction, modulo 256, goes into one of eight streams, by how much the
neighbours differ, and every stream gets Huffman codes of its own from zlib, where LOCO-I adapts a Golomb code per
context. The prediction needs earlier anti-diagonals only, so that a whole one of many images is decoded at a time.

Lossless WebP, PNG and LZMA make larger files: `python -m benchmarks.pack`, benchmarks/NOTES.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

CONTEXTS = 8
"""Streams of a channel; a pixel goes into one by how much its neighbours differ."""
_LEVELS = (2, 5, 9, 14, 21, 32, 52)
"""Sum of two differences between neighbours up to which a pixel is in context 0, 1, ...: about even on photographs."""
_CONTEXT_OF = np.searchsorted(_LEVELS, np.arange(4 * 255 + 1)).astype(np.uint8)
_BLOCK_PIXELS = 2**22
"""Pixels of a channel that are coded together; part of the format, and what bounds the memory of decoding."""


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows that are coded together, for images (N, C, H, W)."""
    step = max(1, _BLOCK_PIXELS // (shape[2] * shape[3]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def encode(images: np.ndarray) -> list[bytes]:
    """uint8 (N, C, H, W) to C * 8 streams."""
    count, _, height, width = images.shape
    order = np.concatenate(_diagonals(height, width))
    planes = images.transpose(1, 2, 3, 0).astype(np.int16)
    first, *others = _channel_order(len(planes))
    streams = []
    for plane in (planes[first], *(planes[channel] - planes[first] for channel in others)):
        padded = np.zeros((height + 1, width + 1, count), np.int16)
        padded[1:, 1:] = plane
        predicted, context = _predict(padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1])
        error = (plane - predicted).astype(np.uint8).reshape(-1, count)[order]
        context = context.reshape(-1, count)[order]
        streams += [_huffman(error[context == number]) for number in range(CONTEXTS)]
    return streams


def decode(streams: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
    """The inverse of `encode`, for images of `shape` (N, C, H, W)."""
    count, channels, height, width = shape
    stride = width + 1
    # Position of every pixel in a plane that has one row of zeros above and one column of zeros before it.
    diagonals = [(at // width + 1) * stride + at % width + 1 for at in _diagonals(height, width)]
    images = np.empty((channels, height, width, count), np.uint8)
    base = np.zeros(((height + 1) * stride, count), np.int16)
    for position, channel in enumerate(_channel_order(channels)):
        errors = [_Stream(part) for part in streams[position * CONTEXTS : (position + 1) * CONTEXTS]]
        plane = np.zeros_like(base)
        for at in diagonals:
            predicted, context = _predict(plane[at - 1], plane[at - stride], plane[at - stride - 1])
            error = np.empty(context.shape, np.uint8)
            for number, stream in enumerate(errors):
                here = context == number
                error[here] = stream.take(int(np.count_nonzero(here)))
            plane[at] = ((error + predicted + base[at]) & 255) - base[at]
        images[channel] = (plane + base).reshape(height + 1, stride, count)[1:, 1:]
        if position == 0:
            base = plane
    return images.transpose(3, 0, 1, 2)


class _Stream:
    """Errors of one context, taken from the front."""

    def __init__(self, packed: memoryview) -> None:
        self._values = np.frombuffer(zlib.decompress(packed), np.uint8)
        self._taken = 0

    def take(self, count: int) -> np.ndarray:
        self._taken += count
        return self._values[self._taken - count : self._taken]


def _predict(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of left, above and left + above - corner, and the context: how much the three differ."""
    predicted = np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))
    return predicted, _CONTEXT_OF[np.abs(left - corner) + np.abs(corner - above)]


def _channel_order(channels: int) -> list[int]:
    """The middle channel (green) first: the others are coded by their difference to it.

    >>> _channel_order(3), _channel_order(1)
    ([1, 0, 2], [0])
    """
    middle = channels // 2
    return [middle, *(channel for channel in range(channels) if channel != middle)]


def _diagonals(height: int, width: int) -> list[np.ndarray]:
    """Row-major positions of each anti-diagonal, from the upper left corner on.

    >>> [positions.tolist() for positions in _diagonals(2, 3)]
    [[0], [1, 3], [2, 4], [5]]
    """
    row, column = np.divmod(np.arange(height * width), width)
    order = np.argsort(row + column, kind="stable")
    return np.split(order, np.cumsum(np.bincount(row + column))[:-1])


def _huffman(values: np.ndarray) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(values.tobytes()) + coder.flush()
