"""Image operations that the common corruptions are made of: batched, on the device of the images, float32 in and out.

Images are (B, C, H, W) in any range unless said. Any size of image takes any size of kernel. Products of matrices are
taken in float64: their sums then agree to far less than a grey level in any batch and on any device.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Border = Literal["nearest", "reflect", "reflect-101"]

EDGE_LOW, EDGE_HIGH = 50, 150
"""Thresholds of Canny's slopes."""
FARTHEST, FAR_PIXELS = 20.0, 16
"""Distances to an edge are cut off here; the longest jump that is tried on the way."""
MOVES = tuple(
    ((down, right), length)
    for one, other, length in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 1.4), (1, 2, 2.1969), (2, 1, 2.1969))
    for down in sorted({-one, one})
    for right in sorted({-other, other})
)
"""Steps to a neighbour in 5x5 pixels, and how long each is."""


# Blur


def smooth(x: Tensor, sigma: float, *, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Gaussian blur of (..., H, W), cut off at `truncate` sigmas; sigma 0 leaves the images as they are."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return x
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * sigma**2))
    weights /= weights.sum()
    down, across = (_band(size, weights, border).to(x.device) for size in x.shape[-2:])
    return (down @ x.double() @ across.T).to(x.dtype)


def _band(size: int, weights: Tensor, border: Border) -> Tensor:
    """(size, size) float64 that correlates one axis with `weights` (odd,), the border within: `matrix @ values`."""
    reach = len(weights) // 2
    source = _fold(torch.arange(size)[:, None] + torch.arange(-reach, reach + 1), size, border)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, weights.expand(size, -1))


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of (B, C, H, W) with one kernel (k, k), k odd; the border reflects and its pixel is not repeated."""
    height, width = x.shape[2:]
    reach = len(kernel) // 2
    rows, columns = (
        _fold(torch.arange(-reach, size + reach), size, "reflect-101").to(x.device) for size in (height, width)
    )
    padded = x[:, :, rows][..., columns]
    total = torch.zeros_like(x)
    for i, line in enumerate(kernel.tolist()):
        for j, weight in enumerate(line):
            if weight:
                total.add_(padded[:, :, i : i + height, j : j + width], alpha=weight)
    return total


def disk(radius: float, alias: float) -> Tensor:
    """Kernel (k, k) float64 of an anti-aliased disk, k odd, without the zeros around it; adds up to 1.

    Smoothing reflects at the edge of the grid, where the largest disks gain one percent: that is divided out again.

    >>> disk(1, 0.1).mul(5).round(decimals=4).tolist()
    [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    """
    reach, soft = (8, 1) if radius <= 8 else (math.floor(radius), 2)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (line.square() + line.square()[:, None] <= radius**2).double()
    weights = torch.exp(-(torch.arange(-soft, soft + 1, dtype=torch.float64).square()) / (2 * alias**2))
    blur = _band(len(line), weights / weights.sum(), "reflect-101")
    kernel = blur @ inside @ blur.T
    kernel /= kernel.sum()
    empty = int((kernel.sum(0) < 1e-12).sum()) // 2
    return kernel[empty : len(line) - empty, empty : len(line) - empty]


def move(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """One-sided motion blur of (B, C, H, W) along an angle an image (B,), clockwise from the right; edges repeat.

    A line of 2 * radius + 1 pixels, each rounded to the grid, with weights exp(-k^2 / (2 sigma^2)) that add up to 1.
    """
    height, width = x.shape[2:]
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights /= weights.sum()
    angle = torch.deg2rad(degrees.cpu().double())[:, None]
    down, right = ((steps * part - 0.5).ceil().long() for part in (angle.sin(), angle.cos()))
    rows = _fold(torch.arange(height) + down[..., None], height, "nearest").to(x.device)
    columns = _fold(torch.arange(width) + right[..., None], width, "nearest").to(x.device)
    moved = torch.zeros_like(x)
    for k, weight in enumerate(weights.tolist()):
        if weight > 1e-9:
            source = rows[:, k, :, None] * width + columns[:, k, None, :]
            moved.add_(take(x, source.flatten(1)), alpha=weight)
    return moved


# Moving pixels


def take(x: Tensor, source: Tensor) -> Tensor:
    """Pixels of (B, C, H, W) at positions (B, H * W) of the flat image."""
    return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def shuffled(shifts: Tensor, height: int, width: int, reach: int) -> Tensor:
    """Where each pixel comes from after glass blur's walk, on which every pixel takes the value of a shifted one.

    The walk goes from (height - reach, width - reach) down to (reach + 1, reach + 1), for the whole batch at once. The
    generator writes it as a swap of two array views, which share their memory: in effect the second pixel keeps its
    value, and so it does in the published files.

    Args:
        shifts: (B, iterations, height - 2 * reach, width - 2 * reach, 2) int8 on the CPU, columns then rows, in the
            order of the walk.

    Returns:
        (B, height * width) int64 positions in the flat image before the walk.
    """
    batch, iterations = shifts.shape[:2]
    source = np.repeat(np.arange(height * width), batch)
    across, down = shifts.permute(4, 1, 2, 3, 0).numpy()
    for k in range(iterations):
        for i, row in enumerate(range(height - reach, reach, -1)):
            jumps = (across[k, i] + down[k, i].astype(np.int64) * width) * batch + np.arange(batch)
            for j, column in enumerate(range(width - reach, reach, -1)):
                here = (row * width + column) * batch
                source[here : here + batch] = source[here + jumps[j]]
    return torch.from_numpy(source.reshape(height * width, batch).T.copy())


def zoom_grid(size: int, factor: float) -> tuple[int, int]:
    """How many values in the middle of an axis are enlarged, and to how many; several factors may come to the same.

    >>> zoom_grid(32, 1.02), zoom_grid(32, 1.03)
    ((32, 33), (32, 33))
    """
    inner = math.ceil(size / factor)
    return inner, round(inner * factor)


def zoom(x: Tensor, down: tuple[int, int], across: tuple[int, int]) -> Tensor:
    """(B, C, H, W) enlarged about its centre by linear interpolation and cut to its size; a `zoom_grid` for each axis.

    The middle values are spread evenly, ends on ends; of the enlarged the middle ones remain.
    """
    for inner, grown in (down, across):
        size = x.shape[2]
        place = (torch.arange(size, dtype=torch.float64) + (grown - size) // 2) * ((inner - 1) / (grown - 1))
        low = place.floor().clamp_(max=inner - 2)
        first = (low.long() + (size - inner) // 2).to(x.device)
        between = (place - low)[:, None].to(x)
        # After either axis the other one takes its place: rows are what is fast to pick.
        x = torch.lerp(x.index_select(2, first), x.index_select(2, first + 1), between).transpose(2, 3).contiguous()
    return x


def warp(x: Tensor, shifts: Tensor) -> Tensor:
    """The affine maps of (B, C, H, W) that move three corners of a square about the centre by (B, 3, 2) pixels.

    The square reaches a third of the shorter side to each side of the centre; shifts are (right, down).
    """
    height, width = x.shape[2:]
    reach = min(height, width) // 3
    corners = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64, device=x.device) * reach
    corners += torch.tensor([width // 2, height // 2], device=x.device)
    moved = corners + shifts
    (a, b), (c, d) = (moved[:, 0] - moved[:, 1]).T, (moved[:, 2] - moved[:, 1]).T
    area = a * d - b * c
    # Corners on one line have no affine map; the smallest area takes the place of none.
    area = torch.where(area == 0, 1e-9, area)
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / area[:, None, None]
    back = inverse @ torch.stack([corners[0] - corners[1], corners[2] - corners[1]])
    right = torch.arange(width, device=x.device) - moved[:, 1, 0, None]
    down = torch.arange(height, device=x.device) - moved[:, 1, 1, None]
    columns, rows = (
        corners[1, axis]
        + right[:, None, :] * back[:, 0, axis, None, None]
        + down[..., None] * back[:, 1, axis, None, None]
        for axis in (0, 1)
    )
    return _sample(x, rows, columns, "reflect-101")


def bend(x: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Pixels read (B, H, W) to the right of and below their place, by bilinear interpolation; edges reflect."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None] + down
    columns = torch.arange(width, device=x.device) + right
    return _sample(x, rows, columns, "reflect")


def box_resize(levels: Tensor, height: int, width: int) -> Tensor:
    """Grey levels (B, C, H, W) float64 brought to a size with a box filter, to the bit as by Pillow's integers.

    The width first and then the height, with weights of 22 bits, rounded to whole levels after either.
    """

    def rounded(sums: Tensor) -> Tensor:
        return ((sums + 2.0**21) / 2.0**22).floor()

    across, down = (_box_weights(*sizes).to(levels) for sizes in ((levels.shape[3], width), (levels.shape[2], height)))
    return rounded(down @ rounded(levels @ across.T))


def _box_weights(size: int, wanted: int) -> Tensor:
    """(wanted, size) float64, weights times 2^22. The order of the sums decides ties, and is that of Pillow."""
    stride = size / wanted
    reach = max(1.0, stride)
    centre = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * stride)[:, None]
    pixel = torch.arange(size, dtype=torch.float64)
    place = (pixel - centre + 0.5) * (1 / reach)
    inside = (place > -0.5) & (place <= 0.5)
    inside &= (pixel >= (centre - 0.5 * reach + 0.5).floor()) & (pixel < (centre + 0.5 * reach + 0.5).floor())
    weights = inside.double()
    return (weights / weights.sum(1, keepdim=True) * 2.0**22 + 0.5).floor()


# Layers


def height_map(noise: Tensor, decay: float) -> Tensor:
    """Diamond-square height maps (B, side, side) in [0, 1], whose edges join, from draws on (-1, 1) of that shape.

    Each point is the mean of its four neighbours on the coarser grid plus amplitude^2 times its own draw. The amplitude
    begins at 100 and is divided by `decay` at every halving of the grid. The first corner is 0.
    """
    height = torch.zeros_like(noise)
    step, amplitude = noise.shape[1], 100.0

    def place(rows: slice, columns: slice, neighbours: Tensor) -> None:
        height[:, rows, columns] = neighbours / 4 + amplitude**2 * noise[:, rows, columns]

    while step >= 2:
        whole, half = slice(0, None, step), slice(step // 2, None, step)
        corners = height[:, whole, whole]
        below = corners + corners.roll(-1, 1)
        place(half, half, below + below.roll(-1, 2))
        middles = height[:, half, half]
        place(whole, half, middles + middles.roll(1, 1) + corners + corners.roll(-1, 2))
        place(half, whole, middles + middles.roll(1, 2) + corners + corners.roll(-1, 1))
        step, amplitude = step // 2, amplitude / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def edges(levels: Tensor) -> Tensor:
    """Canny edges (B, 1, H, W) bool of grey levels 0 to 255, with thresholds on the sum of both absolute slopes.

    Sobel slopes with repeated border pixels; a pixel stays if its slope exceeds that of its two neighbours across the
    edge (a tie with the right or lower one is allowed along the axes), and where a chain of such pixels leads to one
    above the higher threshold.
    """
    height, width = levels.shape[2:]
    padded = F.pad(levels, (1, 1, 1, 1), mode="replicate").int()
    across = padded[..., 2:] - padded[..., :-2]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = padded[..., 2:, :] - padded[..., :-2, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    slope = across.abs() + down.abs()
    around = F.pad(slope, (1, 1, 1, 1))

    def beside(rows: int, columns: int) -> Tensor:
        return around[..., 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    # tan 22.5 degrees with 15 bits: slopes of either axis, and in between those of the two diagonals.
    level = across.abs() * 13573
    upright = down.abs() << 15
    flat, steep = upright < level, upright > level + (across.abs() << 16)
    falling = (slope > beside(-1, -1)) & (slope > beside(1, 1))
    rising = (slope > beside(-1, 1)) & (slope > beside(1, -1))
    highest = torch.where((across ^ down) < 0, rising, falling)
    highest = torch.where(steep, (slope > beside(-1, 0)) & (slope >= beside(1, 0)), highest)
    highest = torch.where(flat, (slope > beside(0, -1)) & (slope >= beside(0, 1)), highest)
    candidates = highest & (slope > EDGE_LOW)
    found = candidates & (slope > EDGE_HIGH)
    while True:
        grown = candidates & (F.max_pool2d(found.float(), 3, 1, 1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown


def distance(marked: Tensor) -> Tensor:
    """Distance (B, 1, H, W) to the nearest marked pixel of the same image, at most 20, and 20 without one.

    The length of the shortest way in single, diagonal and knight's moves, as OpenCV approximates Euclid's. Any such way
    can take its moves one direction after the other, each in powers of two.
    """
    height, width = marked.shape[2:]
    nearest = torch.where(marked, 0.0, FARTHEST)
    for (down, right), length in MOVES:
        moves = 1
        while moves * length < FARTHEST:
            top, left = (FAR_PIXELS + moves * step for step in (down, right))
            around = F.pad(nearest, (FAR_PIXELS,) * 4, value=FARTHEST)
            nearest = torch.minimum(nearest, around[..., top : top + height, left : left + width] + moves * length)
            moves *= 2
    return nearest


def equalise(levels: Tensor) -> Tensor:
    """Grey levels (B, 1, H, W) spread so that their histogram is even; an image of one level stays as it is."""
    flat = levels.flatten(1).long()
    counts = torch.zeros(len(flat), 256, device=levels.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    lowest = counts.gather(1, flat.amin(1, keepdim=True))
    others = flat.shape[1] - lowest
    spread = ((counts.cumsum(1) - lowest) * (255 / others.clamp_min(1))).round()
    return torch.where(others > 0, spread.gather(1, flat), flat.float()).view_as(levels)


# Parts


def _fold(position: Tensor, size: int, border: Border) -> Tensor:
    """Positions outside 0 to size - 1 brought inside: the border repeated, or reflected with or without its pixel."""
    if border == "nearest":
        return position.clamp(0, size - 1)
    last = 2 * size - 1 if border == "reflect" else 2 * size - 2
    folded = position.remainder(2 * size if border == "reflect" else 2 * size - 2)
    return torch.minimum(folded, last - folded)


def _sample(x: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """Bilinear samples of (B, C, H, W) at real positions (B, H, W)."""
    height, width = x.shape[2:]
    top, left = rows.floor(), columns.floor()
    below, beside = ((rows - top)[:, None].to(x), (columns - left)[:, None].to(x))
    lines = [_fold(top.long() + step, height, border) * width for step in (0, 1)]
    places = [_fold(left.long() + step, width, border) for step in (0, 1)]
    upper, lower = (
        torch.lerp(take(x, (line + places[0]).flatten(1)), take(x, (line + places[1]).flatten(1)), beside)
        for line in lines
    )
    return torch.lerp(upper, lower, below)


_ROUNDING = 2.0**-8
"""A part of a grey level that float32 may have lost, and that truncation must not turn into a whole one."""


def as_levels(x: Tensor) -> Tensor:
    """Images in [0, 1] as whole grey levels, 0 to 255, truncated."""
    return (x.clamp(0, 1) * 255 + _ROUNDING).floor()
