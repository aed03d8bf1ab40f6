"""CFA in Python floats: class-wise radii, betas, the loss they enter, and the average of epochs that pass the gate."""

from __future__ import annotations

from reference import losses


def robust_accuracy(predicted, labels, num_classes):
    """t_c over the true class counts."""
    return [
        sum(p == y for p, y in zip(predicted, labels, strict=True) if y == c) / sum(y == c for y in labels)
        for c in range(num_classes)
    ]


def radii(t, lam, eps):
    return [(lam + t_c) * eps for t_c in t]


def betas(t, lam, beta):
    return [(lam + t_c) * beta for t_c in t]


def shares(t, lam, beta):
    """b_c = beta_c / (1 + beta_c)."""
    return [b / (1 + b) for b in betas(t, lam, beta)]


def loss(clean, adv, y, share):
    """Mean over the batch of (1 - b_y) CE + b_y KL."""
    total = 0.0
    for z, z_adv, label in zip(clean, adv, y, strict=True):
        b = share[label]
        total += (1 - b) * losses.cross_entropy(z, label) + b * losses.kl(z, z_adv)
    return total / len(y)


def fawa(values, worst, decay, threshold):
    """The average of one weight after every epoch, None before an epoch has passed; the first that does is copied.

    `values` are those of the epochs, `worst` the accuracies of their worst classes.
    """
    average, path = None, []
    for value, lowest in zip(values, worst, strict=True):
        if lowest >= threshold:
            average = value if average is None else decay * average + (1 - decay) * value
        path.append(average)
    return path
