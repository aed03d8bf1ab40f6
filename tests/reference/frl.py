"""FRL in Python floats: errors by counting, one class after another, and the loss one image after another."""

from __future__ import annotations

import math

from reference import losses


def violations(clean, robust, y, tau1, tau2):
    """(g_nat, g_bdy) of the predictions of every image, clean and attacked; an image is robust if right in both."""
    classes = sorted(set(y))
    images = len(y)
    right = [p == label for p, label in zip(clean, y, strict=True)]
    crossed = [a and q != label for a, q, label in zip(right, robust, y, strict=True)]
    natural_error, boundary_error = 1 - sum(right) / images, sum(crossed) / images
    natural, boundary = [], []
    for c in classes:
        own = [i for i in range(images) if y[i] == c]
        natural.append(sum(not right[i] for i in own) / len(own) - natural_error - tau1)
        boundary.append(sum(crossed[i] for i in own) / len(own) - boundary_error - tau2)
    return natural, boundary


def projected(lam, lim):
    lam = [max(value, 0.0) for value in lam]
    total = sum(lam)
    return [lim * value / total for value in lam] if total > lim else lam


def multipliers(measured, *, variant, rate1=0.05, rate2=0.2, lim=0.5, halve_every=40, positive_part=False):
    """The three multipliers in every epoch, from the violations (g_nat, g_bdy) measured before each."""
    classes = len(measured[0][0])
    nat, bdy, eps = [0.0] * classes, [0.0] * classes, [0.0] * classes
    found = []
    for epoch, (g_nat, g_bdy) in enumerate(measured, 1):
        if epoch % halve_every == 0:
            rate1 = rate1 / 2
        if positive_part:
            g_nat, g_bdy = ([max(g, 0.0) for g in each] for each in (g_nat, g_bdy))
        nat = projected([lam + rate1 * g for lam, g in zip(nat, g_nat, strict=True)], lim)
        if variant in ("rw", "rwrm"):
            bdy = projected([lam + 2 * rate1 * g for lam, g in zip(bdy, g_bdy, strict=True)], lim)
        if variant in ("rm", "rwrm"):
            eps = [lam + rate2 * g for lam, g in zip(eps, g_bdy, strict=True)]
        found.append((nat, bdy, eps))
    return found


def class_weights(lam):
    return [1 / len(lam) + value - sum(lam) / len(lam) for value in lam]


def radius_factors(lam, smallest=0.98, largest=3.0):
    return [min(max(math.exp(2 * value), smallest), largest) for value in lam]


def loss(clean, adv, y, nat, bdy, beta):
    """Both terms of a batch, each over the sum of its own weights; `nat` and `bdy` are multipliers."""
    w_nat, w_bdy = class_weights(nat), class_weights(bdy)
    ce = kl = ce_weight = kl_weight = 0.0
    for z, z_adv, label in zip(clean, adv, y, strict=True):
        ce += w_nat[label] * losses.cross_entropy(z, label)
        ce_weight += w_nat[label]
        kl += w_bdy[label] * losses.kl(z, z_adv)
        kl_weight += w_bdy[label]
    return ce / ce_weight + beta * kl / kl_weight
