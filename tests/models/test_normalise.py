from __future__ import annotations

import pytest
import torch
from torch import nn

from robustfair.errors import ConfigError, ModelError
from robustfair.models.normalise import (
    CIFAR10_STATISTICS,
    NAMED_STATISTICS,
    Normalise,
    Normalised,
    default_statistics,
    named_statistics,
)


def test_each_channel_has_its_own_mean_and_std():
    x = torch.rand(2, 3, 4, 5)
    out = Normalise(3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))(x)
    for c, (mean, std) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
        torch.testing.assert_close(out[:, c], (x[:, c] - mean) / std)


def test_defaults_by_channel_count():
    assert default_statistics(3) == CIFAR10_STATISTICS
    assert default_statistics(2) == ((0.5, 0.5), (0.5, 0.5))
    assert Normalise(3).statistics() == CIFAR10_STATISTICS


def test_words_for_statistics():
    assert named_statistics("auto", 3) is None
    assert named_statistics("none", 2) == ((0.0, 0.0), (1.0, 1.0))
    assert named_statistics("half", 1) == ((0.5,), (0.5,))
    assert all(named_statistics(name, 3) == pair for name, pair in NAMED_STATISTICS.items())
    assert named_statistics(([0.1], [0.2]), 1) == ((0.1,), (0.2,))
    with pytest.raises(ConfigError, match=r"normalise must be auto, none, half, cifar10, .*, got 'cifra10'"):
        named_statistics("cifra10", 3)


def test_an_image_with_other_channels_does_not_spread_over_them():
    with pytest.raises(ModelError, match="takes images of 3 channels, got 1"):
        Normalise(3)(torch.rand(2, 1, 4, 4))


def test_a_network_from_elsewhere_behind_a_normalisation():
    network = nn.Conv2d(3, 4, 1)
    model = Normalised(network, 3, [0.5] * 3, [0.25] * 3)
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(model(x), network((x - 0.5) / 0.25))
    assert list(model.state_dict()) == ["normalise.mean", "normalise.std", "network.weight", "network.bias"]


def test_statistics_travel_with_the_weights_but_do_not_train():
    source = Normalise(1, mean=[0.1307], std=[0.3081])
    target = Normalise(1)
    target.load_state_dict(source.state_dict())
    assert target.statistics() == ((0.1307,), (0.3081,))
    assert not list(source.parameters())


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [([0.5], None, "mean"), (None, [0.5], "std"), (None, [0.5, 0.0, 0.5], "std"), (None, [0.5, -1.0, 0.5], "std")],
)
def test_wrong_statistics_are_refused(mean, std, field):
    with pytest.raises(ConfigError, match=f"normalise: {field} must be"):
        Normalise(3, mean, std)
