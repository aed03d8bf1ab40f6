"""Networks in the layout and with the names of public robust-training repositories, written for comparison only.

`PublicWideResNet` keeps the unused copy of the first stage that the files of TRADES and FAAL carry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _WideBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.same = n_in == n_out
        self.convShortcut = None if self.same else nn.Conv2d(n_in, n_out, 1, stride, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        if self.convShortcut is None:
            return torch.add(x, out)
        return torch.add(self.convShortcut(activated), out)


class _WideStage(nn.Module):
    def __init__(self, n: int, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        blocks = [_WideBlock(n_in if i == 0 else n_out, n_out, stride if i == 0 else 1) for i in range(n)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class PublicWideResNet(nn.Module):
    """Names: conv1, block1.layer.0.bn1, ..., convShortcut, bn1, fc, and sub_block1 without use."""

    def __init__(self, depth: int = 34, widen: int = 10, num_classes: int = 10, dead_copy: bool = True) -> None:
        super().__init__()
        n = (depth - 4) // 6
        c = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, c[0], 3, 1, 1, bias=False)
        self.block1 = _WideStage(n, c[0], c[1], 1)
        if dead_copy:
            self.sub_block1 = _WideStage(n, c[0], c[1], 1)
        self.block2 = _WideStage(n, c[1], c[2], 2)
        self.block3 = _WideStage(n, c[2], c[3], 2)
        self.bn1 = nn.BatchNorm2d(c[3])
        self.fc = nn.Linear(c[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = torch.relu(self.bn1(out))
        return self.fc(F.avg_pool2d(out, 8).flatten(1))


class _PreActBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + skip


class PublicPreActResNet18(nn.Module):
    """Names: conv1, layer1.0.bn1, ..., shortcut.0, bn, linear."""

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(_PreActBlock(w, w, 1), _PreActBlock(w, w, 1))
        self.layer2 = nn.Sequential(_PreActBlock(w, 2 * w, 2), _PreActBlock(2 * w, 2 * w, 1))
        self.layer3 = nn.Sequential(_PreActBlock(2 * w, 4 * w, 2), _PreActBlock(4 * w, 4 * w, 1))
        self.layer4 = nn.Sequential(_PreActBlock(4 * w, 8 * w, 2), _PreActBlock(8 * w, 8 * w, 1))
        self.bn = nn.BatchNorm2d(8 * w)
        self.linear = nn.Linear(8 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        out = F.avg_pool2d(torch.relu(self.bn(out)), 4)
        return self.linear(out.view(out.size(0), -1))


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """`model` in eval mode with random parameters and running statistics, so that no entry is interchangeable."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return model.eval()
