from __future__ import annotations

import torch
from torch import nn

from reference.public_networks import PublicResNet18
from robustfair.models import ResNet18
from robustfair.models.networks.resnet18 import ResNetBlock


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_match_the_public_code():
    with torch.device("meta"):
        assert _count(ResNet18()) == _count(PublicResNet18()) == 11_173_962


def test_width_scales_every_stage():
    model = ResNet18(width=16, num_classes=7)
    assert [stage[-1].conv2.out_channels for stage in model.stages] == [16, 32, 64, 128]
    assert model.head.weight.shape == (7, 128)


def test_a_block_with_silent_convolutions_passes_what_is_positive():
    block = ResNetBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())
