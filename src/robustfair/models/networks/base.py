"""What the networks share: one constructor, the starting weights, and residual stages of any block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from robustfair.errors import ConfigError
from robustfair.models.normalise import Normalise, Statistics


class Network(nn.Module, ABC):
    """Input normalisation, the layers of a network, mean over the image, linear head.

    Class attributes:
        name: the registered name; of the instance where the sizes decide.
        default_width: the published one.

    Args:
        num_classes: outputs C.
        in_channels: channels of an image.
        width: of the layers, as the network says; None takes `default_width`.
        mean, std: of the input normalisation, one number a channel; None takes `default_statistics`.
        shape: what else the layers of the network take.

    Shape: (B, in_channels, H, W) in [0, 1] to logits (B, C), any H and W.

    Raises:
        ConfigError: a size out of range.
    """

    name: str
    default_width: ClassVar[int]

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **shape: int,
    ) -> None:
        super().__init__()
        width = self.default_width if width is None else width
        check_sizes(self.name, num_classes=num_classes, in_channels=in_channels, width=width)
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, width
        if mean is None and std is None:
            mean, std = self.published_statistics() or (None, None)
        self.normalise = Normalise(in_channels, mean, std)
        self.head = nn.Linear(self.make_layers(in_channels, width, **shape), num_classes)
        self.set_starting_weights()

    @abstractmethod
    def make_layers(self, in_channels: int, width: int, *args: Any, **shape: Any) -> int:
        """Set the layers between normalisation and head as attributes; returns the channels of their output."""

    @abstractmethod
    def run_layers(self, x: Tensor) -> Tensor:
        """(B, channels, H', W') from normalised images (B, in_channels, H, W)."""

    def published_statistics(self) -> Statistics | None:
        """Mean and std that published weights of these sizes were trained with, where they are not the default."""
        return None

    def set_starting_weights(self) -> None:
        """Draw the weights that training starts from, see `initialise`."""
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run_layers(self.normalise(x)).mean((2, 3)))


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


def residual_stages(
    block: Callable[[int, int, int], nn.Module], in_channels: int, channels: Sequence[int], blocks: int
) -> nn.Sequential:
    """Stages of `blocks` blocks each, with `channels` outputs; every stage but the first halves the image.

    Args:
        block: makes one from its channels in, its channels out and its stride.
    """
    stages = []
    for i, out_channels in enumerate(channels):
        first = block(in_channels, out_channels, 1 if i == 0 else 2)
        rest = [block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(first, *rest))
        in_channels = out_channels
    return nn.Sequential(*stages)
