"""Super-classes and any other grouping of the images, from the stored predictions: rates per group, without attacking.

Groups come from the data set (the 20 super-classes of CIFAR-100) or from a CSV file with a header: `class,group` rows,
a class by name or by number, or `index,group` rows, an image by its position in the audited data set. The file is read
strictly: every class or image stands in it once.
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

from robustfair.config import require
from robustfair.data import ImageDataset
from robustfair.errors import DataError, UnknownNameError
from robustfair.evaluate.rates import ClassRates
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, find_attack
from robustfair.files import as_json
from robustfair.grammar import read_path
from robustfair.registry import canonical
from robustfair.values import Threat

SCHEMA = "robustfair.groups/1"
SUPERCLASS = "superclass"

Within = Literal["class", "group"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """A division of classes, or of single images, into groups.

    Attributes:
        names: (G,).
        by: what is grouped, "class" or "index".
        member: (C,) or (N,) int64, the group of each.
        source: "superclass" or the path of the file.
    """

    names: tuple[str, ...]
    by: Literal["class", "index"]
    member: Tensor
    source: str


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
        cut={name: audit.unfinished(name) for name in names},
    )


def read_groups(by: str | Path, images: ImageDataset | Audit) -> Groups:
    """The groups that a user names: "superclass" for those of the data set, else the path of a CSV file.

    Args:
        by: see the head of this module for the file.
        images: the data set to audit, or an audit of it.

    Raises:
        DataError: no super-classes, no such file, or a line that does not fit; with the file and the line. A sample as
            for `regroup`.
    """
    _require_even(images)
    if canonical(str(by)).replace("-", "") == SUPERCLASS:
        return _superclasses(images)
    path = read_path(by)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {why}: group by {SUPERCLASS}, or by a CSV file with the header class,group")
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
