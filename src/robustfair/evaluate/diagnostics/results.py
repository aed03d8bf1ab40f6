"""Diagnostics: what a reader of an audit should know before quoting its numbers. All pure, from the predictions alone.

The main one is flattery. PGD climbs the cross-entropy, and on flat logits, as unit head norms make them, that gradient
points less well to the nearest boundary than a margin does. Published PGD-AT on CIFAR-10 shows 53.9 % under PGD-20 and
49.5 % under AutoAttack; after HWNwB 56.7 % and 48.3 %: the PGD figure rises where the robustness falls.

Source of these figures: "Class-wise disparity in adversarial training: implicit bias perspective" (HWNwB), its table of
WRN-28-5 results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from robustfair import metrics
from robustfair.attacks.named import CROSS_ENTROPY
from robustfair.evaluate.compare import check_comparable
from robustfair.evaluate.diagnostics.base import Diagnostic, paired_difference
from robustfair.evaluate.result import CLEAN, Audit, shortfall
from robustfair.metrics import FEW_IMAGES
from robustfair.models.pixels import LEAST_SKILL

FLATTERY_NOTED = 0.01
"""Difference between two attacks, as a fraction of all images, from which it is noted (beyond chance)."""
FLATTERY_WARNED = 0.05
"""The same for a warning: published adversarially trained models differ by 3 to 5 points from PGD-20 to AutoAttack."""
CONFIRMED_SHARE = 0.5
"""A gain counts as confirmed if the stronger attack shows at least this share of it."""
MASKED_SHARE = 0.05
"""Share of images without a usable gradient from which an audit is called masked."""
BEYOND_GRADIENTS = 0.01
"""Share of all images, broken by Square after the gradient attacks before it had failed, from which it is warned of."""
EQUAL_NORMS = 1.01
MISLEADING = "a search without gradients does better than one with them, so the gradients do not show the way."
WITHOUT_GRADIENTS = (
    "Do not quote gradient attacks on this model. Look for rounding, saturation or randomness in it, and quote "
    "autoattack as an upper bound."
)
"""The reason and the advice where Square does better."""

_DRAWS = 2000


def diagnose(audit: Audit) -> tuple[Diagnostic, ...]:
    """All diagnostics of one audit, warnings first."""
    for attack in audit.attacks:
        assert bool((audit.correct(attack) <= audit.correct(CLEAN)).all()), f"{attack} beats clean in a class"
    found = (
        *(Diagnostic(**found) for found in audit.provenance.get("checks", ())),
        *_cut(audit),
        *_masked(audit),
        *_square_is_stronger(audit),
        *_not_finite(audit),
        *_near_chance(audit),
        *_flattered(audit),
        *_no_images(audit),
        *_few_images(audit),
        *_weak_attacks(audit),
    )
    return tuple(sorted(found, key=lambda diagnostic: diagnostic.severity != "warn"))


def diagnose_change(before: Audit, after: Audit) -> tuple[Diagnostic, ...]:
    """Diagnostics of the change from `before` to `after`: gains under PGD that a stronger attack does not confirm.

    For every PGD attack of both audits the gain in average and in worst-class accuracy stands against that under the
    attack of another goal that leaves `after` least. Where PGD shows at least a point more, beyond chance, it is
    named: a warning if the other attack confirms less than half of the gain, else a note. Chance is a bootstrap over
    the images of each class, paired over models and attacks, from a fixed seed.

    Raises:
        DataError: the audits are not of the same images, classes and threat.
    """
    check_comparable(before, after)
    common = [name for name in after.attacks if name in before.attacks]
    weak = [name for name in common if _climbs_cross_entropy(after, name)]
    others = [name for name in common if name != CLEAN and _goal(after, name) != CROSS_ENTROPY]
    if weak and not others:
        return (
            Diagnostic(
                code="gain-unchecked",
                severity="note",
                text=f"The change is measured under {_listed(weak)} alone, which a repair of the head can flatter.",
                advice="Audit both models with a margin attack as well, such as cw-50(restarts=5).",
            ),
        )
    found = []
    for name in weak:
        other = min(others, key=after.average)
        gains = _Gains.of(before, after, name, other)
        for measure in ("average", "worst class"):
            found += gains.judge(measure, name, other)
    return tuple(sorted(found, key=lambda diagnostic: diagnostic.severity != "warn"))


def _flattered(audit: Audit) -> list[Diagnostic]:
    """PGD figures that another attack of the audit shows to be too high, beyond chance."""
    found = []
    for name in (name for name in audit.attacks if _climbs_cross_entropy(audit, name)):
        others = [other for other in audit.attacks if other not in (CLEAN, name)]
        if not others:
            continue
        strongest = min(others, key=audit.average)
        excess, lower, upper = _excess(audit, name, strongest)
        if excess < FLATTERY_NOTED or lower <= 0:
            continue
        text = (
            f"{name} reports {_percent(audit.average(name))}, {strongest} {_percent(audit.average(strongest))}: "
            f"{_points(excess)} points (95 % interval {_points(lower)} to {_points(upper)}) of the {name} figure "
            "are not robustness."
        )
        if audit.head_norm_ratio < EQUAL_NORMS and _goal(audit, strongest) != CROSS_ENTROPY:
            text += " Head rows of equal norm flatten the logits, and flat logits flatter PGD."
        found.append(
            Diagnostic(
                code="flattered-attack",
                severity="warn" if excess >= FLATTERY_WARNED else "note",
                text=text,
                advice=f"Quote {strongest}, or robust, which counts an image only if every attack fails on it.",
            )
        )
    return found


def _excess(audit: Audit, name: str, other: str) -> tuple[float, float, float]:
    """Average accuracy under one attack less that under another, with its 95 % interval: (value, lower, upper)."""
    more, less = audit.hits(name), audit.hits(other)
    if not audit.reweighted:
        return paired_difference(more, less)
    table = metrics.paired_table(less, more, audit.labels, audit.num_classes)
    n, lost, won = table.sum((1, 2)), table[:, 1, 0], table[:, 0, 1]
    value = audit.average(name) - audit.average(other)
    return value, *metrics.stratified_paired_interval(lost, won, n, audit.shares)


def _masked(audit: Audit) -> list[Diagnostic]:
    """Images on which a gradient attack cannot move, whatever their robustness."""
    gradients = audit.provenance.get("input_gradients") or {"images": 0}
    for kind, words in (("zero", "zero"), ("not_finite", "not a finite number")):
        if gradients["images"] and gradients[kind] > MASKED_SHARE * gradients["images"]:
            share = _percent(gradients[kind] / gradients["images"])
            return [
                Diagnostic(
                    code="masked-gradient",
                    severity="warn",
                    text=f"On {share} of the images that are right when clean the gradient at the input is {words}: "
                    "gradient attacks cannot move there, and their figures say nothing of robustness.",
                    advice="Attack the model without the masking part (rounding, saturated logits), or by queries.",
                )
            ]
    return []


def _square_is_stronger(audit: Audit) -> list[Diagnostic]:
    """Images that only Square broke, of those on which attacks by gradients had failed in the same AutoAttack."""
    found = []
    for attack in audit.broken_by:
        gradients: list[str] = []
        for member, by_class in audit.fell_to(attack).items():
            broken = int(by_class.sum())
            if member.startswith(("apgd", "fab")):
                gradients.append(member)
            elif member.startswith("square") and gradients and broken >= BEYOND_GRADIENTS * len(audit.labels):
                share = _percent(broken / len(audit.labels))
                text = (
                    f"In {attack} {member} broke {broken} images, {share} of all, on which {_listed(gradients)} had "
                    f"failed: {MISLEADING}"
                )
                found.append(
                    Diagnostic(code="square-beats-gradients", severity="warn", text=text, advice=WITHOUT_GRADIENTS)
                )
    return found


def _not_finite(audit: Audit) -> list[Diagnostic]:
    """Attacked points without a prediction, which every attack counts as broken."""
    points = {name: about.get("not_finite", 0) for name, about in audit.settings.items()}
    named = [f"{name} met {count:,}" for name, count in points.items() if count]
    if not named:
        return []
    return [
        Diagnostic(
            code="not-finite",
            severity="warn",
            text=f"At some attacked points the logits are no finite numbers: {_listed(named)}. Such images count as "
            "lost under every attack, for want of a class and not for another one.",
            advice="Find where the model overflows or divides by zero on attacked images, and audit it again.",
        )
    ]


def _cut(audit: Audit) -> list[Diagnostic]:
    """Attacks that the time budget ended or left out."""
    if audit.complete:
        return []
    return [
        Diagnostic(
            code="cut-short",
            severity="warn",
            text=f"Not all attacks ran to their end: {shortfall(audit.unfinished())}. Robust accuracies are upper "
            "bounds.",
            advice="Give it more time: where the audit is saved, the same command goes on where it stopped.",
        )
    ]


def _near_chance(audit: Audit) -> list[Diagnostic]:
    chance = 1 / audit.num_classes
    skill = (audit.average(CLEAN) - chance) / (1 - chance)
    if skill >= LEAST_SKILL:
        return []
    return [
        Diagnostic(
            code="clean-near-chance",
            severity="warn",
            text=f"Clean accuracy is {_percent(audit.average(CLEAN))}; chance is {_percent(chance)}.",
            advice="Check that the model normalises its own input from [0, 1], and that its classes are in this order.",
        )
    ]


def _no_images(audit: Audit) -> list[Diagnostic]:
    names = [name for name, n in zip(audit.class_names, audit.count().tolist(), strict=True) if n == 0]
    if not names:
        return []
    return [
        Diagnostic(
            code="no-images",
            severity="warn",
            text=f"No images of {_listed(names)}: nothing is known about {_these(names)}.",
            advice="Audit on data that hold every class; the worst class is the worst among those present.",
        )
    ]


def _few_images(audit: Audit) -> list[Diagnostic]:
    counts = zip(audit.class_names, audit.count().tolist(), strict=True)
    names = [name for name, n in counts if 0 < n < FEW_IMAGES]
    if not names:
        return []
    return [
        Diagnostic(
            code="few-images",
            severity="note",
            text=f"Fewer than {FEW_IMAGES} images of {_listed(names)}: the intervals of {_these(names)} are wide.",
            advice="Read the intervals, not the rates, or audit on more images.",
        )
    ]


def _weak_attacks(audit: Audit) -> list[Diagnostic]:
    goals = {_goal(audit, name) for name in audit.attacks if name != CLEAN}
    if goals - {CROSS_ENTROPY}:
        return []
    attacks = [name for name in audit.attacks if name != CLEAN]
    return [
        Diagnostic(
            code="weak-attacks",
            severity="note",
            text=f"Only {_listed(attacks)} ran: an upper bound on robustness." if attacks else "No attack ran.",
            advice="Add a stronger attack, such as cw-50(restarts=5).",
        )
    ]


@dataclass(frozen=True)
class _Gains:
    """Class accuracies (..., C, 4) of (PGD before, PGD after, other before, other after): measured, and resampled.

    Attributes:
        measured: (C, 4), classes with images only.
        resampled: (draws, C, 4).
        share: (C,) share that each class has of the data set.
    """

    measured: np.ndarray
    resampled: np.ndarray
    share: np.ndarray

    @staticmethod
    def of(before: Audit, after: Audit, name: str, other: str) -> _Gains:
        flags = torch.stack([before.hits(name), after.hits(name), before.hits(other), after.hits(other)], 1).long()
        pattern = flags @ torch.tensor([8, 4, 2, 1])
        cell = before.labels * 16 + pattern
        table = torch.bincount(cell, minlength=16 * before.num_classes).view(-1, 16).numpy()
        table = table[table.sum(1) > 0]
        n = table.sum(1)
        bits = np.array(list(product((0, 1), repeat=4)))
        draws = np.random.default_rng(0).multinomial(n, table / n[:, None], size=(_DRAWS, len(n)))
        present = (before.count() > 0).numpy()
        return _Gains(table @ bits / n[:, None], draws @ bits / n[:, None], before.shares.numpy()[present])

    def judge(self, measure: str, name: str, other: str) -> list[Diagnostic]:
        """The diagnostic on one measure, if there is one."""
        was, now, other_was, other_now = self._reduce(self.measured, measure)
        gain, confirmed = now - was, other_now - other_was
        drawn = self._reduce(self.resampled, measure)
        excess = (drawn[..., 1] - drawn[..., 0]) - (drawn[..., 3] - drawn[..., 2])
        lower, upper = np.quantile(excess, [0.025, 0.975])
        if gain < FLATTERY_NOTED or gain - confirmed < FLATTERY_NOTED or lower <= 0:
            return []
        return [
            Diagnostic(
                code="unconfirmed-gain",
                severity="warn" if confirmed < CONFIRMED_SHARE * gain else "note",
                text=(
                    f"{measure.capitalize()}: {_change(name, was, now)}, {_change(other, other_was, other_now)}. "
                    f"{_points(gain - confirmed)} points (95 % interval {_points(lower)} to {_points(upper)}) of the "
                    f"{name} gain are not confirmed."
                ),
                advice=f"Quote the change under {other}.",
            )
        ]

    def _reduce(self, rates: np.ndarray, measure: str) -> np.ndarray:
        """(..., C, 4) -> (..., 4)."""
        return rates.min(-2) if measure == "worst class" else np.einsum("...cj,c->...j", rates, self.share)


def _goal(audit: Audit, name: str) -> str:
    settings: Mapping[str, object] = audit.settings.get(name, {})
    return str(settings.get("goal", ""))


def _climbs_cross_entropy(audit: Audit, name: str) -> bool:
    """PGD in the papers' sense: several steps on cross-entropy. One step (FGSM) is never taken for robustness."""
    return _goal(audit, name) == CROSS_ENTROPY and int(audit.settings[name].get("steps", 0)) > 1


def _change(name: str, was: float, now: float) -> str:
    verb = "gains" if now >= was else "loses"
    return f"{name} {verb} {_points(abs(now - was))} points ({_percent(was)} to {_percent(now)})"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def _listed(names: list[str], most: int = 5) -> str:
    """`a, b and c`, or the first few and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _these(names: list[str]) -> str:
    return "this class" if len(names) == 1 else "these classes"
