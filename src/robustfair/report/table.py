"""Console tables of an audit, class by class, and the words that every report uses for a number.

Rates are fractions everywhere else; here they become percent with one decimal, differences become percentage points.
`*` is the worst class of its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from robustfair import metrics
from robustfair.config import format_eps, require
from robustfair.evaluate.audit import ROBUST, Audit
from robustfair.evaluate.compare import Comparison, check_comparable
from robustfair.evaluate.finding import paired_difference
from robustfair.evaluate.grouping import GroupRates
from robustfair.report.layout import WORST, Cell, Column, Sheet, printable

Rates = Audit | GroupRates
Measured = Rates | Comparison

NO_IMAGES = "no images"


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
    """Accuracy of one class under one attack, as fractions; all nan where the class has no images."""

    correct: int
    n: int
    rate: float
    lower: float
    upper: float
    worst: bool


def class_rates(audit: Rates, attack: str) -> list[ClassRate]:
    """One entry a class or group (C,), in the order of the data set, with its 95 % Wilson interval."""
    worst = audit.worst(attack).class_index
    rate, correct, n = audit.rate(attack).tolist(), audit.correct(attack).tolist(), audit.count().tolist()
    lower, upper = (end.tolist() for end in audit.interval(attack))
    return [
        ClassRate(correct=correct[c], n=n[c], rate=rate[c], lower=lower[c], upper=upper[c], worst=c == worst)
        for c in range(len(audit.class_names))
    ]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference of two accuracies on the same images, after - before, with its paired 95 % interval; fractions."""

    value: float
    lower: float
    upper: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.lower > 0 or self.upper < 0

    @property
    def span(self) -> str:
        """The interval in points."""
        return f"[{points(self.lower)}, {points(self.upper)}]"


def changes(before: Audit, after: Audit, attack: str) -> list[Change]:
    """The change of every class (C,) under one attack; nan for a class without images."""
    old, new = before.hits(attack), after.hits(attack)
    return [_change(old[of_class], new[of_class]) for of_class in (after.labels == c for c in range(after.num_classes))]


def change_of_average(before: Audit, after: Audit, attack: str) -> Change:
    """The change of the average under one attack."""
    return _change(before.hits(attack), after.hits(attack))


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
        (_name("worst is"), *blank, *(_name(worst[a].class_name) for a in attacks)),
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

    A change stands with its 95 % interval, paired over the images; that of the worst class has none, since it may be
    another class before and after.

    Args:
        attacks: None takes those that both audits have.

    Raises:
        DataError: the audits are not of the same images, classes and threat.
        ConfigError: an attack that one of them lacks, or none at all.
    """
    check_comparable(before, after)
    shared = [attack for attack in shown_attacks(after) if attack in shown_attacks(before)]
    chosen = shared if attacks is None else list(attacks)
    allowed = f"in both audits ({', '.join(shared)})"
    for attack in chosen:
        require(attack in shared, "report", "attack", allowed=allowed, got=attack)
    require(bool(chosen), "report", "attacks", allowed=f"at least one {allowed}", got=chosen)

    def change(value: Change) -> Cell:
        return Cell() if math.isnan(value.value) else Cell(text=points(value.value), interval=value.span)

    columns = [
        (class_rates(before, attack), class_rates(after, attack), changes(before, after, attack)) for attack in chosen
    ]
    rows = []
    for c, name in enumerate(after.class_names):
        cells = [_name(name), Cell(text=str(columns[0][0][c].n or NO_IMAGES))]
        for old, new, changed in columns:
            cells += [
                Cell(text=percent(e.rate) if e.n else "", mark=WORST if e.worst else "") for e in (old[c], new[c])
            ]
            cells.append(change(changed[c]))
        rows.append(tuple(cells))
    totals = {name: [_name(name), Cell()] for name in ("average", "worst", "worst is", "std", "range")}
    for attack in chosen:
        old_rate, new_rate = before.rate(attack), after.rate(attack)
        old_worst, new_worst = before.worst(attack), after.worst(attack)
        averages = (before.average(attack), after.average(attack))
        totals["average"] += [Cell(text=percent(average)) for average in averages]
        totals["average"].append(change(change_of_average(before, after, attack)))
        totals["worst is"] += [_name(old_worst.class_name), _name(new_worst.class_name), Cell()]
        for name, old_value, new_value in (
            ("worst", old_worst.value, new_worst.value),
            ("std", metrics.std(old_rate), metrics.std(new_rate)),
            ("range", metrics.accuracy_range(old_rate), metrics.accuracy_range(new_rate)),
        ):
            texts = (percent(old_value), percent(new_value), points(new_value - old_value))
            totals[name] += [Cell(text=text) for text in texts]
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
        notes=("* worst class of its column. Changes in points, intervals 95 %, paired.",),
        ranks=tuple(changed.value for changed in columns[-1][2]),
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
        rows.append((attack, average, f"{lowest}, {printable(worst.class_name)}"))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{attack:<{first}}  {average:<{second}}  {worst}" for attack, average, worst in rows]


def member_lines(audit: Audit) -> list[str]:
    """For every strong attack of several parts, how many images each part broke, on what those before had left."""
    found = []
    for attack in audit.broken_by:
        parts = [f"{member} {int(count.sum())}" for member, count in audit.fell_to(attack).items()]
        if len(parts) > 1:
            found.append(f"{attack} broke by {', '.join(parts)}")
    return found


# Parts


def _name(text: str) -> Cell:
    return Cell(text=text, is_name=True)


def _change(before: Tensor, after: Tensor) -> Change:
    """Of hits (n,) on the same images."""
    value, lower, upper = paired_difference(after, before) if len(after) else (math.nan, math.nan, math.nan)
    return Change(value=value, lower=lower, upper=upper)
