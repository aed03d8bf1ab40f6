"""Projected gradient ascent on one image at a time, one pixel at a time, in Python floats.

The network enters twice only: for its logits, and for the product of a gradient with respect to the logits (the closed
formulas of `reference.losses`) with the network's Jacobian.

Orders: linf steps along the sign, then ball, then box. l2 as Rice et al.: step, ball, box. l2 as TRADES: step, box,
ball. The ball of both l2 orders shrinks by radius / (length + 1e-7), and only what is longer than the radius.
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
    if goal == "margin":
        return losses.margin_gradient(logits, y)
    return [-g for g in losses.cross_entropy_gradient(logits, target)]


def value_at_logits(goal, logits, clean, y, target):
    if goal == "ce":
        return losses.cross_entropy(logits, y)
    if goal == "kl":
        return losses.kl(clean, logits)
    if goal == "margin":
        return losses.margin(logits, y)
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


def linf_step(point, origin, gradient, eps, step):
    moved = []
    for p, x, g in zip(point, origin, gradient, strict=True):
        p = p + step * sign(g)
        p = clip(p, x - eps, x + eps)
        moved.append(clip(p, 0.0, 1.0))
    return moved


def into_ball(delta, eps):
    size = length(delta)
    return [d * (eps / (size + 1e-7)) for d in delta] if size > eps else delta


def l2_step_rice(point, origin, gradient, eps, step):
    size = length(gradient)
    delta = [p - x + step * g / (size + 1e-10) for p, x, g in zip(point, origin, gradient, strict=True)]
    return [clip(x + d, 0.0, 1.0) for x, d in zip(origin, into_ball(delta, eps), strict=True)]


def l2_step_trades(point, origin, gradient, eps, step):
    size = length(gradient) or 1.0
    moved = [clip(p + step * g / size, 0.0, 1.0) for p, g in zip(point, gradient, strict=True)]
    delta = into_ball([m - x for m, x in zip(moved, origin, strict=True)], eps)
    return [clip(x + d, 0.0, 1.0) for x, d in zip(origin, delta, strict=True)]


STEP = {"linf": linf_step, "l2-rice": l2_step_rice, "l2-trades": l2_step_trades}


def pgd(model, x, y, start, *, eps, step_size, steps, goal, geometry, target=None):
    """Every iterate of every image, the start first: a list (B) of lists (steps + 1) of pixels. `model` in float64."""
    shape = tuple(x.shape[1:])
    paths = []
    for i in range(len(x)):
        origin, point = x[i].flatten().tolist(), start[i].flatten().tolist()
        label, aim = int(y[i]), None if target is None else int(target[i])
        clean = logits_of(model, origin, shape)
        path = [point]
        for _ in range(steps):
            gradient = pixel_gradient(model, point, shape, goal, clean, label, aim)
            point = STEP[geometry](point, origin, gradient, float(eps[i]), float(step_size[i]))
            path.append(point)
        paths.append(path)
    return paths


def last(paths, like):
    """The last iterates as images, in the box as every attack returns them."""
    return torch.tensor([[clip(p, 0.0, 1.0) for p in path[-1]] for path in paths], dtype=like.dtype).view_as(like)
