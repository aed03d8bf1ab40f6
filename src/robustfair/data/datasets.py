"""Data sets as they are held: uint8 images resident in memory or on the device, labels, class names, a fingerprint.

`load_dataset` finds a set by name or path, decodes it once into a cache file a part, and maps that file afterwards.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustfair.data.load import cache
from robustfair.data.load.decode import bytes_hint, fingerprint
from robustfair.data.load.find import find_source
from robustfair.data.load.parts import listed
from robustfair.data.load.sources import Source, hold_out
from robustfair.errors import ConfigError, DataError, RobustFairWarning
from robustfair.grammar import read_path
from robustfair.values import seeded_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Which images of a data set a sample of it holds.

    Attributes:
        places: (N,) int64 their rows in that data set, on the CPU.
        of: how many images there are.
        class_counts: (C,) images of each class there, where so many were drawn of each class; None where every image
            was as likely to be drawn, so that the sample shows the shares of the classes itself.
        how: in words, how they were drawn.
    """

    places: Tensor
    of: int
    class_counts: tuple[int, ...] | None
    how: str

    @property
    def words(self) -> str:
        """The sample in words: "1,000 of 10,000 images, drawn with seed 0"."""
        return f"{len(self.places):,} of {self.of:,} images, {self.how}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """One part of a data set.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, on the device of `images`.
        class_names: one name per class; a class without images keeps its index.
        name: what reports call it.
        augment: default augmentation, a key of `robustfair.data.augment.crops.AUGMENTATIONS`.
        groups: super-class index per class, as in CIFAR-100, or None.
        group_names: names of the super-classes, empty without groups.
        drawn: of a sample, what it was drawn from, see `sample`; None of a data set as it is.

    Raises:
        DataError: a shape or type is wrong, or labels lie outside the range (the first of them is named).

    >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    >>> data = ImageDataset(images=images, labels=torch.tensor([0, 2, 0]), class_names=("a", "b", "c"))
    >>> len(data), data.num_classes, data.class_counts().tolist(), len(data.limit_per_class(1))
    (3, 3, [2, 0, 1], 2)
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "images"
    augment: str = "none"
    groups: tuple[int, ...] | None = None
    group_names: tuple[str, ...] = ()
    drawn: Drawn | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            got = f"{_dtype(self.images)} {tuple(self.images.shape)}"
            is_number = self.images.is_floating_point() and self.images.numel() > 0
            hint = f"; {bytes_hint(float(self.images.min()), float(self.images.max()))}" if is_number else ""
            raise DataError(f"{self.name}: images must be uint8 (N, C, H, W), got {got}{hint}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{_dtype(self.labels)} {tuple(self.labels.shape)}"
            raise DataError(f"{self.name}: labels must be int64 ({len(self.images)},), one an image, got {got}")
        outside = (self.labels < 0) | (self.labels >= self.num_classes)
        if outside.any():
            index = int(outside.nonzero()[0])
            raise DataError(
                f"{self.name}: labels outside the range 0 to {self.num_classes - 1}, "
                f"the first is {int(self.labels[index])} at index {index}"
            )
        groups = self.groups if self.groups is not None else (0,) * self.num_classes
        if len(groups) != self.num_classes or (self.groups is None) != (not self.group_names):
            raise DataError(f"{self.name}: groups must give every class a super-class, and group_names their names")
        if self.groups is not None and not all(0 <= group < len(self.group_names) for group in groups):
            raise DataError(f"{self.name}: groups outside the range 0 to {len(self.group_names) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """C, with or without images in every class."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where images and labels are."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of pixels, labels and class names; of nothing else, so a copy elsewhere has the same."""
        return fingerprint(self.images.cpu().numpy(), self.labels.cpu().numpy(), self.class_names)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same data resident on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor | np.ndarray | Sequence[int]) -> ImageDataset:
        """The images at rows `index`, in that order; all classes keep their index."""
        rows = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        drawn = self.drawn and replace(self.drawn, places=self.drawn.places[rows.cpu()])
        return replace(self, images=self.images[rows], labels=self.labels[rows], drawn=drawn)

    def sample(self, images: int, *, stratified: bool = False, seed: int = 0) -> ImageDataset:
        """That many images, drawn at random without replacement and kept in data set order; `drawn` says which.

        A larger sample of the same seed holds a smaller one.

        Args:
            images: how many.
            stratified: draw as many of every class, all of a class that has fewer, and never more than `images` in all.
            seed: of the draw.

        Raises:
            ConfigError: `images` is no whole number from 1, if stratified from the number of classes that have images,
                to all.
        """
        counts = self.class_counts().cpu()
        least = int((counts > 0).sum()) if stratified else 1
        if isinstance(images, bool) or not isinstance(images, Integral) or not least <= images <= len(self):
            first = f"{least:,}, one of every class," if stratified else "1"
            allowed = f"a whole number from {first} to {len(self):,}, all there are"
            raise ConfigError("sample", "images", allowed=allowed, got=images)
        if stratified:
            each = _each(counts.tolist(), int(images))
            rows = torch.cat([order[:each] for order in self.class_orders(seed)])
            return self.drawn_rows(rows.sort().values, f"as many of each class, drawn with seed {seed}")
        rows = torch.randperm(len(self), generator=seeded_generator("cpu", seed, "sample"))[:images]
        return self.drawn_rows(rows.sort().values, f"drawn with seed {seed}", by_class=False)

    def class_orders(self, seed: int) -> list[Tensor]:
        """For every class its rows in the order in which `sample` draws them, on the CPU."""
        labels = self.labels.cpu()
        found = []
        for label in range(self.num_classes):
            rows = (labels == label).nonzero().squeeze(1)
            order = torch.randperm(len(rows), generator=seeded_generator("cpu", seed, "sample", label))
            found.append(rows[order])
        return found

    def drawn_rows(self, rows: Tensor, how: str, *, by_class: bool = True) -> ImageDataset:
        """The images at `rows` (N,) as a sample; `how` says how they were drawn, class by class or from all at once."""
        part, counts = self.subset(rows), tuple(self.class_counts().tolist()) if by_class else None
        if part.drawn is None:
            return replace(part, drawn=Drawn(places=rows, of=len(self), class_counts=counts, how=how))
        counts, how = part.drawn.class_counts or counts, f"{part.drawn.how}; {how}"
        return replace(part, drawn=replace(part.drawn, class_counts=counts, how=how))

    def limit_per_class(self, n: int) -> ImageDataset:
        """The first `n` images of every class, in data set order.

        Raises:
            ConfigError: `n` is below 1.
        """
        return self.subset(self.first_per_class(n))

    def first_per_class(self, n: int) -> Tensor:
        """Rows of the first `n` images of every class, ascending, on the CPU; raises as `limit_per_class`."""
        if n < 1:
            raise ConfigError("data", "limit_per_class", allowed="at least 1", got=n)
        labels = self.labels.cpu()
        by_class = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=self.num_classes)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(len(labels)) - starts[labels[by_class]]
        return by_class[rank < n].sort().values

    def class_counts(self) -> Tensor:
        """(C,) int64 images per class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def count_line(self, part: str) -> str:
        """Images per class in words: of each of ten classes or fewer, else the range; classes without are named.

        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> data = ImageDataset(images=images, labels=torch.tensor([0, 2, 0]), class_names=("a", "b", "c"))
        >>> data.count_line("train")
        'images, train part: 3 images of 3 classes (a: 2, b: 0, c: 1), none of b'
        """
        counts = self.class_counts().tolist()
        if len(set(counts)) == 1:
            each = f"{counts[0]:,} each"
        elif len(counts) <= 10:
            each = ", ".join(f"{name}: {count:,}" for name, count in zip(self.class_names, counts, strict=True))
        else:
            each = f"{min(counts):,} to {max(counts):,} each"
        absent = [name for name, count in zip(self.class_names, counts, strict=True) if count == 0]
        without = f", none of {listed(absent)}" if absent else ""
        images = f"{len(self):,} image{'s' if len(self) != 1 else ''}"
        classes = f"{self.num_classes:,} class{'es' if self.num_classes != 1 else ''}"
        if self.drawn is not None:
            images = f"{len(self):,} of {self.drawn.of:,} images"
        how = f", {self.drawn.how}" if self.drawn else ""
        return f"{self.name}, {part} part: {images} of {classes} ({each}){without}{how}"


@dataclass(frozen=True, init=False, eq=False)
class Splits:
    """A data set's parts, which share their class names; `data.train` and `data.test` where the source has them.

    Raises:
        DataError: class names differ between the parts, or a part is asked for that does not exist.
    """

    parts: Mapping[str, ImageDataset]
    notes: tuple[str, ...]
    """What loading left out and converted, and how it read the names of files and folders, a line each."""

    def __init__(
        self, *, train: ImageDataset | None = None, test: ImageDataset | None = None, notes: Sequence[str] = ()
    ) -> None:
        given = {"train": train, "test": test}
        parts = {part: data for part, data in given.items() if data is not None}
        if not parts:
            raise DataError("a data set needs a train part or a test part")
        if len({data.class_names for data in parts.values()}) > 1:
            raise DataError(
                f"{' and '.join(data.name for data in parts.values())}: class names differ between the parts"
            )
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "notes", tuple(notes))

    @property
    def counts(self) -> tuple[str, ...]:
        """Images per class, a line a part."""
        return tuple(data.count_line(part) for part, data in self.parts.items())

    @property
    def report(self) -> tuple[str, ...]:
        """All that loading has to say: images per class of every part, and the notes."""
        return (*self.counts, *self.notes)

    @property
    def train(self) -> ImageDataset:
        """The part to train on."""
        return self._part("train")

    @property
    def test(self) -> ImageDataset:
        """The part to audit on, never used for selection."""
        return self._part("test")

    @property
    def only(self) -> ImageDataset:
        """The one part of a source without splits, such as a plain image folder.

        Raises:
            DataError: there are two parts.
        """
        if len(self.parts) > 1:
            raise DataError("the data set has a train and a test part, choose one")
        return next(iter(self.parts.values()))

    def _part(self, part: str) -> ImageDataset:
        if part not in self.parts:
            other = self.only
            raise DataError(
                f"{other.name} has no {part} part, only {len(other)} images of part {next(iter(self.parts))}"
            )
        return self.parts[part]


def load_dataset(
    name_or_path: str | Path, *, image_size: int | None = None, cache_dir: Path | str | None = None
) -> Splits:
    """Load a data set by its name in the catalogue, or from a path.

    A name is looked up as a folder under `ROBUSTFAIR_DATA`, then on the Hugging Face hub. A path is a folder saved by
    `datasets`, a folder of parquet files, an image folder (`<class>/...` or `<split>/<class>/...`), an `.npz`, or the
    parts that `robustfair data pack` wrote (their folder, or one of them), which come before all else in a folder; or
    the original files of CIFAR, MNIST and its kin, or Tiny-ImageNet. A validation part is the test part of sources that
    have no other with labels; a source without splits is all train part. What is left out, converted or guessed is
    warned of, a line each, and stands in `Splits.notes`; `Splits.report` has the images per class too.

    Args:
        name_or_path: "cifar10", "cifar10-c/gaussian_noise/3", "./my_images", ... A `Path` is never taken for a name.
        image_size: side in pixels; other images are scaled (bilinear) and cropped to the centre square. None keeps
            their size, except for office-home, whose images all differ (224).
        cache_dir: where decoded images are kept; by default `ROBUSTFAIR_CACHE`, `$XDG_CACHE_HOME/robustfair` or
            `~/.cache/robustfair`.

    Raises:
        UnknownNameError: no such name; shows the nearest ones.
        DataError: the source is missing, empty, corrupt, or can be read in two ways; its images differ in size and
            `image_size` is None.
        ConfigError: `image_size` is below 1.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError("data", "image_size", allowed="at least 1", got=image_size)
    source = find_source(name_or_path)
    size = source.entry.image_size if image_size is None and source.entry is not None else image_size
    parts, notes = _decode(source, size) if source.identity is None else _cached(source, size, cache_dir)
    notes = (*source.notes, *notes)
    for note in notes:
        warnings.warn(f"{source.name}: {note}", RobustFairWarning, stacklevel=2)
    return Splits(**parts, notes=notes)


Loaded = tuple[dict[str, ImageDataset], tuple[str, ...]]
"""The parts, and what decoding them left out or converted."""


def _cached(source: Source, size: int | None, cache_dir: Path | str | None) -> Loaded:
    """The source from its cache files, which are written if they are not whole."""
    root = read_path(cache_dir) if cache_dir is not None else cache.cache_root()
    identity = [source.entry.name if source.entry is not None else None, source.identity, size]
    paths = {part: cache.cache_path(root, source.name, part, identity) for part in _part_names(source)}
    stored = {part: found for part, path in paths.items() if (found := _read(path, source)) is not None}
    if stored:
        _, names, notes = next(iter(stored.values()))
        if set(names) == set(stored):
            return {part: data for part, (data, _, _) in stored.items()}, notes
    parts, notes = _decode(source, size)
    for part, data in parts.items():
        _write(paths[part], data, tuple(parts), notes)
    return parts, notes


def _part_names(source: Source) -> tuple[str, ...]:
    return ("train", "test") if _holds_out(source) else source.parts


def _holds_out(source: Source) -> bool:
    return source.entry is not None and source.entry.holdout > 0 and source.parts == ("train",)


def _decode(source: Source, image_size: int | None) -> Loaded:
    decoded = source.decode(image_size)
    entry = source.entry
    if entry is not None and len(decoded.class_names) != entry.num_classes:
        read = "; ".join(("", *source.notes, *decoded.notes))
        raise DataError(f"{source.name}: expected {entry.num_classes} classes, found {len(decoded.class_names)}{read}")
    if entry is not None and _holds_out(source):
        decoded = hold_out(decoded, entry.holdout)
    parts = {
        part: ImageDataset(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            class_names=decoded.class_names,
            name=source.name,
            augment=_default_augment(source),
            groups=decoded.groups,
            group_names=decoded.group_names,
        )
        for part, (images, labels) in decoded.parts.items()
    }
    return parts, decoded.notes


def _default_augment(source: Source) -> str:
    return source.entry.augment if source.entry is not None else "crop-flip"


def _write(path: Path, data: ImageDataset, parts: Sequence[str], notes: Sequence[str]) -> None:
    about = {"class_names": data.class_names, "groups": data.groups, "group_names": data.group_names}
    header = {"about": json.dumps(about | {"parts": parts, "notes": notes}), "fingerprint": data.fingerprint}
    cache.write(path, {"images": data.images, "labels": data.labels}, header)


def _read(path: Path, source: Source) -> tuple[ImageDataset, tuple[str, ...], tuple[str, ...]] | None:
    """The part in a cache file, all parts that were decoded with it, and the notes of that.

    None unless the file is whole and its content still has its fingerprint.
    """
    found = cache.read(path)
    if found is None:
        return None
    tensors, header = found
    try:
        about = json.loads(header["about"])
        data = ImageDataset(
            images=tensors["images"],
            labels=tensors["labels"],
            class_names=tuple(about["class_names"]),
            name=source.name,
            augment=_default_augment(source),
            groups=tuple(about["groups"]) if about["groups"] is not None else None,
            group_names=tuple(about["group_names"]),
        )
        parts, notes = tuple(about["parts"]), tuple(about["notes"])
    except (DataError, KeyError, TypeError, ValueError):
        return None
    return (data, parts, notes) if data.fingerprint == header.get("fingerprint") else None


def _each(counts: Sequence[int], n: int) -> int:
    """The most images of every class, as far as it has them, that are at most `n` together.

    >>> _each([100, 100, 4], 64), _each([5, 5], 10)
    (30, 5)
    """
    low, high = 1, max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(count, middle) for count in counts) <= n else (low, middle - 1)
    return low


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
