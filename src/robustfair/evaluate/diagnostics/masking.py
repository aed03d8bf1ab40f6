"""Does a model hide its gradients? Diagnostics from attacks on a sample of the images.

Robustness that rests on gradients which attacks cannot use is none: it falls to attacks without gradients, to more
steps, and it stays where none can be, at radii that turn any image into any other (Athalye et al. 2018; Carlini et al.
2019).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from robustfair.data import ImageDataset
from robustfair.errors import ModelError, RobustFairWarning
from robustfair.evaluate.diagnostics.base import Diagnostic, paired_difference
from robustfair.evaluate.diagnostics.results import MISLEADING, WITHOUT_GRADIENTS
from robustfair.evaluate.plan import SearchPrecision
from robustfair.evaluate.result import CLEAN, Audit, shortfall
from robustfair.evaluate.run import audit
from robustfair.evaluate.runner import Progress
from robustfair.values import Threat

SAMPLE = 256
"""Images that are attacked."""
LARGE = {"linf": 0.5, "l2": 0.5}
"""Radius, in linf per pixel and in l2 as a share of the longest way through the box, at which nothing is robust."""
NEAR_ZERO = 0.02
A_POINT = 0.01
BASE, LONGER, RESTARTED = "pgd-20", "pgd-100", "pgd-20(restarts=5)"
SQUARE = "square(queries=1000)"


def diagnose_gradients(
    model: nn.Module,
    dataset: ImageDataset,
    threat: Threat,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    precision: SearchPrecision = "auto",
    max_minutes: float | None = None,
    on_progress: Progress | None = None,
) -> tuple[Diagnostic, ...]:
    """What attacking a sample of the images again and again shows; by Square alone where there are no gradients.

    Args:
        model: on the device that the attacks are to run on.
        dataset: its first images of each class are the sample.
        threat: of the audit.
        seed, batch_size, precision: see `robustfair.evaluate.run.audit`.
        max_minutes: stop then; none are left from 0 down. An attack that was cut proves nothing, and is named.
        on_progress: as for an audit; the attacks are called "check pgd-20", ...

    Raises:
        ModelError: Square cannot attack the model either.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    sample = replace(dataset.limit_per_class(max(1, SAMPLE // dataset.num_classes)), drawn=None)
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    found: list[Diagnostic] = []
    cut: dict[str, float] = {}

    def attacked(attacks: Sequence[str], eps: float, step_size: float | None, where: str = "") -> Audit | None:
        """An audit of the sample; None where there is no time for it."""
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        if left is not None and left <= 0:
            cut.update((f"{name}{where}", 0.0) for name in attacks)
            return None

        def tell(attack: str, done: int, total: int) -> None:
            if on_progress:
                on_progress(f"check {attack}{where}", done, total)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustFairWarning)
            result = audit(
                model,
                sample,
                attacks=attacks,
                norm=threat.norm,
                eps=eps,
                step_size=step_size,
                batch_size=batch_size,
                device=device,
                seed=seed,
                precision=precision,
                max_minutes=left,
                checks=False,
                on_progress=tell,
            )
        cut.update((f"{part}{where}", share) for part, share in result.unfinished().items())
        return result

    try:
        again = attacked((BASE, LONGER, RESTARTED, SQUARE), threat.eps, threat.step_size)
    except ModelError as error:
        found.append(_no_gradient(error, attacked((SQUARE,), threat.eps, threat.step_size)))
    else:
        if again is not None:
            found += [*_square_is_stronger(again), *_still_falling(again)]
        far = attacked((BASE,), _large(threat, sample), None, " at a large radius")
        if far is not None:
            found += _robust_far_away(far)
    return (*found, diagnostics_cut(shortfall(cut))) if cut else tuple(found)


def diagnostics_cut(reason: str, remedy: str = "run them again with more time") -> Diagnostic:
    """That some of these diagnostics could not be made."""
    return Diagnostic(
        code="checks-cut",
        severity="note",
        text=f"Not all checks for masked gradients were made: {reason}.",
        advice=f"What they would have shown is not known: {remedy}.",
    )


def _no_gradient(error: ModelError, found: Audit | None) -> Diagnostic:
    """That the checks by gradients could not be made, and what Square alone left."""
    text = f"The checks with gradients, by {BASE}, {LONGER} and {RESTARTED}, could not be made: {error}."
    if found is not None and _ran(found, SQUARE):
        left = f"{_rate(found, SQUARE)} of {len(found.labels)} images"
        text += f" {SQUARE} by itself leaves {left}; {_rate(found, CLEAN)} are right when clean."
    return Diagnostic(
        code="no-gradient",
        severity="warn",
        text=text,
        advice="Attacks by queries alone say little of robustness: audit the model in a form that gives gradients.",
    )


def _square_is_stronger(found: Audit) -> list[Diagnostic]:
    if not _ran(found, BASE, SQUARE):
        return []
    difference, lower, upper = paired_difference(found.hits(BASE), found.hits(SQUARE))
    if difference < A_POINT:
        return []
    return [
        Diagnostic(
            code="square-beats-pgd",
            severity="warn" if lower > 0 else "note",
            text=f"{SQUARE} leaves {_rate(found, SQUARE)} of {len(found.labels)} images, {BASE} {_rate(found, BASE)}, "
            f"{_fewer(difference, lower, upper)}: {MISLEADING}",
            advice=WITHOUT_GRADIENTS,
        )
    ]


def _still_falling(found: Audit) -> list[Diagnostic]:
    drops = {
        name: paired_difference(found.hits(BASE), found.hits(name))
        for name in (LONGER, RESTARTED)
        if _ran(found, BASE, name)
    }
    figures = [f"{name} {_rate(found, name)}, {_fewer(*drop)}" for name, drop in drops.items() if drop[0] > A_POINT]
    if not figures:
        return []
    return [
        Diagnostic(
            code="not-converged",
            severity="note",
            text=f"{BASE} leaves {_rate(found, BASE)} of {len(found.labels)} images, {'; '.join(figures)}: more work "
            "still finds more than a point.",
            advice="Use more steps and restarts, or autoattack, until the figure stands.",
        )
    ]


def _robust_far_away(found: Audit) -> list[Diagnostic]:
    if not _ran(found, BASE) or found.average(BASE) <= NEAR_ZERO:
        return []
    return [
        Diagnostic(
            code="robust-at-large-radius",
            severity="warn",
            text=f"At radius {found.threat.eps:.3g} ({found.threat.norm}), where an image can become any grey, {BASE} "
            f"leaves {_rate(found, BASE)} of {len(found.labels)} images right: the attack does not work on this model.",
            advice="Its gradients are masked: figures of gradient attacks say nothing of robustness here.",
        )
    ]


def _ran(found: Audit, *attacks: str) -> bool:
    """Whether these attacks ran to their end."""
    return all(name in found.attacks and not found.unfinished(name) for name in attacks)


def _large(threat: Threat, dataset: ImageDataset) -> float:
    pixels = dataset.images[0].numel()
    return LARGE["linf"] if threat.norm == "linf" else LARGE["l2"] * pixels**0.5


def _fewer(difference: float, lower: float, upper: float) -> str:
    return f"{100 * difference:.1f} points fewer (95 % interval {100 * lower:.1f} to {100 * upper:.1f})"


def _rate(found: Audit, name: str) -> str:
    return f"{100 * found.average(name):.1f} %"
