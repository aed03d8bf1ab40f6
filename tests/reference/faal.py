"""FAAL in Python floats: margins, class means, the weights by bisection and by a generic solver, and the loss."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize

from reference import losses


def probability_margin(z, y):
    p = losses.softmax(z)
    return max(p[k] for k in range(len(p)) if k != y) - p[y]


def class_means(values, y, num_classes, absent):
    """Mean of `values` per class, and how many there are of each."""
    means, counts = [], []
    for c in range(num_classes):
        own = [value for value, label in zip(values, y, strict=True) if label == c]
        means.append(math.fsum(own) / len(own) if own else absent)
        counts.append(len(own))
    return means, counts


def kl_from_uniform(q):
    """KL(uniform || q)."""
    return math.fsum(math.log(1 / len(q) / value) for value in q) / len(q)


def worst_weights(a, radius):
    """q_c = kappa / (xi - a_c), xi above max a by the number whose logarithm is bisected until it moves no more."""
    top = max(a)
    gaps = [top - value for value in a]
    if radius == 0 or max(gaps) == 0:
        return [1 / len(a)] * len(a)

    def at(log_s):
        inverse = [1 / (math.exp(log_s) * max(gaps) + gap) for gap in gaps]
        return [value / math.fsum(inverse) for value in inverse]

    low, high = -650.0, 400.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_from_uniform(at(middle)) > radius else (low, middle)
    return at(low)


def solved_weights(a, radius):
    """The same by a solver that knows nothing of the solution: sequential quadratic programming on the simplex."""
    a = np.asarray(a, dtype=float)
    a = (a - a.max()) / (a.max() - a.min())
    c = len(a)
    within = {
        "type": "ineq",
        "fun": lambda q: radius + np.log(c * q).mean(),
        "jac": lambda q: 1 / (c * q),
    }
    whole = {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones(c)}
    q = np.full(c, 1 / c)
    for _ in range(3):  # each from where the last one stopped, without what it had learnt of the curvature
        q = minimize(
            lambda q: -a @ q,
            q,
            jac=lambda q: -a,
            bounds=[(1e-9, 1)] * c,
            constraints=[within, whole],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 2000},
        ).x
    return q.tolist()


def loss(per_example, y, q):
    """(C / B) sum_i q_{y_i} l_i."""
    total = math.fsum(q[label] * value for value, label in zip(per_example, y, strict=True))
    return len(q) / len(y) * total
