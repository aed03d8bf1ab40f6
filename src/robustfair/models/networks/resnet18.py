"""ResNet-18 for small images: 3x3 stem without pooling, batch norm after each convolution, in the shortcut too.

Source: He et al. 2016, "Deep residual learning for image recognition", in the form that most CIFAR codes train: the
first stage keeps the size of the image (11,173,962 parameters for ten classes).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.models.networks.base import Network, residual_stages
from robustfair.registry import MODELS


class ResNetBlock(nn.Module):
    """Twice 3x3 convolution and batch norm, with a ReLU between and one after the shortcut is added.

    Where stride or channels change, the shortcut is a 1x1 convolution with batch norm; elsewhere it is the input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.changes = stride != 1 or in_channels != out_channels
        if self.changes:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut_norm(self.shortcut(x)) if self.changes else x
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + shortcut)


@MODELS.register("resnet18")
class ResNet18(Network):
    """Four stages of two blocks with width, 2, 4 and 8 width channels, mean over the image, head.

    Args:
        width: channels of the stem and the first stage.
    """

    name = "resnet18"
    default_width = 64

    def make_layers(self, in_channels: int, width: int) -> int:
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = residual_stages(ResNetBlock, width, (width, 2 * width, 4 * width, 8 * width), blocks=2)
        return 8 * width

    def run_layers(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.norm(self.stem(x))))
