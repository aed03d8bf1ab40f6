"""What the networks here share: input normalisation as a first layer, the starting weights, a check of the sizes.

The statistics are persistent buffers, so a weight file alone tells how its pixels were prepared: our weights trained on
raw pixels never run behind CIFAR-10 statistics by accident, and a foreign checkpoint that carries its own mean and std
sets ours. They are no parameters: nothing trains, decays or counts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustfair.errors import ConfigError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

CIFAR10_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def default_statistics(in_channels: int) -> Statistics:
    """Mean and std per channel: those of the CIFAR-10 training pixels for three channels, else 0.5 and 0.5.

    >>> default_statistics(1)
    ((0.5,), (0.5,))
    """
    return CIFAR10_STATISTICS if in_channels == 3 else ((0.5,) * in_channels, (0.5,) * in_channels)


class Normalise(nn.Module):
    """(x - mean) / std per channel, (B, C, H, W) in [0, 1] to the same shape, so that attacks work on pixels.

    Args:
        in_channels: number of channels C.
        mean, std: one number a channel; None takes `default_statistics`.

    Raises:
        ConfigError: not one number a channel, or a std that is not positive.

    >>> Normalise(1, mean=[0.5], std=[0.25])(torch.tensor([[[[0.0, 1.0]]]])).flatten().tolist()
    [-2.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        default_mean, default_std = default_statistics(in_channels)
        for field, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != in_channels:
                raise ConfigError("normalise", field, allowed=f"{in_channels} numbers, one a channel", got=values)
        if std is not None and min(std) <= 0:
            raise ConfigError("normalise", "std", allowed="positive", got=std)
        self.register_buffer("mean", torch.tensor(default_mean if mean is None else mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(default_std if std is None else std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def statistics(self) -> Statistics:
        """Mean and std as the shortest decimals that give back the stored float32 values exactly."""
        mean, std = (tuple(float(str(v)) for v in t.float().cpu().numpy()) for t in (self.mean, self.std))
        return mean, std


def check_sizes(owner: str, *, num_classes: int, in_channels: int, width: int) -> None:
    """Refuse sizes that make no classifier.

    Raises:
        ConfigError: fewer than two classes, or no channel, or a width below one.
    """
    for field, value, least in (("num_classes", num_classes, 2), ("in_channels", in_channels, 1), ("width", width, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(owner, field, allowed=f"an integer of at least {least}", got=value)


def initialise(model: nn.Module) -> None:
    """Set the starting weights in place, drawn from torch's global generator.

    Convolutions: Kaiming normal over the fan out, as the WideResNet code of TRADES and FAAL has it. Batch norm:
    scale 1, shift 0. Linear weights: torch's default. Every bias is 0, so that no class is preferred before training.

    Source: He et al. 2015, "Delving deep into rectifiers", section 2.2 (backward case).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
