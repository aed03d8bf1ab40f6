"""Augmentations one image at a time with numpy, Pillow and plain loops."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


def crop_flip(
    images: np.ndarray, top: list[int], left: list[int], mirrored: list[bool], padding: int, pad_mode: str
) -> np.ndarray:
    """Images (B, C, H, W) uint8 as float32 in [0, 1], windows at (top, left) of the padded image."""
    _, _, height, width = images.shape
    mode = {"reflect": "reflect", "zero": "constant"}[pad_mode]
    out = []
    for image, row, column, mirror in zip(images, top, left, mirrored, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
        window = padded[:, row : row + height, column : column + width]
        out.append(window[:, :, ::-1] if mirror else window)
    return np.stack(out).astype(np.float32) / np.float32(255)


def crop_shift(
    image: np.ndarray,
    *,
    mirrored: bool,
    lost_columns: int,
    lost_rows: int,
    crop_left: int,
    crop_top: int,
    cut_left: int,
    cut_top: int,
) -> np.ndarray:
    """An image (C, H, W): mirror, crop, pad the crop with what it lost on every side, cut a window of the old size."""
    _, height, width = image.shape
    if mirrored:
        image = image[:, :, ::-1]
    crop = image[:, crop_top : crop_top + height - lost_rows, crop_left : crop_left + width - lost_columns]
    padded = np.pad(crop, ((0, 0), (lost_rows, lost_rows), (lost_columns, lost_columns)))
    return padded[:, cut_top : cut_top + height, cut_left : cut_left + width]


def colour_shape(image: np.ndarray, operation: str, strength: float, upright: bool) -> np.ndarray:
    """An image (C, H, W) uint8 after one operation of Pillow, grey in mode "L"; the strength with its sign."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    width, height = picture.size
    if operation == "saturation":
        picture = ImageEnhance.Color(picture).enhance(strength)
    elif operation == "brightness":
        picture = ImageEnhance.Brightness(picture).enhance(strength)
    elif operation == "contrast":
        picture = ImageEnhance.Contrast(picture).enhance(strength)
    elif operation == "sharpness":
        picture = ImageEnhance.Sharpness(picture).enhance(strength)
    elif operation == "autocontrast":
        picture = ImageOps.autocontrast(picture)
    elif operation == "equalise":
        picture = ImageOps.equalize(picture)
    elif operation == "rotation":
        picture = picture.rotate(strength)
    else:
        slope = math.tan(strength)
        matrix = (1, 0, 0, slope, 1, -width / 2 * slope) if upright else (1, slope, -height / 2 * slope, 0, 1, 0)
        picture = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def first_fit(areas: list[float], ratios: list[float], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the first rectangle lower and narrower than the image; (0, 0) if none is."""
    for area, ratio in zip(areas, ratios, strict=True):
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            return rows, columns
    return 0, 0


def erase(image: np.ndarray, top: int, left: int, rows: int, columns: int) -> np.ndarray:
    """An image (C, H, W) with a black rectangle."""
    out = image.copy()
    for row in range(top, top + rows):
        for column in range(left, left + columns):
            out[:, row, column] = 0
    return out
