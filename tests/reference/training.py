"""A plain training loop: PGD-AT or TRADES with CCM, CCR and an average of the weights, one statement after another.

SGD is written out (decay added to the gradient, momentum buffer started by the first gradient), learning rates are
given per step, the model is any torch module, and nothing of the package is used. Start noise comes from the generator
that the caller hands over for each batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kl_clean_first(clean, adv):
    """Sum over classes, one value per example."""
    p = torch.softmax(clean, 1)
    return (p * (torch.log(p) - torch.log_softmax(adv, 1))).sum(1)


def noise(x, generator, eps, kind):
    if kind == "gauss":
        return x + 0.001 * torch.empty_like(x).normal_(generator=generator)
    uniform = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return torch.clamp(x + uniform * eps[:, None, None, None], 0, 1)


def attack(model, x, y, generator, *, eps, step_size, steps, kind):
    """linf ascent on CE ("uniform" start) or on the KL from the clean prediction ("gauss" start), in eval mode."""
    model.eval()
    point = noise(x, generator, eps, kind)
    clean = model(x).detach()
    for _ in range(steps):
        point = point.detach().requires_grad_(True)
        logits = model(point)
        value = (
            F.cross_entropy(logits, y, reduction="sum") if kind == "uniform" else kl_clean_first(clean, logits).sum()
        )
        (gradient,) = torch.autograd.grad(value, point)
        moved = point.detach() + step_size * gradient.sign()
        radius = eps[:, None, None, None]
        moved = torch.max(torch.min(moved, x + radius), x - radius)
        point = torch.clamp(moved, 0, 1)
    model.train()
    return point.detach()


def train(
    model,
    epochs,
    *,
    objective,
    num_classes,
    eps=0.0,
    step_size=0.0,
    steps=0,
    beta=0.0,
    lr,
    momentum,
    weight_decay,
    ccm=None,
    ccr=None,
    decay=None,
):
    """Train `model` in place.

    Args:
        epochs: per epoch a list of (x, y, generator of the attack, learning rate's epoch and step).
        objective: "standard", "pgd-at" or "trades".
        lr: function of (epoch, step).
        ccm, ccr: lambda; both act from the second epoch on. None leaves them out.
        decay: of an average over steps, None for none.

    Returns:
        mean loss per epoch, robust accuracy per class and epoch, the average {name: tensor}.
    """
    parameters = dict(model.named_parameters())
    buffers = {}
    average = {}
    mean_losses, robust_accuracy = [], []
    radius_of, beta_of = [eps] * num_classes, [beta] * num_classes
    model.train()
    for epoch, batches in enumerate(epochs):
        hits, seen = [0] * num_classes, [0] * num_classes
        loss_sum = images = 0
        for step, (x, y, generator) in enumerate(batches):
            adv = None
            if objective != "standard":
                eps_i = torch.tensor([radius_of[c] for c in y.tolist()], dtype=x.dtype)
                kind = "uniform" if objective == "pgd-at" else "gauss"
                x_adv = attack(model, x, y, generator, eps=eps_i, step_size=step_size, steps=steps, kind=kind)
            if objective == "standard":
                per_example = F.cross_entropy(model(x), y, reduction="none")
            elif objective == "pgd-at":
                adv = model(x_adv)
                per_example = F.cross_entropy(adv, y, reduction="none")
            else:
                clean = model(x)
                adv = model(x_adv)
                weight = torch.tensor([beta_of[c] for c in y.tolist()], dtype=clean.dtype)
                per_example = F.cross_entropy(clean, y, reduction="none") + weight * kl_clean_first(clean, adv)
                if ccr is not None:
                    per_example = per_example / (1 + weight)
            loss = per_example.sum() / len(y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, weights), gradient in zip(parameters.items(), gradients, strict=True):
                    gradient = gradient + weight_decay * weights
                    buffers[name] = momentum * buffers[name] + gradient if name in buffers else gradient.clone()
                    weights -= lr(epoch, step) * buffers[name]
                for name, weights in parameters.items():
                    if decay is not None:
                        old = average.get(name, weights)
                        average[name] = decay * old + (1 - decay) * weights if name in average else weights.clone()
            loss_sum += float(loss.detach()) * len(y)
            images += len(y)
            for i, c in enumerate(y.tolist()):
                seen[c] += 1
                hits[c] += adv is not None and int(adv[i].argmax()) == c
        mean_losses.append(loss_sum / images)
        robust_accuracy.append([h / n for h, n in zip(hits, seen, strict=True)])
        t = robust_accuracy[-1]
        if ccm is not None:
            radius_of = [(ccm + t[c]) * eps for c in range(num_classes)]
        if ccr is not None:
            beta_of = [(ccr + t[c]) * beta for c in range(num_classes)]
    return mean_losses, robust_accuracy, average
