"""Edits of the training images: which ones are trained on, how often, with which labels.

An edit comes before all training, or between two stages. It acts on what is left for training once the validation
images are out, so that no copy of a held out image and no label that a model has made up is ever measured on. What it
decides is kept as rows and labels, never as pixels: the images of the data set, followed by those of the sources it
adds, are the rows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustfair.config import Bounds, Count, Share, Whole, build, config, require
from robustfair.data.datasets import ImageDataset, load_dataset
from robustfair.data.load.memory import require_memory
from robustfair.data.load.parts import listed
from robustfair.errors import DataError, ModelError, RobustFairWarning
from robustfair.grammar import parse_term
from robustfair.registry import EDITS
from robustfair.values import seeded_generator

_ROWS_AT_A_TIME = 4096
Predict = Callable[[ImageDataset], Tensor]
"""(N, C) probabilities that the model of the stage before gives the images of a data set, on the CPU."""


@dataclass(frozen=True)
class Edited:
    """What an edit decided.

    Attributes:
        index: (M,) rows to train on, of the images given, then of each added source in turn; a row may come again.
        labels: (M,) their labels.
        rows: how many rows there are, in the images given and the added sources.
        added: names or paths of the sources whose training images follow the images given.
    """

    index: Tensor
    labels: Tensor
    rows: int
    added: tuple[str, ...] = ()

    def apply(self, images: ImageDataset) -> ImageDataset:
        """The images to train on.

        Raises:
            DataError: images or an added source are not those that the edit was made on.
        """
        parts = [images.images, *(source_images(name, images).images for name in self.added)]
        found = sum(len(part) for part in parts)
        if found != self.rows:
            raise DataError(
                f"{images.name}: its images changed since an edit of {self.rows:,}, there are {found:,} now"
            )
        return replace(images, images=_rows_of(parts, self.index), labels=self.labels)

    def save(self, path: Path) -> None:
        """Write rows and labels, with what is added in the header."""
        about = {"rows": str(self.rows), "added": json.dumps(self.added)}
        path.write_bytes(save({"index": self.index.contiguous(), "labels": self.labels.contiguous()}, about))

    @staticmethod
    def read(path: Path) -> Edited:
        """What `save` wrote.

        Raises:
            DataError: no edit is there, or it is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                added = tuple(json.loads(about["added"]))
                return Edited(file.get_tensor("index"), file.get_tensor("labels"), int(about["rows"]), added)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise DataError(
                f"{path} holds no edit of training images: name the images.safetensors of a stage"
            ) from None

    def after(self, first: Edited) -> Edited:
        """This edit, made on what `first` left, as one edit of what `first` was made on."""
        left = len(first.index)
        own = first.index[self.index.clamp(max=left - 1)]
        index = torch.where(self.index < left, own, first.rows + self.index - left)
        return Edited(index, self.labels, first.rows + self.rows - left, first.added + self.added)


def _rows_of(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows `index` of images that follow one another in `parts`, which are never put together: they may be large."""
    found = torch.empty((len(index), *parts[0].shape[1:]), dtype=parts[0].dtype)
    first = 0
    for part in parts:
        for rows in torch.nonzero((index >= first) & (index < first + len(part))).squeeze(1).split(_ROWS_AT_A_TIME):
            found[rows] = part[index[rows] - first]
        first += len(part)
    return found


class Edit(Protocol):
    """A frozen dataclass, its config. `needs_model` says whether it asks the model of the stage before it."""

    name: ClassVar[str]
    needs_model: ClassVar[bool]

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        """What to train on in place of `images`."""
        ...


@runtime_checkable
class ChecksImages(Protocol):
    """An edit that can refuse images before a model is trained that it may ask."""

    def check(self, images: ImageDataset) -> None:
        """Raise what calling it on `images` would raise, as far as no model is needed to know."""
        ...


def read_edit(text: str) -> Edit:
    """The edit that `long-tail` or `long-tail(factor=100)` names."""
    term = parse_term(text, "edit", example="long-tail(factor=100)", hint="give one, and a stage for each")
    return build(EDITS.get(term.name), term.args, owner=term.name)


def edit(images: ImageDataset, what: str | Edit, *, seed: int = 0) -> ImageDataset:
    """Training images after an edit that asks no model, as `Recipe.edit` has it before all training.

    Hold out the validation images first: of thinned classes little would be left to measure on.

    Args:
        what: such as "long-tail(factor=100)".
        seed: of its draws.

    Raises:
        ConfigError: the edit asks a model.
    """
    chosen = read_edit(what) if isinstance(what, str) else what
    hint = "Make it a stage, after one that trains"
    require(not chosen.needs_model, "edit", "what", allowed="one that asks no model", got=chosen.name, hint=hint)
    return chosen(images, _asks_nobody, seed).apply(images)


def _asks_nobody(images: ImageDataset) -> Tensor:
    raise AssertionError("this edit says that it asks no model")


Profile = Literal["exponential", "step"]


@EDITS.register("long-tail")
@config
class LongTail:
    """Thin the classes to a long tail, from all images of the first to 1 / factor of them in the last.

    n_c = n factor^(-c / (C - 1)), with n the images of the smallest class: the profile of Cui et al. 2019, under which
    classes are thinned in their order. Under "step" the first half of the classes keeps n and the others n / factor.

    Attributes:
        factor: of the first class's images to the last one's, at least 1.
        profile: "exponential" or "step".
        seed: of the draw of the images that stay; None takes that of the stage, and 0 before all training.
    """

    name: ClassVar[str] = "long-tail"
    needs_model: ClassVar[bool] = False
    factor: Annotated[float, Bounds(ge=1)] = 100.0
    profile: Profile = "exponential"
    seed: int | None = None

    def check(self, images: ImageDataset) -> None:
        counts = zip(images.class_names, images.class_counts().tolist(), strict=True)
        absent = [name for name, count in counts if count == 0]
        if absent:
            raise DataError(
                f"long-tail: {images.name} has no training image of class {listed(absent)} to keep: train on images of "
                "every class"
            )

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        self.check(images)
        kept, there = [], images.class_counts().tolist()
        counts = profile(min(there), images.num_classes, self.factor, self.profile)
        if counts[-1] * self.factor > min(there) * (1 + 1e-9):
            text = f"long-tail keeps one image at least: of {min(there):,} a factor of {self.factor:g} leaves none"
            warnings.warn(f"{text}, so that it is {counts[0] / counts[-1]:g} here", RobustFairWarning, stacklevel=2)
        drawn = seed if self.seed is None else self.seed
        for label, count in enumerate(counts):
            rows = (images.labels == label).nonzero().squeeze(1).cpu()
            order = torch.randperm(len(rows), generator=seeded_generator("cpu", drawn, self.name, label))
            kept.append(rows[order[:count]])
        index = torch.cat(kept).sort().values
        return Edited(index, images.labels.cpu()[index], len(images))


def profile(largest: int, num_classes: int, factor: float, kind: Profile = "exponential") -> list[int]:
    """Images of each class, falling from `largest` by `factor` to the last, rounded down; at least one.

    >>> profile(5000, 10, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> profile(500, 5, 10, "step")
    [500, 500, 50, 50, 50]
    """
    last = max(num_classes - 1, 1)
    steps = [label / last if kind == "exponential" else label >= num_classes // 2 for label in range(num_classes)]
    return [max(int(largest * factor**-step), 1) for step in steps]


@EDITS.register("upweight")
@config
class Upweight:
    """Repeat the training images that the model before gets wrong (JTT, Liu et al. 2021).

    Attributes:
        times: lambda_up, at least 0; the authors sweep 20, 50 and 100 on images.
        count: how often such an image is there afterwards: 1 + times ("official": their code appends so many copies),
            or times ("paper"), at least 1.
    """

    name: ClassVar[str] = "upweight"
    needs_model: ClassVar[bool] = True
    times: Whole = 20
    count: Literal["official", "paper"] = "official"

    def __post_init__(self) -> None:
        kept = self.times > 0 or self.count == "official"
        require(kept, self.name, "times", allowed="at least 1 under count paper", got=self.times)

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        labels = images.labels.cpu()
        wrong = (_answers(self.name, predict(images), images).argmax(1) != labels).nonzero().squeeze(1)
        copies = self.times - (self.count == "paper")
        count = len(labels) + len(wrong) * copies
        require_memory(self.name, count, tuple(images.images.shape[1:]), doing="repeating wrong ones to")
        index = torch.cat([torch.arange(len(labels)), wrong.repeat(copies)])
        return Edited(index, labels[index], len(images))


@EDITS.register("add")
@config
class Add:
    """Train on the labelled images of another source too, such as generated ones.

    Attributes:
        data: name or path, as `--data` takes it.
        limit_per_class: only the first so many of each class.
    """

    name: ClassVar[str] = "add"
    needs_model: ClassVar[bool] = False
    data: str
    limit_per_class: Count | None = None

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        more = self._source(images)
        rows = torch.arange(len(more)) if self.limit_per_class is None else more.first_per_class(self.limit_per_class)
        index = torch.cat([torch.arange(len(images)), len(images) + rows])
        labels = torch.cat([images.labels.cpu(), more.labels.cpu()[rows]])
        return Edited(index, labels, len(images) + len(more), (self.data,))

    def check(self, images: ImageDataset) -> None:
        self._source(images)

    def _source(self, images: ImageDataset) -> ImageDataset:
        """What is added.

        Raises:
            DataError: its classes are others.
        """
        more = source_images(self.data, images)
        numbers = tuple(str(label) for label in range(more.num_classes))
        if more.class_names not in (images.class_names, numbers[: images.num_classes]):
            raise DataError(
                f"add: the classes of {self.data} are {', '.join(more.class_names[:4])}, ... and those of "
                f"{images.name} {', '.join(images.class_names[:4])}, ...: its labels would not mean the same; add "
                "images without them by pseudo-label"
            )
        return more


@EDITS.register("pseudo-label")
@config
class PseudoLabel:
    """Train on the images of another source too, labelled by the model before: by its most probable class.

    STL-10's 100,000 images without labels are `stl10/unlabelled`; HWNwB's table 3 trains on them beside the labelled
    ones, labelled by a teacher that was trained on these.

    Attributes:
        data: name or path, as `--data` takes it; its own labels are not read.
        confidence: only images to whose class the model gives at least this probability, in [0, 1].
    """

    name: ClassVar[str] = "pseudo-label"
    needs_model: ClassVar[bool] = True
    data: str
    confidence: Share = 0.0

    def check(self, images: ImageDataset) -> None:
        source_images(self.data, images)

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        more = source_images(self.data, images)
        sure, labels = _answers(self.name, predict(more), images).max(1)
        rows = (sure >= self.confidence).nonzero().squeeze(1)
        require(len(rows) > 0, self.name, "confidence", allowed="reached by an image", got=self.confidence)
        index = torch.cat([torch.arange(len(images)), len(images) + rows])
        labels = torch.cat([images.labels.cpu(), labels[rows]])
        return Edited(index, labels, len(images) + len(more), (self.data,))


def _answers(owner: str, probabilities: Tensor, images: ImageDataset) -> Tensor:
    """(N, C) probabilities, one a class of `images`.

    Raises:
        ModelError: the model has other classes.
    """
    if probabilities.shape[1] != images.num_classes:
        raise ModelError(
            f"{owner}: the model before has {probabilities.shape[1]} classes and {images.name} {images.num_classes}: "
            "let a stage train one on these images before it"
        )
    return probabilities


def source_images(name: str, images: ImageDataset) -> ImageDataset:
    """The training images of another source, scaled to the size of `images`.

    Raises:
        DataError: they have other channels.
    """
    size = images.images.shape[2]
    found = load_dataset(name, image_size=size).train
    if found.images.shape[1:] != images.images.shape[1:]:
        shapes = " and ".join(" x ".join(map(str, data.images.shape[1:])) for data in (found, images))
        raise DataError(f"{name} and {images.name} have images of {shapes}: they cannot be trained on together")
    return found
