"""Console tables of an audit, class by class, and the words that every report uses for a number.

Rates are fractions everywhere else; here they become percent with one decimal, differences become percentage points.
`*` is the worst class of its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustfair import metrics
from robustfair.config import require
from robustfair.evaluate.compare import Comparison, Difference, check_comparable, compare_under
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import ROBUST, Audit
from robustfair.grammar import format_eps
from robustfair.report.layout import SURE, WORST, Cell, Column, Sheet, printable

Rates = Audit | GroupRates
Measured = Rates | Comparison

NO_IMAGES = "no images"
CHANGES = "Intervals of changes: 95 %, paired over the images; of worst and range by bootstrap."
TESTED = (
    "† more than chance: by an exact McNemar test, of classes after Holm's correction, or an interval without zero."
)
"""What marks a change, in every report: the verdict of `robustfair.evaluate.compare`."""


# Numbers as words


def percent(value: float) -> str:
    """A fraction as percent with one decimal, without the sign.

    >>> percent(0.5234), percent(float("nan"))
    ('52.3', 'n/a')
    """
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def points(change: float) -> str:
    """A difference of two fractions in percentage points, always with its sign; rounding leaves no negative zero.

    >>> points(0.182), points(-0.031), points(-0.0001)
    ('+18.2', '-3.1', '0.0')
    """
    if math.isnan(change):
        return "n/a"
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text


def span(lower: float, upper: float) -> str:
    """An interval in percent.

    >>> span(0.481, 0.5637)
    '[48.1, 56.4]'
    """
    return f"[{percent(lower)}, {percent(upper)}]"


def threat_words(audit: Measured) -> str:
    """The adversary in words: norm and radius."""
    return f"{audit.threat.norm} eps {format_eps(audit.threat.eps)}"


def heading(title: str, audit: Measured) -> str:
    """What a table is about: models, data, threat and unit."""
    return f"{title} on {audit.data}, {threat_words(audit)}, percent right"


# What the tables show


def shown_attacks(audit: Rates) -> tuple[str, ...]:
    """The columns of a report: the attacks, and "robust" (no attack of them succeeds) where there are several."""
    return (*audit.attacks, ROBUST) if len(audit.attacks) > 2 else audit.attacks


@dataclass(frozen=True, kw_only=True)
class ClassRate:
    """Accuracy of one class under one attack, as fractions; all nan where the class has no images.

    `worst` says whether it is among the worst classes of its column, see `WorstClass.indices`.
    """

    correct: int
    n: int
    rate: float
    lower: float
    upper: float
    worst: bool


def class_rates(audit: Rates, attack: str) -> list[ClassRate]:
    """One entry a class or group (C,), in the order of the data set, with its 95 % Wilson interval."""
    worst = audit.worst(attack).indices
    rate, correct, n = audit.rate(attack).tolist(), audit.correct(attack).tolist(), audit.count().tolist()
    lower, upper = (end.tolist() for end in audit.interval(attack))
    return [
        ClassRate(correct=correct[c], n=n[c], rate=rate[c], lower=lower[c], upper=upper[c], worst=c in worst)
        for c in range(len(audit.class_names))
    ]


def both_attacks(before: Audit, after: Audit) -> list[str]:
    """The columns that two audits share: "robust" only where both hold the same attacks, so that it is one thing."""
    alike = set(before.attacks) == set(after.attacks)
    return [name for name in shown_attacks(after) if name in before.attacks or (name == ROBUST and alike)]


def points_span(difference: Difference) -> str:
    """The interval of a change in points."""
    return f"[{points(difference.lower)}, {points(difference.upper)}]"


# Tables


def class_table(audit: Audit) -> Sheet:
    """Accuracy class by class under each attack with Wilson intervals, then average, worst class, std and range."""
    attacks, norms = shown_attacks(audit), audit.head_norms

    def cell(value: float, interval: tuple[float, float], *, worst: bool = False) -> Cell:
        return Cell(text=percent(value), interval=span(*interval), mark=WORST if worst else "")

    columns = [class_rates(audit, attack) for attack in attacks]
    rows = []
    for c, name in enumerate(audit.class_names):
        row = [column[c] for column in columns]
        norm = [] if norms is None else [Cell(text=f"{norms[c]:.3f}")]
        rates = [cell(e.rate, (e.lower, e.upper), worst=e.worst) if e.n else Cell() for e in row]
        rows.append((_name(name), Cell(text=str(row[0].n or NO_IMAGES)), *norm, *rates))
    blank = [Cell()] * (1 if norms is None else 2)
    worst = {attack: audit.worst(attack) for attack in attacks}
    totals = (
        (_name("average"), *blank, *(cell(audit.average(a), audit.average_interval(a)) for a in attacks)),
        (_name("worst"), *blank, *(cell(worst[a].value, audit.worst_interval(a)) for a in attacks)),
        (_name("worst is"), *blank, *(worst_name(worst[a]) for a in attacks)),
        (_name("std"), *blank, *(Cell(text=percent(metrics.std(audit.rate(a)))) for a in attacks)),
        (_name("range"), *blank, *(Cell(text=percent(metrics.accuracy_range(audit.rate(a)))) for a in attacks)),
    )
    heads = ("class", "images", *([] if norms is None else ["head norm"]), *attacks)
    return Sheet(
        title=heading(audit.model, audit),
        columns=tuple(Column(head=head) for head in heads),
        rows=tuple(rows),
        totals=totals,
        notes=("* worst class of its column. Intervals: 95 %, Wilson; for worst, bootstrap.",),
        ranks=tuple(entry.rate for entry in columns[-1]),
        ranked_by=f"accuracy under {attacks[-1]}",
    )


def before_after_table(before: Audit, after: Audit, attacks: Sequence[str] | None = None) -> Sheet:
    """Accuracy class by class before and after a repair, and the change in points, under each attack.

    A change stands with its 95 % interval, paired over the images, that of worst and range by bootstrap. It is marked
    where `compare` finds it to be more than chance: of classes after Holm's correction.

    Args:
        attacks: None takes those that both audits have.

    Raises:
        DataError: the audits are not of the same images, classes and threat.
        ConfigError: an attack that one of them lacks, or none at all.
    """
    check_comparable(before, after)
    shared = both_attacks(before, after)
    chosen = shared if attacks is None else list(attacks)
    allowed = f"in both audits ({', '.join(shared)})"
    for attack in chosen:
        require(attack in shared, "report", "attack", allowed=allowed, got=attack)
    require(bool(chosen), "report", "attacks", allowed=f"at least one {allowed}", got=chosen)

    compared = [compare_under(before, after, attack) for attack in chosen]

    def change(value: Difference, *, sure: bool) -> Cell:
        if math.isnan(value.change):
            return Cell()
        return Cell(text=points(value.change), interval=points_span(value), mark=SURE if sure else "")

    columns = [(class_rates(before, e.attack), class_rates(after, e.attack), e.classes) for e in compared]
    rows = []
    for c, name in enumerate(after.class_names):
        cells = [_name(name), Cell(text=str(columns[0][0][c].n or NO_IMAGES))]
        for old, new, tested in columns:
            cells += [
                Cell(text=percent(e.rate) if e.n else "", mark=WORST if e.worst else "") for e in (old[c], new[c])
            ]
            cells.append(change(tested[c].difference, sure=tested[c].significant))
        rows.append(tuple(cells))
    totals = {name: [_name(name), Cell()] for name in ("average", "worst", "worst is", "std", "range")}
    for entry in compared:
        for name, value, sure in (
            ("average", entry.average.difference, entry.average.significant),
            ("worst", entry.worst, entry.worst.sure),
            ("range", entry.range, entry.range.sure),
        ):
            totals[name] += [
                Cell(text=percent(value.before)),
                Cell(text=percent(value.after)),
                change(value, sure=sure),
            ]
        totals["worst is"] += [worst_name(entry.worst_before), worst_name(entry.worst_after), Cell()]
        old_std, new_std = (metrics.std(audit.rate(entry.attack)) for audit in (before, after))
        totals["std"] += [Cell(text=text) for text in (percent(old_std), percent(new_std), points(new_std - old_std))]
    heads = ("before", "after", "change")
    return Sheet(
        title=heading(f"{before.model} -> {after.model}", after),
        columns=(
            Column(head="class"),
            Column(head="images"),
            *(Column(head=head, over=attack) for attack in chosen for head in heads),
        ),
        rows=tuple(rows),
        totals=tuple(map(tuple, totals.values())),
        notes=("* worst class of its column. Changes in points.", CHANGES, TESTED),
        ranks=tuple(tested.difference.change for tested in columns[-1][2]),
        ranked_by=f"change under {chosen[-1]}",
    )


def summary_lines(audit: Audit) -> list[str]:
    """One line per attack: average and worst class, each with its interval.

    They are aligned, and fit below one another in a log.
    """
    rows = []
    for attack in shown_attacks(audit):
        worst = audit.worst(attack)
        average = f"average {percent(audit.average(attack))} {span(*audit.average_interval(attack))}"
        lowest = f"worst class {percent(worst.value)} {span(*audit.worst_interval(attack))}"
        rows.append((attack, average, f"{lowest}, {printable(worst.words)}"))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{attack:<{first}}  {average:<{second}}  {worst}" for attack, average, worst in rows]


def member_lines(audit: Audit) -> list[str]:
    """For every AutoAttack of several parts, how many images each part broke, on what those before had left."""
    found = []
    for attack in audit.broken_by:
        parts = [f"{member} {int(count.sum())}" for member, count in audit.fell_to(attack).items()]
        if len(parts) > 1:
            found.append(f"{attack} broke by {', '.join(parts)}")
    return found


# Parts


def _name(text: str) -> Cell:
    return Cell(text=text, is_name=True)


def worst_name(worst: WorstClass) -> Cell:
    """Whose accuracy is lowest, and who shares it."""
    return Cell(text=worst.name, is_name=True, others=worst.others)
