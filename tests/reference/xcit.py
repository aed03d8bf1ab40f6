"""XCiT-S12 one image at a time in float64, from the formulas of its paper: sums over tokens, channels and windows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

HEADS, EPS = 8, 1e-6
Weights = Mapping[str, np.ndarray]


def logits(weights: Weights, image: np.ndarray, patch: int) -> np.ndarray:
    """(K,) of a normalised image (C, H, W)."""
    strides = {1: (1, 1, 1, 1), 2: (1, 1, 1, 2), 4: (1, 1, 2, 2), 8: (1, 2, 2, 2), 16: (2, 2, 2, 2)}[patch]
    for number, stride in enumerate(strides):
        part = f"patch_embed.proj.{2 * number}"
        image = batch_norm(weights, f"{part}.1", convolution(image, weights[f"{part}.0.weight"], stride))
        image = gelu(image) if number < 3 else image
    _, height, width = image.shape
    tokens = []
    for row in range(height):
        for column in range(width):
            token = image[:, row, column] + position(weights, row, column, height, width)
            tokens.append(token)
    x = np.stack(tokens)
    for number in range(12):
        x = block(weights, f"blocks.{number}", x, height, width)
    x = np.concatenate([weights["cls_token"][0], x])
    for number in range(2):
        x = class_block(weights, f"cls_attn_blocks.{number}", x)
    return linear(weights, "head", layer_norm(weights, "norm", x[0]))


def position(weights: Weights, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Encoding of one token: sine, cosine, sine, ... of its row, then of its column."""
    waves = []
    for place, count in ((row + 1, height), (column + 1, width)):
        turn = 2 * math.pi * place / (count + EPS)
        for pair in range(16):
            angle = turn / 10_000 ** (2 * pair / 32)
            waves += [math.sin(angle), math.cos(angle)]
    kernel, bias = (weights[f"pos_embed.token_projection.{name}"] for name in ("weight", "bias"))
    return kernel[:, :, 0, 0] @ np.array(waves) + bias


def block(weights: Weights, at: str, x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Attention between channels, local patch interaction, MLP."""
    x = x + weights[f"{at}.gamma1"] * channel_attention(weights, f"{at}.attn", layer_norm(weights, f"{at}.norm1", x))
    image = layer_norm(weights, f"{at}.norm3", x).T.reshape(-1, height, width)
    image = depth_wise(weights, f"{at}.local_mp.conv1", image)
    image = batch_norm(weights, f"{at}.local_mp.bn", gelu(image))
    image = depth_wise(weights, f"{at}.local_mp.conv2", image)
    x = x + weights[f"{at}.gamma3"] * image.reshape(x.shape[1], -1).T
    return x + weights[f"{at}.gamma2"] * mlp(weights, f"{at}.mlp", layer_norm(weights, f"{at}.norm2", x))


def channel_attention(weights: Weights, at: str, x: np.ndarray) -> np.ndarray:
    """A channel becomes a mean of its head's channels, by the cosine of their values over the tokens."""
    count, width = x.shape
    size = width // HEADS
    qkv = linear(weights, f"{at}.qkv", x)
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    out = np.zeros((count, width))
    for head in range(HEADS):
        temperature = weights[f"{at}.temperature"][head, 0, 0]
        for channel in range(head * size, (head + 1) * size):
            scores = []
            for other in range(head * size, (head + 1) * size):
                cosine = q[:, channel] @ k[:, other] / np.linalg.norm(q[:, channel]) / np.linalg.norm(k[:, other])
                scores.append(temperature * cosine)
            for share, other in zip(softmax(np.array(scores)), range(head * size, (head + 1) * size), strict=True):
                out[:, channel] += share * v[:, other]
    return linear(weights, f"{at}.proj", out)


def class_block(weights: Weights, at: str, x: np.ndarray) -> np.ndarray:
    """The class token asks all tokens; the others only pass the norms, as the authors' code has it."""
    normed = layer_norm(weights, f"{at}.norm1", x)
    q, k, v = (linear(weights, f"{at}.attn.{name}", normed) for name in "qkv")
    size = x.shape[1] // HEADS
    asked = np.zeros(x.shape[1])
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        shares = softmax(np.array([q[0, own] @ k[token, own] / math.sqrt(size) for token in range(len(x))]))
        asked[own] = sum(share * v[token, own] for token, share in enumerate(shares))
    changed = np.concatenate([linear(weights, f"{at}.attn.proj", asked)[None], normed[1:]])
    x = layer_norm(weights, f"{at}.norm2", x + weights[f"{at}.gamma1"] * changed)
    added = x.copy()
    added[0] = weights[f"{at}.gamma2"] * mlp(weights, f"{at}.mlp", x[0])
    return x + added


def mlp(weights: Weights, at: str, x: np.ndarray) -> np.ndarray:
    return linear(weights, f"{at}.fc2", gelu(linear(weights, f"{at}.fc1", x)))


def linear(weights: Weights, at: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{at}.weight"].T + weights[f"{at}.bias"]


def layer_norm(weights: Weights, at: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + EPS) * weights[f"{at}.weight"] + weights[f"{at}.bias"]


def batch_norm(weights: Weights, at: str, image: np.ndarray) -> np.ndarray:
    mean, variance, scale, shift = (
        weights[f"{at}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (image - mean) / np.sqrt(variance + 1e-5) * scale + shift


def convolution(image: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """3x3, zeros beside the image."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    height, width = ((side + stride - 1) // stride for side in image.shape[1:])
    out = np.zeros((len(kernel), height, width))
    for row in range(height):
        for column in range(width):
            window = padded[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
            out[:, row, column] = [float((window * one).sum()) for one in kernel]
    return out


def depth_wise(weights: Weights, at: str, image: np.ndarray) -> np.ndarray:
    """3x3, each channel by itself."""
    kernels, bias = weights[f"{at}.weight"], weights[f"{at}.bias"]
    found = [convolution(channel[None], kernel[None], 1)[0] for channel, kernel in zip(image, kernels, strict=True)]
    return np.stack(found) + bias[:, None, None]


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max())
    return raised / raised.sum()


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
