"""Edits of the training images between two stages: which ones the next stage trains on, how often, with which labels.

An edit acts on what is left for training once the validation images are out, so that no copy of a held out image and
no label that a model has made up is ever measured on. What it decides is kept as rows and labels, never as pixels: the
images of the data set, followed by those of the sources it adds, are the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustfair.config import Bounds, Count, Share, Whole, config, require
from robustfair.data.datasets import ImageDataset, load_dataset
from robustfair.errors import DataError, ModelError
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


@EDITS.register("long-tail")
@config
class LongTail:
    """Keep n_c = n factor^(-c / (C - 1)) images of class c, n those of the smallest class: an exponential profile.

    Classes are thinned in their order, as Cui et al. 2019 do; which images stay is drawn anew for every seed.

    Attributes:
        factor: of the first class's images to the last one's, at least 1.
    """

    name: ClassVar[str] = "long-tail"
    needs_model: ClassVar[bool] = False
    factor: Annotated[float, Bounds(ge=1)] = 100.0

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        kept = []
        counts = profile(int(images.class_counts().min()), images.num_classes, self.factor)
        for label, count in enumerate(counts):
            rows = (images.labels == label).nonzero().squeeze(1).cpu()
            order = torch.randperm(len(rows), generator=seeded_generator("cpu", seed, self.name, label))
            kept.append(rows[order[:count]])
        index = torch.cat(kept).sort().values
        return Edited(index, images.labels.cpu()[index], len(images))


def profile(largest: int, num_classes: int, factor: float) -> list[int]:
    """Images of each class, falling from `largest` by `factor` to the last; at least one.

    >>> profile(5000, 10, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    last = max(num_classes - 1, 1)
    return [max(int(largest * factor ** (-label / last)), 1) for label in range(num_classes)]


@EDITS.register("upweight")
@config
class Upweight:
    """Add copies of the training images that the model before gets wrong (JTT, Liu et al. 2021).

    The authors' code appends `times` copies, so that such an image is seen 1 + times as often; the paper's count is
    one less.

    Attributes:
        times: copies to add of each, at least 0.
    """

    name: ClassVar[str] = "upweight"
    needs_model: ClassVar[bool] = True
    times: Whole = 20

    def __call__(self, images: ImageDataset, predict: Predict, seed: int) -> Edited:
        labels = images.labels.cpu()
        wrong = (_answers(self.name, predict(images), images).argmax(1) != labels).nonzero().squeeze(1)
        index = torch.cat([torch.arange(len(labels)), wrong.repeat(self.times)])
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
        more = source_images(self.data, images)
        numbers = tuple(str(label) for label in range(more.num_classes))
        if more.class_names not in (images.class_names, numbers[: images.num_classes]):
            raise DataError(
                f"add: the classes of {self.data} are {', '.join(more.class_names[:4])}, ... and those of "
                f"{images.name} {', '.join(images.class_names[:4])}, ...: its labels would not mean the same; add "
                "images without them by pseudo-label"
            )
        rows = torch.arange(len(more)) if self.limit_per_class is None else more.first_per_class(self.limit_per_class)
        index = torch.cat([torch.arange(len(images)), len(images) + rows])
        labels = torch.cat([images.labels.cpu(), more.labels.cpu()[rows]])
        return Edited(index, labels, len(images) + len(more), (self.data,))


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
