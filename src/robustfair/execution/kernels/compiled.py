"""The kernels of `kernels.cpp`: compiled once for a machine, kept in the cache folder, and called from Python.

Everything can be computed without them, only slower. They need Linux and a C++ compiler such as g++; `missing` says why
they cannot be had.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustfair.data.load.cache import cache_root

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
WITHOUT_AVX512 = "-mno-avx512f"
COMPILERS = ("c++", "g++", "clang++")
POINTS, STRIDED_POINTS = 36, 81
NO_MEMORY = 1
LONGEST = 120.0
"""Seconds that compiling may take; it takes one."""


@dataclass(frozen=True)
class Pointwise:
    """What is done to each number of images (N, C, H, W), in this order, where it is given.

    Attributes:
        gate: signs as `Kernels.signs` makes room for them; a number whose sign is not set becomes zero.
        scale, shift: (C,), a factor and a summand.
        add: (N, C, H, W), another summand.
        positive: take the positive part.
        keep: takes the signs of what comes of it.
    """

    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: Tensor | None = None
    positive: bool = False
    keep: Tensor | None = None


NOTHING = Pointwise()
Scheme = Literal["plain", "strided", "spread"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""In the order of their numbers in `kernels.cpp`."""


@dataclass(frozen=True)
class Taps:
    """A convolution as a sum: the result at place (i, j) of a grid is made of the pixels (step i + down[t],
    step j + across[t]) for each tap t, and goes to pixel (spread i + first[0], spread j + first[1]).

    Attributes:
        weights: (K / b, T C, b), see `Kernels.taps_of`.
    """

    weights: Tensor
    down: tuple[int, ...]
    across: tuple[int, ...]
    step: int = 1
    spread: int = 1
    first: tuple[int, int] = (0, 0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid whose results lie in an image of so many."""
        down, across = (
            -(-(size - start) // self.spread) for size, start in zip((height, width), self.first, strict=True)
        )
        return max(down, 0), max(across, 0)


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels. All images are float32 (N, C, H, W) that lie channels last.

    Attributes:
        lanes: numbers in a register of the processor; channels must be a multiple.
    """

    code: ctypes.CDLL
    lanes: int

    def convolve(
        self,
        x: Tensor,
        weights: Tensor,
        before: Pointwise = NOTHING,
        after: Pointwise = NOTHING,
        *,
        scheme: Scheme = "plain",
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """A 3x3 convolution with padding one, or what `scheme` says, (N, C, H, W) -> (N, K, H', W').

        Args:
            weights: as `transformed` gives them for the scheme.
            before, after: done to `x` and to the sums; `before` adds no image.
            scheme: "plain" with stride one, "strided" with stride two, "spread" the gradient of the images of that.
            size: H' and W' of "spread", which two sizes of images come to.
            channels: K where it is no multiple of `lanes`; nothing is done after then.
        """
        images, read, height, width = x.shape
        out = weights.shape[1] * weights.shape[3]
        stored = out if channels is None else channels
        plain = (height, width) if scheme == "plain" else ((height + 1) // 2, (width + 1) // 2)
        shape = (images, stored, *(plain if size is None else size))
        y = torch.empty(shape, memory_format=torch.channels_last)
        first = (before.gate, before.scale, before.shift, before.keep)
        then = (after.gate, after.scale, after.shift, after.add, after.keep)
        sizes = (ctypes.c_int64 * 8)(images, height, width, read, *shape[2:], out, stored)
        numbers = (SCHEMES.index(scheme), before.positive, after.positive, torch.get_num_threads())
        _require(self.code.rf_convolve(*map(_address, (x, weights, y, *first, *then)), sizes, *numbers))
        return y

    def sum(
        self,
        x: Tensor,
        taps: Taps,
        shape: Sequence[int],
        before: Pointwise = NOTHING,
        after: Pointwise = NOTHING,
        *,
        into: Tensor | None = None,
    ) -> Tensor:
        """A convolution as the sum over its taps, at the places of a grid, (N, C, H, W) -> `shape` (N, K, H', W').

        Args:
            taps: what is read and where it goes; pixels of the result that no place of the grid goes to are left as
                they are.
            before, after: done to `x` (only a gate) and to the sums; nothing where channels are no multiple of `lanes`.
            into: where to write, may be `after.add`; None makes room.
        """
        y = torch.empty(tuple(shape), memory_format=torch.channels_last) if into is None else into
        images, channels, height, width = x.shape
        rows, columns = taps.grid(shape[2], shape[3])
        if 0 in (rows, columns):
            return y
        computed = taps.weights.shape[0] * taps.weights.shape[2]
        sizes = [images, height, width, channels, rows, columns, taps.step, shape[2], shape[3], computed, shape[1]]
        sizes += [taps.spread, *taps.first, len(taps.down)]
        given = (x, taps.weights, y, before.gate, after.gate, after.scale, after.shift, after.add, after.keep)
        lists = ((ctypes.c_int64 * len(values))(*values) for values in (sizes, taps.down, taps.across))
        _require(self.code.rf_sum(*map(_address, given), *lists, after.positive, torch.get_num_threads()))
        return y

    def pointwise(self, x: Tensor, done: Pointwise, *, into: Tensor | None = None) -> Tensor:
        """What `done` does to `x`; `into` may be `x`."""
        images, channels, height, width = x.shape
        y = torch.empty_like(x) if into is None else into
        given = (x, y, done.gate, done.scale, done.shift, done.add, done.keep)
        sizes = (images * height * width, channels, done.positive, torch.get_num_threads())
        self.code.rf_pointwise(*map(_address, given), *sizes)
        return y

    def squares(
        self,
        point: Tensor,
        x: Tensor,
        rows: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
        sign: Tensor,
        eps: float,
    ) -> Tensor:
        """(M, C, H, W) the images `rows` (M,) of `point`, inside a square each moved to clamp(x + eps sign, 0, 1).

        Args:
            point, x: (N, C, H, W).
            places: top and left of the squares and their sides, (M,) integers each, all inside the image.
            sign: (M, C), float32.
        """
        count, (channels, height, width) = len(rows), x.shape[1:]
        y = torch.empty((count, channels, height, width), memory_format=torch.channels_last)
        given = (point, x, y, *(part.contiguous() for part in (rows, *places, sign)))
        sizes = (count, height, width, channels, torch.get_num_threads())
        self.code.rf_squares(*map(_address, given), eps, *sizes)
        return y

    def signs(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Room for a bit a number of images of this shape, (N, H W C / 8)."""
        images, channels, height, width = shape
        return torch.empty((images, height * width * channels // 8), dtype=torch.uint8)

    def transformed(self, weight: Tensor, *, strided: bool = False, flipped: bool = False) -> Tensor:
        """Weights (K, C, 3, 3) as `convolve` takes them, (P, K / b, C, b): G g G^T of the paper, in blocks.

        Args:
            strided: for "strided", or flipped for "spread".
            flipped: of kernels whose rows and columns are taken in reverse.
        """
        weight = weight.detach()
        out, channels = weight.shape[:2]
        registers = -(-out // self.lanes)
        block = self.lanes * (2 if registers % 2 == 0 else 1)
        points = STRIDED_POINTS if strided else POINTS
        to = torch.empty(points, registers * self.lanes // block, channels, block)
        strides = (ctypes.c_int64 * 4)(*weight.stride())
        sizes = (out, channels, strides, flipped, strided, torch.get_num_threads())
        self.code.rf_transform(weight.data_ptr(), to.data_ptr(), *sizes)
        return to

    def taps_of(self, weight: Tensor, *, step: int, padding: tuple[int, int], dilation: int) -> Taps:
        """A convolution with weights (K, C, h, w) as the sum over its taps.

        Args:
            step: its stride.
            padding: rows above and columns beside the image.
            dilation: rows and columns from one of the kernel to the next.
        """
        height, width = weight.shape[2:]
        down = [row * dilation - padding[0] for row in range(height) for _ in range(width)]
        across = [column * dilation - padding[1] for _ in range(height) for column in range(width)]
        return self._taps(weight.detach().flatten(2).permute(2, 1, 0), down, across, step=step)

    def taps_back(self, weight: Tensor, *, step: int, padding: tuple[int, int], dilation: int) -> list[Taps]:
        """The gradient of its images: a sum for each remainder of rows and columns by the stride that has taps."""
        found = []
        for top, left in product(range(step), repeat=2):
            kernel, down, across = [], [], []
            for row, column in product(range(weight.shape[2]), range(weight.shape[3])):
                y, x = top + padding[0] - row * dilation, left + padding[1] - column * dilation
                if y % step == 0 and x % step == 0:
                    kernel.append(weight.detach()[:, :, row, column])
                    down.append(y // step)
                    across.append(x // step)
            if kernel:
                found.append(self._taps(torch.stack(kernel), down, across, spread=step, first=(top, left)))
        return found

    def _taps(self, weights: Tensor, down: list[int], across: list[int], **more: Any) -> Taps:
        """Taps of weights (T, C, K)."""
        flat = self._filled(weights).flatten(0, 1)
        return Taps(self._in_blocks(flat[None])[0], tuple(down), tuple(across), **more)

    def _filled(self, weights: Tensor) -> Tensor:
        """Weights (P, C, K) with zeros added, so that K fills registers."""
        return torch.nn.functional.pad(weights, (0, -weights.shape[2] % self.lanes))

    def _in_blocks(self, weights: Tensor) -> Tensor:
        """Weights (P, C, K) as (P, K / b, C, b), where b is as many as fill two registers, or one."""
        points, channels, out = weights.shape
        block = 2 * self.lanes if out % (2 * self.lanes) == 0 else self.lanes
        return weights.reshape(points, channels, out // block, block).transpose(1, 2).contiguous()


def is_plain(x: Tensor) -> bool:
    """Whether the kernels take images: float32 on a CPU that lie channels last."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


def kernels() -> Kernels | None:
    """The kernels, or None where they cannot be had."""
    return _loaded()[0]


def missing() -> str | None:
    """Why they cannot be had; None where they can."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[Kernels | None, str | None]:
    try:
        found = _load(_compiled())
        _check(found)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, str(error)
    return found, None


def _compiled() -> Path:
    """The library for this processor, compiled unless it is there.

    Raises:
        RuntimeError: it cannot be compiled here.
        OSError: it cannot be kept anywhere.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or capability not in ("AVX2", "AVX512"):
        raise RuntimeError("they are for Linux on processors with AVX2")
    compiler = _compiler()
    flags = FLAGS if capability == "AVX512" else (*FLAGS, WITHOUT_AVX512)
    folder = _own_folder()
    path = folder / f"kernels-{_identity(compiler, flags)}.so"
    if not path.exists():
        made = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            done = _run([*compiler, *flags, str(SOURCE), "-o", str(made)])
            if done.returncode != 0:
                first = (done.stderr.strip() or "no message").splitlines()[0]
                raise RuntimeError(f"{Path(compiler[0]).name} cannot compile them: {first}")
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
    return path


def _compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, which may hold arguments too, as in "ccache g++", or one of `COMPILERS`.

    Raises:
        RuntimeError: there is none.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        wanted = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError as error:
        raise RuntimeError(f"CXX={named} cannot be read: {error}") from error
    for name, *arguments in wanted:
        found = shutil.which(name)
        if found is not None:
            return [found, *arguments]
    if named:
        raise RuntimeError(f"no C++ compiler was found: there is no {named}, which CXX names")
    raise RuntimeError("no C++ compiler such as g++ was found")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What a command says, whatever the encoding of its words."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LONGEST,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _own_folder() -> Path:
    """A folder that nobody else writes to: code from it is run. One for this process where there is no such."""
    folder = cache_root() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="robustfair-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _identity(compiler: Sequence[str], flags: tuple[str, ...]) -> str:
    """Of everything that the library depends on."""
    version = _run([*compiler, "--version"])
    version.check_returncode()
    info = Path("/proc/cpuinfo")
    processor = next(
        (line for line in info.read_text(errors="replace").splitlines() if line.startswith("flags")), platform.machine()
    )
    parts = (SOURCE.read_bytes(), version.stdout.encode(), repr((*compiler[1:], *flags)).encode(), processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _load(path: Path) -> Kernels:
    library = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rf_convolve.argtypes = [pointer] * 13 + [number] * 4
    library.rf_sum.argtypes = [pointer] * 12 + [number] * 2
    library.rf_transform.argtypes = [pointer] * 2 + [size] * 2 + [pointer] + [number] * 3
    library.rf_transform.restype = None
    library.rf_pointwise.argtypes = [pointer] * 7 + [size] * 2 + [number] * 2
    library.rf_pointwise.restype = None
    library.rf_squares.argtypes = [pointer] * 8 + [ctypes.c_float] + [size] * 4 + [number]
    library.rf_squares.restype = None
    return Kernels(library, library.rf_lanes())


def _check(found: Kernels) -> None:
    """Refuse kernels that this compiler got wrong.

    Raises:
        RuntimeError: a convolution differs from torch's.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2 * found.lanes, 7, 5, generator=draw).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(found.lanes, 2 * found.lanes, 3, 3, generator=draw)
    wanted = torch.nn.functional.conv2d(x, weight, padding=1)
    apart = (found.convolve(x, found.transformed(weight)) - wanted).abs().max()
    if not apart <= 1e-4 * wanted.abs().max():
        raise RuntimeError("what the compiler made of them computes something else")


def _require(code: int) -> None:
    """Raise what a code of a kernel stands for."""
    if code == NO_MEMORY:
        raise MemoryError("no memory for the buffers of a convolution")
    if code:
        raise ValueError("no kernel does that before or after a convolution")


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()
