"""The images of a corruption audit: corrupted on the fly, or as their authors ship them (CIFAR-10-C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustfair.data import ImageDataset
from robustfair.data.corruptions.generate import corrupt
from robustfair.data.corruptions.names import SEVERITIES
from robustfair.errors import DataError
from robustfair.grammar import canonical_key, read_path

Images = Callable[[str, int, slice], Tensor]
"""From corruption, severity and rows to the corrupted images, uint8 (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Corrupted images as their authors ship them, mapped from disk: `<corruption>.npy`, severity after severity.

    Attributes:
        files: corruption -> uint8 (5 * count, H, W, C).
        count: N, images of one severity.
        device: where they go.
    """

    files: Mapping[str, np.ndarray]
    count: int
    device: torch.device

    def __call__(self, corruption: str, severity: int, rows: slice) -> Tensor:
        """uint8 (B, C, H, W)."""
        first = (severity - 1) * self.count
        pixels = np.array(self.files[corruption][first + rows.start : first + rows.stop])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.device)


def open_published(folder: Path | str, corruptions: Sequence[str], dataset: ImageDataset) -> Published:
    """A downloaded set of corrupted images (CIFAR-10-C), found to be of the images of `dataset`; on its device.

    Raises:
        DataError: a file is missing or damaged, or its shape or labels are not those of the data set.
    """
    folder = read_path(folder)
    if not folder.is_dir():
        raise DataError(f"published corruptions: {str(folder)!r} is not a folder")
    files = {canonical_key(path.stem): path for path in sorted(folder.glob("*.npy"))}
    missing = [name for name in (*corruptions, "labels") if name not in files]
    if missing:
        raise DataError(f"{folder} holds no {missing[0]}.npy: name the corruptions that it holds")
    n = len(dataset)
    labels = _mapped(files["labels"])
    expected = np.tile(dataset.labels.cpu().numpy(), len(SEVERITIES))
    if labels.shape != expected.shape or not np.array_equal(labels, expected):
        raise DataError(
            f"{files['labels']} are not the labels of the {n} images of {dataset.name}, {len(SEVERITIES)} times over: "
            "audit the whole test part, in its order"
        )
    channels, height, width = dataset.images.shape[1:]
    shape = (len(SEVERITIES) * n, height, width, channels)
    mapped = {name: _mapped(files[name]) for name in corruptions}
    for name, pixels in mapped.items():
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise DataError(f"{files[name]} must be uint8 {shape}, got {pixels.dtype} {pixels.shape}")
    return Published(files=mapped, count=n, device=dataset.device)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Images of a data set, corrupted on its device."""

    data: ImageDataset
    seed: int
    scale: str
    frost: Path | str | None

    def __call__(self, corruption: str, severity: int, rows: slice) -> Tensor:
        """uint8 (B, C, H, W)."""
        return corrupt(
            self.data.images[rows],
            corruption,
            severity,
            index=torch.arange(rows.start, rows.stop),
            seed=self.seed,
            scale=self.scale,
            frost=self.frost,
        )


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}): the file is cut or damaged") from error
