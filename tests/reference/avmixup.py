"""AVmixup on one image at a time, one pixel and one class at a time, in Python floats."""

from __future__ import annotations

from reference import attacks, losses


def kept_mass(y, kept, num_classes):
    """phi: `kept` at y, the rest spread evenly over the other classes."""
    return [kept if c == y else (1 - kept) / (num_classes - 1) for c in range(num_classes)]


def vertex(x, x_adv, gamma, clip):
    moved = [p + gamma * (a - p) for p, a in zip(x, x_adv, strict=True)]
    return [attacks.clip(p, 0.0, 1.0) for p in moved] if clip else moved


def mixed(a, b, w):
    return [w * one + (1 - w) * other for one, other in zip(a, b, strict=True)]


def example(x, x_adv, y, w, *, gamma, lambda1, lambda2, num_classes, clip=True):
    """The mixed pixels and the mixed label of one image with the mixing weight w."""
    label, vertex_label = kept_mass(y, lambda1, num_classes), kept_mass(y, lambda2, num_classes)
    return mixed(x, vertex(x, x_adv, gamma, clip), w), mixed(label, vertex_label, w)


def loss(logits, labels):
    """Mean over the batch of -sum_k label_k log softmax(logits)_k, and its gradient with respect to the logits."""
    value, gradient = 0.0, []
    for z, label in zip(logits, labels, strict=True):
        value -= sum(mass * log_p for mass, log_p in zip(label, losses.log_softmax(z), strict=True)) / len(logits)
        row = zip(losses.softmax(z), label, strict=True)
        gradient.append([(sum(label) * p - mass) / len(logits) for p, mass in row])
    return value, gradient
