"""What the frost corruption lays over images: photographs of a folder, or ice crystals that are made."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustfair.data.corruptions.filters import as_levels, height_map, smooth
from robustfair.errors import DataError
from robustfair.grammar import read_path
from robustfair.values import seeded_generator

TONES, TINT = (0.51, 0.8, 0.8, 0.61, 0.44), (0.89, 1.02, 1.09)
"""Mean brightness of the five synthetic textures, and their colour, as the five photographs have them."""

_UNUSED_TEXTURE = "frost6"
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def frost_source(frost: Path | str | None) -> str:
    """What the frost corruption lays over images, in words for a report.

    >>> frost_source(None)
    'synthetic ice crystals'

    Raises:
        DataError: `frost` is not a folder with pictures.
    """
    return "synthetic ice crystals" if frost is None else f"{len(_pictures(frost))} pictures of {frost}"


def textures(folder: Path | str | None, height: int, width: int, step: int) -> list[Tensor]:
    """(3, h, w) uint8 each, at least as large as images of (height, width).

    Args:
        folder: of photographs; None for ice crystals.
        step: of a photograph one pixel is taken in so many, see `_photograph`.

    Raises:
        DataError: `folder` is not a folder with pictures, or one cannot be decoded.
    """
    if folder is None:
        return [_ice(number, max(256, 3 * max(height, width))) for number in range(len(TONES))]
    return [_photograph(path, height, width, step) for path in _pictures(folder)]


def _pictures(folder: Path | str) -> list[Path]:
    """The pictures of a folder by name. The generator ships six photographs and draws from the first five."""
    folder = read_path(folder)
    if not folder.is_dir():
        raise DataError(f"frost: {str(folder)!r} is not a folder: give one with pictures of frost, or none")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    used = [path for path in files if path.stem != _UNUSED_TEXTURE]
    if not used:
        raise DataError(f"frost: {str(folder)!r} holds no pictures ({', '.join(sorted(_PICTURES))})")
    return used


@lru_cache(maxsize=32)
def _photograph(path: Path, height: int, width: int, step: int) -> Tensor:
    """(3, h, w) uint8: every `step`-th pixel of a picture, or less far apart so that a crop of (height, width) fits."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # the decoders raise whatever their format stumbles on
        raise DataError(f"frost: {path} cannot be decoded: {error}") from error
    growth = max(height / picture.height, width / picture.width)
    if growth > 1:
        size = (math.ceil(picture.width * growth), math.ceil(picture.height * growth))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    step = min(step, picture.height // height, picture.width // width)
    pixels = torch.from_numpy(np.array(picture))[step // 2 :: step, step // 2 :: step]
    return pixels.permute(2, 0, 1).contiguous()


@lru_cache(maxsize=2 * len(TONES))
def _ice(number: int, side: int) -> Tensor:
    """(3, side, side) uint8: six-armed crystals with twigs over a cloudy pane, the same for a number always."""
    rng = seeded_generator("cpu", "ice", number)
    crystals, twigs, points = 160, 6, 48

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=rng)

    def line(start: Tensor, angle: Tensor, length: Tensor) -> Tensor:
        """Points (..., points, 2) from `start` (..., 2)."""
        way = torch.stack([angle.cos(), angle.sin()], -1) * length[..., None]
        return start[..., None, :] + torch.linspace(0, 1, points)[:, None] * way[..., None, :]

    arms = uniform(crystals, 1, high=math.tau) + torch.arange(6) * (math.tau / 6)
    reach = uniform(crystals, 1, low=0.03, high=0.15) * uniform(crystals, 6, low=0.6, high=1.0)
    stems = line(uniform(crystals, 1, 2).expand(-1, 6, -1), arms, reach)
    roots = stems[:, :, points // 8 :: points // 8][:, :, :twigs]
    growth = torch.linspace(0.5, 0.1, twigs) * reach[..., None]
    sides = [
        line(roots, (arms + turn)[..., None].expand(-1, -1, twigs), growth) for turn in (math.pi / 3, -math.pi / 3)
    ]
    places = torch.cat([part.reshape(-1, 2) for part in (stems, *sides)])
    cells = (places * side).long().remainder(side)
    density = torch.bincount(cells[:, 0] * side + cells[:, 1], minlength=side * side).view(1, 1, side, side)
    crystal = smooth(1 - torch.exp(-density * (side / 256)), side / 512, border="reflect")[0, 0]
    pane = 2 ** (side - 1).bit_length()
    cloud = height_map(uniform(1, pane, pane, low=-1, high=1), 1.6)[0, :side, :side]
    tone = 0.5 * cloud / cloud.std() + crystal / crystal.std()
    tone = TONES[number] + 0.1 * (tone - tone.mean()) / tone.std()
    return as_levels(tone * torch.tensor(TINT)[:, None, None]).to(torch.uint8)
