"""Augmentations of a batch on its own device: uint8 (B, C, H, W) in, float32 in [0, 1] out, draws from a generator.

The shifted crop of a padded image and the horizontal flip are one gather: each output pixel reads the source pixel that
padding, crop and flip would have brought there, so neither a padded copy nor a loop over images is made.

Source: the training transforms of the public robust-training codes: padding with zeros in TRADES and MART, by
reflection in the codes of Rice et al. and CFA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from robustfair.config import Whole, config
from robustfair.data.augment.idbh import IDBH, CropShift
from robustfair.errors import ConfigError, UnknownNameError
from robustfair.registry import canonical


class Augmentation(Protocol):
    """Turns images, uint8 (B, C, H, W), into float32 in [0, 1] of the same shape; all draws come from `generator`."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1].

    >>> to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """No augmentation."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return to_unit(images)


@config
class CropFlip:
    """Pad, crop at a uniform offset per image back to the same size, mirror left to right with probability 1/2.

    Attributes:
        padding: pixels on each side; offsets are uniform on 0 to 2 * padding in either direction.
        pad_mode: "reflect" (the border pixel is not repeated) or "zero".
        flip: mirror half of the images.

    Raises:
        ConfigError: `padding` is negative or reaches beyond what the image can reflect; `pad_mode` is unknown.
    """

    name: ClassVar[str] = "crop"
    padding: Whole = 4
    pad_mode: Literal["reflect", "zero"] = "reflect"
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = images.shape
        if self.pad_mode == "reflect" and self.padding >= min(height, width):
            hint = "Take pad_mode 'zero' or less padding"
            allowed = f"below the image side to reflect ({height}x{width})"
            raise ConfigError("crop", "padding", allowed=allowed, got=self.padding, hint=hint)
        top, left, mirrored = self.draw(batch, generator)
        return to_unit(crop_flip(images, top - self.padding, left - self.padding, mirrored, self.pad_mode))

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Row offset, column offset, both (B,) in 0 to 2 * padding, and the mirror mask (B,), in this order."""
        device = generator.device
        offsets = torch.randint(2 * self.padding + 1, (2, batch), generator=generator, device=device)
        mirrored = torch.rand(batch, generator=generator, device=device) < 0.5
        return offsets[0], offsets[1], mirrored & self.flip


def crop_flip(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, pad_mode: str) -> Tensor:
    """Windows of the padded images, mirrored where asked.

    Args:
        images: (B, C, H, W).
        down: (B,) first row of each window in coordinates of the image, negative where it starts in the padding.
        right: (B,) first column, likewise.
        mirrored: (B,) bool, windows to mirror left to right.
        pad_mode: "reflect" or "zero".

    Returns:
        (B, C, H, W), the type of `images`.

    >>> row = torch.tensor([[[[1, 2, 3]]]])
    >>> crop_flip(row, torch.tensor([0]), torch.tensor([-1]), torch.tensor([False]), "reflect").flatten().tolist()
    [2, 1, 2]
    >>> crop_flip(row, torch.tensor([0]), torch.tensor([-1]), torch.tensor([True]), "zero").flatten().tolist()
    [2, 1, 0]
    """
    batch, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + down[:, None]
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + right[:, None]
    source = _reflect(rows, height)[:, :, None] * width + _reflect(columns, width)[:, None, :]
    source = source.view(batch, 1, height * width).expand(batch, channels, height * width)
    window = images.reshape(batch, channels, height * width).gather(2, source).view_as(images)
    if pad_mode == "reflect":
        return window
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return window.masked_fill_(~inside, 0)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside 0 to size - 1 folded back at the border pixel, as often as it takes."""
    if size == 1:
        return torch.zeros_like(position)
    folded = position.remainder(2 * size - 2)
    return torch.minimum(folded, 2 * size - 2 - folded)


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": Identity(),
    "crop": CropFlip(flip=False),
    "crop-flip": CropFlip(),
    "crop-flip-zero": CropFlip(pad_mode="zero"),
    "crop-shift": CropShift(),
    "idbh": IDBH(),
    "idbh-strong": IDBH(erase_probability=1.0),
    "idbh-svhn": IDBH(shift=(0, 9), colour_shape="shape", erase_probability=1.0, erase_area=(0.02, 0.5)),
}
"""By name. `crop-flip` pads by reflection, as Rice et al. and CFA do; TRADES, MART and FAT pad with zeros.

`idbh` is the authors' version cifar10-weak, `idbh-strong` cifar10-strong; all three mirror images, digits too.
"""


def parse_augmentation(text: str) -> Augmentation:
    """The augmentation called `text`, in any spelling.

    Raises:
        UnknownNameError: no such augmentation; shows the nearest names.
    """
    try:
        return AUGMENTATIONS[canonical(text)]
    except KeyError:
        raise UnknownNameError("augmentation", text, AUGMENTATIONS) from None
