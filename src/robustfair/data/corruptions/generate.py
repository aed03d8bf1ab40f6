"""The 19 common corruptions of CIFAR-10-C and ImageNet-C at five severities, for any images, seeded per image.

Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations"
(ICLR 2019), and the parameters of its public generator. Each procedure is batched and runs on the device of the images;
only JPEG goes through Pillow, image by image. Departures from the generator:
- motion blur and snow follow the line that ImageMagick's motion blur takes, and agree statistically;
- the kernels of defocus blur add up to 1, so that none brightens an image;
- affine warps take their coordinates as they are, not rounded to 1/32 of a pixel;
- frost synthesises ice crystals where it is given no folder of photographs.

Every number drawn is keyed by (seed, corruption, severity, index of the image) and comes from the CPU, so that an image
is corrupted alike in any batch and on any device.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robustfair.config import require
from robustfair.data.augment.crops import to_unit
from robustfair.data.corruptions.draws import Draws
from robustfair.data.corruptions.filters import (
    as_levels,
    bend,
    box_resize,
    correlate,
    disk,
    distance,
    edges,
    equalise,
    height_map,
    move,
    shuffled,
    smooth,
    take,
    warp,
    zoom,
    zoom_grid,
)
from robustfair.data.corruptions.frost import textures
from robustfair.data.corruptions.names import CORRUPTIONS, SEVERITIES
from robustfair.errors import UnknownNameError
from robustfair.grammar import canonical_key

Scale = Literal["cifar", "imagenet"]
ScaleChoice = Literal["auto", "cifar", "imagenet"]
Row = tuple[float, ...]
"""The parameters of one severity."""

SMALL_SIDE = 64
"""Images up to this side take the CIFAR parameters, larger ones those of ImageNet."""
SMALLEST_SIDE = 8
_SLIP = 244 / 224
"""The generator writes 244 for the side of its 224-pixel images wherever it bends them."""

PARAMETERS: Mapping[Scale, Mapping[str, tuple[Row, ...]]] = {
    "cifar": {
        "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
        "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
        "speckle_noise": ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)),
        "gaussian_blur": ((0.4,), (0.6,), (0.7,), (0.8,), (1,)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
        "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
        "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
    "imagenet": {
        "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
        "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        "speckle_noise": ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,)),
        "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
        "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        "elastic_transform": tuple(
            (_SLIP * alpha, _SLIP * sigma, _SLIP * affine)
            for alpha, sigma, affine in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
}
"""Scale -> corruption -> severity - 1 -> parameters, named by the procedure that unpacks them."""

LUMINANCE = (0.299, 0.587, 0.114)
WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
RELIEF = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
"""The kernel that lights water from one side."""


def parse_corruption(name: str) -> str:
    """The registered spelling of a corruption: lower case, underscores.

    >>> parse_corruption("Gaussian-Noise")
    'gaussian_noise'

    Raises:
        UnknownNameError: no such corruption; shows the nearest names.
    """
    found = canonical_key(name.strip()).replace(" ", "_")
    if found not in CORRUPTIONS:
        raise UnknownNameError("corruption", name, CORRUPTIONS)
    return found


def parameter_scale(height: int, width: int, scale: str = "auto") -> Scale:
    """Which parameters images of a size take: those of CIFAR up to a side of 64 pixels, those of ImageNet above it.

    >>> parameter_scale(32, 32), parameter_scale(32, 96), parameter_scale(32, 32, "imagenet")
    ('cifar', 'imagenet', 'imagenet')

    Raises:
        ConfigError: `scale` is none of "auto", "cifar", "imagenet".
    """
    allowed = " or ".join(get_args(ScaleChoice))
    require(scale in get_args(ScaleChoice), "corruption", "scale", allowed=allowed, got=scale)
    if scale == "auto":
        return "cifar" if max(height, width) <= SMALL_SIDE else "imagenet"
    return "cifar" if scale == "cifar" else "imagenet"


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    index: Tensor,
    seed: int = 0,
    scale: str = "auto",
    frost: Path | str | None = None,
) -> Tensor:
    """Corrupt a batch of images; each image by numbers of its own, whatever batch it comes in.

    Args:
        images: (B, C, H, W) uint8, grey (C = 1) or RGB (C = 3), of at least 8x8 pixels. Grey images stay grey.
        name: a name of `CORRUPTIONS`; hyphens and capitals are accepted.
        severity: 1 to 5.
        index: (B,) positions of the images in their data set: with `seed` they key what is drawn.
        seed: another seed draws other numbers.
        scale: "cifar" or "imagenet" parameters; "auto" goes by the longer side, see `parameter_scale`.
        frost: folder of photographs of frost; None synthesises ice crystals. See `robustfair.data.corruptions.frost`.

    Returns:
        uint8 of the same shape, on the same device. Values are truncated, as the published files are.

    Raises:
        UnknownNameError: no such corruption; shows the nearest names.
        ConfigError: a severity, scale, shape or type that does not fit.
        DataError: `frost` is not a folder with pictures.
    """
    name = parse_corruption(name)
    _check(images, severity, index)
    height, width = images.shape[2:]
    row = PARAMETERS[parameter_scale(height, width, scale)][name][severity - 1]
    if len(images) == 0:
        return images.clone()
    draws = Draws(index, images.device, seed, name, severity)
    procedure = partial(_frost, folder=frost) if name == "frost" else PROCEDURES[name]
    return as_levels(procedure(to_unit(images), row, draws)).to(torch.uint8)


Procedure = Callable[[Tensor, Row, Draws], Tensor]
"""From images (B, C, H, W) in [0, 1], the parameters and the draws to images that may still leave [0, 1]."""


# Noise


def _gaussian_noise(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (std,) = row
    return x + draws.normal(*x.shape[1:], std=std)


def _shot_noise(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (photons,) = row
    return draws.poisson(x * photons) / photons


def _impulse_noise(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (amount,) = row
    where = draws.uniform(*x.shape[1:])
    return x.masked_fill(where < amount / 2, 1.0).masked_fill_(where > 1 - amount / 2, 0.0)


def _speckle_noise(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (std,) = row
    return x + x * draws.normal(*x.shape[1:], std=std)


# Blur


def _gaussian_blur(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (sigma,) = row
    return smooth(x, sigma)


def _glass_blur(x: Tensor, row: Row, draws: Draws) -> Tensor:
    sigma, reach, iterations = row[0], int(row[1]), int(row[2])
    height, width = x.shape[2:]
    walk = (iterations, max(0, height - 2 * reach), max(0, width - 2 * reach))
    shifts = draws.integers(*walk, 2, low=-reach, high=reach)
    source = shuffled(shifts.cpu(), height, width, reach).to(x.device)
    levels = as_levels(smooth(x, sigma)) / 255
    return smooth(take(levels, source), sigma)


def _defocus_blur(x: Tensor, row: Row, draws: Draws) -> Tensor:
    radius, alias = row
    return correlate(x, disk(radius, alias))


def _motion_blur(x: Tensor, row: Row, draws: Draws) -> Tensor:
    radius, sigma = row
    return move(x, int(radius), sigma, draws.uniform(low=-45, high=45))


def _zoom_blur(x: Tensor, row: Row, draws: Draws) -> Tensor:
    end, step = row
    height, width = x.shape[2:]
    factors = zoom_factors(end, step)
    grids = Counter((zoom_grid(height, factor), zoom_grid(width, factor)) for factor in factors)
    total = x.clone()
    for grid, times in grids.items():
        total.add_(zoom(x, *grid), alpha=times)
    return total / (len(factors) + 1)


def zoom_factors(end: float, step: float) -> list[float]:
    """Factors from 1 in steps to `end`, which numpy's rounding lets in at some severities, as it does in the generator.

    >>> [len(zoom_factors(end, 0.01)) for end in (1.06, 1.11, 1.16)]
    [7, 12, 16]
    """
    return np.arange(1, end, step).tolist()


# Weather


def _snow(x: Tensor, row: Row, draws: Draws) -> Tensor:
    loc, scale, factor, threshold, radius, sigma, keep = row
    height, width = x.shape[2:]
    fall = draws.normal(1, height, width, mean=loc, std=scale)
    fall = zoom(fall, zoom_grid(height, factor), zoom_grid(width, factor))
    flakes = fall.masked_fill(fall < threshold, 0).clamp_(0, 1)
    flakes = move(flakes, int(radius), sigma, draws.uniform(low=-135, high=-45))
    white = keep * x + (1 - keep) * torch.maximum(x, 1.5 * _grey(x) + 0.5)
    return white + flakes + flakes.flip(2, 3)


def _frost(x: Tensor, row: Row, draws: Draws, folder: Path | str | None) -> Tensor:
    weight, frost_weight, step = row[0], row[1], int(row[2])
    height, width = x.shape[2:]
    panes, crops = textures(folder, height, width, step), []
    for which, down, right in draws.uniform(3).tolist():
        texture = panes[int(which * len(panes))]
        top = int(down * (texture.shape[1] - height + 1))
        left = int(right * (texture.shape[2] - width + 1))
        crops.append(texture[:, top : top + height, left : left + width])
    frost = to_unit(torch.stack(crops).to(x.device))
    return weight * x + frost_weight * (frost if x.shape[1] == 3 else _grey(frost))


def _fog(x: Tensor, row: Row, draws: Draws) -> Tensor:
    strength, decay = row
    height, width = x.shape[2:]
    side = 2 ** (max(height, width) - 1).bit_length()
    fog = height_map(draws.uniform(side, side, low=-1, high=1), decay)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * fog) * brightest / (brightest + strength)


def _brightness(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (added,) = row
    value = x.amax(1, keepdim=True)
    lifted = (value + added).clamp_(max=1)
    # Hue and saturation stay where all channels grow by one factor; black has neither and turns grey.
    return torch.where(value > 0, x * (lifted / value.clamp_min(1e-6)), lifted)


def _saturate(x: Tensor, row: Row, draws: Draws) -> Tensor:
    factor, added = row
    if x.shape[1] == 1:
        return x
    value = x.amax(1, keepdim=True)
    saturation = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-6)
    wanted = (saturation * factor + added).clamp_(0, 1)
    # Grey pixels have hue 0, red: what is added to their saturation leaves the first channel and lowers the others.
    red = torch.cat([torch.zeros_like(value), value, value], 1)
    return value - torch.where(saturation > 0, (value - x) / saturation.clamp_min(1e-6), red) * wanted


# Digital


def _contrast(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (factor,) = row
    mean = x.double().mean((2, 3), keepdim=True).to(x.dtype)
    return (x - mean) * factor + mean


def _elastic_transform(x: Tensor, row: Row, draws: Draws) -> Tensor:
    height, width = x.shape[2:]
    alpha, sigma, affine = (part * min(height, width) for part in row)
    shifts = draws.uniform(3, 2, low=-affine, high=affine)
    fields = draws.uniform(2, height, width, low=-1, high=1)
    fields = alpha * smooth(fields, sigma, truncate=3, border="reflect")
    return bend(warp(x, shifts), fields[:, 0], fields[:, 1])


def _pixelate(x: Tensor, row: Row, draws: Draws) -> Tensor:
    (factor,) = row
    height, width = x.shape[2:]
    levels = (x * 255).round().double()
    for rows, columns in ((int(height * factor), int(width * factor)), (height, width)):
        levels = box_resize(levels, rows, columns)
    return (levels / 255).to(x.dtype)


def _jpeg_compression(x: Tensor, row: Row, draws: Draws) -> Tensor:
    from PIL import Image

    (quality,) = row

    def through_jpeg(pixels: np.ndarray) -> np.ndarray:
        stored = io.BytesIO()
        Image.fromarray(pixels).save(stored, "JPEG", quality=int(quality))
        with Image.open(stored) as image:
            return np.asarray(image)

    grey = x.shape[1] == 1
    levels = (x * 255).round().to(torch.uint8).cpu()
    pictures = levels[:, 0].numpy() if grey else levels.permute(0, 2, 3, 1).contiguous().numpy()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        stored = torch.from_numpy(np.stack([*pool.map(through_jpeg, pictures)]))
    return to_unit((stored[:, None] if grey else stored.permute(0, 3, 1, 2)).to(x.device))


# Spatter


def _spatter(x: Tensor, row: Row, draws: Draws) -> Tensor:
    loc, scale, sigma, threshold, strength, kind = row
    layer = smooth(draws.normal(1, *x.shape[2:], mean=loc, std=scale), sigma)
    if kind == 0:
        return x + _colour(WATER, x) * water(layer.masked_fill(layer < threshold, 0), strength)
    mud = smooth((layer > threshold).to(x), strength)
    mud = mud.masked_fill(mud < 0.8, 0)
    return x * (1 - mud) + _colour(MUD, x) * mud


def water(layer: Tensor, strength: float) -> Tensor:
    """How strongly drops show (B, 1, H, W), at most `strength`, from the thresholded liquid layer."""
    levels = as_levels(layer)
    depth = _box_mean(distance(edges(levels))).floor()
    relief = correlate(equalise(depth), torch.tensor(RELIEF, dtype=torch.float64)).clamp_(0, 255)
    shine = levels * _box_mean(relief).round()
    return strength * shine / shine.amax((2, 3), keepdim=True).clamp_min(1e-6)


def _box_mean(x: Tensor) -> Tensor:
    return correlate(x, torch.ones(3, 3, dtype=torch.float64)) / 9


# Parts


def _grey(x: Tensor) -> Tensor:
    """Luminance (B, 1, H, W); grey images are their own."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)


def _colour(rgb: tuple[float, float, float], x: Tensor) -> Tensor:
    """(1, C, 1, 1): a colour, or its luminance for grey images."""
    colour = x.new_tensor(rgb).view(1, 3, 1, 1)
    return colour if x.shape[1] == 3 else _grey(colour)


def _check(images: Tensor, severity: int, index: Tensor) -> None:
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
    fits = fits and min(images.shape[2:]) >= SMALLEST_SIDE
    got = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
    allowed = f"uint8 (B, C, H, W) with 1 or 3 channels and sides of at least {SMALLEST_SIDE}"
    require(fits, "corruption", "images", allowed=allowed, got=got)
    whole = type(severity) is int and severity in SEVERITIES
    require(whole, "corruption", "severity", allowed="a whole number from 1 to 5", got=severity)
    fits = index.shape == images.shape[:1] and not index.is_floating_point()
    require(fits, "corruption", "index", allowed=f"whole numbers ({len(images)},)", got=tuple(index.shape))


PROCEDURES: Mapping[str, Procedure] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
"""All but frost, which takes a folder besides."""
