"""Friendly adversarial training on one image at a time: the two early-stopped attacks, under linf.

Both look at the prediction before every step. `official` is the order of `earlystop.py`, `cfa` that of CFA's code.
"""

from __future__ import annotations

from reference import attacks


def official(point, steps, budget, is_wrong, moved):
    """Steps until the image is found wrong with no budget left; every other time it is found wrong costs 1.

    Args:
        point: the start; `moved` is a function of the number of the step and the point.

    Returns:
        every iterate, the start first.
    """
    path = [point]
    for t in range(steps):
        if is_wrong(path[-1]):
            if budget == 0:
                break
            budget -= 1
        path.append(moved(t, path[-1]))
    return path


def cfa(point, steps, budget, is_wrong, moved):
    """Steps while there is budget, whatever the prediction; every time it is found wrong costs 1."""
    path = [point]
    for t in range(steps):
        if budget == 0:
            break
        if is_wrong(path[-1]):
            budget -= 1
        path.append(moved(t, path[-1]))
    return path


RULES = {"official": official, "cfa": cfa}


def in_ball_and_box(pixels, origin, eps):
    return [attacks.clip(attacks.clip(p, x - eps, x + eps), 0.0, 1.0) for p, x in zip(pixels, origin, strict=True)]


def attack(model, x, y, start, *, eps, step_size, steps, goal, tau, variant, noise=None, target=None):
    """Paths of all images, one after another: lists of iterates of flat pixels. `model` in float64 and eval mode.

    Args:
        eps: radius of every image.
        noise: per step (B, C, H, W), added to the step before the projection.
        target: classes (B,) for the goal "target"; the stop reads the labels all the same.
    """
    shape, paths = tuple(x.shape[1:]), []
    for i in range(len(x)):
        origin, label = x[i].flatten().tolist(), int(y[i])
        aim = None if target is None else int(target[i])
        clean = attacks.logits_of(model, origin, shape)

        def is_wrong(point, label=label):
            logits = attacks.logits_of(model, point, shape)
            return max(range(len(logits)), key=lambda c: logits[c]) != label

        def moved(t, point, i=i, origin=origin, label=label, clean=clean, aim=aim):
            gradient = attacks.pixel_gradient(model, point, shape, goal, clean, label, aim)
            added = [0.0] * len(point) if noise is None else noise[t][i].flatten().tolist()
            stepped = [p + step_size * attacks.sign(g) + a for p, g, a in zip(point, gradient, added, strict=True)]
            return in_ball_and_box(stepped, origin, float(eps[i]))

        first = in_ball_and_box(start[i].flatten().tolist(), origin, float(eps[i]))
        paths.append(RULES[variant](first, steps, tau, is_wrong, moved))
    return paths
