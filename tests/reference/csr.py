"""CSR in Python floats: the confusion matrix, its top singular vectors by power iteration, the regularised loss.

Matrices are lists of rows, rows predicted, columns true.
"""

from __future__ import annotations

import math

from reference import losses


def shifted(z, y, gamma, kind):
    if kind == "additive":
        return [v if c == y else v + gamma for c, v in enumerate(z)]
    return [v - gamma * v if c == y else v for c, v in enumerate(z)]


def confused_with(z, y, gamma=0.0, kind="additive"):
    """The best wrong class i where z_y <= z_i after the shift, else y."""
    moved = shifted(z, y, gamma, kind)
    rival = losses.runner_up(moved, y)
    return rival if moved[y] <= moved[rival] else y


def confusion(logits, labels, num_classes, gamma=0.0, kind="additive"):
    """(counts off the diagonal, images of each class)."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    sizes = [0] * num_classes
    for z, y in zip(logits, labels, strict=True):
        sizes[y] += 1
        i = confused_with(z, y, gamma, kind)
        if i != y:
            counts[i][y] += 1
    return counts, sizes


def rates(counts, sizes):
    """Each column divided by the size of its class; a class without images has no errors."""
    return [[count / size if size else 0.0 for count, size in zip(row, sizes, strict=True)] for row in counts]


def norm(v):
    return math.sqrt(math.fsum(a * a for a in v))


def times(matrix, v):
    return [math.fsum(a * b for a, b in zip(row, v, strict=True)) for row in matrix]


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def top_vectors(matrix, rounds=20_000):
    """(sigma, u, v) by power iteration on M^T M from a positive vector, which stays non-negative."""
    back = transposed(matrix)
    v = [1.0 + 0.01 * c for c in range(len(matrix))]
    for _ in range(rounds):
        moved = times(back, times(matrix, v))
        moved = [a / norm(moved) for a in moved]
        change = max(abs(a - b) for a, b in zip(moved, v, strict=True))
        v = moved
        if change < 1e-13:
            break
    image = times(matrix, v)
    sigma = norm(image)
    return sigma, [a / sigma for a in image], v


def outer(u, v):
    return [[a * b for b in v] for a in u]


def spread(matrix):
    """2 (G - min G) / (max G - min G) + 0.01 over all entries."""
    entries = [a for row in matrix for a in row]
    low, high = min(entries), max(entries)
    return [[2 * (a - low) / (high - low) + 0.01 for a in row] for row in matrix]


def official_regulariser(logits, labels, weights):
    """mean of sum_c t_c (log t_c - log p_c), t the one-hot label times g = weights[predicted][true]."""
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        g = weights[confused_with(z, y)][y]
        total += g * (math.log(g) - losses.log_softmax(z)[y])
    return total / len(labels)


def paper_regulariser(logits, labels, gradient, sizes, gamma=0.0, kind="additive"):
    """mean over confused images of u_i v_y N / m_y CE(z + gamma (1 - e_y), y), as a share of all images."""
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        i = confused_with(z, y, gamma, kind)
        if i != y:
            scale = sum(sizes) / sizes[y]
            total += gradient[i][y] * scale * losses.cross_entropy(shifted(z, y, gamma, kind), y)
    return total / len(labels)


def surrogate(logits, labels, gradient, sizes, gamma=0.0):
    """sum_ij u_i v_j L_ij with L as eq. (10) has it, summed cell by cell."""
    total, num_classes = 0.0, len(sizes)
    for i in range(num_classes):
        for j in range(num_classes):
            cell = [
                losses.cross_entropy(shifted(z, j, gamma, "additive"), j)
                for z, y in zip(logits, labels, strict=True)
                if y == j and i != j and confused_with(z, j, gamma, "additive") == i
            ]
            if cell:
                total += gradient[i][j] * math.fsum(cell) / sizes[j]
    return total
