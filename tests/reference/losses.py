"""Losses and their gradients with respect to the logits of one example: Python floats, loops, closed formulas.

Formulas, with p the softmax of the clean logits, q that of the attacked ones:

    cross-entropy           -log p_y, gradient p - e_y; to a distribution t: -sum t_c log p_c, gradient p - t
    KL(p || q)              sum p_c (log p_c - log q_c), gradients p (log p - log q - KL) on clean, q - p on attacked
    floored KL              log(q_c + e) for log q_c; gradient q sum r - r on attacked, r = p q / (q + e)
    Jensen-Shannon          (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2; gradient q (log q - log m - KL(q || m)) / 2
    margin                  max_{k != y} z_k - z_y, gradient e_k - e_y
    boosted cross-entropy   -log q_y - log(1.0001 - q_k + e), gradient q - e_y + q_k (e_k - q) / (1.0001 - q_k + e)

The objectives below them return a value and its gradient with respect to each pass's logits, as lists of rows.
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


def smoothed(y, num_classes, amount):
    """(1 - s) e_y + s / C."""
    return [(1 - amount) * e + amount / num_classes for e in one_hot(y, num_classes)]


def smoothed_off_class(y, num_classes, amount):
    """1 - s at y, s / (C - 1) at every other class."""
    return [1 - amount if c == y else amount / (num_classes - 1) for c in range(num_classes)]


def soft_cross_entropy(z, soft):
    return -sum(t * log_p for t, log_p in zip(soft, log_softmax(z), strict=True))


def soft_cross_entropy_gradient(z, soft):
    return [p - t for p, t in zip(softmax(z), soft, strict=True)]


def entropy(z):
    return -sum(math.exp(log_p) * log_p for log_p in log_softmax(z))


def margin_term(z, y, minuend=1.0001, eps_log=1e-12):
    """What boosted cross-entropy adds to cross-entropy: -log(1.0001 - q_k + e), k the strongest wrong class."""
    return -math.log(minuend - softmax(z)[runner_up(z, y)] + eps_log)


def boosted_cross_entropy(z, y, minuend=1.0001, eps_log=1e-12):
    return cross_entropy(z, y) + margin_term(z, y, minuend, eps_log)


def boosted_cross_entropy_gradient(z, y, minuend=1.0001, eps_log=1e-12):
    q, k = softmax(z), runner_up(z, y)
    share = q[k] / (minuend - q[k] + eps_log)
    return [q[c] - (c == y) + share * ((c == k) - q[c]) for c in range(len(z))]


def floored_kl(clean, adv, eps_log=1e-12):
    pairs = zip(log_softmax(clean), softmax(adv), strict=True)
    return sum(math.exp(log_p) * (log_p - math.log(q + eps_log)) for log_p, q in pairs)


def floored_kl_gradient_clean(clean, adv, eps_log=1e-12):
    total = floored_kl(clean, adv, eps_log)
    pairs = zip(log_softmax(clean), softmax(adv), strict=True)
    return [math.exp(log_p) * (log_p - math.log(q + eps_log) - total) for log_p, q in pairs]


def floored_kl_gradient_adv(clean, adv, eps_log=1e-12):
    q = softmax(adv)
    r = [p * q_c / (q_c + eps_log) for p, q_c in zip(softmax(clean), q, strict=True)]
    return [q_c * sum(r) - r_c for q_c, r_c in zip(q, r, strict=True)]


def log_middle(clean, adv):
    """log of the mean of both distributions."""
    return [math.log((p + q) / 2) for p, q in zip(softmax(clean), softmax(adv), strict=True)]


def js(clean, adv):
    total = 0.0
    for z in (clean, adv):
        for log_p, log_m in zip(log_softmax(z), log_middle(clean, adv), strict=True):
            total += math.exp(log_p) * (log_p - log_m) / 2
    return total


def js_gradient_adv(clean, adv):
    apart = [log_q - log_m for log_q, log_m in zip(log_softmax(adv), log_middle(clean, adv), strict=True)]
    mean = sum(q * d for q, d in zip(softmax(adv), apart, strict=True))
    return [q * (d - mean) / 2 for q, d in zip(softmax(adv), apart, strict=True)]


def probability_gradient(z, y):
    """d softmax(z)_y / dz = p_y (e_y - p)."""
    p = softmax(z)
    return [p[y] * ((c == y) - p[c]) for c in range(len(z))]


def combined(*scaled):
    """Sum of (factor, gradient) pairs, entry by entry."""
    return [sum(factor * gradient[c] for factor, gradient in scaled) for c in range(len(scaled[0][1]))]


def mean_over_batch(rows):
    """Rows of (value, gradient, ...), one per example: the mean value, and the gradients of that mean."""
    value = sum(row[0] for row in rows) / len(rows)
    columns = list(zip(*rows, strict=True))[1:]
    return value, *([[g / len(rows) for g in gradient] for gradient in column] for column in columns)


def mean_cross_entropy(logits, y, soft=None):
    """Standard training on clean logits, PGD-AT and FGSM-AT on attacked ones; `soft` takes the place of the labels."""
    targets = [one_hot(label, len(z)) for z, label in zip(logits, y, strict=True)] if soft is None else soft
    pairs = zip(logits, targets, strict=True)
    return mean_over_batch([(soft_cross_entropy(z, t), soft_cross_entropy_gradient(z, t)) for z, t in pairs])


def trades(clean, adv, y, beta, *, regularizer="kl", soft=None):
    """CE(clean) + beta KL, or beta times the cross-entropy -sum p_c log q_c under `regularizer` "ce"."""
    rows = []
    for i, (z, z_adv) in enumerate(zip(clean, adv, strict=True)):
        target = one_hot(y[i], len(z)) if soft is None else soft[i]
        apart, at_clean = kl(z, z_adv), kl_gradient_clean(z, z_adv)
        if regularizer == "ce":
            p, surprise = softmax(z), [-log_q for log_q in log_softmax(z_adv)]
            apart = sum(p_c * s for p_c, s in zip(p, surprise, strict=True))
            at_clean = [p_c * (s - apart) for p_c, s in zip(p, surprise, strict=True)]
        rows.append(
            (
                soft_cross_entropy(z, target) + beta * apart,
                combined((1, soft_cross_entropy_gradient(z, target)), (beta, at_clean)),
                combined((beta, kl_gradient_adv(z, z_adv))),
            )
        )
    return mean_over_batch(rows)


def mart(clean, adv, y, beta, *, bce_margin=1.0001, weight_margin=1.0000001, eps_log=1e-12):
    """Boosted CE(attacked) + beta (1.0000001 - p_y) KL, the weight live."""
    rows = []
    for z, z_adv, label in zip(clean, adv, y, strict=True):
        apart, weight = floored_kl(z, z_adv, eps_log), weight_margin - softmax(z)[label]
        at_clean = combined(
            (weight, floored_kl_gradient_clean(z, z_adv, eps_log)), (-apart, probability_gradient(z, label))
        )
        at_adv = combined(
            (1, boosted_cross_entropy_gradient(z_adv, label, bce_margin, eps_log)),
            (beta * weight, floored_kl_gradient_adv(z, z_adv, eps_log)),
        )
        value = boosted_cross_entropy(z_adv, label, bce_margin, eps_log) + beta * weight * apart
        rows.append((value, combined((beta, at_clean)), at_adv))
    return mean_over_batch(rows)


def arow(clean, adv, y, lam, *, label_smoothing=0.2, weighting="anti-robust", eps_log=1e-12):
    """CE(clean) to smoothed labels + lam w KL, with w = 1 - q_y, p_y or 1, live."""
    rows = []
    for z, z_adv, label in zip(clean, adv, y, strict=True):
        target, apart = smoothed(label, len(z), label_smoothing), floored_kl(z, z_adv, eps_log)
        weight, weight_at_clean, weight_at_adv = 1.0, [0.0] * len(z), [0.0] * len(z)
        if weighting == "anti-robust":
            weight = 1 - softmax(z_adv)[label]
            weight_at_adv = [-g for g in probability_gradient(z_adv, label)]
        elif weighting == "confidence":
            weight, weight_at_clean = softmax(z)[label], probability_gradient(z, label)
        at_clean = combined((weight, floored_kl_gradient_clean(z, z_adv, eps_log)), (apart, weight_at_clean))
        at_adv = combined((weight, floored_kl_gradient_adv(z, z_adv, eps_log)), (apart, weight_at_adv))
        rows.append(
            (
                soft_cross_entropy(z, target) + lam * weight * apart,
                combined((1, soft_cross_entropy_gradient(z, target)), (lam, at_clean)),
                combined((lam, at_adv)),
            )
        )
    return mean_over_batch(rows)
