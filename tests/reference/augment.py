"""Pad, crop, mirror one image at a time with numpy."""

from __future__ import annotations

import numpy as np


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
