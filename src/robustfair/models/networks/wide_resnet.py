"""WideResNet for small images, named `wrn-DEPTH-WIDTH` as in the papers' tables.

Source: Zagoruyko & Komodakis 2016, "Wide residual networks", in the form that TRADES, AWP and FAAL train, without
dropout and without the unused copy of the first stage (`sub_block1`) that public files carry: 46,160,474 parameters for
WRN-34-10 and ten classes, where the files of TRADES and FAAL hold 48,262,586.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.errors import ConfigError
from robustfair.models.networks.preact_resnet import PreActBlock, residual_stages
from robustfair.models.normalise import Normalise, check_sizes, initialise
from robustfair.registry import MODELS, canonical

STEM_CHANNELS = 16


class WideResNet(nn.Module):
    """A 3x3 stem of 16 channels, three stages of pre-activation blocks, mean over the image, head.

    Args:
        depth: layers with weights, 6 n + 4 for n blocks a stage.
        num_classes: outputs C.
        in_channels: channels of an image.
        width: the widening factor, which multiplies the base of 16: stages have 16, 32 and 64 times `width` channels.
        mean, std: of the input normalisation, one number a channel; None takes `default_statistics`.

    Shape: (B, in_channels, H, W) in [0, 1] to logits (B, C), any H and W.

    Raises:
        ConfigError: a size out of range, or a depth that is not 6 n + 4.
    """

    def __init__(
        self,
        *,
        depth: int = 28,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_sizes("wide-resnet", num_classes=num_classes, in_channels=in_channels, width=width)
        if depth < 10 or depth % 6 != 4:
            raise ConfigError("wide-resnet", "depth", allowed="6 n + 4 (10, 16, 22, 28, 34, 40, ...)", got=depth)
        self.name = f"wrn-{depth}-{width}"
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, width
        channels = [STEM_CHANNELS * width * factor for factor in (1, 2, 4)]
        self.normalise = Normalise(in_channels, mean, std)
        self.stem = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.stages = residual_stages(PreActBlock, STEM_CHANNELS, channels, blocks=(depth - 4) // 6)
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.stem(self.normalise(x)))
        return self.head(F.relu(self.norm(h)).mean((2, 3)))


def wide_resnet_factory(name: str) -> functools.partial[WideResNet] | None:
    """The constructor that `wrn-D-W` names, any depth and width; None for a name of another form.

    >>> wide_resnet_factory("WRN_40_2").keywords
    {'depth': 40, 'width': 2}
    """
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", canonical(name))
    return functools.partial(WideResNet, depth=int(match[1]), width=int(match[2])) if match else None


for _depth, _width in ((28, 2), (28, 5), (28, 10), (34, 10), (70, 16)):
    MODELS.register(f"wrn-{_depth}-{_width}")(functools.partial(WideResNet, depth=_depth, width=_width))
