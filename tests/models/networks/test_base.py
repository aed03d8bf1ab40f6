from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustfair.errors import ConfigError
from robustfair.models import SmallCNN
from robustfair.models.networks.base import Network, check_sizes, initialise


class Tiny(Network):
    name = "tiny"
    default_width = 3

    def make_layers(self, in_channels, width, kernel=1):
        self.conv = nn.Conv2d(in_channels, width, kernel)
        return width

    def run_layers(self, x):
        return F.relu(self.conv(x))


def test_a_network_is_its_layers_between_normalisation_and_head():
    net = Tiny(num_classes=5, in_channels=1, mean=[0.25], std=[0.5])
    assert [*net.state_dict()] == [
        "normalise.mean",
        "normalise.std",
        "conv.weight",
        "conv.bias",
        "head.weight",
        "head.bias",
    ]
    assert (net.num_classes, net.in_channels, net.width) == (5, 1, 3)
    x = torch.rand(2, 1, 4, 4)
    features = F.relu(net.conv((x - 0.25) / 0.5)).mean((2, 3))
    assert torch.equal(net(x), net.head(features))
    assert Tiny(kernel=3).conv.kernel_size == (3, 3)


def test_what_no_layer_takes_is_no_size():
    with pytest.raises(TypeError, match="depth"):
        SmallCNN(depth=3)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"width": 0}, "width"),
        ({"width": 1.5}, "width"),
        ({"num_classes": True}, "num_classes"),
    ],
)
def test_wrong_sizes_are_refused(sizes, field):
    with pytest.raises(ConfigError, match=f"net: {field} must be an integer of at least"):
        check_sizes("net", **{"num_classes": 10, "in_channels": 3, "width": 8, **sizes})


def test_starting_weights_have_the_kaiming_scale_and_no_class_preference():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.Linear(128, 10))
    initialise(net)
    expected = (2 / (128 * 9)) ** 0.5
    assert net[0].weight.std().item() == pytest.approx(expected, rel=0.02)
    assert net[0].bias.abs().max() == 0
    assert net[1].weight.eq(1).all()
    assert net[1].bias.eq(0).all()
    assert net[2].bias.eq(0).all()
