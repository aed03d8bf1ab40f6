"""The WideResNet of DeepMind's robust-training code, named `dm-wrn-DEPTH-WIDTH`: SiLU, and strides padded as in JAX.

It has the layers and the parameters of `WideResNet`, but its weights do not run there: the activation is SiLU, and a
convolution of stride two pads only on the right and below where the image has even sides, so every position shifts.

Source: Gowal et al. 2020, "Uncovering the limits of adversarial training against norm-bounded adversarial examples",
section 4; its files and those of Rebuffi et al. 2021, Gowal et al. 2021 and Wang et al. 2023 share the layout. They run
behind the statistics of their training data, which the files do not hold. 36,479,194 parameters for WRN-28-10 and ten
classes, 266,796,506 for WRN-70-16.
"""

from __future__ import annotations

import functools
import re

from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.errors import ConfigError
from robustfair.models.networks.base import Network, residual_stages
from robustfair.models.networks.wide_resnet import STEM_CHANNELS
from robustfair.models.normalise import NAMED_STATISTICS, Statistics
from robustfair.registry import MODELS, canonical


class DMBlock(nn.Module):
    """Twice batch norm, SiLU, 3x3 convolution, plus a shortcut: a 1x1 convolution of the activated input, or itself."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(pad_same(h, self.conv1.stride[0]))
        return self.conv2(F.silu(self.norm2(h))) + shortcut


def pad_same(x: Tensor, stride: int) -> Tensor:
    """Zeros around (B, C, H, W) so that a 3x3 convolution gives ceil(H / stride) rows; an odd one goes below or right.

    >>> pad_same(Tensor([[[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]]), stride=2)[0, 0]
    tensor([[0., 1., 1., 1., 0.],
            [0., 1., 1., 1., 0.],
            [0., 0., 0., 0., 0.]])
    """
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class DMWideResNet(Network):
    """A 3x3 stem of 16 channels, three stages of SiLU blocks, mean over the image, head.

    Args:
        depth: layers with weights, 6 n + 4 for n blocks a stage.
        width: the widening factor, which multiplies the base of 16: stages have 16, 32 and 64 times `width` channels.
        mean, std: of the input normalisation, one number a channel; None takes what the published files were trained
            with: CIFAR-100's for a hundred classes and three channels, else `default_statistics`.

    Raises:
        ConfigError: a size out of range, or a depth that is not 6 n + 4.
    """

    name = "dm-wide-resnet"
    default_width = 10

    def make_layers(self, in_channels: int, width: int, depth: int = 28) -> int:
        if depth < 10 or depth % 6 != 4:
            raise ConfigError("dm-wide-resnet", "depth", allowed="6 n + 4 (10, 16, 22, 28, 34, 70, ...)", got=depth)
        self.name = f"dm-wrn-{depth}-{width}"
        channels = [STEM_CHANNELS * width * factor for factor in (1, 2, 4)]
        self.stem = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.stages = residual_stages(DMBlock, STEM_CHANNELS, channels, blocks=(depth - 4) // 6)
        self.norm = nn.BatchNorm2d(channels[-1])
        return channels[-1]

    def published_statistics(self) -> Statistics | None:
        return NAMED_STATISTICS["cifar100"] if (self.num_classes, self.in_channels) == (100, 3) else None

    def run_layers(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.stages(self.stem(x))))


def dm_wide_resnet_factory(name: str) -> functools.partial[DMWideResNet] | None:
    """The constructor that `dm-wrn-D-W` names, any depth and width; None for a name of another form.

    >>> dm_wide_resnet_factory("DM_WRN_94_16").keywords
    {'depth': 94, 'width': 16}
    """
    match = re.fullmatch(r"dm-wrn-(\d+)-(\d+)", canonical(name))
    return functools.partial(DMWideResNet, depth=int(match[1]), width=int(match[2])) if match else None


for _depth, _width in ((28, 10), (70, 16)):
    MODELS.register(f"dm-wrn-{_depth}-{_width}")(functools.partial(DMWideResNet, depth=_depth, width=_width))
