"""A three-convolution net for small images: the model of the demo, trained against PGD on a laptop core in seconds.

It has no batch norm, so its clean and attacked forward passes are one function and class-wise effects are easy to read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.models.normalise import Normalise, check_sizes, initialise
from robustfair.registry import MODELS


@MODELS.register("small-cnn")
class SmallCNN(nn.Module):
    """Convolutions of width, 2 and 4 width channels with ReLU (two of them halve the image), mean over the image, head.

    Args:
        num_classes: outputs C.
        in_channels: channels of an image.
        width: channels of the first convolution.
        mean, std: of the input normalisation, one number a channel; None takes `default_statistics`.

    Shape: (B, in_channels, H, W) in [0, 1] to logits (B, C), any H and W.

    Raises:
        ConfigError: a size out of range.
    """

    name = "small-cnn"

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self.name, num_classes=num_classes, in_channels=in_channels, width=width)
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, width
        self.normalise = Normalise(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(self.normalise(x)))
        h = F.relu(self.conv3(F.relu(self.conv2(h))))
        return self.head(h.mean((2, 3)))
