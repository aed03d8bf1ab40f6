"""The device that a name means, and the refusal of one that is not there."""

from __future__ import annotations

import torch

from robustfair.errors import ConfigError


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
