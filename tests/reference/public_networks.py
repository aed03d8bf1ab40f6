"""Networks in the layout and with the names of public robust-training repositories, written for comparison only.

`PublicWideResNet` keeps the unused copy of the first stage that the files of TRADES and FAAL carry. `PublicResNet18`
has the names of CIFAR codes, or those of torchvision. `PublicDMWideResNet` is written from the layer table of its paper
and the padding rule of JAX's "SAME". `Plain` and its kin are small networks in the manner of tutorials, which do
with their images what they like.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        skip = nn.Sequential()
        if stride != 1 or n_in != n_out:
            skip = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.add_module(shortcut, skip)
        self.shortcut_name = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + getattr(self, self.shortcut_name)(x))


class PublicResNet18(nn.Module):
    """Names: conv1, bn1, layer1.0.conv1, ..., shortcut.0, shortcut.1, linear; or downsample.0, downsample.1, fc."""

    def __init__(
        self, num_classes: int = 10, width: int = 64, shortcut: str = "shortcut", head: str = "linear"
    ) -> None:
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(_Block(w, w, 1, shortcut), _Block(w, w, 1, shortcut))
        self.layer2 = nn.Sequential(_Block(w, 2 * w, 2, shortcut), _Block(2 * w, 2 * w, 1, shortcut))
        self.layer3 = nn.Sequential(_Block(2 * w, 4 * w, 2, shortcut), _Block(4 * w, 4 * w, 1, shortcut))
        self.layer4 = nn.Sequential(_Block(4 * w, 8 * w, 2, shortcut), _Block(8 * w, 8 * w, 1, shortcut))
        self.add_module(head, nn.Linear(8 * w, num_classes))
        self.head_name = head

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return getattr(self, self.head_name)(F.avg_pool2d(out, 4).flatten(1))


class _DMBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(n_in)
        self.conv_0 = nn.Conv2d(n_in, n_out, 3, stride, 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(n_out)
        self.conv_1 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        if n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.batchnorm_0(x)
        out = out * torch.sigmoid(out)
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        before = 1 if self.conv_0.stride == (1, 1) else 0
        out = self.batchnorm_1(self.conv_0(F.pad(out, (before, 1, before, 1))))
        return self.conv_1(out * torch.sigmoid(out)) + skip


class _DMStage(nn.Module):
    def __init__(self, n: int, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        first = _DMBlock(n_in, n_out, stride)
        self.block = nn.Sequential(first, *(_DMBlock(n_out, n_out, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class PublicDMWideResNet(nn.Module):
    """Names: init_conv, layer.0.block.0.batchnorm_0, ..., shortcut, batchnorm, logits. Statistics are no entries."""

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        num_classes: int = 10,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2471, 0.2435, 0.2616),
    ) -> None:
        super().__init__()
        n = (depth - 4) // 6
        c = [16, 16 * widen, 32 * widen, 64 * widen]
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.init_conv = nn.Conv2d(3, c[0], 3, 1, 1, bias=False)
        self.layer = nn.Sequential(_DMStage(n, c[0], c[1], 1), _DMStage(n, c[1], c[2], 2), _DMStage(n, c[2], c[3], 2))
        self.batchnorm = nn.BatchNorm2d(c[3])
        self.logits = nn.Linear(c[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.batchnorm(self.layer(self.init_conv((x - self.mean) / self.std)))
        out = out * torch.sigmoid(out)
        return self.logits(F.avg_pool2d(out, 8).flatten(1))


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """`model` in eval mode with random parameters and running statistics, so that no entry is interchangeable."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return model.eval()


class Plain(nn.Module):
    """Pixels about zero, one convolution, pooling, a head; for images of 8x8."""

    def __init__(self, channels: int = 3, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6 * 3 * 3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.features(x - 0.5)))

    def features(self, x: Tensor) -> Tensor:
        return F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)

    def flat(self, h: Tensor) -> Tensor:
        return h.flatten(1)


class Viewing(Plain):
    """Views what it pooled as the LeNet of torch's tutorial does, which fails on images laid out channels last."""

    def flat(self, h: Tensor) -> Tensor:
        return h.view(h.size(0), -1)


class WritingOnImages(Plain):
    """Centres the images where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.head(self.flat(self.features(x)))


class Reentrant(Plain):
    """Checkpoints in the way in which autograd cannot give the gradient of the images."""

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=True)
