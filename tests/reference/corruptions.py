"""The deterministic parts of the common corruptions, pixel by pixel in float64, one image at a time.

Planes are (H, W), images (H, W, C), both in [0, 1] unless a name says levels (0 to 255).
"""

from __future__ import annotations

import colorsys
import heapq
import itertools
import math

import numpy as np


def fold(position: int, size: int, border: str) -> int:
    """Walk from `position` into 0 to size - 1: abc with "reflect" is cba|abc|cba, with "reflect-101" cb|abc|ba."""
    while not 0 <= position < size:
        if border == "nearest":
            position = 0 if position < 0 else size - 1
        elif border == "reflect":
            position = -position - 1 if position < 0 else 2 * size - 1 - position
        else:
            position = -position if position < 0 else 2 * size - 2 - position
    return position


def each_plane(function, image: np.ndarray, *args) -> np.ndarray:
    return np.stack([function(image[..., c], *args) for c in range(image.shape[2])], axis=2)


def gaussian_blur(plane: np.ndarray, sigma: float, truncate: float = 4.0, border: str = "nearest") -> np.ndarray:
    reach = int(truncate * sigma + 0.5)
    steps = range(-reach, reach + 1)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) if sigma else 1.0 for k in steps]
    height, width = plane.shape
    out = np.zeros((height, width))
    for row, column in itertools.product(range(height), range(width)):
        for (i, a), (j, b) in itertools.product(zip(steps, weights, strict=True), repeat=2):
            out[row, column] += a * b * plane[fold(row + i, height, border), fold(column + j, width, border)]
    return out / sum(weights) ** 2


def correlate(plane: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    reach = len(kernel) // 2
    height, width = plane.shape
    out = np.zeros((height, width))
    for row, column in itertools.product(range(height), range(width)):
        for i, j in itertools.product(range(-reach, reach + 1), repeat=2):
            source = fold(row + i, height, "reflect-101"), fold(column + j, width, "reflect-101")
            out[row, column] += kernel[i + reach, j + reach] * plane[source]
    return out


def disk(radius: float, alias: float) -> np.ndarray:
    """On the whole grid of 17 pixels or more, zeros included."""
    reach, soft = (8, 1) if radius <= 8 else (int(radius), 2)
    line = range(-reach, reach + 1)
    hard = np.array([[1.0 if x * x + y * y <= radius * radius else 0.0 for x in line] for y in line])
    soften = np.array([[math.exp(-(x * x + y * y) / (2 * alias**2)) for x in range(-soft, soft + 1)]
                       for y in range(-soft, soft + 1)])  # fmt: skip
    kernel = correlate(hard, soften)
    return kernel / kernel.sum()


def motion_blur(plane: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    height, width = plane.shape
    out, total = np.zeros((height, width)), 0.0
    for k in range(2 * radius + 1):
        weight = math.exp(-(k**2) / (2 * sigma**2))
        down = math.ceil(k * math.sin(math.radians(degrees)) - 0.5)
        right = math.ceil(k * math.cos(math.radians(degrees)) - 0.5)
        for row, column in itertools.product(range(height), range(width)):
            source = fold(row + down, height, "nearest"), fold(column + right, width, "nearest")
            out[row, column] += weight * plane[source]
        total += weight
    return out / total


def glass_walk(levels: np.ndarray, shifts: np.ndarray, reach: int) -> np.ndarray:
    """The generator's own statement on (H, W, C): both sides are views of one array, so the second pixel is kept."""
    x = levels.copy()
    height, width = x.shape[:2]
    for k in range(len(shifts)):
        for i, h in enumerate(range(height - reach, reach, -1)):
            for j, w in enumerate(range(width - reach, reach, -1)):
                dx, dy = shifts[k, i, j]
                h_other, w_other = h + dy, w + dx
                x[h, w], x[h_other, w_other] = x[h_other, w_other], x[h, w]
    return x


def contrast(plane: np.ndarray, factor: float) -> np.ndarray:
    mean = math.fsum(plane.flat) / plane.size
    return np.array([[(value - mean) * factor + mean for value in row] for row in plane])


def brightness(image: np.ndarray, added: float) -> np.ndarray:
    return _through_hsv(image, lambda h, s, v: (h, s, min(1.0, v + added)))


def saturate(image: np.ndarray, factor: float, added: float) -> np.ndarray:
    return _through_hsv(image, lambda h, s, v: (h, min(1.0, max(0.0, s * factor + added)), v))


def _through_hsv(image: np.ndarray, change) -> np.ndarray:
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        out[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*image[place])))
    return out


def bilinear(plane: np.ndarray, row: float, column: float, border: str) -> float:
    height, width = plane.shape
    top, left = math.floor(row), math.floor(column)
    total = 0.0
    for i, j in itertools.product((0, 1), repeat=2):
        weight = (1 - abs(row - top - i)) * (1 - abs(column - left - j))
        total += weight * plane[fold(top + i, height, border), fold(left + j, width, border)]
    return total


def warp(plane: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Solve for the affine map from moved corners back to the corners, points as (right, down)."""
    height, width = plane.shape
    reach = min(height, width) // 3
    centre = np.array([width // 2, height // 2], dtype=float)
    corners = np.array([centre + reach, centre + np.array([reach, -reach]), centre - reach])
    moved = np.column_stack([corners + shifts, np.ones(3)])
    back = np.linalg.solve(moved, corners)
    out = np.empty((height, width))
    for row, column in itertools.product(range(height), range(width)):
        x, y = np.array([column, row, 1.0]) @ back
        out[row, column] = bilinear(plane, y, x, "reflect-101")
    return out


def bend(plane: np.ndarray, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    out = np.empty_like(plane)
    for row, column in np.ndindex(plane.shape):
        out[row, column] = bilinear(plane, row + down[row, column], column + right[row, column], "reflect")
    return out


def height_map(noise: np.ndarray, decay: float) -> np.ndarray:
    """Diamond-square with joined edges, point by point."""
    side = len(noise)
    heights = np.full((side, side), np.nan)
    heights[0, 0] = 0.0
    step, amplitude = side, 100.0

    def put(row: int, column: int, neighbours: list[tuple[int, int]]) -> None:
        values = [heights[(row + i) % side, (column + j) % side] for i, j in neighbours]
        heights[row, column] = sum(values) / 4 + amplitude * amplitude * noise[row, column]

    while step >= 2:
        half = step // 2
        for row, column in itertools.product(range(half, side, step), repeat=2):
            put(row, column, [(-half, -half), (-half, half), (half, -half), (half, half)])
        across = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for row, column in itertools.product(range(0, side, step), range(half, side, step)):
            put(row, column, across)
        for row, column in itertools.product(range(half, side, step), range(0, side, step)):
            put(row, column, across)
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def fog(image: np.ndarray, heights: np.ndarray, strength: float) -> np.ndarray:
    brightest = image.max()
    return np.array(
        [
            [[(value + strength * heights[r, c]) * brightest / (brightest + strength) for value in image[r, c]]
             for c in range(image.shape[1])]
            for r in range(image.shape[0])
        ]
    )  # fmt: skip


def canny(levels: np.ndarray, low: float = 50, high: float = 150) -> np.ndarray:
    height, width = levels.shape

    def at(row: int, column: int) -> int:
        return int(levels[fold(row, height, "nearest"), fold(column, width, "nearest")])

    slopes = np.zeros((height, width, 2), dtype=int)
    for r, c in np.ndindex(height, width):
        for k, weight in ((-1, 1), (0, 2), (1, 1)):
            slopes[r, c, 0] += weight * (at(r + k, c + 1) - at(r + k, c - 1))
            slopes[r, c, 1] += weight * (at(r + 1, c + k) - at(r - 1, c + k))

    def strength(row: int, column: int) -> int:
        inside = 0 <= row < height and 0 <= column < width
        return int(abs(slopes[row, column]).sum()) if inside else 0

    thin = set()
    for r, c in np.ndindex(height, width):
        (dx, dy), own = slopes[r, c], strength(r, c)
        if own <= low:
            continue
        angle = math.degrees(math.atan2(abs(dy), abs(dx)))
        if angle < 22.5:
            keep = own > strength(r, c - 1) and own >= strength(r, c + 1)
        elif angle > 67.5:
            keep = own > strength(r - 1, c) and own >= strength(r + 1, c)
        else:
            side = 1 if dx * dy >= 0 else -1
            keep = own > strength(r - 1, c - side) and own > strength(r + 1, c + side)
        if keep:
            thin.add((r, c))
    found = np.zeros((height, width), dtype=bool)
    waiting = [place for place in thin if strength(*place) > high]
    while waiting:
        r, c = waiting.pop()
        if not found[r, c]:
            found[r, c] = True
            around = ((r + i, c + j) for i, j in itertools.product((-1, 0, 1), repeat=2))
            waiting += [place for place in around if place in thin]
    return found


def distance(marked: np.ndarray, farthest: float = 20.0) -> np.ndarray:
    """Dijkstra's shortest ways in steps of 1, 1.4 (diagonal) and 2.1969 (knight)."""
    steps = [(i, j, {1: 1.0, 2: 1.4, 5: 2.1969}[i * i + j * j])
             for i, j in itertools.product(range(-2, 3), repeat=2) if i * i + j * j in (1, 2, 5)]  # fmt: skip
    out = np.full(marked.shape, farthest)
    queue = [(0.0, int(r), int(c)) for r, c in zip(*np.nonzero(marked), strict=True)]
    while queue:
        length, row, column = heapq.heappop(queue)
        inside = 0 <= row < marked.shape[0] and 0 <= column < marked.shape[1]
        if inside and (length < out[row, column]):
            out[row, column] = length
            for i, j, more in steps:
                heapq.heappush(queue, (length + more, row + i, column + j))
    return out


def equalise(levels: np.ndarray) -> np.ndarray:
    values = sorted(int(value) for value in levels.flat)
    lowest = values.count(values[0])
    if lowest == len(values):
        return levels.astype(float)
    table = {v: round((sum(w <= v for w in values) - lowest) * 255 / (len(values) - lowest)) for v in set(values)}
    return np.array([[float(table[int(value)]) for value in row] for row in levels])


def water(levels: np.ndarray, strength: float) -> np.ndarray:
    box = np.ones((3, 3))
    depth = np.floor(correlate(distance(canny(levels)), box) / 9 + 1e-9)
    relief = correlate(equalise(depth), np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])).clip(0, 255)
    shine = levels * np.rint(correlate(relief, box) / 9)
    return strength * shine / shine.max() if shine.any() else shine
