"""Losses and their gradients with respect to the logits of one example: Python floats, loops, closed formulas.

Formulas: cross-entropy and its gradient p - e_y; KL(p || q) = sum p_c (log p_c - log q_c) with gradients
p (log p - log q - KL) on the clean and q - p on the attacked logits; margin max_{k != y} z_k - z_y with e_k - e_y.
"""

from __future__ import annotations

import math


def log_softmax(z):
    top = max(z)
    log_sum = top + math.log(sum(math.exp(v - top) for v in z))
    return [v - log_sum for v in z]


def softmax(z):
    return [math.exp(v) for v in log_softmax(z)]


def one_hot(y, num_classes):
    return [1.0 if c == y else 0.0 for c in range(num_classes)]


def cross_entropy(z, y):
    return -log_softmax(z)[y]


def cross_entropy_gradient(z, y):
    return [p - e for p, e in zip(softmax(z), one_hot(y, len(z)), strict=True)]


def kl(clean, adv):
    return sum(
        math.exp(log_p) * (log_p - log_q) for log_p, log_q in zip(log_softmax(clean), log_softmax(adv), strict=True)
    )


def kl_gradient_clean(clean, adv):
    total = kl(clean, adv)
    pairs = zip(log_softmax(clean), log_softmax(adv), strict=True)
    return [math.exp(log_p) * (log_p - log_q - total) for log_p, log_q in pairs]


def kl_gradient_adv(clean, adv):
    return [q - p for p, q in zip(softmax(clean), softmax(adv), strict=True)]


def runner_up(z, y):
    """The strongest class other than `y`."""
    best = None
    for c, value in enumerate(z):
        if c != y and (best is None or value > z[best]):
            best = c
    return best


def margin(z, y):
    return z[runner_up(z, y)] - z[y]


def margin_gradient(z, y):
    k = runner_up(z, y)
    return [(c == k) - (c == y) + 0.0 for c in range(len(z))]


def trades(clean, adv, y, beta):
    """Value and gradients with respect to the clean and the attacked logits of a whole batch (lists of lists)."""
    batch = len(y)
    value, gradient_clean, gradient_adv = 0.0, [], []
    for z, z_adv, label in zip(clean, adv, y, strict=True):
        value += (cross_entropy(z, label) + beta * kl(z, z_adv)) / batch
        pairs = zip(cross_entropy_gradient(z, label), kl_gradient_clean(z, z_adv), strict=True)
        gradient_clean.append([(ce + beta * consistency) / batch for ce, consistency in pairs])
        gradient_adv.append([beta / batch * g for g in kl_gradient_adv(z, z_adv)])
    return value, gradient_clean, gradient_adv
