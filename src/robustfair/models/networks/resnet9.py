"""ResNet-9, the small residual net of fast CIFAR training; the CIFAR-100 class-wise study uses it.

Departure from its usual form: the last pooling is a mean over what is left of the image, not a 4x4 maximum, so any
image size works; the other poolings round up for the same reason (no difference on even sizes).
"""

from __future__ import annotations

from torch import Tensor, nn

from robustfair.models.networks.base import Network
from robustfair.registry import MODELS


def _conv(in_channels: int, out_channels: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)) if pool else nn.Sequential(*layers)


class _Residual(nn.Module):
    """x plus two convolutions of it, each with batch norm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


@MODELS.register("resnet9")
class ResNet9(Network):
    """Eight convolutions of width to 8 width channels, two residual pairs among them, mean over the image, head.

    Args:
        width: channels of the first convolution; the last have eight times as many.
    """

    name = "resnet9"
    default_width = 64

    def make_layers(self, in_channels: int, width: int) -> int:
        self.features = nn.Sequential(
            _conv(in_channels, width),
            _conv(width, 2 * width, pool=True),
            _Residual(2 * width),
            _conv(2 * width, 4 * width, pool=True),
            _conv(4 * width, 8 * width, pool=True),
            _Residual(8 * width),
        )
        return 8 * width

    def run_layers(self, x: Tensor) -> Tensor:
        return self.features(x)
