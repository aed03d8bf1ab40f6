"""Distillation from a robust teacher in Python floats: ARD, RSLAD, and what ABSLD and Fair-ARD make of them.

Divergence, q and p the softmax of the logits of teacher and student over T: sum q (log(q + e) - log p), also divided by
the number of classes; its gradient in the student's logits is (p - q) / T. The teacher is constant.
"""

from __future__ import annotations

import math

from reference import losses


def tempered(z, temperature):
    return losses.softmax([v / temperature for v in z])


def divergence(teacher, student, temperature=1.0, eps_log=0.0, over="mean"):
    q, p = tempered(teacher, temperature), tempered(student, temperature)
    total = 0.0
    for q_c, p_c in zip(q, p, strict=True):
        total += q_c * (math.log(q_c + eps_log) - math.log(p_c))
    return total / len(q) if over == "mean" else total


def divergence_gradient(teacher, student, temperature=1.0, over="mean"):
    q, p = tempered(teacher, temperature), tempered(student, temperature)
    scale = temperature * (len(q) if over == "mean" else 1)
    return [(p_c - q_c) / scale for q_c, p_c in zip(q, p, strict=True)]


def scaled(row, factor):
    return [factor * v for v in row]


def rslad(clean, adv, y, *, teacher_clean, teacher_adv, clean_share=1 / 6, eps_log=1e-5, over="mean"):
    """Value, and gradients on clean and attacked logits, of the mean over the batch; labels are not read."""
    value, at_clean, at_adv, b = 0.0, [], [], len(y)
    for z, z_adv, t, t_adv in zip(clean, adv, teacher_clean, teacher_adv, strict=True):
        value += (1 - clean_share) * divergence(t_adv, z_adv, 1.0, eps_log, over) / b
        value += clean_share * divergence(t, z, 1.0, eps_log, over) / b
        at_clean.append(scaled(divergence_gradient(t, z, 1.0, over), clean_share / b))
        at_adv.append(scaled(divergence_gradient(t_adv, z_adv, 1.0, over), (1 - clean_share) / b))
    return value, at_clean, at_adv


def ard(clean, adv, y, *, teacher, alpha=1.0, temperature=30.0, over="mean"):
    """As `rslad`: alpha T^2 D_T + (1 - alpha) CE at the clean image."""
    value, at_clean, at_adv, b = 0.0, [], [], len(y)
    for z, z_adv, t, label in zip(clean, adv, teacher, y, strict=True):
        value += alpha * temperature**2 * divergence(t, z_adv, temperature, 0.0, over) / b
        value += (1 - alpha) * losses.cross_entropy(z, label) / b
        at_clean.append(scaled(losses.cross_entropy_gradient(z, label), (1 - alpha) / b))
        gradient = divergence_gradient(t, z_adv, temperature, over)
        at_adv.append(scaled(gradient, alpha * temperature**2 / b))
    return value, at_clean, at_adv


def class_means(values, y, num_classes):
    """The mean of the values of every class, None without any."""
    found = []
    for c in range(num_classes):
        own = [value for value, label in zip(values, y, strict=True) if label == c]
        found.append(sum(own) / len(own) if own else None)
    return found


def class_sums(values, y, num_classes):
    """The sum of the values of every class, None without any."""
    found = []
    for c in range(num_classes):
        own = [value for value, label in zip(values, y, strict=True) if label == c]
        found.append(sum(own) if own else None)
    return found


def next_temperatures(temperatures, class_losses, rate, lowest=0.5, highest=5.0):
    """T - rate d / max |d|, clipped; a class without a loss stays, and so do all where the losses are equal."""
    known = [loss for loss in class_losses if loss is not None]
    mean = sum(known) / len(known)
    largest = max(abs(loss - mean) for loss in known)
    moved = []
    for temperature, loss in zip(temperatures, class_losses, strict=True):
        if loss is not None and largest > 0:
            temperature -= rate * (loss - mean) / largest
        moved.append(min(max(temperature, lowest), highest))
    return moved


def absld_loss(clean, adv, y, *, teacher, t_adv, t_clean, official=False):
    """Value of the loss with tempered labels of the teacher; `official` divides both by the product."""
    warm, cold = [], []
    for row, label in zip(teacher, y, strict=True):
        product = t_adv[label] * t_clean[label]
        cold.append(scaled(row, 1 / (product if official else t_clean[label])))
        warm.append(scaled(row, 1 / (product if official else t_adv[label])))
    return rslad(clean, adv, y, teacher_clean=cold, teacher_adv=warm)[0]


def fair_weights(kappa, beta=2.0, lowest=5 / 6, highest=5 / 2):
    """(before, after the clip): inverse powers of kappa + 1e-5 that sum to the number of classes."""
    raw = [(1 / (k + 1e-5)) ** beta for k in kappa]
    before = [len(raw) * w / sum(raw) for w in raw]
    return before, [min(max(w, lowest), highest) for w in before]


def steps_survived(path, is_right):
    """How many of the points that a step leaves, all but the last, are classified right."""
    return sum(1 for point in path[:-1] if is_right(point))
