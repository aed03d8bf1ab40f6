"""An audit that stops as soon as one of its numbers is known well enough: a sequential audit.

    worst.robust=+-2            the accuracy of the worst class under all attacks, to within 2 percentage points
    average.robust=+-1.5        +-1.5%, +/-1.5 and ±1.5 mean the same
    class.cat.pgd-20=+-3        one class; any name of a gate but those of groups

Rule. Images are attacked in rounds, at first `FIRST` of every class, drawn at random. The interval after a round is the
95 % interval that every report of these images shows: Wilson's, stratified for the average, and for the worst class the
bootstrap that covers the minimum whichever class has it. The audit stops where its length is at most twice the
half-width asked for. Else the next round takes n (half-width / asked)^2 images of a class in all, at least `LEAST` and
at most `MOST` times the n it has, of the classes that still count: for the worst class those that can still be it. A
class is left alone once its Wilson interval lies above that of another, at the level 1 - 0.05 / (C k (k + 1)) in round
k: at those levels all intervals of all classes and rounds hold together with 95 %. The average takes images of every
class in its share of the data, the mean over classes as many of each.

Coverage. An interval that is looked at again and again until it is short can cover less than its 95 %, since chance may
have made it short. But the length for a rate hardly depends on which rate was found, and rounds are few: in 1,000
simulated audits of each of 16 cases 93.8 to 99.9 % of the intervals at the stop hold the truth, and 94.0 to 99.8 % of
those of all images. `python -m benchmarks.until` measures both, and what the rule saves; docs/measurements.md has its
table. It fails where the worst class is nearly always right: with 97 % beside 99.9 %, asked to within 4 points, most
audits end after the first round, and 88 % of 300 held the truth, 93 % of those of all images.

Meaning. The interval is, as in any audit, of the accuracy on images like these. That an image is left out makes it no
longer, and that a class is used up no shorter: a set whose 1,000 images of a class give +-2.9 points at best never
gives +-2.

Source: stopping at a fixed width, Chow and Robbins (1965), "On the asymptotic theory of fixed-width sequential
confidence intervals for the mean", and for proportions Frey (2010), "Fixed-width sequential confidence intervals for a
proportion". Leaving alone what can no longer be the lowest, with a union bound over classes and rounds, Even-Dar,
Mannor and Mansour (2006), "Action elimination and stopping conditions for the multi-armed bandit and reinforcement
learning problems".
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from robustfair import metrics
from robustfair.config import require
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, RobustFairWarning
from robustfair.evaluate.gates import ONE, Quantity, measured, read_quantity, require_known
from robustfair.evaluate.journal import Journal
from robustfair.evaluate.result import Audit, shortfall
from robustfair.evaluate.run import audit, read_settings
from robustfair.evaluate.runner import Progress
from robustfair.grammar import read_path
from robustfair.metrics.rates import worst_count
from robustfair.values import derive_seed

FIRST = 50
"""Images of every class in the first round: enough for Wilson's interval and for the bootstrap."""
LEAST, MOST = 1.25, 2.0
"""How many times the images of a class a round may leave, at least and at most."""
ALPHA = 0.05
"""How often, over all rounds and classes, a class may be left out wrongly."""
NARROW = "narrow enough"
USED_UP = "no images left of the classes that count"
NO_TIME = "out of time"
EXAMPLE = "worst.robust=+-2"

_ROUNDING = 1e-9
_RULE = re.compile(r"(?P<name>.+?)\s*=\s*(?:\+-|\+/-|±)\s*(?P<points>[^\s%]+)\s*%?")


@dataclass(frozen=True, kw_only=True)
class Until(Quantity):
    """A number of an audit, and how well it is to be known; `parse_until` builds it from its text.

    Attributes:
        half_width: of its 95 % interval, as a fraction.
    """

    half_width: float
    kind: ClassVar[str] = "stopping rule"


def parse_until(text: str) -> Until:
    """Read a stopping rule, see the head of this module.

    >>> parse_until("Worst.robust = ±2%").text, parse_until("class.cat.pgd-20=+/-0.5").half_width
    ('worst.robust=+-2', 0.005)

    Raises:
        ConfigError: the text does not follow the grammar, or names a group or no percentage points.
        UnknownNameError: another measure.
    """
    kind = Until.kind
    found = _RULE.fullmatch(text.strip())
    if not found:
        raise ConfigError(kind, "text", allowed=f"name=+-points, like {EXAMPLE}", got=text)
    of = read_quantity(found["name"], text.strip(), kind=kind, like=EXAMPLE)
    require(not of.of_groups, kind, "measure", allowed="over classes, not groups", got=of.measure)
    try:
        points = float(found["points"])
    except ValueError:
        points = float("nan")
    hint = f"Did you mean +-{100 * points:g}?" if 0.001 <= points < 0.1 else ""
    allowed = "percentage points from 0.1 to 50"
    if not 0.1 <= points <= 50:
        raise ConfigError(kind, "half-width", allowed=allowed, got=found["points"], hint=hint)
    return Until(**vars(of) | {"text": f"{of.name}=+-{points:g}"}, half_width=points / 100)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many images of each class every round of a sequential audit takes. Pure: from counts to counts.

    Attributes:
        rule: when to stop.
        class_names: (C,).
        sizes: (C,) int64 images of each class that there are.
    """

    rule: Until
    class_names: Sequence[str]
    sizes: Tensor

    def first(self) -> Tensor:
        """(C,) images of each class after the first round."""
        return self._at(FIRST)

    def after(self, number: int, correct: Tensor, n: Tensor, half_width: float) -> Tensor:
        """(C,) images of each class after the next round; `n` where there is none.

        Args:
            number: of the round that has ended, from 1.
            correct: (C,) images right after it.
            n: (C,) images after it.
            half_width: of the interval of the number after it.
        """
        largest = int(n.argmax())
        level = float(n[largest] / self._unit()[largest])
        factor = min(MOST, max(LEAST, (half_width / self.rule.half_width) ** 2))
        return torch.where(self.counting(number, correct, n), torch.maximum(n, self._at(level * factor)), n)

    def counting(self, number: int, correct: Tensor, n: Tensor) -> Tensor:
        """(C,) bool, the classes whose further images can change the number, arguments as for `after`."""
        measure = self.rule.measure
        present = n > 0
        if measure in ONE:
            return torch.tensor([name == self.rule.subject for name in self.class_names])
        if measure in ("average", "class-mean"):
            return present
        classes = int(present.sum())
        lower, upper = metrics.wilson(correct, n, 1 - ALPHA / (classes * number * (number + 1)))
        share = re.fullmatch(r"worst-(.+)pct", measure)
        lowest = worst_count(float(share[1]) / 100, classes) if share else 1
        low = lower <= upper[present].kthvalue(lowest).values
        high = upper >= lower[present].max()
        return {"best": high, "range": low | high}.get(measure, low)

    def _at(self, level: float) -> Tensor:
        wanted = (level * self._unit() - _ROUNDING).ceil().nan_to_num(nan=0.0).long()
        return torch.minimum(wanted, self.sizes)

    def _unit(self) -> Tensor:
        """(C,) images of each class where the mean class has one; nan for a class without."""
        present = self.sizes > 0
        if self.rule.measure == "average":
            return (self.sizes.double() * int(present.sum()) / int(self.sizes.sum())).where(present, torch.nan)
        return torch.ones(len(self.sizes), dtype=torch.float64).where(present, torch.nan)


class _Part(NamedTuple):
    """An audit of one round, and the rows (M,) of its images in the data set."""

    audit: Audit
    rows: Tensor


def audit_until(
    model: nn.Module,
    dataset: ImageDataset,
    until: str,
    *,
    device: str | torch.device = "cpu",
    max_minutes: float | None = None,
    journal: Path | str | None = None,
    keep_journal: bool = False,
    checks: bool = True,
    label: str = "",
    split: str = "test",
    on_progress: Progress | None = None,
    on_round: Callable[[str], None] | None = None,
    **settings: Any,
) -> Audit:
    """Attack images of `dataset` until a number of the audit is known well enough, see the head of this module.

    Every round is an audit of its own images, see `audit`, with draws of its own that depend on the seed and its
    number. So the same call attacks the same images and finds the same, on the same machine.

    Args:
        until: the number and the half-width of its interval in percentage points, "worst.robust=+-2".
        max_minutes: stop then, counted from the call, with the rounds that ran to their end; where that is none, with
            what ran of the first.
        journal: every round keeps what it knows beside this file; where such files exist the audit goes on from them.
            They stay where time ended it.
        on_progress: as for `audit`; the attack is named with its round.
        on_round: called with a line after every round.
        model, dataset, device, keep_journal, checks, label, split, settings: as for `audit`.

    Returns:
        The audit of the images that were attacked, in data set order. `provenance["until"]` says what was asked, why
        it stopped, how many images (C,) there were after each round, and the fingerprint and size of `dataset`;
        its half-width is None where not even the first round ran to its end.

    Raises:
        ConfigError, UnknownNameError: a rule that cannot be read, or of an attack or a class that is not there.
        And as `audit`.
    """
    began = time.monotonic()
    rule, plan = parse_until(until), read_settings(dataset, settings)
    require_known([rule], attacks=plan.attacks, classes=dataset.class_names)
    orders = dataset.class_orders(plan.seed)
    rounds = Rounds(rule=rule, class_names=dataset.class_names, sizes=torch.tensor([len(order) for order in orders]))
    parts: list[_Part] = []
    left = max_minutes
    taken, wanted, history = torch.zeros_like(rounds.sizes), rounds.first(), []
    value = half_width = float("nan")
    while True:
        number = len(parts) + 1
        slices = zip(orders, taken.tolist(), wanted.tolist(), strict=True)
        rows = torch.cat([order[begin:end] for order, begin, end in slices]).sort().values
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"audit: \S+ minutes are over", RobustFairWarning)
            found = audit(
                model,
                dataset.drawn_rows(rows, f"until {rule.text}"),
                device=device,
                max_minutes=left,
                journal=None if journal is None else round_journal(read_path(journal), number),
                keep_journal=True,
                checks=checks and number == 1,
                label=label,
                split=split,
                on_progress=None if on_progress is None else _named(on_progress, number),
                **{**settings, "seed": derive_seed("until", plan.seed, number)},
            )
        if not found.complete and parts:
            stopped = NO_TIME
            break
        parts.append(_Part(found, rows))
        taken = wanted
        whole = _merged(dataset, parts, rule)
        history.append(taken.tolist())
        if not found.complete:
            stopped = NO_TIME
            break
        value, lower, upper = measured(rule, rule.attack, whole)
        half_width = (upper - lower) / 2
        if on_round is not None:
            on_round(f"round {number}: {_known(whole, rule, value, half_width)}")
        if half_width <= rule.half_width:
            stopped = NARROW
            break
        wanted = rounds.after(number, whole.correct(rule.attack), taken, half_width)
        if torch.equal(wanted, taken):
            stopped = USED_UP
            break
        if max_minutes is not None:
            left = max_minutes - (time.monotonic() - began) / 60
            if left <= 0:
                stopped = NO_TIME
                break
    about = {
        "asked": rule.text,
        "stopped": stopped,
        "half_width": None if math.isnan(half_width) else half_width,
        "images": history,
        "of": [dataset.fingerprint, len(dataset)],
    }
    result = replace(whole, provenance={**whole.provenance, "seed": plan.seed, "until": about})
    if stopped == NO_TIME:
        _warn_of_time(result, max_minutes, _known(result, rule, value, half_width), goes_on=journal is not None)
    elif journal is not None and not keep_journal:
        remove_round_journals(read_path(journal))
    return result


def until_line(result: Audit) -> str:
    """Of a sequential audit why it stopped and how many images it took, in one line; "" of another."""
    about = result.provenance.get("until")
    if about is None:
        return ""
    counts = result.count().tolist()
    each = ", ".join(f"{name}: {n:,}" for name, n in zip(result.class_names, counts, strict=True))
    if len(counts) > 10:
        each = f"{min(counts):,} to {max(counts):,} of a class"
    number = len(about["images"])
    took = f"{len(result.labels):,} of {about['of'][1]:,} images ({each})"
    rounds = f"{number} round{'s' if number > 1 else ''}"
    within = "" if about["half_width"] is None else f" at +-{100 * about['half_width']:.2g} points"
    return f"until {about['asked']}: {about['stopped']}{within}, after {rounds} and {took}"


def round_journal(journal: Path, number: int) -> Path:
    """The journal of one round of the audit that keeps its own at `journal`."""
    return journal.with_name(f"{journal.stem}-round-{number}{journal.suffix}")


def remove_round_journals(journal: Path) -> None:
    """The audit is finished: the journals of its rounds go."""
    number = 1
    while (path := round_journal(journal, number)).exists():
        Journal(path, {}).remove()
        number += 1


def _named(on_progress: Progress, number: int) -> Progress:
    return lambda attack, done, total: on_progress(f"{attack}, round {number}", done, total)


def _known(whole: Audit, rule: Until, value: float, half_width: float) -> str:
    if math.isnan(value):
        return f"{len(whole.labels):,} images"
    return f"{len(whole.labels):,} images, {rule.name} {100 * value:.1f} % +-{100 * half_width:.2g} points"


def _warn_of_time(result: Audit, minutes: float | None, known: str, *, goes_on: bool) -> None:
    again = " The same command goes on from what is finished." if goes_on else ""
    cut = "" if result.complete else f"; {shortfall(result.unfinished())}. Robust accuracies are upper bounds"
    text = f"audit: {minutes:g} minutes are over before {result.provenance['until']['asked']}: {known}"
    warnings.warn(f"{text}{cut}.{again}", RobustFairWarning, stacklevel=3)


def _merged(dataset: ImageDataset, parts: Sequence[_Part], rule: Until) -> Audit:
    """The audit of the images of all rounds, in data set order."""
    first = parts[0].audit
    if len(parts) == 1:
        return first
    audits = [part.audit for part in parts]
    rows, order = torch.cat([part.rows for part in parts]).sort()
    data = dataset.drawn_rows(rows, f"until {rule.text}")
    assert data.drawn is not None

    def joined(columns: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(columns))[order]

    points: dict[str, dict[int, Tensor]] = {name: {} for name in first.points}
    for each in parts:
        places = torch.searchsorted(rows, each.rows).tolist()
        for name, kept in each.audit.points.items():
            points[name] |= {places[at]: point for at, point in kept.items()}
    return replace(
        first,
        index=data.drawn.places,
        drawn_from=data.drawn.class_counts,
        labels=data.labels.cpu(),
        predictions={name: joined([one.predictions[name] for one in audits]) for name in first.predictions},
        broken_by={name: joined([one.broken_by[name] for one in audits]) for name in first.broken_by},
        points=points,
        settings={name: _settings([one.settings[name] for one in audits]) for name in first.settings},
        fingerprint=data.fingerprint,
        provenance={
            **first.provenance,
            "seconds": _sums([one.provenance["seconds"] for one in audits]),
            "input_gradients": _sums([one.provenance["input_gradients"] or {} for one in audits]) or None,
            "date": audits[-1].provenance["date"],
            "sample": data.drawn.words,
        },
    )


def _settings(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of an attack in all rounds; of what it did there, how often its logits were no finite numbers."""
    count = sum(each.get("not_finite", 0) for each in found)
    return {**found[0], "not_finite": count} if any("not_finite" in each for each in found) else dict(found[0])


def _sums(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for each in found for key in each)
    return {key: round(sum(each.get(key, 0) for each in found), 3) for key in keys}
