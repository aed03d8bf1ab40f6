from __future__ import annotations

import pytest
import torch

from robustfair.data.augment.crops import CropFlip
from robustfair.data.datasets import ImageDataset
from robustfair.data.loader import Loader, evaluation_batches
from robustfair.errors import ConfigError, DataError, UnknownNameError
from robustfair.values import derive_seed


def make(count: int, channels: int = 3) -> ImageDataset:
    shape = (count, channels, 8, 8)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(images=images, labels=torch.arange(count) % 3, class_names=("a", "b", "c"))


def test_an_epoch_repeats_exactly_from_its_number() -> None:
    loader = Loader(make(50), 16, augment="crop-flip", seed=5)
    in_order = {epoch: list(loader.epoch(epoch)) for epoch in range(3)}
    torch.manual_seed(123)
    replay = list(Loader(make(50), 16, augment="crop-flip", seed=5).epoch(2))
    for first, again in zip(in_order[2], replay, strict=True):
        assert torch.equal(first.x, again.x)
        assert torch.equal(first.index, again.index)
        assert first.seed == again.seed


def test_every_image_once_in_another_order_each_epoch_and_seed() -> None:
    orders = [
        torch.cat([batch.index for batch in Loader(make(50), 16, augment="none", seed=seed).epoch(epoch)]).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_holds_its_rows_labels_and_seed() -> None:
    data = make(20)
    for position, batch in enumerate(Loader(data, 8, augment="none", seed=3).epoch(4)):
        assert torch.equal(batch.x, data.images[batch.index].float() / 255)
        assert torch.equal(batch.y, data.labels[batch.index])
        assert batch.seed == derive_seed(3, 4, position)


def test_augmentation_draws_from_the_stream_of_the_batch() -> None:
    data = make(20)
    augment = CropFlip(padding=2)
    for batch in Loader(data, 8, augment=augment, seed=0).epoch(1):
        assert torch.equal(batch.x, augment(data.images[batch.index], batch.rng("augment")))


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
        (3, 8, [3]),
    ],
)
def test_batch_sizes(count: int, size: int, sizes: list[int]) -> None:
    loader = Loader(make(count), size, augment="none", seed=0)
    assert [len(batch.y) for batch in loader.epoch(0)] == sizes
    assert loader.steps_per_epoch == len(sizes)


def test_memory_format_follows_the_channels_unless_given() -> None:
    def first(channels: int, memory_format: torch.memory_format | None) -> torch.Tensor:
        loader = Loader(make(6, channels), 4, augment="none", seed=0, memory_format=memory_format)
        return next(loader.epoch(0)).x

    assert first(3, None).is_contiguous(memory_format=torch.channels_last)
    assert not first(3, None).is_contiguous()
    assert first(1, None).is_contiguous()
    assert first(3, torch.contiguous_format).is_contiguous()
    assert torch.equal(first(3, None), first(3, torch.contiguous_format))


def test_evaluation_is_in_order_and_the_same_every_time() -> None:
    data = make(10)
    batches = list(evaluation_batches(data, 4))
    assert [len(batch.y) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.x for batch in batches]), data.images.float() / 255)
    assert torch.equal(torch.cat([batch.y for batch in batches]), data.labels)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(10))
    assert [batch.seed for batch in batches] == [derive_seed("evaluate", position) for position in range(3)]


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="loader: batch_size must be at least 1, got 0"):
        Loader(make(3), 0, augment="none", seed=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        next(evaluation_batches(make(3), 0))
    with pytest.raises(UnknownNameError, match="did you mean crop"):
        Loader(make(3), 2, augment="crob", seed=0)
    with pytest.raises(DataError, match="no images to train on"):
        Loader(make(3).subset([]), 2, augment="none", seed=0)
