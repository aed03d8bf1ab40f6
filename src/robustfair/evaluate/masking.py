"""Does a model hide its gradients? Checks on a sample of the images, each with what was found and what to do.

Robustness that rests on gradients which attacks cannot use is none: it falls to attacks without gradients, to more
steps, and it stays where none can be, at radii that turn any image into any other (Athalye et al. 2018; Carlini et al.
2019). That outputs are random is seen in a few passes; the thorough checks attack a sample several times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import attacking
from robustfair.data import ImageDataset
from robustfair.evaluate.audit import Audit, audit
from robustfair.evaluate.sanity import Finding, paired_difference
from robustfair.values import Threat

PASSES = 5
"""Of the same images, to see whether the output is random."""
SAME = 1e-4
"""Share of the spread of the logits by which repeated passes of a fixed model may differ."""
SAMPLE = 256
"""Images of the thorough checks."""
LARGE = {"linf": 0.5, "l2": 0.5}
"""Radius, in linf per pixel and in l2 as a share of the longest way through the box, at which nothing is robust."""
NEAR_ZERO = 0.02
A_POINT = 0.01
BASE, LONGER, RESTARTED = "pgd-20", "pgd-100", "pgd-20(restarts=5)"
SQUARE = "square(queries=1000)"


def random_output(model: nn.Module, x: Tensor) -> tuple[Finding, ...]:
    """Whether the same images give other logits at every pass.

    Args:
        model: on the device of `x`; it keeps its modes.
        x: (B, C, H, W) in [0, 1].
    """
    with attacking(model, "eval"), torch.no_grad():
        passes = torch.stack([model(x) for _ in range(PASSES)])
    spread = float((passes[0].amax(1) - passes[0].amin(1)).mean())
    apart = float((passes - passes[0]).abs().amax())
    if apart <= SAME * max(spread, 1e-12):
        return ()
    changed = int((passes.argmax(2) != passes[0].argmax(1)).any(0).sum())
    return (
        Finding(
            code="random-output",
            severity="warn",
            text=f"The same images give other logits at every pass: up to {apart:.2g} apart in {PASSES} passes, where "
            f"logits spread over {spread:.2g}; {changed} of {len(x)} predictions change.",
            advice="Attacks must average over the randomness, which none here does: audit the model without it, or "
            "read every figure as an upper bound.",
        ),
    )


def thorough_findings(
    model: nn.Module, dataset: ImageDataset, threat: Threat, *, seed: int = 0, batch_size: int | None = None
) -> tuple[Finding, ...]:
    """What attacking a sample of the images again and again shows.

    Args:
        model: on the device that the attacks are to run on.
        dataset: its first images of each class are the sample.
        threat: of the audit.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    sample = dataset.limit_per_class(max(1, SAMPLE // dataset.num_classes))
    common: dict[str, Any] = {"norm": threat.norm, "device": device, "seed": seed, "batch_size": batch_size}
    again = audit(
        model,
        sample,
        attacks=[BASE, LONGER, RESTARTED, SQUARE],
        eps=threat.eps,
        step_size=threat.step_size,
        **common,
    )
    far = audit(model, sample, attacks=BASE, eps=_large(threat, sample), **common)
    return (*_square_is_stronger(again), *_still_falling(again), *_robust_far_away(far))


def _square_is_stronger(found: Audit) -> tuple[Finding, ...]:
    difference, lower, _ = paired_difference(found.hits(BASE), found.hits(SQUARE))
    if difference < A_POINT or lower <= 0:
        return ()
    return (
        Finding(
            code="square-beats-pgd",
            severity="warn",
            text=f"{SQUARE} leaves {_rate(found, SQUARE)} of {len(found.labels)} images, {BASE} {_rate(found, BASE)}: "
            "a search without gradients does better than one with them, so the gradients do not show the way.",
            advice="Do not quote gradient attacks on this model. Look for rounding, saturation or randomness in it, "
            "and quote autoattack as an upper bound.",
        ),
    )


def _still_falling(found: Audit) -> tuple[Finding, ...]:
    more = [name for name in (LONGER, RESTARTED) if found.average(BASE) - found.average(name) > A_POINT]
    sure = [name for name in more if paired_difference(found.hits(BASE), found.hits(name))[1] > 0]
    if not sure:
        return ()
    figures = ", ".join(f"{name} {_rate(found, name)}" for name in sure)
    return (
        Finding(
            code="not-converged",
            severity="note",
            text=f"{BASE} leaves {_rate(found, BASE)} of {len(found.labels)} images, {figures}: more work still finds "
            "more than a point.",
            advice="Use more steps and restarts, or autoattack, until the figure stands.",
        ),
    )


def _robust_far_away(found: Audit) -> tuple[Finding, ...]:
    if found.average(BASE) <= NEAR_ZERO:
        return ()
    return (
        Finding(
            code="robust-at-large-radius",
            severity="warn",
            text=f"At radius {found.threat.eps:.3g} ({found.threat.norm}), where an image can become any grey, {BASE} "
            f"leaves {_rate(found, BASE)} of {len(found.labels)} images right: the attack does not work on this model.",
            advice="Its gradients are masked: figures of gradient attacks say nothing of robustness here.",
        ),
    )


def _large(threat: Threat, dataset: ImageDataset) -> float:
    pixels = dataset.images[0].numel()
    return LARGE["linf"] if threat.norm == "linf" else LARGE["l2"] * pixels**0.5


def _rate(found: Audit, name: str) -> str:
    return f"{100 * found.average(name):.1f} %"
