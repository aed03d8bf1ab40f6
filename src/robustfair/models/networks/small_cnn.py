"""A three-convolution net for small images: the model of the demo, trained against PGD on a laptop core in seconds.

It has no batch norm, so its clean and attacked forward passes are one function and class-wise effects are easy to read.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.models.networks.base import Network
from robustfair.registry import MODELS


@MODELS.register("small-cnn")
class SmallCNN(Network):
    """Convolutions of width, 2 and 4 width channels with ReLU (two of them halve the image), mean over the image, head.

    Args:
        width: channels of the first convolution.
    """

    name = "small-cnn"
    default_width = 32

    def make_layers(self, in_channels: int, width: int) -> int:
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        return 4 * width

    def run_layers(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
