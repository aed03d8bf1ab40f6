"""Counts and sums per class, which add up over batches: (C, C) rows predicted, columns true, or hits or sums (C,)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustfair.errors import ConfigError

Array = Tensor | np.ndarray


def check_classes(values: Tensor, num_classes: int, *, field: str) -> None:
    """Refuse class indices outside [0, num_classes). Synchronises with the device.

    Raises:
        ConfigError: an index lies outside.
    """
    if values.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= num_classes:
        raise ConfigError(
            "metrics",
            field,
            allowed=f"class indices from 0 to {num_classes - 1}",
            got=low if low < 0 else high,
            hint="Check num_classes against the labels and the width of the model's output.",
        )


def confusion_pred_true(pred: Tensor, label: Tensor, num_classes: int, *, check: bool = True) -> Tensor:
    """Confusion counts (C, C) int64 of predictions and labels (N,), rows predicted, columns true. Add batches with `+`.

    With `check=False` nothing waits for the device, and the caller vouches for the range of both inputs.

    Raises:
        ConfigError: inputs of different or wrong shape, or (with `check`) an index outside [0, num_classes).

    >>> confusion_pred_true(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    """
    check_pair(pred, label, owner="confusion_pred_true")
    if check:
        check_classes(pred, num_classes, field="pred")
        check_classes(label, num_classes, field="label")
    cell = pred.long() * num_classes + label.long()
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, cell, torch.ones_like(cell)).view(num_classes, num_classes)


def correct_per_class(correct: Tensor, label: Tensor, num_classes: int, *, check: bool = True) -> Tensor:
    """Hits per class (C,) int64 from flags (N,) bool and labels (N,): the form in which robust hits are kept.

    Raises:
        ConfigError: inputs of different or wrong shape, or (with `check`) a label outside [0, num_classes).

    >>> correct_per_class(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3).tolist()
    [1, 0, 1]
    """
    check_pair(correct, label, owner="correct_per_class")
    if check:
        check_classes(label, num_classes, field="label")
    counts = torch.zeros(num_classes, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, label.long(), correct.long())


def sums_per_class(values: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums per class (C,) of values (N,), or (C, K) of rows (N, K), and counts (C,), all float64; differentiable.

    Nothing waits for the device, and the caller vouches for the range of the labels. It is a product with the one-hot
    labels, which a GPU adds up in the same order every time, as `index_add_` does not.

    >>> sums, counts = sums_per_class(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 3)
    >>> sums.tolist(), counts.tolist()
    ([2.0, 0.0, 5.0], [1.0, 0.0, 2.0])
    """
    member = F.one_hot(label, num_classes).to(torch.float64)
    return member.T @ values.to(torch.float64), member.sum(0)


def check_pair(a: Tensor, b: Tensor, *, owner: str) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise ConfigError(owner, "shapes", allowed="two vectors of one length", got=(tuple(a.shape), tuple(b.shape)))


def square(counts_pred_true: Array) -> Tensor:
    counts = torch.as_tensor(counts_pred_true)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ConfigError("metrics", "counts_pred_true", allowed="a square matrix (C, C)", got=tuple(counts.shape))
    return counts
