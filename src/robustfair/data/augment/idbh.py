"""IDBH augmentation and its CropShift, batched on the device: uint8 (B, C, H, W) in, float32 in [0, 1] out.

An image is mirrored with probability 1/2, loses rows and columns and is moved (CropShift), goes through exactly one of
eight operations on colour or shape, and loses a rectangle (RandomErasing). The operations equal Pillow's to the bit.
Every image takes the same steps, a gather, a blend and a look-up table, and a step that its operation does not need
changes nothing in it: no step asks the host which image takes which operation.

Source: Li and Spratling, "Data augmentation alone can improve adversarial training" (ICLR 2023), and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustfair.config import Share, config, require
from robustfair.data.corruptions.filters import take

CHOICES: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "color": {
        "saturation": (0.125, 0.1, 1.9),
        "brightness": (0.125, 0.5, 1.9),
        "contrast": (0.125, 0.5, 1.9),
        "sharpness": (0.125, 0.1, 1.9),
        "autocontrast": (0.125, 1, 1),
        "equalise": (0.125, 1, 1),
        "shear": (0.125, 0.05, 0.15),
        "rotation": (0.125, 1, 10),
    },
    "shape": {
        "saturation": (0.08, 0.1, 1.9),
        "brightness": (0.08, 0.5, 1.9),
        "contrast": (0.04, 0.5, 1.9),
        "sharpness": (0.08, 0.1, 1.9),
        "autocontrast": (0.04, 1, 1),
        "equalise": (0.08, 1, 1),
        "shear": (0.3, 0.05, 0.35),
        "rotation": (0.3, 1, 30),
    },
}
"""Probability, lowest and highest strength of each operation: factors, radians of a shear, whole degrees."""
OPERATIONS = tuple(CHOICES["color"])
SATURATION, BRIGHTNESS, CONTRAST, SHARPNESS, AUTOCONTRAST, EQUALISE, SHEAR, ROTATION = range(len(OPERATIONS))
"""Places in `OPERATIONS`: the first four blend, two look up, the last two move pixels."""

LUMINANCE = (19595, 38470, 7471)
"""Weights of Pillow's grey, in 1/65536."""
CANDIDATES = 10
"""Rectangles drawn for an image; the first that fits is erased."""
ERASING_RATIO = (0.3, 3.3)


# CropShift


@dataclass(frozen=True, kw_only=True, eq=False)
class Shifts:
    """What CropShift draws for B images, each (B,): numbers of pixels, int64, and the mirror mask, bool.

    Attributes:
        mirrored: images to mirror left to right before all else.
        lost_columns, lost_rows: c_x and c_y, how many are lost in total.
        crop_left, crop_top: t_x and t_y, how many of them at the left and the top.
        cut_left, cut_top: u_x and u_y, where the window begins in the crop padded by c_x and c_y on each side.
    """

    mirrored: Tensor
    lost_columns: Tensor
    lost_rows: Tensor
    crop_left: Tensor
    crop_top: Tensor
    cut_left: Tensor
    cut_top: Tensor


@dataclass(frozen=True, kw_only=True)
class CropShift:
    """Cut a number of rows and columns off, put what is left at a random place of a black image of the same size.

    Rows and columns lost add up to s, uniform on `low` to `high` - 1 (`low` itself where both are equal).

    Attributes:
        low: fewest rows and columns lost.
        high: one more than the most.
        flip: mirror half of the images first.

    Raises:
        ConfigError: not 0 <= `low` <= `high`; images of which it may leave nothing.
    """

    low: int = 0
    high: int = 11
    flip: bool = True

    def __post_init__(self) -> None:
        _check_range("crop-shift", "low and high", self.low, self.high)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = images.shape
        _check_side("crop-shift", "low and high", self.low, self.high, height, width)
        return _unit(crop_shift(images, self.draw(batch, generator)))

    def draw(self, batch: int, generator: torch.Generator) -> Shifts:
        """All draws for a batch."""
        device = generator.device
        mirrored = torch.rand(batch, generator=generator, device=device) < 0.5
        lost = torch.randint(self.low, max(self.high, self.low + 1), (batch,), generator=generator, device=device)
        parts = torch.rand(5, batch, dtype=torch.float64, generator=generator, device=device)
        columns = _up_to(lost, parts[0])
        rows = lost - columns
        return Shifts(
            mirrored=mirrored & self.flip,
            lost_columns=columns,
            lost_rows=rows,
            crop_left=_up_to(columns, parts[1]),
            crop_top=_up_to(rows, parts[2]),
            cut_left=_up_to(columns, parts[3]),
            cut_top=_up_to(rows, parts[4]),
        )


def crop_shift(images: Tensor, shifts: Shifts) -> Tensor:
    """Mirrored, cropped and moved images (B, C, H, W), black where the crop does not reach; type as it came.

    >>> one = {name: torch.tensor([1]) for name in ("lost_columns", "crop_left", "cut_left")}
    >>> none = {name: torch.tensor([0]) for name in ("lost_rows", "crop_top", "cut_top")}
    >>> row = torch.tensor([[[[1, 2, 3]]]])
    >>> crop_shift(row, Shifts(mirrored=torch.tensor([False]), **one, **none)).flatten().tolist()
    [2, 3, 0]
    """
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    return _window(images, shifts, rows[:, None], columns)


def _window(images: Tensor, shifts: Shifts, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of the mirrored, cropped and moved images at rows and columns that broadcast to (B, H, W).

    Black outside the crop, and so outside the image.
    """
    height, width = images.shape[2:]

    def each(of_image: Tensor) -> Tensor:
        return of_image[:, None, None]

    row = rows - each(shifts.lost_rows - shifts.cut_top)
    column = columns - each(shifts.lost_columns - shifts.cut_left)
    inside = (row >= 0) & (row < each(height - shifts.lost_rows))
    inside = inside & (column >= 0) & (column < each(width - shifts.lost_columns))
    column = column + each(shifts.crop_left)
    column = torch.where(each(shifts.mirrored), width - 1 - column, column)
    source = (row + each(shifts.crop_top)) * width + column
    return take(images, (source * inside).flatten(1)) * inside[:, None]


# IDBH


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """What IDBH draws for B images, each (B,).

    Attributes:
        shifts: of CropShift.
        operation: int64, position in `OPERATIONS`.
        strength: float64, a factor, or radians (shear) or whole degrees (rotation) with their sign.
        upright: bool, a shear along y, not x.
        top, left, rows, columns: int64, the erased rectangle; 0 rows where nothing is erased.
    """

    shifts: Shifts
    operation: Tensor
    strength: Tensor
    upright: Tensor
    top: Tensor
    left: Tensor
    rows: Tensor
    columns: Tensor


@config
class IDBH:
    """Mirror, CropShift, one operation on colour or shape, RandomErasing; the defaults are version `cifar10-weak`.

    Attributes:
        shift: `low` and `high` of CropShift.
        colour_shape: which probabilities and strengths of `CHOICES` the operations take, "color" or "shape".
        erase_probability: of erasing a rectangle.
        erase_area: smallest and largest part of the image that is erased, before sides are rounded to pixels.
        flip: mirror half of the images.

    Raises:
        ConfigError: a range that is reversed or leaves its bounds, a probability outside [0, 1], an unknown
            `colour_shape`; images that are neither grey nor RGB, or too small for `shift`.
    """

    shift: tuple[int, int] = (0, 11)
    colour_shape: Literal["color", "shape"] = "color"
    erase_probability: Share = 0.5
    erase_area: tuple[float, float] = (0.02, 0.33)
    flip: bool = True

    def __post_init__(self) -> None:
        _check_range("idbh", "shift", *self.shift)
        low, high = self.erase_area
        allowed = "two parts with 0 < smallest <= largest <= 1"
        require(0 < low <= high <= 1, "idbh", "erase_area", allowed=allowed, got=self.erase_area)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = images.shape
        hint = "Take crop-shift, which changes no colours"
        allowed = "grey or RGB (1 or 3 channels)"
        require(channels in (1, 3), "idbh", "images", allowed=allowed, got=tuple(images.shape), hint=hint)
        _check_side("idbh", "shift", *self.shift, height, width)
        return apply(images, self.draw(batch, height, width, generator))

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """All draws for a batch of images of height x width."""
        low, high = self.shift
        shifts = CropShift(low=low, high=high, flip=self.flip).draw(batch, generator)
        operation, strength, upright = self._draw_operation(batch, generator)
        top, left, rows, columns = self._draw_rectangle(batch, height, width, generator)
        return Draws(
            shifts=shifts,
            operation=operation,
            strength=strength,
            upright=upright,
            top=top,
            left=left,
            rows=rows,
            columns=columns,
        )

    def _draw_operation(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Operation, strength and the axis of a shear, each (B,)."""
        device = generator.device
        chance, amount, sign, axis = torch.rand(4, batch, dtype=torch.float64, generator=generator, device=device)
        operation = torch.zeros(batch, dtype=torch.int64, device=device)
        strength, begin = torch.ones_like(amount), 0.0
        for number, (probability, low, high) in enumerate(CHOICES[self.colour_shape].values()):
            chosen = chance >= begin
            whole = number == ROTATION
            value = (low + (high + 1 - low) * amount).floor() if whole else low + (high - low) * amount
            operation = torch.where(chosen, number, operation)
            strength = torch.where(chosen, value, strength)
            begin += probability
        return operation, torch.where((operation >= SHEAR) & (sign < 0.5), -strength, strength), axis < 0.5

    def _draw_rectangle(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, rows and columns of what is erased, each (B,)."""
        device = generator.device
        chance, down, right = torch.rand(3, batch, dtype=torch.float64, generator=generator, device=device)
        part, ratio = torch.rand(2, batch, CANDIDATES, dtype=torch.float64, generator=generator, device=device)
        (smallest, largest), (flattest, steepest) = self.erase_area, map(math.log, ERASING_RATIO)
        area = height * width * (smallest + (largest - smallest) * part)
        rows, columns = first_fit(area, (flattest + (steepest - flattest) * ratio).exp(), height, width)
        rows = torch.where(chance < self.erase_probability, rows, 0)
        return _up_to(height - rows, down), _up_to(width - columns, right), rows, columns


def first_fit(area: Tensor, ratio: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (B,) int64, of the first candidate (B, n) lower and narrower than the image, else zeros.

    >>> first_fit(torch.tensor([[400.0, 50.0]]), torch.tensor([[1.0, 2.0]]), 20, 20)
    (tensor([10]), tensor([5]))
    """
    rows, columns = (product.sqrt().round().long() for product in (area * ratio, area / ratio))
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.gather(1, first)
    rows, columns = ((size.gather(1, first) * found).squeeze(1) for size in (rows, columns))
    return rows, columns


def apply(images: Tensor, draws: Draws) -> Tensor:
    """The augmented images, float32 (B, C, H, W) in [0, 1], of grey or RGB images, uint8 (B, C, H, W)."""
    levels = _window(images, draws.shifts, *_positions(draws, *images.shape[2:])).float()
    levels = _blend(_washed_out(levels, draws.operation), levels, draws)
    indices = levels.long().flatten(2)
    pixels = _unit(_tables(indices, draws.operation)).gather(2, indices).view_as(levels)
    return pixels.mul_(_kept(draws, *images.shape[2:]))


def _positions(draws: Draws, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (B, H, W) int64, that the pixels of sheared or rotated images come from.

    As Pillow's nearest neighbour takes them: coefficients in 16 binary digits, at the centres of pixels. Both maps
    leave the centre of the image in its place. Positions may lie outside the image.
    """
    shear = torch.where(draws.operation == SHEAR, draws.strength, 0).tan()
    angle = torch.where(draws.operation == ROTATION, -draws.strength, 0).deg2rad()
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    across = (cos, sin + torch.where(draws.upright, 0, shear))
    down = (torch.where(draws.upright, shear, 0) - sin, cos)
    x, y = torch.arange(width, device=shear.device), torch.arange(height, device=shear.device)[:, None]

    def place(right: Tensor, below: Tensor, centre: float) -> Tensor:
        start = right * (-width / 2) + below * (-height / 2) + centre
        steps = (right, below, start + right * 0.5 + below * 0.5)
        step_x, step_y, origin = ((step * 65536 + 0.5).floor().long()[:, None, None] for step in steps)
        return (step_x * x + step_y * y + origin) >> 16

    return place(*down, height / 2), place(*across, width / 2)


def _washed_out(levels: Tensor, operation: Tensor) -> Tensor:
    """What a factor of 0 would leave of float32 levels (B, C, H, W): grey, black, the mean grey, or blurred."""
    operation = operation.view(-1, 1, 1, 1)
    grey = _luminance(levels)
    pixels = grey.shape[2] * grey.shape[3]
    # In whole numbers: GPUs divide by a number through its reciprocal, which may miss a tie.
    mean = ((2 * grey.sum((2, 3), keepdim=True, dtype=torch.float64).long() + pixels) // (2 * pixels)).float()
    return torch.where(
        operation == SHARPNESS,
        _smooth(levels),
        torch.where(operation == SATURATION, grey, torch.where(operation == CONTRAST, mean, 0.0)),
    )


def _luminance(levels: Tensor) -> Tensor:
    """Grey levels (B, 1, H, W) of (B, C, H, W). All sums are whole numbers below 2^24, exact in float32."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = (levels[:, c, None] * weight for c, weight in enumerate(LUMINANCE))
    return ((red + green + blue + 32768) / 65536).floor()


def _smooth(levels: Tensor) -> Tensor:
    """The mean of 3x3 pixels in which the middle one counts five times, rounded; the border stays."""
    middle = levels[:, :, 1:-1]
    lines = (levels[:, :, :-2] + middle).add_(levels[:, :, 2:])
    total = (lines[..., :-2] + lines[..., 1:-1]).add_(lines[..., 2:]).add_(middle[..., 1:-1], alpha=4)
    smoothed = levels.clone()
    # No thirteenth is halfway between two levels, so float32 rounds each as exactly as Pillow does.
    smoothed[:, :, 1:-1, 1:-1] = total.div_(13).add_(0.5).floor_()
    return smoothed


def _blend(washed_out: Tensor, levels: Tensor, draws: Draws) -> Tensor:
    """From `washed_out` at factor 0 through `levels` at 1 and beyond, truncated to whole levels; float32."""
    factor = torch.where(draws.operation <= SHARPNESS, draws.strength, 1).float().view(-1, 1, 1, 1)
    return (levels - washed_out).mul_(factor).add_(washed_out).clamp_(0, 255).floor_()


def _tables(levels: Tensor, operation: Tensor) -> Tensor:
    """What becomes of each level, (B, C, 256) float64, by the levels (B, C, H * W) int64 of an image's channel."""
    operation = operation.view(-1, 1, 1)
    level = torch.arange(256, dtype=torch.float64, device=levels.device)
    counts, pixels = _histograms(levels), levels.shape[2]
    up_to = counts.cumsum(2)
    below = up_to - counts
    lowest, highest = (part.sum(2, keepdim=True) for part in (up_to == 0, up_to < pixels))

    span = (highest - lowest).double()
    scale = torch.full_like(span, 255) / span
    stretched = (level * scale - lowest * scale).trunc_().clamp_(0, 255)
    stretches = (operation == AUTOCONTRAST) & (span > 0)

    step = below.gather(2, highest) // 255
    spread = ((step // 2 + below) // step.clamp_min(1)).clamp_(max=255)
    spreads = (operation == EQUALISE) & (step > 0)
    return torch.where(spreads, spread.double(), torch.where(stretches, stretched, level))


def _histograms(levels: Tensor) -> Tensor:
    """How often each level occurs, (B, C, 256) int64, in levels (B, C, N) int64."""
    channels = math.prod(levels.shape[:2])
    offsets = 256 * torch.arange(channels, device=levels.device).view(*levels.shape[:2], 1)
    counts = torch.zeros(256 * channels, dtype=torch.int64, device=levels.device)
    places = (levels + offsets).flatten()
    return counts.scatter_add_(0, places, torch.ones_like(places)).view(*levels.shape[:2], 256)


def _kept(draws: Draws, height: int, width: int) -> Tensor:
    """(B, 1, H, W) float32, 0 in the erased rectangles and 1 elsewhere."""

    def erased(start: Tensor, length: Tensor, size: int) -> Tensor:
        place = torch.arange(size, device=start.device) - start[:, None]
        return (place >= 0) & (place < length[:, None])

    rows, columns = erased(draws.top, draws.rows, height), erased(draws.left, draws.columns, width)
    return (~(rows[:, :, None] & columns[:, None, :]))[:, None].float()


# Parts


def _unit(levels: Tensor) -> Tensor:
    return levels.float().div_(255)


def _up_to(most: Tensor, part: Tensor) -> Tensor:
    """Whole numbers uniform on 0 to `most` from uniform parts in [0, 1)."""
    return (part * (most + 1)).long()


def _check_range(owner: str, field: str, low: int, high: int) -> None:
    whole = isinstance(low, int) and isinstance(high, int)
    allowed = "whole numbers with 0 <= low <= high"
    require(whole and 0 <= low <= high, owner, field, allowed=allowed, got=(low, high))


def _check_side(owner: str, field: str, low: int, high: int, height: int, width: int) -> None:
    """Raise ConfigError where CropShift may leave nothing of an image."""
    side = min(height, width)
    allowed = f"low below and high at most {side}, the shorter side of {height}x{width} images"
    hint = "Take crop-flip, or in Python a smaller range"
    require(low < side and high <= side, owner, field, allowed=allowed, got=(low, high), hint=hint)
