"""XCiT-S12 for images of any size, named `xcit-s12-pP` by the stride P of its patch embedding; `xcit-s12` has stride 2.

Tokens mix by attention between channels, whose cost grows with the number of tokens and not with its square, and by
depth-wise convolutions; a class token collects them in two last blocks. At 32 pixels a stride of 2 gives 16x16 tokens,
the published one of 16 only 2x2.

The embedding has the four convolutions of the published network for patches of 16; for a smaller P the first of them
have a stride of 1 in place of 2. So every P has the same parameters, 26,253,304 for 1,000 classes and three channels,
under the names of timm's files, which load. The published network for patches of 8 is another one: its embedding has
three convolutions.

Source: El-Nouby et al. 2021, "XCiT: Cross-covariance image transformers", section 3 and table 1 (S12), in the form of
the authors' code. Departures: no stochastic depth in training, and weight decay as the recipe has it for all.
"""

from __future__ import annotations

import functools
import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.errors import ConfigError
from robustfair.models.networks.base import Network
from robustfair.registry import MODELS, canonical

DEPTH, CLASS_DEPTH, HEADS, MLP_RATIO = 12, 2, 8, 4
PATCHES = (1, 2, 4, 8, 16)
FREQUENCIES, TEMPERATURE = 32, 10_000
_EPS = 1e-6
"""Of layer norms, and of the division that brings positions to (0, 2 pi]."""


def fourier_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(1, 64, height, width): sines and cosines of row and column, each counted from 1 and scaled to (0, 2 pi].

    Channel 2 i is the sine and 2 i + 1 the cosine of the row over 10,000^(2 i / 32); those of the column follow.

    >>> fourier_positions(1, 4)[0, 32].round(decimals=3).abs().tolist()  # sines of a quarter to four of a turn
    [[1.0, 0.0, 1.0, 0.0]]
    """
    rates = TEMPERATURE ** (-2 * torch.arange(FREQUENCIES // 2, device=device) / FREQUENCIES)

    def waves(count: int) -> Tensor:
        """(count, 32)."""
        turns = torch.arange(1, count + 1, device=device) / (count + _EPS) * (2 * math.pi)
        angles = turns[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)

    rows = waves(height)[:, None].expand(height, width, FREQUENCIES)
    columns = waves(width)[None].expand(height, width, FREQUENCIES)
    return torch.cat([rows, columns], dim=2).permute(2, 0, 1)[None]


class PositionalEncoding(nn.Module):
    """A linear map of `fourier_positions`, so that any image size has an encoding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, width, 1)

    def forward(self, height: int, width: int) -> Tensor:
        """(1, width, height, width of the image)."""
        weight = self.token_projection.weight
        return self.token_projection(fourier_positions(height, width, weight.device).to(weight.dtype))


class PatchEmbedding(nn.Module):
    """Four 3x3 convolutions with batch norm, GELU between them, the last of them with stride 2 as `patch` asks for."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        strided = patch.bit_length() - 1
        channels = [in_channels, width // 8, width // 4, width // 2, width]
        layers: list[nn.Module] = []
        for number in range(4):
            stride = 2 if number >= 4 - strided else 1
            convolution = nn.Conv2d(channels[number], channels[number + 1], 3, stride, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(channels[number + 1])), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H / patch, W / patch)."""
        return self.proj(x)


class CrossCovarianceAttention(nn.Module):
    """Attention between the channels of a head: softmax(t K^T Q) over channels, of unit vectors over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to the same."""
        batch, count, width = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, HEADS, width // HEADS).permute(2, 0, 3, 4, 1)
        q, k, v = parts.unbind(0)  # each (B, heads, channels, N)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(batch, count, width))


class ClassAttention(nn.Module):
    """The class token asks all tokens, itself too; the others are not changed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width), the class token first, to what it becomes, (B, 1, width)."""
        batch, _, width = tokens.shape

        def heads(x: Tensor) -> Tensor:
            return x.reshape(batch, -1, HEADS, width // HEADS).transpose(1, 2)

        q, k, v = heads(self.q(tokens[:, :1])), heads(self.k(tokens)), heads(self.v(tokens))
        weights = (q * (width // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, 1, width))


class LocalPatchInteraction(nn.Module):
    """Two depth-wise 3x3 convolutions, GELU and batch norm between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tensor, height: int) -> Tensor:
        """(B, height * W, width) to the same."""
        batch, count, width = tokens.shape
        image = tokens.transpose(1, 2).reshape(batch, width, height, count // height)
        return self.conv2(self.bn(F.gelu(self.conv1(image)))).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear maps with GELU between them, the inner one `MLP_RATIO` times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to the same."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Cross-covariance attention, local patch interaction, MLP: each of normed tokens, scaled and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=_EPS) for _ in range(3))
        self.attn = CrossCovarianceAttention(width)
        self.local_mp = LocalPatchInteraction(width)
        self.mlp = Mlp(width)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.ones(width)) for _ in range(3))

    def forward(self, tokens: Tensor, height: int) -> Tensor:
        """(B, height * W, width) to the same."""
        tokens = tokens + self.gamma1 * self.attn(self.norm1(tokens))
        tokens = tokens + self.gamma3 * self.local_mp(self.norm3(tokens), height)
        return tokens + self.gamma2 * self.mlp(self.norm2(tokens))


class ClassBlock(nn.Module):
    """Class attention and MLP of the class token. As in the authors' code the other tokens are normed on the way too,
    and to them is added what the first norm makes of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_EPS) for _ in range(2))
        self.attn = ClassAttention(width)
        self.mlp = Mlp(width)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, width), the class token first, to the same."""
        normed = self.norm1(tokens)
        tokens = tokens + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], dim=1)
        tokens = self.norm2(tokens)
        token = tokens[:, :1]
        return torch.cat([token + self.gamma2 * self.mlp(token), 2 * tokens[:, 1:]], dim=1)


class XCiT(Network):
    """Patch embedding, twelve blocks, two class blocks, layer norm, head of the class token.

    Args:
        width: channels of a token, a multiple of 8, the number of heads.
        patch: stride of the patch embedding, 1, 2, 4, 8 or 16.

    Raises:
        ConfigError: a size out of range.
    """

    name = "xcit"
    default_width = 384

    def make_layers(self, in_channels: int, width: int, patch: int = 2) -> int:
        if width % HEADS:
            raise ConfigError("xcit-s12", "width", allowed=f"a multiple of {HEADS}, the number of heads", got=width)
        if patch not in PATCHES:
            allowed = f"one of {', '.join(map(str, PATCHES))}"
            raise ConfigError("xcit-s12", "patch", allowed=allowed, got=patch)
        self.name = f"xcit-s12-p{patch}"
        self.patch_embed = PatchEmbedding(in_channels, width, patch)
        self.pos_embed = PositionalEncoding(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(DEPTH)])
        self.cls_attn_blocks = nn.ModuleList([ClassBlock(width) for _ in range(CLASS_DEPTH)])
        self.norm = nn.LayerNorm(width, eps=_EPS)
        return width

    def run_layers(self, x: Tensor) -> Tensor:
        image = self.patch_embed(x)
        height, width = image.shape[2:]
        tokens = (image + self.pos_embed(height, width)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, height)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.cls_attn_blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0, :, None, None]

    def set_starting_weights(self) -> None:
        """Linear weights and the class token from a normal of scale 0.02, cut off at 2; convolutions as torch has them,
        since half of them are depth-wise; every bias of a linear map 0.
        """
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def xcit_factory(name: str) -> functools.partial[XCiT] | None:
    """The constructor that `xcit-s12-pP` names, and `xcit-s12` for a stride of 2; None for a name of another form.

    >>> xcit_factory("XCiT-S12").keywords, xcit_factory("xcit_s12_p4").keywords
    ({'patch': 2}, {'patch': 4})
    """
    match = re.fullmatch(r"xcit-s12(?:-p(\d+))?", canonical(name))
    return functools.partial(XCiT, patch=int(match[1] or 2)) if match else None


for _patch in (2, 4, 16):
    MODELS.register(f"xcit-s12-p{_patch}")(functools.partial(XCiT, patch=_patch))
