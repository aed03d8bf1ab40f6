"""PreActResNet-18 for small images, and the pre-activation block that WideResNet is made of too.

Source: He et al. 2016, "Identity mappings in deep residual networks", in the form that CFA, FAIR-TAT and AWP train:
3x3 stem without pooling, batch norm and ReLU before the mean over the image (11,172,170 parameters for ten classes).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.models.networks.base import Network, residual_stages
from robustfair.registry import MODELS


class PreActBlock(nn.Module):
    """Twice batch norm, ReLU, 3x3 convolution, plus a shortcut.

    Where stride or channels change, the shortcut is a 1x1 convolution of the *pre-activated* input, without batch norm;
    elsewhere it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return h + shortcut


@MODELS.register("preact-resnet18")
class PreActResNet18(Network):
    """Four stages of two pre-activation blocks with width, 2, 4 and 8 width channels, mean over the image, head.

    Args:
        width: channels of the stem and the first stage.
    """

    name = "preact-resnet18"
    default_width = 64

    def make_layers(self, in_channels: int, width: int) -> int:
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages = residual_stages(PreActBlock, width, (width, 2 * width, 4 * width, 8 * width), blocks=2)
        self.norm = nn.BatchNorm2d(8 * width)
        return 8 * width

    def run_layers(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stages(self.stem(x))))
