"""Training under adversarial weight perturbation (AWP), one statement after another, with a proxy network.

One step, on images attacked at the weights w: a copy of the network takes one step of plain gradient ascent on the
loss; every entry l of the state that has "weight" in its name and two dimensions or more gives

    v_l = gamma ||w_l|| moved_l / (||moved_l|| + 1e-20),   moved_l = entry of the copy - entry of the network

The loss is taken at w + v, SGD steps there with its decay, and v is subtracted. Nothing of the package is used.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F

from reference import training


def frobenius(tensor):
    return math.sqrt(math.fsum(value * value for value in tensor.flatten().tolist()))


def loss(model, x, x_adv, y, *, objective, beta=0.0, class_weight=None):
    """Mean over the batch of the objective's loss per image, times the weight of its class."""
    if objective == "pgd-at":
        per_example = F.cross_entropy(model(x_adv), y, reduction="none")
    else:
        clean = model(x)
        adv = model(x_adv)
        per_example = F.cross_entropy(clean, y, reduction="none") + beta * training.kl_clean_first(clean, adv)
    if class_weight is not None:
        per_example = per_example * torch.tensor([class_weight[c] for c in y.tolist()], dtype=per_example.dtype)
    return per_example.sum() / len(y)


def gradients(model, value):
    """By name; a parameter that the loss does not depend on has none."""
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def perturbation(model, loss_of, *, gamma, rate, ascents=1, include_1d=False, inplace=False):
    """v by name, zeros where nothing moves.

    Args:
        loss_of: function of a network.
        rate: of the plain ascent; it cancels.
        ascents: steps to v, each of gamma / ascents, relative to the length of w.
        inplace: as the class in `awp.py`: ascend on the network itself, statistics of batch norm included, and choose
            tensors by their dimensions alone.
    """
    w = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    v = {name: torch.zeros_like(weight) for name, weight in w.items()}
    for _ in range(ascents):
        network = model if inplace else copy.deepcopy(model)
        network.train()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.copy_(w[name] + v[name])
        before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        gradient = gradients(network, loss_of(network))
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if name in gradient:
                    weight += rate * gradient[name]
            for name, entry in network.state_dict().items():
                if name not in w:
                    continue
                chosen = entry.ndim > 1 and (inplace or "weight" in name)
                if chosen or include_1d:
                    moved = entry - before[name]
                    v[name] += gamma / ascents * frobenius(w[name]) / (frobenius(moved) + 1e-20) * moved
    if inplace:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(w[name])
    return v


def train(
    model,
    epochs,
    *,
    objective,
    eps,
    step_size,
    steps,
    lr,
    momentum,
    weight_decay,
    gamma,
    beta=0.0,
    rate=0.01,
    begin=0,
    ascents=1,
    include_1d=False,
    inplace=False,
    class_weight=None,
    weighted_ascent=False,
    decay=None,
):
    """Train `model` in place.

    Args:
        epochs: per epoch a list of (x, y, generator of the attack).
        objective: "pgd-at" or "trades".
        lr: function of (epoch, step).
        begin: first epoch that is perturbed.
        class_weight: factor of the loss per class; `weighted_ascent` takes it for v too.
        decay: of an average over steps, None for none.

    Returns:
        momentum buffers and the average, both {name: tensor}.
    """
    buffers, average = {}, {}
    model.train()
    for epoch, batches in enumerate(epochs):
        for step, (x, y, generator) in enumerate(batches):
            radius = torch.full((len(y),), eps, dtype=x.dtype)
            kind = "uniform" if objective == "pgd-at" else "gauss"
            x_adv = training.attack(model, x, y, generator, eps=radius, step_size=step_size, steps=steps, kind=kind)

            def loss_of(network, class_weight, x=x, x_adv=x_adv, y=y):
                return loss(network, x, x_adv, y, objective=objective, beta=beta, class_weight=class_weight)

            ascended = class_weight if weighted_ascent else None
            v = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
            if epoch >= begin:
                v = perturbation(
                    model,
                    lambda network, ascended=ascended, loss_of=loss_of: loss_of(network, ascended),
                    gamma=gamma,
                    rate=rate,
                    ascents=ascents,
                    include_1d=include_1d,
                    inplace=inplace,
                )
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight += v[name]
            gradient = gradients(model, loss_of(model, class_weight))
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name in gradient:
                        moved = gradient[name] + weight_decay * weight
                        buffers[name] = momentum * buffers[name] + moved if name in buffers else moved.clone()
                        weight -= lr(epoch, step) * buffers[name]
                for name, weight in model.named_parameters():
                    weight -= v[name]
                for name, weight in model.named_parameters():
                    if decay is not None:
                        kept = average.get(name, weight)
                        average[name] = decay * kept + (1 - decay) * weight
    return buffers, average
