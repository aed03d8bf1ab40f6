"""Is one model better than another? Two audits of the same images, compared image by image from what they stored.

Per class and for the average: the change with its paired interval, and the exact McNemar test, per class with Holm's
correction over the classes of one attack. For the worst class and the range, whose classes may differ between the two
models: a paired bootstrap. All of it is described in `robustfair.metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.config import require
from robustfair.errors import DataError
from robustfair.evaluate.grouping import Difficulty, Groups
from robustfair.evaluate.groups import GroupRates, Rates, regroup
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, find_attack, shortfall
from robustfair.files import as_json
from robustfair.grammar import format_eps, format_value
from robustfair.values import Threat

SCHEMA = "robustfair.compare/1"
AVERAGE = "average"

_OUTER_COMMA = re.compile(r",(?![^()]*\))")
_HOW_IT_RAN = ("ran", "not_finite")
"""What settings say of the run of an attack, and may differ between two of them."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A number of two models on the same images, as fractions, and the paired interval of its change, after - before.

    All nan for a class without images.
    """

    before: float
    after: float
    lower: float
    upper: float

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.lower > 0 or self.upper < 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"before": self.before, "after": self.after, "change": self.change, "interval": [self.lower, self.upper]}


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The accuracy of two models on the same images, and whether its change is more than chance.

    Attributes:
        name: the class, or "average".
        n: images.
        difference: accuracy before and after, and its change.
        lost: images that are right before only.
        won: images that are right after only.
        p: of the exact McNemar test, two-sided; nan without images.
        p_adjusted: Holm's correction of it over the classes with images; p itself for the average.
        significant: whether `p_adjusted` is at most 1 - level.
    """

    name: str
    n: int
    difference: Difference
    lost: int
    won: int
    p: float
    p_adjusted: float
    significant: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        about = {key: getattr(self, key) for key in ("name", "n", "lost", "won", "p", "p_adjusted", "significant")}
        return about | self.difference.to_dict()


@dataclass(frozen=True, kw_only=True)
class AttackComparison:
    """Two models under one attack.

    Attributes:
        attack: its name, or "robust": right under every attack that both audits hold.
        classes: (C,) in the order of the data set.
        average: over all images.
        worst: accuracy of the worst class of each model, and its change.
        worst_before, worst_after: these classes.
        range: largest less smallest class accuracy.
    """

    attack: str
    classes: tuple[PairedTest, ...]
    average: PairedTest
    worst: Difference
    worst_before: WorstClass
    worst_after: WorstClass
    range: Difference

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        names = [tested.name for tested in self.classes]
        worst = {"before": self.worst_before, "after": self.worst_after}
        return {
            "classes": [tested.to_dict() for tested in self.classes],
            "average": self.average.to_dict(),
            "worst": self.worst.to_dict()
            | {f"class_{when}": found.words for when, found in worst.items()}
            | {f"classes_{when}": [names[c] for c in found.indices] for when, found in worst.items()},
            "range": self.range.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changes from one model to another, under every attack of both audits.

    Attributes:
        before, after: what reports call the models.
        data: name of the data set.
        images: N.
        class_names: (C,).
        threat: that of both audits.
        level: coverage of the intervals; a test is significant from 1 - level down.
        attacks: one entry an attack, "clean" first and "robust" last.
        notes: what limits the comparison, one sentence each.
        groups: where the groups come from that stand in place of the classes; "" for classes.
    """

    before: str
    after: str
    data: str
    images: int
    class_names: tuple[str, ...]
    threat: Threat
    level: float
    attacks: tuple[AttackComparison, ...]
    notes: tuple[str, ...] = ()
    groups: str = ""

    def under(self, attack: str) -> AttackComparison:
        """The entry of one attack.

        Raises:
            UnknownNameError: the comparison holds no such attack.
        """
        entries = {entry.attack: entry for entry in self.attacks}
        return entries[find_attack(attack, entries, "attack of this comparison")]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values: nan is null."""
        return as_json(
            {
                "schema": SCHEMA,
                "before": self.before,
                "after": self.after,
                "data": {"name": self.data, "images": self.images},
                "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
                "level": self.level,
                **({"groups": self.groups} if self.groups else {}),
                "attacks": {entry.attack: entry.to_dict() for entry in self.attacks},
                "notes": self.notes,
            }
        )


def compare(
    before: Audit,
    after: Audit,
    *,
    attacks: str | Sequence[str] | None = None,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Comparison:
    """Compare two models on the images that both were audited on.

    Args:
        before, after: audits of the same images, classes, norm and radius.
        attacks: names that both audits hold, or "robust", also as one text with commas; None takes all of them, and
            robust beside at least one attack. Robust is over the attacks that both hold, so that neither model answers
            for more.
        level: coverage of the intervals.
        groups: compare these in place of the classes, see `read_groups`.

    Raises:
        DataError: the audits are not of the same images, classes or threat, or an attack ran with other settings;
            groups as for `regroup`.
        UnknownNameError: an attack that one of the audits lacks.
        ConfigError: no attack, level outside (0, 1), or something else than audits.
    """
    for which, given in (("before", before), ("after", after)):
        got = str(given) if isinstance(given, str | Path) else type(given).__name__
        hint = "Read it with robustfair.load_audit(path)"
        require(isinstance(given, Audit), "compare", which, allowed="an Audit", got=got, hint=hint)
    check_comparable(before, after)
    shared = [name for name in before.attacks if name in after.attacks]
    known = (*shared, ROBUST)
    usual = (CLEAN,) if shared == [CLEAN] else known
    asked = _OUTER_COMMA.split(attacks) if isinstance(attacks, str) else attacks
    chosen = [find_attack(name, known, "attack of both audits") for name in (usual if asked is None else asked)]
    require(bool(chosen), "compare", "attacks", allowed=f"at least one of {', '.join(known)}", got=chosen)
    used = shared if ROBUST in chosen else [name for name in shared if name in chosen]
    for name in used:
        _check_settings(before, after, name)
    notes = [note for name in used for audit in (before, after) for note in _cut_short(audit, name)]
    if ROBUST in chosen and not before.attacks == after.attacks == tuple(shared):
        notes.append(f"{ROBUST} is over the attacks that both audits hold: {', '.join(shared)}")
    if "sample" in after.provenance:
        notes.append(f"of a sample: {after.provenance['sample']}")
    if after.reweighted:
        notes.append("the average weighs every class by its share of all images; its test does not")
    first: Rates = _of(before, shared)
    second: Rates = _of(after, shared)
    if groups is not None:
        first, second = (regroup(_of(audit, shared), groups) for audit in (before, after))
        notes += _about_groups(second)
    return Comparison(
        before=before.model,
        after=after.model,
        data=after.data,
        images=len(after.labels),
        class_names=second.class_names,
        threat=after.threat,
        level=level,
        groups="" if groups is None else groups.source,
        attacks=tuple(compare_under(first, second, name, level) for name in chosen),
        notes=tuple(notes),
    )


def _about_groups(rates: GroupRates) -> list[str]:
    notes = [rates.about.rstrip(".")] if rates.about else []
    if rates.source == Difficulty.name:
        notes.append("thirds of one of the two models hold its luck too: those of another seed do not")
    return notes


def compare_many(
    audits: Sequence[Audit],
    *,
    attacks: str | Sequence[str] | None = None,
    level: float = 0.95,
    groups: Groups | None = None,
) -> tuple[Comparison, ...]:
    """Every later audit against the first; arguments and errors as for `compare`."""
    require(len(audits) >= 2, "compare", "audits", allowed="at least two", got=len(audits))
    return tuple(compare(audits[0], later, attacks=attacks, level=level, groups=groups) for later in audits[1:])


def check_comparable(before: Audit, after: Audit) -> None:
    """Refuse two audits that are not of the same images, classes and threat.

    Raises:
        DataError: class names, images, labels, norm or radius differ.
    """
    models = f"the audits of {before.model} and {after.model}"
    if before.class_names != after.class_names:
        raise DataError(
            f"{models} are over different classes, {_few(before.class_names)} and {_few(after.class_names)}: "
            "audit both models on one data set"
        )
    same = before.drawn_from == after.drawn_from and torch.equal(before.index, after.index)
    if not (same and torch.equal(before.labels, after.labels)):
        raise DataError(
            f"{models} are not of the same images ({len(before.labels)} and {len(after.labels)}): "
            "audit both models on one data set"
        )
    if before.fingerprint != after.fingerprint:
        raise DataError(
            f"{models} are not of the same images ({before.data} and {after.data}, with other pixels): "
            "audit both models on one data set"
        )
    threats = [f"{audit.threat.norm} eps {format_eps(audit.threat.eps)}" for audit in (before, after)]
    if threats[0] != threats[1]:
        raise DataError(f"{models} are under different threats, {' and '.join(threats)}: audit both under one")


def compare_under(before: Rates, after: Rates, attack: str, level: float = 0.95) -> AttackComparison:
    """Compare two models under one attack, "robust" over the attacks that each audit holds: what every report shows.

    The audits must be comparable, see `check_comparable`.
    """
    table = metrics.paired_table(before.hits(attack), after.hits(attack), after.labels, after.num_classes)
    worst, spread = _bootstrapped(table, level)
    return AttackComparison(
        attack=attack,
        classes=_tested(table, after.class_names, level),
        average=_average(table, before, after, attack, level),
        worst=worst,
        worst_before=before.worst(attack),
        worst_after=after.worst(attack),
        range=spread,
    )


def _average(table: Tensor, before: Rates, after: Rates, attack: str, level: float) -> PairedTest:
    """Over all images. Of a sample whose classes have other shares than the data, each class has its share there."""
    pooled = _tested(table.sum(0, keepdim=True), (AVERAGE,), level)[0]
    if isinstance(after, GroupRates) or not after.reweighted:
        return pooled
    n, lost, won = table.sum((1, 2)), table[:, 1, 0], table[:, 0, 1]
    lower, upper = metrics.stratified_paired_interval(lost, won, n, after.shares, level)
    change = Difference(before=before.average(attack), after=after.average(attack), lower=lower, upper=upper)
    return replace(pooled, difference=change)


def _tested(table: Tensor, names: Sequence[str], level: float) -> tuple[PairedTest, ...]:
    """Of counts (C, 2, 2), see `metrics.paired_table`; corrected for as many tests as have images."""
    n, lost, won = table.sum((1, 2)), table[:, 1, 0], table[:, 0, 1]
    before, after = _rates(table)
    lower, upper = metrics.paired_interval(lost, won, n, level)
    p = metrics.mcnemar(lost, won).masked_fill(n == 0, float("nan"))
    adjusted = metrics.holm(p)
    columns = (n, lost, won, before, after, lower, upper, p, adjusted)
    return tuple(
        PairedTest(
            name=name,
            n=images,
            difference=Difference(before=old, after=new, lower=low, upper=high),
            lost=losses,
            won=wins,
            p=plain,
            p_adjusted=corrected,
            significant=corrected <= 1 - level,
        )
        for name, images, losses, wins, old, new, low, high, plain, corrected in zip(
            names, *(column.tolist() for column in columns), strict=True
        )
    )


def _bootstrapped(table: Tensor, level: float) -> list[Difference]:
    """Of the worst class and of the range."""
    before, after = _rates(table)
    intervals = metrics.bootstrap_differences(table, ("worst", "range"), level=level)
    return [
        Difference(before=measure(before), after=measure(after), lower=interval.lower, upper=interval.upper)
        for measure, interval in zip((metrics.worst, metrics.accuracy_range), intervals, strict=True)
    ]


def _rates(table: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracies (C,) before and after."""
    n = table.sum((1, 2)).double()
    return table[:, 1].sum(1) / n, table[:, :, 1].sum(1) / n


def _of(audit: Audit, attacks: Sequence[str]) -> Audit:
    return replace(audit, predictions={name: audit.predictions[name] for name in attacks})


def _check_settings(before: Audit, after: Audit, attack: str) -> None:
    old, new = before.settings.get(attack, {}), after.settings.get(attack, {})
    for key in sorted(old.keys() & new.keys() - set(_HOW_IT_RAN)):
        if old[key] != new[key]:
            raise DataError(
                f"{attack} ran with {key} {format_value(old[key])} on {before.model} and {format_value(new[key])} "
                f"on {after.model}: audit both with the same settings"
            )


def _cut_short(audit: Audit, attack: str) -> list[str]:
    parts = audit.unfinished(attack)
    return [f"{audit.model}: {shortfall(parts)}; its accuracy there is an upper bound"] if parts else []


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"({', '.join(names[:3])}{more})"
