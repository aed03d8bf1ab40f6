"""Super-classes and any other grouping of the images, from the stored predictions: rates per group, without attacking.

Groups come from the data set (the 20 super-classes of CIFAR-100), from the training images or a baseline (see
`grouping`), or from a CSV file with a header: `class,group` rows, a class by name or by number, or `index,group` rows,
an image by its position in the audited data set. The file is read strictly: every class or image stands in it once.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import build, require
from robustfair.data import ImageDataset
from robustfair.errors import DataError, UnknownNameError
from robustfair.evaluate.grouping import NAMED, Groups, Shot, recorded_counts
from robustfair.evaluate.rates import ClassRates
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, find_attack, load_audit
from robustfair.files import as_json
from robustfair.grammar import parse_term, read_path
from robustfair.registry import canonical
from robustfair.values import Threat

SCHEMA = "robustfair.groups/1"
SUPERCLASS = "superclass"

Within = Literal["class", "group"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupRates(ClassRates):
    """How often a model is right in every group, clean and under each attack of an audit.

    Methods are those of `Audit`, with groups for classes: rates are fractions, nan for a group without images.

    Attributes:
        model, data, threat: of the audit.
        class_names: (G,) names of the groups, under the name that tables know.
        labels: (N,) group of every image.
        right: attack -> (N,) bool, "clean" first and "robust" last.
        within: "class" if an image counts as right by its own class, "group" if by any class of its group.
        source: where the groups come from.
        about: a sentence on what they are, "" where their names say it.
        cut: attack -> its parts that a time budget cut short and how far each came, see `Audit.unfinished`.
    """

    model: str
    data: str
    threat: Threat
    class_names: tuple[str, ...]
    labels: Tensor
    right: Mapping[str, Tensor]
    within: Within
    source: str
    about: str = ""
    cut: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kind: ClassVar[str] = "groups"

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks in order, "clean" first; without "robust"."""
        return tuple(name for name in self.right if name != ROBUST)

    def hits(self, attack: str) -> Tensor:
        """(N,) bool, whether an image counts as right.

        Raises:
            UnknownNameError: the audit held no such attack.
        """
        return self.right[find_attack(attack, self.right, "attack of this audit")]

    def unfinished(self, attack: str = ROBUST) -> dict[str, float]:
        """The parts of an attack that a time budget cut short, and how far each came; of every attack for "robust"."""
        return dict(self.cut.get(find_attack(attack, self.right, "attack of this audit"), {}))

    def misses_groups(self, attack: str) -> bool:
        """Whether it aims at another class where only another group counts."""
        return self.within == "group" and canonical(attack) != CLEAN

    def is_upper_bound(self, attack: str) -> bool:
        """Whether the attack might have done more: it misses groups, or time was up before its end."""
        return self.misses_groups(attack) or bool(self.unfinished(attack))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: nan is null."""
        return as_json(
            {
                "schema": SCHEMA,
                "model": self.model,
                "data": {"name": self.data, "images": len(self.labels)},
                "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
                "groups": self.class_names,
                "source": self.source,
                **({"about": self.about} if self.about else {}),
                "within": self.within,
                "count": self.count(),
                "attacks": {name: self._numbers(name) for name in self.right},
            }
        )

    def _numbers(self, attack: str) -> dict[str, Any]:
        lower, upper = self.interval(attack)
        worst = self.worst(attack)
        return {
            "correct": self.correct(attack),
            "wilson": {"level": 0.95, "lower": lower, "upper": upper},
            "average": self.average(attack),
            "average_interval": self.average_interval(attack),
            "worst": worst.value,
            "worst_group": worst.words,
            "worst_groups": [self.class_names[group] for group in worst.indices],
            "worst_interval": self.worst_interval(attack),
            "upper_bound": self.is_upper_bound(attack),
            "unfinished": self.unfinished(attack),
        }


Rates = Audit | GroupRates


def regroup(audit: Audit, groups: Groups, *, within: Within = "class") -> GroupRates:
    """The rates of an audit by group instead of class.

    Args:
        audit: its stored predictions.
        groups: see `read_groups`.
        within: "class" counts an image as right if its class is, "group" if any class of its group is predicted. The
            attacks aimed at another class, and left alone what was wrong when clean: rates under attack are then upper
            bounds.

    Raises:
        DataError: groups of another number of classes or images; a sample that holds another share of some classes
            than of others, which a group would mix.
        ConfigError: `within="group"` with groups of images, or another word.
    """
    require(within in ("class", "group"), "groups", "within", allowed="class or group", got=within)
    _require_even(audit)
    things, expected = ("classes", audit.num_classes) if groups.by == "class" else ("images", len(audit.labels))
    if len(groups.member) != expected:
        raise DataError(
            f"{groups.source} groups {len(groups.member)} {things} and the audit of {audit.model} has {expected}"
        )
    names = (*audit.attacks, ROBUST)
    if within == "class":
        right = {name: audit.hits(name) for name in names}
    else:
        hint = "A prediction is a class, and only grouped classes say which group that is"
        require(groups.by == "class", "groups", "within", allowed="class for groups of images", got=within, hint=hint)
        group = groups.member[audit.labels]
        right = {name: groups.member[audit.prediction(name)] == group for name in audit.attacks}
        right[ROBUST] = torch.stack(list(right.values())).all(0)
    return GroupRates(
        model=audit.model,
        data=audit.data,
        threat=audit.threat,
        class_names=groups.names,
        labels=groups.member[audit.labels] if groups.by == "class" else groups.member,
        right=right,
        within=within,
        source=groups.source,
        about=_about(groups, audit.count()),
        cut={name: audit.unfinished(name) for name in names},
    )


def read_groups(
    by: str | Path,
    images: ImageDataset | Audit,
    *,
    trained_on: Sequence[int] | None = None,
    baseline: Audit | None = None,
    also: Sequence[Audit] = (),
) -> Groups:
    """The groups that a user names: "superclass" for those of the data set, "shot" or "difficulty" with or without
    settings, such as "shot(many=50, few=10)" and "difficulty(attack=pgd-20)", else the path of a CSV file.

    Args:
        by: see the head of this module for the file.
        images: the data set to audit, or an audit of it.
        trained_on: (C,) images of each class that the model was trained on, for "shot"; what the audit recorded if not
            given.
        baseline: for "difficulty", where it names no audit itself.
        also: further audits that are to be grouped alike.

    Raises:
        DataError: no super-classes, no such file, or a line that does not fit; with the file and the line. Training
            images or a baseline that are not known, or of other classes. A sample as for `regroup`.
        ConfigError, UnknownNameError: settings that "shot" or "difficulty" do not have.
    """
    _require_even(images)
    if canonical(str(by)).replace("-", "") == SUPERCLASS:
        return _superclasses(images)
    path = read_path(by)
    if canonical(str(by).partition("(")[0]) in NAMED and not path.is_file():
        audits = [*([images] if isinstance(images, Audit) else []), *also]
        return _named(str(by), images.class_names, audits, trained_on, baseline)
    if not path.is_file():
        why = "names nothing" if not str(by) else "is a folder" if path.is_dir() else "does not exist"
        named = ", ".join((SUPERCLASS, *NAMED))
        raise DataError(
            f"{str(by) or 'an empty grouping'} {why}: group by {named}, or by a CSV file with the header class,group"
        )
    kind, rows = _read_csv(path)
    shown = images.class_names if kind == "class" else _positions(images)
    slots = _slots(shown, numbered=kind == "class")
    names: dict[str, int] = {}
    member, lines = [-1] * len(shown), [0] * len(shown)
    for line, key, name in rows:
        slot = slots.get(key)
        if slot is None:
            raise DataError(f"{path}, line {line}: {_unknown(kind, key, shown)}")
        if lines[slot]:
            raise DataError(f"{path}, line {line}: {kind} {key} has a group on line {lines[slot]} already: keep one")
        member[slot], lines[slot] = names.setdefault(name, len(names)), line
    missing = [word for word, line in zip(shown, lines, strict=True) if not line]
    if missing:
        last = rows[-1][0] if rows else 1
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{path}, line {last}: the file ends without {kind} {missing[0]}{more}: give each a group")
    return Groups(names=tuple(names), by=kind, member=torch.tensor(member), source=str(path))


def _named(
    by: str, classes: Sequence[str], audits: Sequence[Audit], trained_on: Sequence[int] | None, baseline: Audit | None
) -> Groups:
    """What "shot" or "difficulty" means for these classes."""
    term = parse_term(by, "grouping", example="shot(many=100, few=20)")
    chosen = build(NAMED[term.name], term.args, owner=term.name)
    if isinstance(chosen, Shot):
        counts = recorded_counts(*audits) if trained_on is None else trained_on
        if counts is None:
            raise DataError(
                "shot: this model does not say how many images of each class it was trained on, as a run does: group "
                "by a CSV file with the header class,group"
            )
        if len(counts) != len(classes):
            raise DataError(f"shot: {len(counts)} classes were trained on, and {len(classes)} are audited")
        return chosen.groups(counts)
    found = baseline if chosen.baseline is None else load_audit(chosen.baseline)
    if found is None:
        raise DataError(
            "difficulty: the thirds are those of a baseline: add `baseline` with the JSON of its audit, or name it as "
            "difficulty(baseline=...)"
        )
    if found.class_names != tuple(classes):
        raise DataError(f"difficulty: the baseline {found.model} was audited on other classes than these")
    return chosen.groups(found)


def _about(groups: Groups, count: Tensor) -> str:
    """What the groups are; and where classes weigh unequally in them, `count` (C,) their images, that they do."""
    if not groups.about:
        return ""
    sizes = [set(count[groups.member == group].tolist()) - {0} for group in range(len(groups.names))]
    uneven = any(len(found) > 1 for found in sizes)
    return groups.about + (" Rates are over images: a class with more test images weighs more." if uneven else "")


def _superclasses(images: ImageDataset | Audit) -> Groups:
    if images.groups is None:
        name = images.name if isinstance(images, ImageDataset) else images.data
        raise DataError(f"{name} has no super-classes: group by a CSV file with the header class,group")
    member = torch.tensor(images.groups)
    names = images.group_names or tuple(f"group {group}" for group in range(int(member.max()) + 1))
    return Groups(names=names, by="class", member=member, source=SUPERCLASS)


def _require_even(images: ImageDataset | Audit) -> None:
    if isinstance(images, ImageDataset):
        name, own = images.name, images.class_counts().tolist()
        of = None if images.drawn is None else images.drawn.class_counts
    else:
        name, own = f"the audit of {images.model}", images.count().tolist()
        of = images.drawn_from
    if of is not None and any(n * sum(of) != m * sum(own) for n, m in zip(own, of, strict=True)):
        raise DataError(
            f"{name}: the sample holds another share of some classes than of others, which groups would mix: audit all "
            "images, or a sample that is not stratified"
        )


def _positions(images: ImageDataset | Audit) -> tuple[str, ...]:
    if isinstance(images, ImageDataset):
        places = range(len(images)) if images.drawn is None else images.drawn.places.tolist()
    else:
        places = images.index.tolist()
    return tuple(map(str, places))


def _slots(shown: Sequence[str], *, numbered: bool) -> dict[str, int]:
    """What may stand in the first column -> its place; a name goes before the number of another class."""
    numbers = {str(slot): slot for slot in range(len(shown))} if numbered else {}
    times = Counter(shown)
    return numbers | {word: slot for slot, word in enumerate(shown) if times[word] == 1}


def _unknown(kind: str, key: str, shown: Sequence[str]) -> str:
    if kind == "class":
        return str(UnknownNameError("class", key, shown))
    return f"index {key!r} is none of the {len(shown)} images, {shown[0]} to {shown[-1]}"


def _read_csv(path: Path) -> tuple[Literal["class", "index"], list[tuple[int, str, str]]]:
    """What the rows of a file group, and its rows as (line, class or index, group)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error}): write rows of class,group") from None
    number, head = lines[0] if lines else (1, [])
    kinds: dict[tuple[str, ...], Literal["class", "index"]] = {("class", "group"): "class", ("index", "group"): "index"}
    kind = kinds.get(tuple(cell.lower() for cell in head))
    if kind is None:
        raise DataError(f"{path}, line {number}: the header must be class,group or index,group, got {','.join(head)!r}")
    for number, row in lines[1:]:
        if len(row) != 2 or not all(row):
            got = ",".join(row)
            raise DataError(f"{path}, line {number}: expected {kind},group and neither of them empty, got {got!r}")
    return kind, [(number, row[0], row[1]) for number, row in lines[1:]]
