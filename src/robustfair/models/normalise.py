"""Input normalisation as the first layer of a model.

The statistics are persistent buffers, so a weight file alone tells how its pixels were prepared: our weights trained on
raw pixels never run behind CIFAR-10 statistics by accident, and a foreign checkpoint that carries its own mean and std
sets ours. They are no parameters: nothing trains, decays or counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from robustfair.errors import ConfigError, ModelError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Normalisation = str | tuple[Sequence[float], Sequence[float]]

CIFAR10_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
NAMED_STATISTICS: Mapping[str, Statistics] = {
    "cifar10": CIFAR10_STATISTICS,
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
}
"""Mean and std of training pixels in [0, 1], as the public codes for these data sets have them."""


def default_statistics(in_channels: int) -> Statistics:
    """Mean and std per channel: those of the CIFAR-10 training pixels for three channels, else 0.5 and 0.5.

    >>> default_statistics(1)
    ((0.5,), (0.5,))
    """
    return CIFAR10_STATISTICS if in_channels == 3 else ((0.5,) * in_channels, (0.5,) * in_channels)


def named_statistics(normalise: Normalisation, in_channels: int) -> Statistics | None:
    """The statistics that a word or a pair means; None for "auto", which leaves the choice to the model.

    Args:
        normalise: "none" (0 and 1), "half" (0.5 and 0.5), a key of `NAMED_STATISTICS`, "auto", or a pair (mean, std).
        in_channels: channels of an image.

    Raises:
        ConfigError: another word, or no pair.

    >>> named_statistics("none", 1), named_statistics("auto", 3)
    (((0.0,), (1.0,)), None)
    """
    levels = {"none": (0.0, 1.0), "half": (0.5, 0.5)}
    if isinstance(normalise, str):
        if normalise == "auto":
            return None
        if normalise in levels:
            mean, std = levels[normalise]
            return (mean,) * in_channels, (std,) * in_channels
        if normalise in NAMED_STATISTICS:
            return NAMED_STATISTICS[normalise]
    elif len(normalise) == 2:
        return tuple(normalise[0]), tuple(normalise[1])
    allowed = f"auto, none, half, {', '.join(NAMED_STATISTICS)} or a pair (mean, std)"
    raise ConfigError("model", "normalise", allowed=allowed, got=normalise)


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
        if x.shape[1] != len(self.mean):  # one channel would spread over all of them unasked
            raise ModelError(f"the model takes images of {len(self.mean)} channels, got {x.shape[1]}")
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def statistics(self) -> Statistics:
        """Mean and std as the shortest decimals that give back the stored float32 values exactly."""
        mean, std = (tuple(float(str(v)) for v in t.float().cpu().numpy()) for t in (self.mean, self.std))
        return mean, std


class Normalised(nn.Module):
    """A network from elsewhere behind an input normalisation: (B, C, H, W) in [0, 1] to its logits.

    Args:
        network: takes normalised images.
        in_channels: channels C of an image.
        mean, std: as for `Normalise`.
    """

    def __init__(
        self, network: nn.Module, in_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.normalise = Normalise(in_channels, mean, std)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalise(x))
