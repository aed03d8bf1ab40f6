"""timm beside a CPU build of torch: its torchvision then finds no compiled operators, and does not import."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from torch import library

_LIBRARIES: list[library.Library] = []
"""What was declared, alive as long as the tests run."""


def import_timm() -> ModuleType:
    """timm, or a skipped test where it is not installed."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        declared = library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(declared)
    import timm

    return timm
