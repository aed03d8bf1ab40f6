from __future__ import annotations

import torch

from reference.public_networks import PublicPreActResNet18
from robustfair.models import PreActResNet18
from robustfair.models.networks.preact_resnet import PreActBlock


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_match_the_public_code():
    with torch.device("meta"):
        assert _count(PreActResNet18()) == _count(PublicPreActResNet18()) == 11_172_170


def test_width_scales_every_stage():
    model = PreActResNet18(width=16, num_classes=7)
    assert [stage[-1].conv2.out_channels for stage in model.stages] == [16, 32, 64, 128]
    assert model.head.weight.shape == (7, 128)


def test_shortcut_only_where_the_shape_changes_and_without_batch_norm():
    assert PreActBlock(8, 8, stride=1).shortcut is None
    changed = PreActBlock(8, 16, stride=2).shortcut
    assert changed.kernel_size == (1, 1)
    assert changed.stride == (2, 2)
    assert changed.bias is None


def test_a_block_with_silent_convolutions_passes_its_input():
    block = PreActBlock(4, 4, stride=1)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
