"""WideResNet for small images, named `wrn-DEPTH-WIDTH` as in the papers' tables.

Source: Zagoruyko & Komodakis 2016, "Wide residual networks", in the form that TRADES, AWP and FAAL train, without
dropout and without the unused copy of the first stage (`sub_block1`) that public files carry: 46,160,474 parameters for
WRN-34-10 and ten classes, where the files of TRADES and FAAL hold 48,262,586.
"""

from __future__ import annotations

import functools
import re

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.errors import ConfigError
from robustfair.models.networks.base import Network, residual_stages
from robustfair.models.networks.preact_resnet import PreActBlock
from robustfair.registry import MODELS, canonical

STEM_CHANNELS = 16


class WideResNet(Network):
    """A 3x3 stem of 16 channels, three stages of pre-activation blocks, mean over the image, head.

    Args:
        depth: layers with weights, 6 n + 4 for n blocks a stage.
        width: the widening factor, which multiplies the base of 16: stages have 16, 32 and 64 times `width` channels.

    Raises:
        ConfigError: a size out of range, or a depth that is not 6 n + 4.
    """

    name = "wide-resnet"
    default_width = 10

    def make_layers(self, in_channels: int, width: int, depth: int = 28) -> int:
        if depth < 10 or depth % 6 != 4:
            raise ConfigError("wide-resnet", "depth", allowed="6 n + 4 (10, 16, 22, 28, 34, 40, ...)", got=depth)
        self.name = f"wrn-{depth}-{width}"
        channels = [STEM_CHANNELS * width * factor for factor in (1, 2, 4)]
        self.stem = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.stages = residual_stages(PreActBlock, STEM_CHANNELS, channels, blocks=(depth - 4) // 6)
        self.norm = nn.BatchNorm2d(channels[-1])
        return channels[-1]

    def run_layers(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stages(self.stem(x))))


def wide_resnet_factory(name: str) -> functools.partial[WideResNet] | None:
    """The constructor that `wrn-D-W` names, any depth and width; None for a name of another form.

    >>> wide_resnet_factory("WRN_40_2").keywords
    {'depth': 40, 'width': 2}
    """
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", canonical(name))
    return functools.partial(WideResNet, depth=int(match[1]), width=int(match[2])) if match else None


for _depth, _width in ((28, 2), (28, 5), (28, 10), (34, 10), (70, 16)):
    MODELS.register(f"wrn-{_depth}-{_width}")(functools.partial(WideResNet, depth=_depth, width=_width))
