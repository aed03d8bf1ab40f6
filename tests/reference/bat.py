"""BAT on one image at a time: its two points by loops over the steps, its loss in Python floats.

Both searches look at the point they stand at before they step, and not at the last one.
"""

from __future__ import annotations

import math

from reference import attacks, losses


def last_clean(start, steps, is_wrong, moved):
    """The point before the first wrong one; the start, if that is wrong; the end, if none is."""
    before, here = start, start
    for _ in range(steps):
        if is_wrong(here):
            return before
        before, here = here, moved(here)
    return here


def first_adversarial(start, steps, tau, is_wrong, moved):
    """The first wrong point that finds no budget; every wrong one before it pays 1 and goes on, right ones go on."""
    here, budget = start, tau
    for _ in range(steps):
        if is_wrong(here):
            if budget == 0:
                return here
            budget -= 1
        here = moved(here)
    return here


def points(model, x, y, start, *, eps, step_size, steps, tau):
    """(last-clean from start[0], first-adversarial from start[1]) of all images under linf. `model` in float64."""
    shape, found = tuple(x.shape[1:]), ([], [])
    for i in range(len(x)):
        origin, label = x[i].flatten().tolist(), int(y[i])
        clean = attacks.logits_of(model, origin, shape)

        def is_wrong(point, label=label):
            logits = attacks.logits_of(model, point, shape)
            return max(range(len(logits)), key=lambda c: logits[c]) != label

        def kept(point, origin=origin):
            return [
                attacks.clip(attacks.clip(p, o - eps, o + eps), 0.0, 1.0) for p, o in zip(point, origin, strict=True)
            ]

        def moved(point, label=label, clean=clean, kept=kept):
            gradient = attacks.pixel_gradient(model, point, shape, "kl", clean, label, None)
            return kept([p + step_size * attacks.sign(g) for p, g in zip(point, gradient, strict=True)])

        one, two = (kept(begin[i].flatten().tolist()) for begin in start)
        found[0].append(last_clean(one, steps, is_wrong, moved))
        found[1].append(first_adversarial(two, steps, tau, is_wrong, moved))
    return tuple(attacks.images(rows, x) for rows in found)


def kl_to_uniform(z):
    return sum(math.exp(log_p) * (log_p - math.log(1 / len(z))) for log_p in losses.log_softmax(z))


def kl_to_uniform_gradient(z):
    """p_c (log p_c + H)."""
    return [math.exp(log_p) * (log_p + losses.entropy(z)) for log_p in losses.log_softmax(z)]


def loss(last, adv, clean, labels, beta, weight):
    """Mean over the batch, and its gradients with respect to the three rows of logits."""
    total, slopes, b = 0.0, ([], [], []), len(labels)
    for z_last, z_adv, z_clean, y in zip(last, adv, clean, labels, strict=True):
        total += losses.cross_entropy(z_last, y) + beta * losses.kl(z_clean, z_adv)
        total += weight * (kl_to_uniform(z_last) + kl_to_uniform(z_adv))
        parts = (
            [(1.0, losses.cross_entropy_gradient(z_last, y)), (weight, kl_to_uniform_gradient(z_last))],
            [(beta, losses.kl_gradient_adv(z_clean, z_adv)), (weight, kl_to_uniform_gradient(z_adv))],
            [(beta, losses.kl_gradient_clean(z_clean, z_adv))],
        )
        for rows, terms in zip(slopes, parts, strict=True):
            rows.append([sum(factor * g[c] for factor, g in terms) / b for c in range(len(z_last))])
    return total / b, slopes
