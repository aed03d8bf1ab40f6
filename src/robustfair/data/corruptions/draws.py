"""Random numbers of corruptions, which an image has wherever it is corrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustfair.values import seeded_generator


class Draws:
    """Random numbers for a batch of B images, a stream an image, each keyed by `keys` and the index of its image.

    They are drawn on the CPU, so that they are the same for images on any device.
    """

    def __init__(self, index: Tensor, device: torch.device, *keys: object) -> None:
        self.device = device
        self._streams = [seeded_generator("cpu", "corrupt", *keys, image) for image in index.tolist()]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) float32 from U(low, high)."""
        return self._filled(shape, torch.float32, lambda part, stream: part.uniform_(low, high, generator=stream))

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """(B, *shape) float32 from N(mean, std)."""
        return self._filled(shape, torch.float32, lambda part, stream: part.normal_(mean, std, generator=stream))

    def integers(self, *shape: int, low: int, high: int) -> Tensor:
        """(B, *shape) int8, uniform on low to high - 1."""
        return self._filled(shape, torch.int8, lambda part, stream: part.random_(low, high, generator=stream))

    def poisson(self, rate: Tensor) -> Tensor:
        """Counts of the rates (B, ...)."""
        parts = zip(rate.cpu(), self._streams, strict=True)
        return torch.stack([torch.poisson(part, generator=stream) for part, stream in parts]).to(self.device)

    def _filled(
        self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        drawn = torch.empty(len(self._streams), *shape, dtype=dtype)
        for part, stream in zip(drawn, self._streams, strict=True):
            fill(part, stream)
        return drawn.to(self.device)
