"""WAT in Python floats: costs by adding up one image after another, weights by plain exponentials."""

from __future__ import annotations

import math

from reference import losses


def trades_losses(clean, adv, y, beta):
    """CE + beta KL of every image."""
    rows = zip(clean, adv, y, strict=True)
    return [losses.cross_entropy(z, label) + beta * losses.kl(z, z_adv) for z, z_adv, label in rows]


def costs(values, y, num_classes, denominator, batch=128):
    """C costs and that of the average; `values` are the losses of all images."""
    images = len(values)
    if denominator == "padded":
        images = math.ceil(images / batch) * batch
    found = []
    for c in range(num_classes):
        own = [value for value, label in zip(values, y, strict=True) if label == c]
        found.append(sum(own) / len(own) if denominator == "class" else num_classes * sum(own) / images)
    return [*found, sum(values) / images]


def weights(history, eta):
    """The weights after epochs of these costs."""
    cumulative = [sum(epoch[j] for epoch in history) for j in range(len(history[0]))]
    raised = [math.exp(eta * cost) for cost in cumulative]
    return [(len(raised) - 1) * value / sum(raised) for value in raised]


def loss(values, y, w):
    """Mean over the batch of (w_y + w_C) times the losses."""
    return sum((w[label] + w[-1]) * value for value, label in zip(values, y, strict=True)) / len(y)
