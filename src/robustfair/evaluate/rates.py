"""How often a model is right in every class, with error bars, and the worst class: what all results have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from robustfair import metrics

_ROUNDING = 1e-12


class WorstClass(NamedTuple):
    """The lowest accuracy of a class, and whose it is: what every report names and marks as worst.

    Attributes:
        class_index, class_name: the first class that has it.
        value: the accuracy.
        indices: all classes that have it; empty where all classes do, since then none is worse than another.
        name: the first class that has it, or "all classes".
        others: who shares it: "and 2 others", or "with images" where not all classes have any; else "".
    """

    class_index: int
    class_name: str
    value: float
    indices: tuple[int, ...]
    name: str
    others: str

    @classmethod
    def of(cls, rate: Tensor, names: Sequence[str], kind: str = "classes") -> WorstClass:
        """Read it off accuracies (C,), nan for a class without images; `kind` is what the names are names of.

        Two classes tie where the same share of their images is right, up to the rounding of a mean.

        Raises:
            ConfigError: no class has images.

        >>> WorstClass.of(torch.tensor([0.5, 0.25, 0.25]), ["cat", "dog", "ship"]).words
        'dog and 1 other'
        >>> WorstClass.of(torch.tensor([0.0, 0.0, float("nan")]), ["cat", "dog", "ship"]).words
        'all classes with images'
        """
        first = metrics.worst_class(rate)
        tied = ((rate - rate[first]).abs() <= _ROUNDING).nonzero().flatten().tolist()
        present, more = int((~rate.isnan()).sum()), len(tied) - 1
        if more and len(tied) == present:
            return cls(
                first, names[first], float(rate[first]), (), f"all {kind}", "with images" * (present < len(rate))
            )
        others = f"and {more} other{'s' if more > 1 else ''}" if more else ""
        return cls(first, names[first], float(rate[first]), tuple(tied), names[first], others)

    @property
    def words(self) -> str:
        """Whose accuracy it is, in words."""
        return f"{self.name} {self.others}".strip()


class ClassRates(ABC):
    """How often a model is right in every class, and the error bars: all read off which images it has right.

    A result derives from it and says with `hits` what is right. Methods take the cell that `hits` takes: the name of an
    attack, or a corruption and a severity. Rates are fractions, nan for a class without images.

    Attributes:
        class_names: (C,).
        labels: (N,) class of every image.
        kind: what the classes are called.
    """

    class_names: tuple[str, ...]
    labels: Tensor
    kind: ClassVar[str] = "classes"

    @abstractmethod
    def hits(self, *cell: Any, **named: Any) -> Tensor:
        """(N,) how far the prediction of each image is right: bool, or a share where it is a mean over cells."""

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def count(self) -> Tensor:
        """(C,) int64 images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def correct(self, *cell: Any) -> Tensor:
        """(C,) images of each class that are right, int64; float64 where `hits` are shares."""
        hits = self.hits(*cell)
        hits = hits.long() if hits.dtype == torch.bool else hits
        return torch.zeros(self.num_classes, dtype=hits.dtype).index_add_(0, self.labels, hits)

    def rate(self, *cell: Any) -> Tensor:
        """(C,) accuracy per class."""
        return self.correct(*cell).double() / self.count()

    def interval(self, *cell: Any, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Wilson interval of `rate`: lower and upper ends, (C,) each.

        An image counts as one trial, however many cells it is in: over several cells the interval is cautious, since a
        share between 0 and 1 varies less than a hit does. So are the other intervals.
        """
        return metrics.wilson(self.correct(*cell), self.count(), level)

    def average(self, *cell: Any) -> float:
        """Share of all images that are right."""
        return float(self.hits(*cell).sum()) / len(self.labels)

    def average_interval(self, *cell: Any, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of `average`."""
        lower, upper = metrics.wilson(self.hits(*cell).sum(), len(self.labels), level)
        return float(lower), float(upper)

    def worst(self, *cell: Any) -> WorstClass:
        """The class of lowest accuracy among those with images, and who shares it."""
        return WorstClass.of(self.rate(*cell), self.class_names, self.kind)

    def worst_interval(self, *cell: Any, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the worst class accuracy, which as a minimum over classes is biased low.

        It is an interval for the minimum, whichever class that is; see `metrics.bootstrap_statistic`.
        """
        found = metrics.bootstrap_statistic(self.correct(*cell), self.count(), "worst", level=level)
        return found.lower, found.upper
