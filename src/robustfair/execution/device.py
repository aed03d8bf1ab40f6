"""The device that a name means, and the refusal of one that is not there."""

from __future__ import annotations

import warnings

import torch

from robustfair.config import Precision
from robustfair.errors import ConfigError, RobustFairWarning


def resolve_device(name: str | torch.device) -> str:
    """The device that a name means; for "auto" a GPU where there is one.

    Raises:
        ConfigError: no such device, or torch does not see it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = isinstance(name, str | torch.device)
        known = known and torch.empty(0, device=name).device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError):
        known = False
    if not known:
        raise ConfigError("device", "device", allowed="auto, cpu, or a GPU that torch sees", got=name)
    return str(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products, without which they are slower than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def warn_of_slow_bf16(precision: Precision, device: torch.device) -> None:
    """Say that bf16 is slow where a CPU has no instructions for it."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        text = "this processor has no bf16 instructions: precision fp32 is about ten times faster here"
        warnings.warn(text, RobustFairWarning, stacklevel=3)
