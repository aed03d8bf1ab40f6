from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import augment as reference
from robustfair.data.augment.crops import AUGMENTATIONS, CropFlip, Identity, parse_augmentation
from robustfair.errors import ConfigError, UnknownNameError
from robustfair.values import seeded_generator


def random_images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    shape = (batch, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    padding=st.integers(0, 3),
    pad_mode=st.sampled_from(["reflect", "zero"]),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_equals_padding_cropping_and_mirroring_one_by_one(
    batch: int, channels: int, height: int, width: int, padding: int, pad_mode: str, flip: bool, seed: int
) -> None:
    images = random_images(batch, channels, height, width)
    augment = CropFlip(padding=padding, pad_mode=pad_mode, flip=flip)
    top, left, mirrored = augment.draw(batch, seeded_generator("cpu", seed))
    expected = reference.crop_flip(images.numpy(), top.tolist(), left.tolist(), mirrored.tolist(), padding, pad_mode)
    got = augment(images, seeded_generator("cpu", seed))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected)


def test_zero_padding_may_exceed_the_image() -> None:
    images = random_images(6, 3, 4, 4)
    augment = CropFlip(padding=6, pad_mode="zero")
    drawn = [part.tolist() for part in augment.draw(6, seeded_generator("cpu", 0))]
    got = augment(images, seeded_generator("cpu", 0))
    np.testing.assert_array_equal(got.numpy(), reference.crop_flip(images.numpy(), *drawn, 6, "zero"))


def test_offsets_and_mirrors_are_uniform() -> None:
    draws = 90_000
    top, left, mirrored = CropFlip(padding=4).draw(draws, seeded_generator("cpu", 0))
    pairs = torch.bincount(top * 9 + left, minlength=81).double()
    expected = draws / 81
    chi_square = ((pairs - expected) ** 2 / expected).sum().item()
    assert chi_square < 124.8, "the 99.9 % quantile of chi-square with 80 degrees of freedom"
    assert abs(mirrored.double().mean().item() - 0.5) < 4 * 0.5 / draws**0.5


def test_crop_never_mirrors() -> None:
    crop = AUGMENTATIONS["crop"]
    assert isinstance(crop, CropFlip)
    assert not crop.draw(1000, seeded_generator("cpu", 0))[2].any()


@pytest.mark.parametrize("pad_mode", ["reflect", "zero"])
def test_all_pixels_come_from_the_source_image(pad_mode: str) -> None:
    images = random_images(16, 3, 8, 8)
    for image, out in zip(images, CropFlip(pad_mode=pad_mode)(images, seeded_generator("cpu", 1)), strict=True):
        allowed = set(image.flatten().tolist()) | ({0} if pad_mode == "zero" else set())
        assert set((out * 255).round().int().flatten().tolist()) <= allowed


def test_same_generator_state_gives_the_same_images_and_the_source_stays() -> None:
    images = random_images(8, 3, 8, 8)
    before = images.clone()
    augment = CropFlip()
    first, again = (augment(images, seeded_generator("cpu", 3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, seeded_generator("cpu", 4)))
    assert torch.equal(images, before)


def test_identity_divides_by_255_and_draws_nothing() -> None:
    images = random_images(4, 1, 3, 3)
    generator = seeded_generator("cpu", 0)
    state = generator.get_state()
    np.testing.assert_array_equal(Identity()(images, generator).numpy(), images.numpy().astype(np.float32) / 255)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_synchronisation_on_the_gpu() -> None:
    images = random_images(8, 3, 8, 8).cuda()
    generator = seeded_generator("cuda", 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pad_mode in ("reflect", "zero"):
            out = CropFlip(pad_mode=pad_mode)(images, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device.type == "cuda"


def test_padding_larger_than_a_reflection() -> None:
    with pytest.raises(ConfigError, match=r"crop: padding must be below the image side to reflect \(4x8\), got 4"):
        CropFlip(padding=4)(random_images(2, 1, 4, 8), seeded_generator("cpu", 0))


@pytest.mark.parametrize(("field", "value"), [("padding", -1), ("pad_mode", "edge")])
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"crop: {field} must be"):
        CropFlip(**{field: value})


def test_names_are_read_in_any_spelling() -> None:
    assert parse_augmentation("Crop_Flip") is AUGMENTATIONS["crop-flip"]
    assert parse_augmentation("none") == Identity()
    with pytest.raises(UnknownNameError, match="unknown augmentation 'crop-flop': did you mean crop-flip"):
        parse_augmentation("crop-flop")
