"""Projected gradient ascent on one image at a time, one pixel at a time, in Python floats.

The network enters twice only: for its logits, and for the product of a gradient with respect to the logits (the closed
formulas of `reference.losses`) with the network's Jacobian.

Orders: linf steps along the sign, then ball, then box. l2 as Rice et al.: step, ball, box. l2 as TRADES: step, box,
ball. The ball of both l2 orders shrinks by radius / (length + 1e-7), and only what is longer than the radius. Noise
joins a step before the ball and the box; without a box the ball alone bounds the pixels. Random numbers are given.
"""

from __future__ import annotations

import math

import torch

from reference import losses


def gradient_at_logits(goal, logits, clean, y, target):
    """d goal / d logits of one example; every goal is ascended."""
    if goal == "ce":
        return losses.cross_entropy_gradient(logits, y)
    if goal == "kl":
        return losses.kl_gradient_adv(clean, logits)
    if goal == "revkl":
        return losses.kl_gradient_clean(logits, clean)
    if goal == "js":
        return losses.js_gradient_adv(clean, logits)
    if goal == "margin":
        return losses.margin_gradient(logits, y)
    if goal == "soft":
        return losses.soft_cross_entropy_gradient(logits, target)
    return [-g for g in losses.cross_entropy_gradient(logits, target)]


def value_at_logits(goal, logits, clean, y, target):
    if goal == "ce":
        return losses.cross_entropy(logits, y)
    if goal == "kl":
        return losses.kl(clean, logits)
    if goal == "revkl":
        return losses.kl(logits, clean)
    if goal == "js":
        return losses.js(clean, logits)
    if goal == "margin":
        return losses.margin(logits, y)
    if goal == "soft":
        return losses.soft_cross_entropy(logits, target)
    return -losses.cross_entropy(logits, target)


def logits_of(model, pixels, shape):
    with torch.no_grad():
        return model(torch.tensor(pixels, dtype=torch.float64).view(1, *shape))[0].tolist()


def pixel_gradient(model, pixels, shape, goal, clean, y, target):
    point = torch.tensor(pixels, dtype=torch.float64).view(1, *shape).requires_grad_(True)
    logits = model(point)
    at_logits = gradient_at_logits(goal, logits[0].tolist(), clean, y, target)
    (gradient,) = torch.autograd.grad(logits, point, torch.tensor([at_logits], dtype=torch.float64))
    return gradient.flatten().tolist()


def sign(v):
    return (v > 0) - (v < 0)


def length(v):
    return math.sqrt(math.fsum(a * a for a in v))


def clip(v, low, high):
    return min(max(v, low), high)


def into_box(v, box):
    return clip(v, 0.0, 1.0) if box else v


def linf_step(point, origin, gradient, eps, step, noise, box):
    moved = []
    for p, x, g, n in zip(point, origin, gradient, noise, strict=True):
        p = p + step * sign(g) + n
        p = clip(p, x - eps, x + eps)
        moved.append(into_box(p, box))
    return moved


def into_ball(delta, eps):
    size = length(delta)
    return [d * (eps / (size + 1e-7)) for d in delta] if size > eps else delta


def l2_step_rice(point, origin, gradient, eps, step, noise, box):
    size = length(gradient)
    pixels = zip(point, origin, gradient, noise, strict=True)
    delta = [p - x + step * g / (size + 1e-10) + n for p, x, g, n in pixels]
    return [into_box(x + d, box) for x, d in zip(origin, into_ball(delta, eps), strict=True)]


def l2_step_trades(point, origin, gradient, eps, step, noise, box):
    size = length(gradient) or 1.0
    moved = [into_box(p + step * g / size + n, box) for p, g, n in zip(point, gradient, noise, strict=True)]
    delta = into_ball([m - x for m, x in zip(moved, origin, strict=True)], eps)
    return [into_box(x + d, box) for x, d in zip(origin, delta, strict=True)]


STEP = {"linf": linf_step, "l2-rice": l2_step_rice, "l2-trades": l2_step_trades}


def pgd(model, x, y, start, *, eps, step_size, steps, goal, geometry, target=None, noise=None, box=True):
    """Every iterate of every image, the start first: a list (B) of lists (steps + 1) of pixels. `model` in float64.

    `noise` holds images (B, C, H, W), one per step.
    """
    shape = tuple(x.shape[1:])
    paths = []
    for i in range(len(x)):
        origin, point = x[i].flatten().tolist(), start[i].flatten().tolist()
        label, aim = int(y[i]), None if target is None else target[i].tolist()
        clean = logits_of(model, origin, shape)
        path = [point]
        for t in range(steps):
            gradient = pixel_gradient(model, point, shape, goal, clean, label, aim)
            extra = [0.0] * len(point) if noise is None else noise[t][i].flatten().tolist()
            point = STEP[geometry](point, origin, gradient, float(eps[i]), float(step_size[i]), extra, box)
            path.append(point)
        paths.append(path)
    return paths


def last(paths, like, box=True):
    """The last iterates as images, in the box as every attack that keeps to it returns them."""
    return images([[into_box(p, box) for p in path[-1]] for path in paths], like)


def images(pixels, like):
    return torch.tensor(pixels, dtype=like.dtype).view_as(like)


def fgsm(model, x, y, start, *, eps, alpha, box=True):
    """The step of fast adversarial training on delta = x' - x: alpha along the sign, the ball, then [-x, 1 - x]."""
    shape = tuple(x.shape[1:])
    found = []
    for i in range(len(x)):
        origin, point = x[i].flatten().tolist(), start[i].flatten().tolist()
        gradient = pixel_gradient(model, point, shape, "ce", None, int(y[i]), None)
        moved = []
        for x_k, p, g in zip(origin, point, gradient, strict=True):
            delta = clip(p - x_k + alpha * sign(g), -eps, eps)
            moved.append(x_k + (clip(delta, 0.0 - x_k, 1.0 - x_k) if box else delta))
        found.append(moved)
    return images(found, x)


def uniform_start(x, draw, eps, box=True):
    """x + eps u with u in (-1, 1), clipped."""
    return images(
        [
            [into_box(p + eps * u, box) for p, u in zip(image, row, strict=True)]
            for image, row in zip(x.flatten(1).tolist(), draw.flatten(1).tolist(), strict=True)
        ],
        x,
    )


def radial_start(x, direction, share, eps, box=True):
    """A random direction of length share * eps, clipped."""
    found = []
    rows = zip(x.flatten(1).tolist(), direction.flatten(1).tolist(), share.tolist(), strict=True)
    for image, row, part in rows:
        scale = part * eps / length(row)
        found.append([into_box(p + scale * d, box) for p, d in zip(image, row, strict=True)])
    return images(found, x)


def gauss_start(x, draw):
    """x + 0.001 n, neither projected nor clipped."""
    return x + 0.001 * draw


def gradient_start(model, x, y, goal="ce"):
    """x plus the gradient of the mean goal over the batch, clipped."""
    shape = tuple(x.shape[1:])
    found = []
    for image, label in zip(x, y.tolist(), strict=True):
        pixels = image.flatten().tolist()
        gradient = pixel_gradient(model, pixels, shape, goal, logits_of(model, pixels, shape), label, None)
        found.append([clip(p + g / len(x), 0.0, 1.0) for p, g in zip(pixels, gradient, strict=True)])
    return images(found, x)
