"""Batches from a data set that is resident on a device, every epoch replayable from its number alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from robustfair.data.augment.crops import Augmentation, parse_augmentation, to_unit
from robustfair.data.datasets import ImageDataset
from robustfair.errors import ConfigError, DataError
from robustfair.values import Batch, derive_seed, seeded_generator


@dataclass(frozen=True, eq=False)
class Loader:
    """Shuffled, augmented batches.

    The order of an epoch is keyed by (seed, epoch), a batch's seed by (seed, epoch, position), and the augmentation
    draws from the stream `batch.rng("augment")`: an epoch repeats exactly, whatever ran before it.

    A last batch of one image joins the batch before it, since batch norm cannot train on a single value; only a data
    set of one image, or batches of one, give such a batch.

    Attributes:
        dataset: the images, on the device that batches shall be on.
        batch_size: B.
        augment: an augmentation or its name.
        seed: of the run.
        memory_format: of `x`; None is `torch.channels_last` from three channels on, else contiguous.

    Raises:
        DataError: the data set is empty.
        ConfigError: `batch_size` is below 1.
        UnknownNameError: no augmentation has this name.
    """

    dataset: ImageDataset
    batch_size: int
    _: KW_ONLY
    augment: Augmentation | str
    seed: int
    memory_format: torch.memory_format | None = None

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        if len(self.dataset) == 0:
            raise DataError(f"{self.dataset.name}: no images to train on")
        self._augmentation()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self._bounds())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch number `epoch`."""
        data, augment = self.dataset, self._augmentation()
        shuffle = seeded_generator("cpu", self.seed, "order", epoch)
        order = torch.randperm(len(data), generator=shuffle).to(data.device)
        for position, (start, stop) in enumerate(self._bounds()):
            index = order[start:stop]
            seed = derive_seed(self.seed, epoch, position)
            x = augment(data.images[index], seeded_generator(data.device, seed, "augment"))
            yield Batch(x=_as_format(x, self.memory_format), y=data.labels[index], index=index, seed=seed)

    def _augmentation(self) -> Augmentation:
        return parse_augmentation(self.augment) if isinstance(self.augment, str) else self.augment

    def _bounds(self) -> list[tuple[int, int]]:
        bounds = _slices(len(self.dataset), self.batch_size)
        last = bounds[-1][1] - bounds[-1][0]
        if last == 1 and self.batch_size > 1 and len(bounds) > 1:
            return [*bounds[:-2], (bounds[-2][0], bounds[-1][1])]
        return bounds


def evaluation_batches(
    dataset: ImageDataset, batch_size: int, *, memory_format: torch.memory_format | None = None
) -> Iterator[Batch]:
    """All images in order, as they are; the seed of a batch depends on its position alone.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    _check_batch_size(batch_size)
    for position, (start, stop) in enumerate(_slices(len(dataset), batch_size)):
        yield Batch(
            x=_as_format(to_unit(dataset.images[start:stop]), memory_format),
            y=dataset.labels[start:stop],
            index=torch.arange(start, stop, device=dataset.device),
            seed=derive_seed("evaluate", position),
        )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError("loader", "batch_size", allowed="at least 1", got=batch_size)


def _slices(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _as_format(x: Tensor, memory_format: torch.memory_format | None) -> Tensor:
    if memory_format is None:
        memory_format = torch.channels_last if x.shape[1] >= 3 else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)
