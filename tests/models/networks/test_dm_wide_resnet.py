from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reference.public_networks import PublicDMWideResNet
from robustfair.errors import ConfigError
from robustfair.models import DMWideResNet, WideResNet
from robustfair.models.networks.dm_wide_resnet import DMBlock, dm_wide_resnet_factory, pad_same


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "width", "expected"), [(28, 10, 36_479_194), (70, 16, 266_796_506)])
def test_parameters_match_the_papers(depth, width, expected):
    with torch.device("meta"):
        ours = _count(DMWideResNet(depth=depth, width=width))
        assert ours == _count(PublicDMWideResNet(depth, width)) == _count(WideResNet(depth=depth, width=width))
    assert ours == expected


def test_it_is_another_function_than_the_wide_resnet_of_the_same_weights():
    torch.manual_seed(0)
    ours, plain = DMWideResNet(depth=10, width=1).eval(), WideResNet(depth=10, width=1).eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert not torch.allclose(ours(x), plain(x), atol=1e-2)


@pytest.mark.parametrize("size", [7, 8, 9, 32])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_gives_the_rounded_up_size(size, stride):
    x = torch.rand(1, 1, size, size + 1)
    out = F.conv2d(pad_same(x, stride), torch.ones(1, 1, 3, 3), stride=stride)
    assert out.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))


def test_an_even_image_is_padded_below_and_right_only():
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(pad_same(x, 2), F.pad(x, (0, 1, 0, 1)))
    assert torch.equal(pad_same(x, 1), F.pad(x, (1, 1, 1, 1)))


def test_the_shortcut_stands_where_channels_change():
    assert DMBlock(8, 8, stride=1).shortcut is None
    assert DMBlock(8, 16, stride=2).shortcut.bias is None


def test_its_own_statistics_follow_the_classes():
    assert DMWideResNet(depth=10, width=1).normalise.statistics()[0] == (0.4914, 0.4822, 0.4465)
    hundred = DMWideResNet(depth=10, width=1, num_classes=100).normalise
    assert hundred.statistics() == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    given = DMWideResNet(depth=10, width=1, num_classes=100, mean=[0.5] * 3, std=[0.5] * 3).normalise
    assert given.statistics() == ((0.5,) * 3, (0.5,) * 3)


def test_names_are_parsed_and_impossible_depths_refused():
    assert dm_wide_resnet_factory("DM_WRN_94_16").keywords == {"depth": 94, "width": 16}
    assert dm_wide_resnet_factory("wrn-28-10") is None
    with pytest.raises(ConfigError, match=r"depth must be 6 n \+ 4"):
        DMWideResNet(depth=12, width=1)
