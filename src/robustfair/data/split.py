"""Stratified splits that depend on the labels, a fraction and a seed, and on nothing else.

Every class draws from its own stream, so that more images of one class never change what is held out of another.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from robustfair.errors import ConfigError
from robustfair.values import derive_seed


def stratified_split(labels: Tensor, fraction: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out the same fraction of every class.

    Of a class with n images, `round(fraction * n)` are held out, but at least one and never all; a class with a single
    image keeps it in the first part.

    Args:
        labels: (N,) class index per image.
        fraction: share of each class to hold out, above 0 and below 1.
        seed: another seed holds out other images.

    Returns:
        `(train_index, held_index)`: disjoint int64 rows on the CPU, each in ascending order, together all N.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.

    >>> train, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 0.5)
    >>> len(train), len(held)
    (4, 3)
    """
    if not (math.isfinite(fraction) and 0 < fraction < 1):
        raise ConfigError("stratified_split", "fraction", allowed="above 0 and below 1", got=fraction)
    values = labels.cpu().numpy()
    held = np.zeros(len(values), dtype=bool)
    for label in np.unique(values).tolist():
        members = np.flatnonzero(values == label)
        held[_draw(members, fraction, derive_seed(seed, "split", label))] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def split_hash(index: Tensor) -> str:
    """Hexadecimal SHA-256 of the rows `index` (N,), in their order: two runs used the same split if these agree.

    >>> split_hash(torch.tensor([1, 2])) == split_hash(torch.tensor([1, 2], dtype=torch.int32))
    True
    """
    return hashlib.sha256(index.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _draw(members: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    n = len(members)
    count = min(n - 1, max(1, round(fraction * n)))
    return np.random.default_rng(seed).permutation(members)[:count]
