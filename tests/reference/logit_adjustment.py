"""Logit adjustment in Python floats: priors from counted predictions, both forms of the paper."""

from __future__ import annotations

import math

from reference import losses


def log_prior(prior, tau):
    """log(pi^tau + 1e-12)."""
    return [math.log((p / sum(prior)) ** tau + 1e-12) for p in prior]


def loss(logits, labels, prior, tau):
    """Mean over the batch of CE(z + log(pi^tau + 1e-12), y)."""
    shift = log_prior(prior, tau)
    moved = [[z + s for z, s in zip(row, shift, strict=True)] for row in logits]
    return sum(losses.cross_entropy(row, y) for row, y in zip(moved, labels, strict=True)) / len(labels)


def loss_gradient(logits, labels, prior, tau):
    """Derivative of it by every logit."""
    shift = log_prior(prior, tau)
    rows = []
    for row, y in zip(logits, labels, strict=True):
        e = [math.exp(z + s) for z, s in zip(row, shift, strict=True)]
        rows.append([(e[k] / sum(e) - (k == y)) / len(labels) for k in range(len(row))])
    return rows


def predicted(logits, prior, tau):
    """argmax z - log(pi^tau + 1e-12), the lowest index on ties."""
    shift = log_prior(prior, tau)
    found = []
    for row in logits:
        moved = [z - s for z, s in zip(row, shift, strict=True)]
        found.append(moved.index(max(moved)))
    return found


def accuracy(counts_pred_true):
    """Share of every class that is right; half an image of one without."""
    classes = range(len(counts_pred_true))
    return [max(counts_pred_true[c][c], 0.5) / sum(counts_pred_true[p][c] for p in classes) for c in classes]


def predicted_counts(counts_pred_true):
    """How many images were predicted as every class; half an image for none."""
    return [max(sum(row), 0.5) for row in counts_pred_true]
