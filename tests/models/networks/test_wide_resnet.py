from __future__ import annotations

import pytest
import torch

from reference.public_networks import PublicWideResNet
from robustfair.errors import ConfigError
from robustfair.models import WideResNet
from robustfair.models.networks.wide_resnet import wide_resnet_factory


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "width", "expected"), [(28, 10, 36_479_194), (34, 10, 46_160_474)])
def test_parameters_match_the_papers(depth, width, expected):
    with torch.device("meta"):
        assert _count(WideResNet(depth=depth, width=width)) == expected


def test_the_public_file_holds_a_dead_copy_of_the_first_stage():
    with torch.device("meta"):
        public = PublicWideResNet(34, 10)
        assert _count(public) == 48_262_586
        assert _count(public) - _count(public.sub_block1) == _count(WideResNet(depth=34, width=10))


def test_width_multiplies_the_base_of_sixteen():
    model = WideResNet(depth=10, width=3)
    assert [stage[-1].conv2.out_channels for stage in model.stages] == [48, 96, 192]
    assert model.stem.out_channels == 16
    assert model.name == "wrn-10-3"


@pytest.mark.parametrize("depth", [4, 12, 27, 0, -2])
def test_impossible_depth(depth):
    with pytest.raises(ConfigError, match=r"depth must be 6 n \+ 4"):
        WideResNet(depth=depth, width=1)


def test_names_are_parsed_in_any_spelling():
    assert wide_resnet_factory("WRN_40_2").keywords == {"depth": 40, "width": 2}
    assert wide_resnet_factory("wrn-28") is None
    assert wide_resnet_factory("wrn-28-10-x") is None
