"""timm beside a CPU build of torch: its torchvision then finds no compiled operators, and does not import."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

_LIBRARIES: list[torch.library.Library] = []
"""What was declared, alive as long as the tests run."""


def import_timm() -> ModuleType:
    """timm, or a skipped test where it is not installed."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
    import timm

    return timm
