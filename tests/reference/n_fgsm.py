"""N-FGSM on one image at a time, one pixel at a time: the step from a noisy point, which no ball holds."""

from __future__ import annotations

from reference import attacks


def attack(model, x, y, start, *, step_size, norm, box=True):
    """x' of every image: `start` plus a step along the sign (linf) or the direction (l2) of the gradient there.

    `model` in float64; `start` (B, C, H, W) is x plus the noise, in the box where there is one.
    """
    shape, found = tuple(x.shape[1:]), []
    for i in range(len(x)):
        point = start[i].flatten().tolist()
        gradient = attacks.pixel_gradient(model, point, shape, "ce", None, int(y[i]), None)
        size = attacks.length(gradient) + 1e-10
        slope = [attacks.sign(g) if norm == "linf" else g / size for g in gradient]
        found.append([attacks.into_box(p + step_size * s, box) for p, s in zip(point, slope, strict=True)])
    return attacks.images(found, x)
