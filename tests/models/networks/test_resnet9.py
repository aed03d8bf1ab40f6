from __future__ import annotations

import pytest
import torch
from torch import nn

from robustfair.models import ResNet9


def test_parameters_by_hand():
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    expected = sum(9 * i * o + 2 * o for i, o in convolutions) + 512 * 10 + 10
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet9().parameters()) == expected == 6_573_130


@pytest.mark.parametrize("size", [1, 7, 8, 28, 33])
def test_pooling_never_empties_an_image(size):
    model = ResNet9(in_channels=1, width=4).eval()
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_poolings_halve_even_images():
    sizes = []
    model = ResNet9(width=4).eval()
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.rand(1, 3, 32, 32))
    assert sizes == [16, 8, 4]
