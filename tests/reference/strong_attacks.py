"""The attacks of the AutoAttack family on one image, pixel by pixel, in Python floats.

Written from sections 3.4 to 3.7 of the reference page: APGD keeps its whole history of losses and counts rises in it,
FAB finds its multiplier by bisection, Square touches the pixels of a window one by one. Random numbers are given. The
network enters for its logits and for the product of its Jacobian with a gradient with respect to the logits, which is
in closed form here.

Pixels are a flat list, channel by channel, row by row.
"""

from __future__ import annotations

import math

import torch

from reference import losses
from reference.attacks import clip, length, logits_of, sign

TINY = 1e-12


def dlr(z, y):
    ranked = sorted(z, reverse=True)
    rival = max(v for k, v in enumerate(z) if k != y)
    return -(z[y] - rival) / (ranked[0] - ranked[2] + TINY)


def dlr_targeted(z, y, target):
    ranked = sorted(z, reverse=True)
    return -(z[y] - z[target]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + TINY)


def _ratio_gradient(z, above, below):
    """Of the ratio of two linear functions of the logits, each given by its coefficients; the second has TINY added."""
    top = sum(a * v for a, v in zip(above, z, strict=True))
    bottom = sum(b * v for b, v in zip(below, z, strict=True)) + TINY
    return [a / bottom - top * b / bottom**2 for a, b in zip(above, below, strict=True)]


def dlr_gradient(z, y):
    order = sorted(range(len(z)), key=lambda k: -z[k])
    rival = next(k for k in order if k != y)
    above, below = [0.0] * len(z), [0.0] * len(z)
    above[y] -= 1
    above[rival] += 1
    below[order[0]] += 1
    below[order[2]] -= 1
    return _ratio_gradient(z, above, below)


def dlr_targeted_gradient(z, y, target):
    order = sorted(range(len(z)), key=lambda k: -z[k])
    above, below = [0.0] * len(z), [0.0] * len(z)
    above[y] -= 1
    above[target] += 1
    below[order[0]] += 1
    below[order[2]] -= 0.5
    below[order[3]] -= 0.5
    return _ratio_gradient(z, above, below)


def loss_and_gradient(loss, z, y, target):
    if loss == "ce":
        return losses.cross_entropy(z, y), losses.cross_entropy_gradient(z, y)
    if loss == "ce-targeted":
        return -losses.cross_entropy(z, target), [-g for g in losses.cross_entropy_gradient(z, target)]
    if loss == "dlr":
        return dlr(z, y), dlr_gradient(z, y)
    return dlr_targeted(z, y, target), dlr_targeted_gradient(z, y, target)


def backward(model, pixels, shape, at_logits):
    """Gradient with respect to the pixels from that with respect to the logits, a function of the logits."""
    point = torch.tensor(pixels, dtype=torch.float64).view(1, *shape).requires_grad_(True)
    logits = model(point)
    weights = torch.tensor([at_logits(logits[0].tolist())], dtype=torch.float64)
    return torch.autograd.grad(logits, point, weights)[0].flatten().tolist()


def size(v, norm):
    return max(abs(a) for a in v) if norm == "linf" else length(v)


def unit(v, norm):
    return [a / (size(v, norm) + TINY) for a in v]


def box(v):
    return [clip(a, 0.0, 1.0) for a in v]


def predicted(z):
    return max(range(len(z)), key=lambda k: z[k])


def apgd(model, origin, shape, y, target, noise, *, loss, eps, norm, steps, rho=0.75):
    """A single run from given noise: every point that was judged, and the histories of what it kept."""

    def project(point):
        if norm == "linf":
            return box([clip(p, x - eps, x + eps) for p, x in zip(point, origin, strict=True)])
        apart = [p - x for p, x in zip(point, origin, strict=True)]
        reach = min(eps, length(apart))
        return box([x + d * reach for x, d in zip(origin, unit(apart, norm), strict=True)])

    def evaluate(point):
        z = logits_of(model, point, shape)
        value, at_logits = loss_and_gradient(loss, z, y, target)
        return value, backward(model, point, shape, lambda _: at_logits)

    current = box([x + eps * u for x, u in zip(origin, unit(noise, norm), strict=True)])
    best_loss, gradient = evaluate(current)
    best, best_gradient = current, gradient
    eta, old = 2 * eps, current
    window, counter = max(int(0.22 * steps), 1), 0
    reference_loss, reduced = best_loss, True
    history = [0.0] * steps
    points, bests, etas, checks = [current], [best_loss], [eta], []
    for i in range(steps):
        momentum = [c - o for c, o in zip(current, old, strict=True)]
        old = current
        a = 1.0 if i == 0 else 0.75
        direction = [sign(g) for g in gradient] if norm == "linf" else unit(gradient, norm)
        ahead = project([c + eta * d for c, d in zip(current, direction, strict=True)])
        mixed = [c + a * (h - c) + (1 - a) * m for c, h, m in zip(current, ahead, momentum, strict=True)]
        current = project(mixed)
        points.append(current)
        value, gradient = evaluate(current)
        history[i] = value
        if value > best_loss:
            best_loss, best, best_gradient = value, current, gradient
        counter += 1
        if counter == window:
            rises = sum(history[i - c] > history[i - c - 1] for c in range(window))
            reduced = rises <= rho * window or (not reduced and reference_loss >= best_loss)
            reference_loss = best_loss
            if reduced:
                eta, current, gradient = eta / 2, best, best_gradient
            window, counter = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
            checks.append(i + 1)
        bests.append(best_loss)
        etas.append(eta)
    return {
        "points": points,
        "best": best,
        "best_losses": bests,
        "step_sizes": etas,
        "checkpoints": checks,
        "history": history,
    }


def project_on_plane(t, w, b, norm):
    """Displacement of least norm with <w, t + d> = b and t + d in the box, or as far as that allows; by bisection."""
    c = sum(a * p for a, p in zip(w, t, strict=True)) - b
    if c < 0:
        w, c = [-a for a in w], -c
    if norm == "l2":
        w = [a if abs(a) >= 1e-8 else 0.0 for a in w]
    room = [p if a > 0 else 1 - p if a < 0 else 0.0 for a, p in zip(w, t, strict=True)]

    def step(multiplier):
        rate = [1.0] * len(w) if norm == "linf" else [abs(a) for a in w]
        return [min(multiplier * s, r) for s, r in zip(rate, room, strict=True)]

    def covered(moved):
        return math.fsum(abs(a) * m for a, m in zip(w, moved, strict=True))

    moved = room
    if covered(room) >= c:
        low, high = 0.0, 1.0
        while covered(step(high)) < c:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if covered(step(middle)) < c else (low, middle)
        moved = step(high)
    return [-sign(a) * m for a, m in zip(w, moved, strict=True)]


def fab(model, origin, shape, y, target, start, *, norm, steps, alpha=0.1, eta=1.05, beta=0.9):
    """Every point that was judged; `target` None is the untargeted form."""

    def plane(point):
        z = logits_of(model, point, shape)
        found = None
        for k in [k for k in range(len(z)) if k != y] if target is None else [target]:
            apart = [1.0 if j == k else -1.0 if j == y else 0.0 for j in range(len(z))]
            w = backward(model, point, shape, lambda _, apart=apart: apart)
            dual = sum(abs(a) for a in w) if norm == "linf" else length(w)
            distance = abs(z[k] - z[y]) / (dual + TINY)
            if found is None or distance < found[0]:
                found = (distance, w, sum(a * p for a, p in zip(w, point, strict=True)) - (z[k] - z[y]))
        return found[1:]

    points, current = [], start
    for _ in range(steps):
        w, b = plane(current)
        d1, d2 = (project_on_plane(t, w, b, norm) for t in (current, origin))
        a1, a2 = (max(size(d, norm), 1e-8) for d in (d1, d2))
        share = clip(a1 / (a1 + a2), 0.0, alpha)
        current = box(
            [
                (1 - share) * (p + eta * d) + share * (x + eta * e)
                for p, d, x, e in zip(current, d1, origin, d2, strict=True)
            ]
        )
        points.append(current)
        if predicted(logits_of(model, current, shape)) != y:
            current = [x + beta * (p - x) for x, p in zip(origin, current, strict=True)]
    return points


def side(query, p_init, shape, norm):
    _, height, width = shape
    share = p_init
    for threshold in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if query > threshold:
            share /= 2
    s = round(math.sqrt(share * height * width))
    if norm == "linf":
        return min(max(s, 1), min(height, width))
    s = max(s, 3)
    if s % 2 == 0:
        s += 1
    return min(s, min(height, width))


def rectangle(height, width):
    found = [[0.0] * width for _ in range(height)]
    row, column = height // 2, width // 2
    for k in range(max(row, column) + 1):
        for i in range(max(row - k, 0), min(row + k + 1, height)):
            for j in range(max(column - k, 0), min(column + k + 1, width)):
                found[i][j] += 1 / (k + 1) ** 2
    total = math.sqrt(sum(v * v for line in found for v in line))
    return [[v / total for v in line] for line in found]


def bump(s, turned):
    whole = rectangle(s // 2, s) + [[-v for v in line] for line in rectangle(s - s // 2, s)]
    total = math.sqrt(sum(v * v for line in whole for v in line))
    whole = [[v / total for v in line] for line in whole]
    return [list(column) for column in zip(*whole, strict=True)] if turned else whole


def tiles(shape, draws):
    """Bumps side by side, row by row; `draws` gives (turned, a sign for each channel) of each."""
    channels, height, width = shape
    s = height // 5
    top = (height - 5 * s) // 2
    found = [0.0] * (channels * height * width)
    at = 0
    for i in range(height // s):
        for j in range(width // s):
            turned, signs = draws[at]
            at += 1
            for c in range(channels):
                for u, line in enumerate(bump(s, turned)):
                    for v, value in enumerate(line):
                        row, column = top + i * s + u, top + j * s + v
                        if row < height and column < width:
                            found[(c * height + row) * width + column] += signs[c] * value
    return found


def margin(z, y):
    """What Square minimises: negative where the class is wrong."""
    return z[y] - max(v for k, v in enumerate(z) if k != y)


def square(model, origin, shape, y, start, draws, *, eps, norm, p_init=0.8, schedule=lambda query: query):
    """Every point that was judged, the start first, and the margins that were kept.

    Args:
        start: signs (linf) or tiles (l2), before they are scaled.
        draws: of each query: four uniform numbers for the places of two windows, a sign a channel, whether it turns.
        schedule: from queries to the count that sets the side.
    """
    channels, height, width = shape
    move = [eps * v for v in (start if norm == "linf" else unit(start, "l2"))]
    best = box([x + m for x, m in zip(origin, move, strict=True)])
    kept = margin(logits_of(model, best, shape), y)
    points, margins = [best], [kept]
    for query, (place, signs, turned) in enumerate(draws):
        s = side(schedule(query), p_init, shape, norm)
        top, left, top2, left2 = (
            int(u * room) for u, room in zip(place, (height - s, width - s, height - s, width - s), strict=True)
        )

        def window(c, row, column, s=s):
            return [(c * height + row + i) * width + column + j for i in range(s) for j in range(s)]

        if norm == "linf":
            candidate = list(best)
            for c in range(channels):
                for at in window(c, top, left):
                    moved = clip(best[at] + 2 * eps * signs[c], origin[at] - eps, origin[at] + eps)
                    candidate[at] = clip(moved, 0.0, 1.0)
        else:
            delta = [b - x for b, x in zip(best, origin, strict=True)]
            spare = max(eps**2 - length(delta) ** 2, 0.0) / channels
            after = list(delta)
            for c in range(channels):
                first, second = window(c, top, left), window(c, top2, left2)
                n1 = length([delta[at] for at in first])
                n12 = length([delta[at] for at in {*first, *second}])
                flat = [v for line in bump(s, turned) for v in line]
                nu = [signs[c] * v + delta[at] / (TINY + n1) for v, at in zip(flat, first, strict=True)]
                scale = math.sqrt(spare + n12**2) / (TINY + length(nu))
                for at in second:
                    after[at] = 0.0
                for at, v in zip(first, nu, strict=True):
                    after[at] = v * scale
            candidate = box([x + eps * d for x, d in zip(origin, unit(after, "l2"), strict=True)])
        points.append(candidate)
        found = margin(logits_of(model, candidate, shape), y)
        if found < kept or found <= 0:
            best, kept = candidate, found
        margins.append(kept)
    return {"points": points, "margins": margins, "best": best}
