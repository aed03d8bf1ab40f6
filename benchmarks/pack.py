"""Is the codec of packed data sets worth its code? Its size and time beside lossless WebP, PNG and LZMA.

The images of WebP and PNG are tiled: one below the other, as many as WebP's height allows, or in a square; or every
image is a file of its own. What is decoded is compared with what was encoded. One thread.
"""

from __future__ import annotations

import argparse
import io
import lzma
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.measure import Report, Row, Table
from benchmarks.workload import default_data, load
from robustfair.data.codec import CONTEXTS, blocks, decode, encode

TALLEST = 16383
"""Most pixels along a side of a WebP image."""
CIFAR10 = 60_000
MOST = 48.0
"""MB of a file that a pack of CIFAR-10 in two may have at most."""
COLUMNS = {
    "codec": "{codec}",
    "bytes an image": "{bytes:.0f}",
    "CIFAR-10 in two files, MB each": "{megabytes:.1f}",
    "encode, s a 1,000 images": "{encode:.2f}",
    "decode, s a 1,000 images": "{decode:.2f}",
}


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Images uint8 (N, C, H, W) to the parts of a file, and back."""

    name: str
    encode: Callable[[np.ndarray], list[bytes]]
    decode: Callable[[list[bytes], tuple[int, ...]], np.ndarray]


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.pack", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--data", default=default_data(), help="name or path of images, or synthetic")
    options.add_argument("--images", type=int, default=1000, help="the first ones of the training part")
    options.add_argument("--slowest", action="store_true", help="WebP at its slowest too: 25 s a 1,000 images")
    options.add_argument("--json", type=Path, metavar="PATH", help="write the report here too")
    options.add_argument("--force", action="store_true", help="let --json replace a file")
    options.set_defaults(device="cpu", threads=1)
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """A line a codec."""
    images = load(args.data, "train", args.images).images.numpy()
    rows = [measured(codec, images) for codec in codecs(slowest=args.slowest)]
    return Report(
        name="pack",
        settings={"data": args.data, "images": len(images), "pillow": Image.__version__},
        tables=[Table(f"Lossless, {len(images)} images", COLUMNS, rows)],
        notes=[f"A pack of CIFAR-10 in two files may have {MOST:.0f} MB a file, of a million bytes each."],
    )


def measured(codec: Codec, images: np.ndarray) -> Row:
    """Size and seconds of one codec."""
    began = time.perf_counter()
    parts = codec.encode(images)
    encoded = time.perf_counter()
    back = codec.decode(parts, images.shape)
    decoded = time.perf_counter()
    if not np.array_equal(back, images):
        raise AssertionError(f"{codec.name} is not lossless")
    size, thousands = sum(map(len, parts)) / len(images), len(images) / 1000
    measure.say(f"{codec.name}: {size:.0f} bytes an image")
    return {
        "codec": codec.name,
        "bytes": size,
        "megabytes": size * CIFAR10 / 2 / 1e6,
        "encode": (encoded - began) / thousands,
        "decode": (decoded - encoded) / thousands,
    }


def codecs(*, slowest: bool) -> Iterator[Codec]:
    """Ours, the pictures, and what the standard library makes of the bare bytes."""
    yield Codec(name="pack", encode=_pack, decode=_unpack)
    tilings = {"a column": 1, "a square": 22, "each its own": 0}
    efforts = {"": (4, 75), **({", slowest": (6, 100)} if slowest else {})}
    for effort, (method, quality) in efforts.items():
        for tiling, across in tilings.items():
            options = {"lossless": True, "exact": True, "method": method, "quality": quality}
            yield _picture(f"WebP{effort}, {tiling}", "WEBP", across, **options)
    yield _picture("PNG, a column", "PNG", 1, optimize=True)
    yield Codec(name="LZMA", encode=lambda images: [lzma.compress(images.tobytes())], decode=_unlzma)


def _pack(images: np.ndarray) -> list[bytes]:
    return [stream for block in blocks(images.shape) for stream in encode(images[block])]


def _unpack(parts: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    each = shape[1] * CONTEXTS
    return np.concatenate(
        [
            decode([memoryview(part) for part in parts[k * each : (k + 1) * each]], (rows, *shape[1:]))
            for k, rows in enumerate(block.stop - block.start for block in blocks(shape))
        ]
    )


def _unlzma(parts: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(lzma.decompress(parts[0]), np.uint8).reshape(shape)


def _picture(name: str, kind: str, across: int, **options: bool | int) -> Codec:
    """Tiles of `across` images a row, 0 for one file an image; the last row is filled up with black."""

    def runs(shape: tuple[int, ...]) -> list[slice]:
        count = across * (TALLEST // shape[2]) if across == 1 else across**2 if across else 1
        return [slice(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]

    def write(images: np.ndarray) -> list[bytes]:
        parts = []
        for run in runs(images.shape):
            file = io.BytesIO()
            Image.fromarray(_tile(images[run], max(1, across))).save(file, kind, **options)
            parts.append(file.getvalue())
        return parts

    def read(parts: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
        _, channels, height, width = shape
        pieces = []
        for part, run in zip(parts, runs(shape), strict=True):
            with Image.open(io.BytesIO(part)) as picture:
                tiled = np.asarray(picture.convert("RGB")).reshape(-1, height, max(1, across), width, channels)
            pieces.append(tiled.transpose(0, 2, 4, 1, 3).reshape(-1, *shape[1:])[: run.stop - run.start])
        return np.concatenate(pieces)

    return Codec(name=name, encode=write, decode=read)


def _tile(images: np.ndarray, across: int) -> np.ndarray:
    """(N, C, H, W) to one picture (rows * H, across * W, C)."""
    count, channels, height, width = images.shape
    filled = np.zeros((-(-count // across) * across, channels, height, width), np.uint8)
    filled[:count] = images
    rows = filled.reshape(-1, across, channels, height, width).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(rows.reshape(-1, across * width, channels))


if __name__ == "__main__":
    main()
