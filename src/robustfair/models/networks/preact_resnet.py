"""PreActResNet-18 for small images, the pre-activation block that WideResNet is made of too, and stages of any block.

Source: He et al. 2016, "Identity mappings in deep residual networks", in the form that CFA, FAIR-TAT and AWP train:
3x3 stem without pooling, batch norm and ReLU before the mean over the image (11,172,170 parameters for ten classes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.models.normalise import Normalise, check_sizes, initialise
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


@MODELS.register("preact-resnet18")
class PreActResNet18(nn.Module):
    """Four stages of two pre-activation blocks with width, 2, 4 and 8 width channels, mean over the image, head.

    Args:
        num_classes: outputs C.
        in_channels: channels of an image.
        width: channels of the stem and the first stage.
        mean, std: of the input normalisation, one number a channel; None takes `default_statistics`.

    Shape: (B, in_channels, H, W) in [0, 1] to logits (B, C), any H and W.

    Raises:
        ConfigError: a size out of range.
    """

    name = "preact-resnet18"

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self.name, num_classes=num_classes, in_channels=in_channels, width=width)
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, width
        self.normalise = Normalise(in_channels, mean, std)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages = residual_stages(PreActBlock, width, (width, 2 * width, 4 * width, 8 * width), blocks=2)
        self.norm = nn.BatchNorm2d(8 * width)
        self.head = nn.Linear(8 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.stem(self.normalise(x)))
        return self.head(F.relu(self.norm(h)).mean((2, 3)))
