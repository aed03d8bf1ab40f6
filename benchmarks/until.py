"""What a sequential audit saves, and whether its intervals hold: simulated on classes of known accuracy.

An image of a class is right with the accuracy of the class, so no model is needed: rounds, intervals and the stop are
those of `robustfair.evaluate.sequential`. Beside it stands the audit of all images that there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Report, Row, Table
from robustfair.evaluate.gates import measured
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.evaluate.sequential import Rounds, parse_until
from robustfair.values import Threat

COLUMNS = {
    "accuracies of the classes": "{case}",
    "images of each": "{sizes}",
    "asked": "{asked}",
    "images taken": "{images:,.0f}",
    "share": "{share:.0%}",
    "rounds": "{rounds:.1f}",
    "narrow enough": "{narrow:.0%}",
    "half-width": "{half_width:.2f}",
    "holds the truth": "{held:.1%}",
    "too low, too high": "{below:.1%}, {above:.1%}",
    "all images: half-width": "{whole_half_width:.2f}",
    "all images: holds the truth": "{whole_held:.1%}",
}
FAAL = (0.589, 0.727, 0.413, 0.370, 0.407, 0.430, 0.524, 0.583, 0.671, 0.679)
"""CIFAR-10 under AutoAttack, of FAAL's official run wrn-awp-awp."""
PLAIN = (0.57, 0.66, 0.33, 0.20, 0.26, 0.40, 0.50, 0.55, 0.62, 0.60)
"""Spread as plain adversarial training spreads the classes of CIFAR-10."""
CIFAR, MANY = (1000,) * 10, (20_000,) * 10
CASES: tuple[tuple[str, tuple[float, ...], tuple[int, ...], str], ...] = (
    ("spread, worst 20 %", PLAIN, CIFAR, "worst.robust=+-4"),
    ("spread, worst 20 %", PLAIN, CIFAR, "worst.robust=+-3"),
    ("spread, worst 20 %", PLAIN, CIFAR, "worst.robust=+-2"),
    ("spread, worst 20 %", PLAIN, MANY, "worst.robust=+-2"),
    ("FAAL's, worst 37 %", FAAL, CIFAR, "worst.robust=+-4"),
    ("FAAL's, worst 37 %", FAAL, MANY, "worst.robust=+-2"),
    ("one of 30 %, others from 45", (0.3, *np.linspace(0.45, 0.8, 9)), CIFAR, "worst.robust=+-3"),
    ("one of 5 %, others from 7", (0.05, *np.linspace(0.07, 0.5, 9)), CIFAR, "worst.robust=+-2"),
    ("five of 37 %, five of 65", (0.37,) * 5 + (0.65,) * 5, CIFAR, "worst.robust=+-4"),
    ("all 10 %", (0.1,) * 10, CIFAR, "worst.robust=+-3"),
    ("all 50 %", (0.5,) * 10, CIFAR, "worst.robust=+-4"),
    ("100 from 10 to 80 %", tuple(np.linspace(0.1, 0.8, 100)), (100,) * 100, "worst-10pct.robust=+-4"),
    ("spread, worst 20 %", PLAIN, CIFAR, "range.robust=+-5"),
    ("spread, worst 20 %", PLAIN, CIFAR, "class.3.robust=+-3"),
    ("spread, worst 20 %", PLAIN, CIFAR, "average.robust=+-1.5"),
    ("spread, worst 20 %", PLAIN, (5000, 4000, 2000, 1000, 500, 400, 300, 200, 100, 60), "average.robust=+-1.5"),
)
"""Name, accuracy of each class, images of each class, what is asked."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One simulated audit: images of each class (C,), rounds, and the value with the ends of its interval."""

    images: Tensor
    rounds: int
    value: float
    lower: float
    upper: float

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.upper - self.lower) / 2

    def holds(self, truth: float) -> bool:
        """Whether the truth is inside."""
        return self.lower <= truth <= self.upper


def simulate(rates: Sequence[float], sizes: Sequence[int], asked: str, rng: np.random.Generator) -> tuple[Outcome, ...]:
    """A sequential audit of classes of known accuracy, and the audit of all images, those of the first among them."""
    rule = parse_until(asked)
    of = torch.tensor(sizes)
    rounds = Rounds(rule=rule, class_names=names(len(of)), sizes=of)
    number, n, wanted = 0, torch.zeros_like(of), rounds.first()
    correct, found = torch.zeros_like(of), None
    while found is None or not torch.equal(n, wanted):
        correct = correct + torch.from_numpy(rng.binomial((wanted - n).numpy(), rates))
        number, n = number + 1, wanted
        ends = measured(rule, rule.attack, audit_of(correct, n, sizes))
        found = Outcome(images=n, rounds=number, value=ends[0], lower=ends[1], upper=ends[2])
        if found.half_width > rule.half_width:
            wanted = rounds.after(number, correct, n, found.half_width)
    correct = correct + torch.from_numpy(rng.binomial((of - n).numpy(), rates))
    value, lower, upper = measured(rule, rule.attack, audit_of(correct, of, sizes))
    return found, Outcome(images=of, rounds=1, value=value, lower=lower, upper=upper)


def truth_of(rates: Sequence[float], sizes: Sequence[int], asked: str) -> float:
    """What the number would be on images without end."""
    rule = parse_until(asked)
    share = torch.tensor(sizes) / sum(sizes)
    acc = torch.tensor(rates, dtype=torch.float64)
    if rule.measure == "average":
        return float((share * acc).sum())
    if rule.measure == "class":
        return float(acc[int(rule.subject)])
    lowest = acc.sort().values
    tenth = max(1, len(acc) // 10)
    found = {"worst": lowest[0], "worst-10pct": lowest[:tenth].mean(), "range": lowest[-1] - lowest[0]}
    return float(found[rule.measure])


def audit_of(correct: Tensor, n: Tensor, sizes: Sequence[int]) -> Audit:
    """An audit that found so many (C,) of so many images of each class right under an attack."""
    classes = len(n)
    labels = torch.arange(classes).repeat_interleave(n)
    rank = torch.arange(len(labels)) - (n.cumsum(0) - n).repeat_interleave(n)
    hit = rank < correct.repeat_interleave(n)
    return Audit(
        model="simulated",
        data="simulated",
        class_names=names(classes),
        index=torch.arange(len(labels)),
        labels=labels,
        predictions={CLEAN: labels, "attack": torch.where(hit, labels, (labels + 1) % classes)},
        settings={},
        threat=Threat(),
        drawn_from=tuple(sizes),
    )


def names(classes: int) -> tuple[str, ...]:
    """Numbers as names."""
    return tuple(map(str, range(classes)))


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark from the command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.until", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--audits", type=int, default=1000, help="simulated of each case")
    options.add_argument("--json", type=Path, metavar="PATH", help="write the report here too")
    options.add_argument("--force", action="store_true", help="let --json replace a file")
    options.set_defaults(device="cpu", threads=1)
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """One table, a row a case."""
    rows = [row(number, args.audits) for number in range(len(CASES))]
    error = 100 * (0.95 * 0.05 / args.audits) ** 0.5
    return Report(
        name="until",
        settings={"audits": args.audits},
        tables=[Table(f"Means of {args.audits:,} simulated audits", COLUMNS, rows)],
        notes=[
            f"Half-widths in points. Nominal coverage is 95 %; the standard error of a coverage here is {error:.1f} "
            "points.",
        ],
    )


def row(number: int, audits: int) -> Row:
    """The means of one case."""
    case, rates, sizes, asked = CASES[number]
    measure.say(f"{case}, {asked}")
    rng, truth, rule = np.random.default_rng(number), truth_of(rates, sizes, asked), parse_until(asked)
    pairs = [simulate(rates, sizes, asked, rng) for _ in range(audits)]
    stopped, whole = zip(*pairs, strict=True)
    taken = float(np.mean([int(each.images.sum()) for each in stopped]))
    return {
        "case": case,
        "sizes": f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}",
        "asked": asked,
        "images": taken,
        "share": taken / sum(sizes),
        "rounds": float(np.mean([each.rounds for each in stopped])),
        "narrow": float(np.mean([each.half_width <= rule.half_width for each in stopped])),
        "half_width": 100 * float(np.mean([each.half_width for each in stopped])),
        "held": float(np.mean([each.holds(truth) for each in stopped])),
        "below": float(np.mean([each.upper < truth for each in stopped])),
        "above": float(np.mean([each.lower > truth for each in stopped])),
        "whole_half_width": 100 * float(np.mean([each.half_width for each in whole])),
        "whole_held": float(np.mean([each.holds(truth) for each in whole])),
    }


if __name__ == "__main__":
    main()
