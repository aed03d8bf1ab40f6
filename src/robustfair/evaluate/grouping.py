"""Groups of classes by how many images they were trained on, and by how hard they are for a baseline.

    shot         many, medium and few training images: more than 100, 20 to 100, fewer than 20 (Liu et al. 2019)
    difficulty   easy, medium and hard thirds of the classes by the accuracy of a baseline, the same for every model

Both are means over classes where the literature has them; rates by group are over images, which is the same wherever
classes have as many test images, as in the data sets of that literature. `metrics.shots` and `metrics.thirds` are the
means over classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.config import Whole, config, require
from robustfair.errors import DataError
from robustfair.evaluate.result import CLEAN, Audit

SHOTS = ("many", "medium", "few")
THIRDS = ("easy", "medium", "hard")


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """A division of classes, or of single images, into groups.

    Attributes:
        names: (G,).
        by: what is grouped, "class" or "index".
        member: (C,) or (N,) int64, the group of each.
        source: "superclass", "shot", "difficulty" or the path of the file.
        about: a sentence on what the groups are, where their names do not say it.
    """

    names: tuple[str, ...]
    by: Literal["class", "index"]
    member: Tensor
    source: str
    about: str = ""


@config
class Shot:
    """Thresholds on the number of training images of a class.

    Attributes:
        many: a class with more has many.
        few: a class with fewer has few; at most `many`.
    """

    name: ClassVar[str] = "shot"
    many: Whole = 100
    few: Whole = 20

    def __post_init__(self) -> None:
        require(self.few <= self.many, self.name, "few", allowed=f"at most many, {self.many}", got=self.few)

    def groups(self, counts: Sequence[int] | Tensor) -> Groups:
        """By the images of each class (C,) that a model was trained on."""
        member = metrics.shot_of_class(torch.as_tensor(counts), many=self.many, few=self.few)
        sizes = torch.bincount(member, minlength=3).tolist()
        about = (
            f"Training images: many is more than {self.many} ({_classes(sizes[0])}), few is fewer than {self.few} "
            f"({_classes(sizes[2])}), medium lies between ({_classes(sizes[1])})."
        )
        return Groups(names=SHOTS, by="class", member=member, source=self.name, about=about)


@config
class Difficulty:
    """Which accuracy of which baseline the thirds are of.

    Attributes:
        attack: of the audit of the baseline.
        baseline: path of that audit.
    """

    name: ClassVar[str] = "difficulty"
    attack: str = CLEAN
    baseline: str | None = None

    def groups(self, baseline: Audit) -> Groups:
        """By the accuracy of every class.

        Raises:
            UnknownNameError: the audit of the baseline holds no such attack.
            DataError: it has no images of a class.
        """
        rate = baseline.rate(self.attack)
        absent = rate.isnan().nonzero().flatten().tolist()
        if absent:
            raise DataError(
                f"difficulty: the audit of {baseline.model} has no image of class {baseline.class_names[absent[0]]}: "
                "its difficulty is not known; audit the baseline on all classes"
            )
        member = metrics.third_of_class(rate)
        sizes = torch.bincount(member, minlength=3).tolist()
        about = (
            f"Thirds of the classes by the accuracy of {baseline.model} under {self.attack}: "
            f"{', '.join(f'{name} {_classes(size)}' for name, size in zip(THIRDS, sizes, strict=True))}."
        )
        return Groups(names=THIRDS, by="class", member=member, source=self.name, about=about)


NAMED: dict[str, type[Shot | Difficulty]] = {Shot.name: Shot, Difficulty.name: Difficulty}


def recorded_counts(*audits: Audit) -> tuple[int, ...] | None:
    """(C,) training images of each class that the audited runs recorded; None where none did.

    Raises:
        DataError: two of them were trained on other numbers.
    """
    found: dict[tuple[int, ...], str] = {}
    for audit in audits:
        counts = audit.provenance.get("trained_on", {}).get("images_per_class")
        if counts is not None:
            found.setdefault(tuple(counts), audit.model)
    if len(found) > 1:
        raise DataError(
            f"shot: {' and '.join(found.values())} were trained on other numbers of images of the classes: group by a "
            "CSV file with the header class,group"
        )
    return next(iter(found), None)


def _classes(number: int) -> str:
    return f"{number} class{'' if number == 1 else 'es'}"
