from __future__ import annotations

import torch
from torch.nn import functional as F

from robustfair.models import SmallCNN


def test_parameters_by_hand():
    w = 32
    convolutions = (9 * 1 * w + w) + (9 * w * 2 * w + 2 * w) + (9 * 2 * w * 4 * w + 4 * w)
    model = SmallCNN(in_channels=1)
    assert sum(p.numel() for p in model.parameters()) == convolutions + 4 * w * 10 + 10


def test_forward_is_three_convolutions_a_mean_and_a_head():
    model = SmallCNN(in_channels=1, width=4, mean=[0.2], std=[0.3])
    x = torch.rand(3, 1, 8, 8)
    h = (x - 0.2) / 0.3
    for conv, stride in ((model.conv1, 1), (model.conv2, 2), (model.conv3, 2)):
        h = F.conv2d(h, conv.weight, conv.bias, stride=stride, padding=1).clamp(min=0)
    expected = h.flatten(2).mean(2) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


def test_train_and_eval_are_one_function():
    model, x = SmallCNN(width=4), torch.rand(2, 3, 8, 8)
    assert torch.equal(model.train()(x), model.eval()(x))
