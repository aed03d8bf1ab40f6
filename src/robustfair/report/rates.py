"""What every report shows of an audit: its attacks, the rates of its classes, and the lines below its table."""

from __future__ import annotations

from dataclasses import dataclass

from robustfair.evaluate.groups import Rates
from robustfair.evaluate.result import CLEAN, ROBUST, Audit
from robustfair.evaluate.sequential import until_line
from robustfair.report.words import percent, printable, span


def shown_attacks(audit: Rates) -> tuple[str, ...]:
    """The columns of a report: the attacks, and "robust" (no attack of them succeeds) where there are several."""
    return (*audit.attacks, ROBUST) if len(audit.attacks) > 2 else audit.attacks


def both_attacks(before: Audit, after: Audit) -> list[str]:
    """The columns that two audits share: "robust" only where both hold the same attacks, so that it is one thing."""
    alike = set(before.attacks) == set(after.attacks)
    return [name for name in shown_attacks(after) if name in before.attacks or (name == ROBUST and alike)]


def strongest(audit: Audit) -> str:
    """The attack of lowest average, the first one on ties; "clean" where there is no other."""
    return min(audit.attacks[1:] or audit.attacks, key=audit.average)


def under_words(audit: Audit, attack: str) -> str:
    """The column in words: "on clean images", "under pgd-20", "under both attacks together"."""
    if attack in audit.attacks:
        return "on clean images" if attack == CLEAN else f"under {attack}"
    number = len(audit.attacks) - 1
    return "under both attacks together" if number == 2 else f"under all {number} attacks together"


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


def image_lines(audit: Audit) -> list[str]:
    """Of an audit of a sample: how it was drawn, or when a sequential audit stopped; and what its average is. Of a
    model whose classes had very different numbers of training images: these.
    """
    drawn = until_line(audit) or audit.provenance.get("sample", "")
    of = sum(audit.drawn_from or ())
    weighed = f"average: every class weighs by its share of the {of:,} images" if audit.reweighted else ""
    return [printable(line) for line in (drawn, weighed, _tail_line(audit)) if line]


def _tail_line(audit: Audit) -> str:
    """How many images the model was trained on, where some class had twice as many as another; else ""."""
    about = audit.provenance.get("trained_on", {})
    counts = about.get("images_per_class") or [0]
    if max(counts) < 2 * min(counts) or not any(counts):
        return ""
    edit = f" ({about['edit']})" if about.get("edit") else ""
    return (
        f"trained on {sum(counts):,} images{edit}: {max(counts):,} of the largest class, {min(counts):,} of the least"
    )


def member_lines(audit: Audit) -> list[str]:
    """For every attack of several parts, how many images each part broke, on what those before had left."""
    found = []
    for attack in audit.broken_by:
        parts = [f"{member} {int(count.sum())}" for member, count in audit.fell_to(attack).items()]
        if len(parts) > 1:
            found.append(f"{attack} broke by {', '.join(parts)}")
    return found
