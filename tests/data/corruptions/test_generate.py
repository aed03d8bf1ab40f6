"""The 19 corruptions against loops over pixels and Pillow, and what all of them have in common."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from reference import corruptions as reference
from robustfair.data.corruptions import generate as corruptions
from robustfair.data.corruptions.filters import height_map, zoom, zoom_grid
from robustfair.data.corruptions.frost import frost_source
from robustfair.data.corruptions.generate import (
    MUD,
    PARAMETERS,
    WATER,
    Draws,
    corrupt,
    parameter_scale,
    parse_corruption,
)
from robustfair.data.corruptions.names import CORRUPTIONS, EXTRA, FAIR_TAT, SEVERITIES, STANDARD
from robustfair.errors import ConfigError, DataError, UnknownNameError
from robustfair.values import seeded_generator

FROST = Path(os.environ.get("ROBUSTFAIR_DATA", ""), "frost")
needs_frost = pytest.mark.skipif(not (FROST / "frost1.png").is_file(), reason="ROBUSTFAIR_DATA holds no frost")
CELLS = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
SHAPE = (3, 3, 9, 12)
"""Images that loops over pixels can afford, neither square nor even."""


def scenes(batch: int = 3, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """uint8 images with the spectrum of photographs: large shapes, some texture, every channel of its own."""
    side = 2 ** (max(height, width) - 1).bit_length()
    noise = torch.rand(batch * channels, side, side, generator=seeded_generator("cpu", "scenes", seed)) * 2 - 1
    maps = height_map(noise, 1.8)[:, :height, :width].view(batch, channels, height, width)
    return (maps * 255).to(torch.uint8)


def run(images: Tensor, name: str, severity: int, **options: object) -> Tensor:
    return corrupt(images, name, severity, index=torch.arange(len(images)), **options)  # type: ignore[arg-type]


def draws_of(images: Tensor, name: str, severity: int) -> Draws:
    """The numbers that `run` draws, once more."""
    return Draws(torch.arange(len(images)), torch.device("cpu"), 0, name, severity)


def check(found: Tensor, exact: np.ndarray) -> None:
    """`found` is `exact` (H, W, C) truncated to grey levels, where that is not within 0.02 of a whole one."""
    levels = exact.clip(0, 1) * 255
    difference = found.permute(1, 2, 0).numpy().astype(int) - np.floor(levels)
    near = np.abs(levels - np.rint(levels)) < 0.02
    assert np.abs(difference).max() <= 1
    assert not difference[~near].any()


def unit(image: Tensor) -> np.ndarray:
    """(H, W, C) float64 in [0, 1]."""
    return image.permute(1, 2, 0).double().numpy() / 255


# The tables


def test_the_lists_of_corruptions() -> None:
    assert CORRUPTIONS == STANDARD + EXTRA
    assert (len(STANDARD), len(EXTRA), len(FAIR_TAT), len(set(CORRUPTIONS))) == (15, 4, 18, 19)
    assert set(CORRUPTIONS) - set(FAIR_TAT) == {"glass_blur"}
    assert {*corruptions.PROCEDURES, "frost"} == set(CORRUPTIONS)


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
def test_every_corruption_has_a_row_of_parameters_a_severity(scale: str) -> None:
    table = PARAMETERS[scale]  # type: ignore[index]
    assert set(table) == set(CORRUPTIONS)
    for rows in table.values():
        assert len(rows) == 5
        assert len({len(row) for row in rows}) == 1


def test_the_side_chooses_the_parameters() -> None:
    assert parameter_scale(64, 64) == "cifar"
    assert parameter_scale(65, 20) == "imagenet"
    small = scenes(1)
    assert torch.equal(run(small, "contrast", 3), run(small, "contrast", 3, scale="cifar"))
    assert not torch.equal(run(small, "contrast", 3), run(small, "contrast", 3, scale="imagenet"))
    large = scenes(1, height=66, width=40)
    assert torch.equal(run(large, "contrast", 3), run(large, "contrast", 3, scale="imagenet"))


# Against the reference


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_is_the_formula_on_its_draws(severity: int, scale: str) -> None:
    images = scenes(*SHAPE)
    table = PARAMETERS[scale]  # type: ignore[index]
    for name in ("gaussian_noise", "speckle_noise"):
        (std,) = table[name][severity - 1]
        noise = draws_of(images, name, severity).normal(*SHAPE[1:], std=std)
        for image, part, got in zip(images, noise, run(images, name, severity, scale=scale), strict=True):
            x, n = unit(image), part.permute(1, 2, 0).double().numpy()
            check(got, x + n if name == "gaussian_noise" else x + x * n)
    (amount,) = table["impulse_noise"][severity - 1]
    found = run(scenes(40), "impulse_noise", severity, scale=scale)
    changed = found != scenes(40)
    assert float(changed.float().mean()) == pytest.approx(amount, rel=0.1)
    assert set(found[changed].tolist()) == {0, 255}
    assert float((found[changed] == 255).float().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_photons(severity: int) -> None:
    (photons,) = PARAMETERS["cifar"]["shot_noise"][severity - 1]
    images = torch.full((200, 1, 16, 16), 102, dtype=torch.uint8)
    found = run(images, "shot_noise", severity).double() / 255
    assert float(found.mean()) == pytest.approx(0.4 - 0.5 / 255, abs=0.003)
    assert float(found.var()) == pytest.approx(0.4 / photons, rel=0.05)


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blurs_are_those_of_loops(severity: int, scale: str) -> None:
    images = scenes(*SHAPE)[:1]
    table = PARAMETERS[scale]  # type: ignore[index]
    (sigma,) = table["gaussian_blur"][severity - 1]
    check(
        run(images, "gaussian_blur", severity, scale=scale)[0],
        reference.each_plane(reference.gaussian_blur, unit(images[0]), sigma),
    )
    kernel = reference.disk(*table["defocus_blur"][severity - 1])
    check(
        run(images, "defocus_blur", severity, scale=scale)[0],
        reference.each_plane(reference.correlate, unit(images[0]), kernel),
    )
    radius, sigma = table["motion_blur"][severity - 1]
    angle = float(draws_of(images, "motion_blur", severity).uniform(low=-45, high=45)[0])
    check(
        run(images, "motion_blur", severity, scale=scale)[0],
        reference.each_plane(reference.motion_blur, unit(images[0]), int(radius), sigma, angle),
    )


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_is_that_of_loops(severity: int) -> None:
    images = scenes(*SHAPE)
    sigma, reach, iterations = PARAMETERS["cifar"]["glass_blur"][severity - 1]
    shape = (int(iterations), SHAPE[2] - 2, SHAPE[3] - 2, 2)
    shifts = draws_of(images, "glass_blur", severity).integers(*shape, low=-1, high=1).numpy().astype(int)
    for image, shift, got in zip(images, shifts, run(images, "glass_blur", severity), strict=True):
        soft = reference.each_plane(reference.gaussian_blur, unit(image), sigma)
        walked = reference.glass_walk(np.floor(soft * 255 + 2.0**-8) / 255, shift, int(reach))
        check(got, reference.each_plane(reference.gaussian_blur, walked, sigma))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_a_mean_of_zooms(severity: int) -> None:
    from scipy import ndimage

    image = scenes(1)[0]
    total = unit(image)
    factors = np.arange(1, *PARAMETERS["cifar"]["zoom_blur"][severity - 1])
    for factor in factors:
        inner = int(np.ceil(32 / factor))
        first = (32 - inner) // 2
        grown = ndimage.zoom(unit(image)[first : first + inner, first : first + inner], (factor, factor, 1), order=1)
        trim = (len(grown) - 32) // 2
        total = total + grown[trim : trim + 32, trim : trim + 32]
    check(run(image[None], "zoom_blur", severity)[0], total / (len(factors) + 1))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_falls_on_a_whitened_image(severity: int) -> None:
    images = scenes(*SHAPE)
    loc, scale, factor, threshold, radius, sigma, keep = PARAMETERS["cifar"]["snow"][severity - 1]
    draws = draws_of(images, "snow", severity)
    layers = draws.normal(1, *SHAPE[2:], mean=loc, std=scale)
    angles = draws.uniform(low=-135, high=-45)
    falls = zoom(layers, zoom_grid(SHAPE[2], factor), zoom_grid(SHAPE[3], factor)).double().numpy()
    for image, (fall,), angle, got in zip(images, falls, angles, run(images, "snow", severity), strict=True):
        flakes = np.where(fall < threshold, 0, fall).clip(0, 1)
        flakes = reference.motion_blur(flakes, int(radius), sigma, float(angle))[..., None]
        x = unit(image)
        grey = (x @ [0.299, 0.587, 0.114])[..., None]
        check(got, keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_is_a_height_map_over_the_image(severity: int) -> None:
    images = scenes(*SHAPE)
    strength, decay = PARAMETERS["cifar"]["fog"][severity - 1]
    noise = draws_of(images, "fog", severity).uniform(16, 16, low=-1, high=1)
    for image, part, got in zip(images, noise, run(images, "fog", severity), strict=True):
        heights = reference.height_map(part.double().numpy(), decay)
        check(got, reference.fog(unit(image), heights, strength))


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours_are_those_of_hsv(severity: int, scale: str) -> None:
    image = scenes(*SHAPE)[0]
    image[:, 0, 0] = 0
    image[:, 0, 1] = 200
    image[:, 0, 2] = torch.tensor([255, 0, 0])
    table = PARAMETERS[scale]  # type: ignore[index]
    for name in ("brightness", "saturate"):
        exact = getattr(reference, name)(unit(image), *table[name][severity - 1])
        check(run(image[None], name, severity, scale=scale)[0], exact)
    check(
        run(image[None], "contrast", severity, scale=scale)[0],
        reference.each_plane(reference.contrast, unit(image), *table["contrast"][severity - 1]),
    )


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_warps_and_bends(severity: int) -> None:
    images = scenes(*SHAPE)[:2]
    alpha, sigma, affine = (9 * value for value in PARAMETERS["cifar"]["elastic_transform"][severity - 1])
    draws = draws_of(images, "elastic_transform", severity)
    shifts = draws.uniform(3, 2, low=-affine, high=affine).double().numpy()
    fields = draws.uniform(2, *SHAPE[2:], low=-1, high=1).double().numpy()
    for image, shift, field, got in zip(
        images, shifts, fields, run(images, "elastic_transform", severity), strict=True
    ):
        right, down = (alpha * reference.gaussian_blur(plane, sigma, 3, "reflect") for plane in field)
        warped = reference.each_plane(reference.warp, unit(image), shift)
        check(got, reference.each_plane(reference.bend, warped, right, down))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_and_jpeg_are_those_of_pillow(severity: int, channels: int) -> None:
    image = scenes(1, channels, 33, 40)[0]
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    (factor,) = PARAMETERS["cifar"]["pixelate"][severity - 1]
    small = picture.resize((int(40 * factor), int(33 * factor)), Image.Resampling.BOX)
    expected = np.asarray(small.resize((40, 33), Image.Resampling.BOX)).reshape(33, 40, channels)
    np.testing.assert_array_equal(run(image[None], "pixelate", severity)[0].permute(1, 2, 0).numpy(), expected)
    (quality,) = PARAMETERS["cifar"]["jpeg_compression"][severity - 1]
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=int(quality))
    expected = np.asarray(Image.open(stored)).reshape(33, 40, channels)
    found = run(image[None], "jpeg_compression", severity)[0]
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_is_water_then_mud(severity: int) -> None:
    images = scenes(2, 3, 15, 20)
    loc, scale, sigma, threshold, strength, kind = PARAMETERS["cifar"]["spatter"][severity - 1]
    assert kind == (severity > 3)
    layers = draws_of(images, "spatter", severity).normal(1, 15, 20, mean=loc, std=scale)
    for image, layer, got in zip(images, layers, run(images, "spatter", severity), strict=True):
        soft = reference.gaussian_blur(layer[0].double().numpy(), sigma)
        if kind == 0:
            levels = np.floor(np.where(soft < threshold, 0, soft).clip(0, 1) * 255)
            check(got, unit(image) + reference.water(levels, strength)[..., None] * np.array(WATER))
        else:
            mud = reference.gaussian_blur((soft > threshold).astype(float), strength)
            mud = np.where(mud < 0.8, 0, mud)[..., None]
            check(got, unit(image) * (1 - mud) + mud * np.array(MUD))


# Frost


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Five pictures of 90x70 pixels, each of one colour, and one that the generator leaves out."""
    for number in range(1, 7):
        Image.new("RGB", (90, 70), (40 * number, 30 * number, 20)).save(tmp_path / f"frost{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_frost_adds_a_crop_of_one_of_five_pictures(textures: Path) -> None:
    images = torch.full((60, 3, 16, 12), 100, dtype=torch.uint8)
    found = run(images, "frost", 3, frost=textures)
    weight, frost_weight, _ = PARAMETERS["cifar"]["frost"][2]
    expected = {
        tuple(int(weight * 100 + frost_weight * value + 1e-3) for value in (40 * number, 30 * number, 20))
        for number in range(1, 6)
    }
    assert {tuple(pixel) for pixel in found.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} == expected


def test_frost_takes_every_fifth_pixel_of_a_picture_for_small_images(tmp_path: Path) -> None:
    levels = np.add.outer(2 * np.arange(60), np.arange(60)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "one.png")
    images = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    found = run(images, "frost", 1, frost=tmp_path)[0, 0].numpy()
    np.testing.assert_array_equal(found, np.floor(levels[2::5, 2::5] * 0.2 + 1e-3))
    found = run(images, "frost", 1, frost=tmp_path, scale="imagenet")[0, 0].numpy().astype(int)
    assert abs(int(found[5, 5]) - int(found[5, 0])) == 2


def test_frost_grows_pictures_that_are_too_small(textures: Path) -> None:
    assert run(scenes(2, height=100, width=150), "frost", 2, frost=textures).shape == (2, 3, 100, 150)


def test_frost_says_where_it_comes_from(textures: Path, tmp_path: Path) -> None:
    assert frost_source(None) == "synthetic ice crystals"
    assert frost_source(textures) == f"5 pictures of {textures}"
    with pytest.raises(DataError, match=r"frost: '.*nowhere' is not a folder"):
        frost_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"frost: '.*empty' holds no pictures"):
        run(scenes(1), "frost", 1, frost=tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"frost: .*a\.png cannot be decoded"):
        run(scenes(1), "frost", 1, frost=tmp_path / "broken")


@needs_frost
@pytest.mark.parametrize("side", [32, 224])
def test_synthetic_frost_changes_images_as_much_as_photographs_do(side: int) -> None:
    images = scenes(40, height=side, width=side)
    for severity in SEVERITIES if side == 32 else (3,):
        change = [
            float((run(images, "frost", severity, frost=frost).float() - images).abs().mean())
            for frost in (FROST, None)
        ]
        assert change[1] == pytest.approx(change[0], rel=0.15)


# What all of them have in common


def mean_change(name: str, images: Tensor, scale: str) -> list[float]:
    return [float((run(images, name, severity, scale=scale).float() - images).abs().mean()) for severity in SEVERITIES]


NOT_MONOTONE: dict[str, dict[str, str]] = {
    "cifar": {
        "glass_blur": "the second and third severity blur more and move as much",
        "frost": "images fade from the third severity on",
        "elastic_transform": "the affine part shrinks",
        "spatter": "mud follows water",
        "saturate": "falls towards grey, then rises",
        "motion_blur": "the fourth severity is longer and no wider",
    },
    "imagenet": {
        "glass_blur": "the second and fourth severity walk less often",
        "elastic_transform": "the affine part shrinks",
        "frost": "images fade",
        "snow": "the third severity has larger flakes, and fewer",
        "fog": "the last three severities weigh about the same",
        "spatter": "mud follows water",
        "saturate": "falls towards grey, then rises",
    },
}
"""Where the parameters of the benchmark do not rise, and why."""


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_changes_more(name: str, scale: str) -> None:
    change = mean_change(name, scenes(96) if scale == "cifar" else scenes(24, 3, 96, 96), scale)
    assert min(change) > 0.2
    if name not in NOT_MONOTONE[scale]:
        assert change == sorted(change)
    elif name not in ("elastic_transform", "saturate"):
        assert change[0] < change[4]


def test_jpeg_changes_more_pixels_at_a_lower_quality() -> None:
    images = scenes(8)
    changed = [(run(images, "jpeg_compression", severity) != images).sum() for severity in (1, 5)]
    assert changed[0] < changed[1]


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    "name",
    [
        "gaussian_blur",
        "glass_blur",
        "defocus_blur",
        "motion_blur",
        "zoom_blur",
        "contrast",
        "elastic_transform",
        "pixelate",
    ],
)
def test_an_image_of_one_colour_stays_as_it_is(name: str, scale: str) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([levels, levels.flip(0), levels.roll(7)], 1)[..., None, None].expand(-1, -1, 10, 9)
    for severity in SEVERITIES:
        assert torch.equal(run(images, name, severity, scale=scale), images)


@given(
    cell=st.sampled_from(CELLS),
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    scale=st.sampled_from(["auto", "imagenet"]),
)
@settings(max_examples=80, deadline=None)
def test_any_size_keeps_its_shape_and_grey_stays_grey(
    cell: tuple[str, int], channels: int, height: int, width: int, scale: str
) -> None:
    images = scenes(2, channels, height, width)
    before = images.clone()
    found = run(images, *cell, scale=scale)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    assert torch.equal(images, before)


def test_colours_on_grey_images_are_their_luminance() -> None:
    images = scenes(4, 1)
    in_colour = images.expand(-1, 3, -1, -1)
    for name, severity in (("frost", 3), ("spatter", 2), ("spatter", 5), ("fog", 2), ("snow", 2), ("brightness", 3)):
        grey, colour = run(images, name, severity).float(), run(in_colour, name, severity).float()
        luminance = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        unclipped = (colour.amax(1, keepdim=True) < 255) & (grey < 255)
        assert float((grey - luminance)[unclipped].abs().max()) < 2


@pytest.mark.parametrize(("name", "severity"), [(name, 1 + i % 5) for i, name in enumerate(CORRUPTIONS)])
def test_an_image_is_corrupted_alike_in_any_batch(name: str, severity: int) -> None:
    images, index = scenes(7, seed=1), torch.tensor([4, 0, 9000, 17, 2, 3, 1])
    whole = corrupt(images, name, severity, index=index, seed=5)
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
    shuffled = corrupt(images[order], name, severity, index=index[order], seed=5)
    alone = [corrupt(images[i : i + 1], name, severity, index=index[i : i + 1], seed=5) for i in range(7)]
    assert torch.equal(whole[order], shuffled)
    assert torch.equal(whole, torch.cat(alone))


DRAWN = [
    *(name for name in STANDARD if name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate")),
    "speckle_noise",
    "spatter",
]
DRAWN.remove("jpeg_compression")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_depend_on_seed_index_and_severity(name: str) -> None:
    images = scenes(1).expand(2, -1, -1, -1)
    first = run(images, name, 5)
    assert torch.equal(first, run(images, name, 5))
    assert torch.equal(first[0], first[1]) == (name not in DRAWN)
    assert torch.equal(first, run(images, name, 5, seed=1)) == (name not in DRAWN)


def test_severities_and_corruptions_draw_from_streams_of_their_own() -> None:
    cells = [("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1)]
    drawn = [draws_of(scenes(1), *cell).normal(64) for cell in cells]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.cat([drawn[a], drawn[b]]))[0, 1])) < 0.5


def test_no_images_give_no_images() -> None:
    for name in CORRUPTIONS:
        assert run(torch.empty(0, 3, 32, 32, dtype=torch.uint8), name, 1).shape == (0, 3, 32, 32)


# Wrong input


@pytest.mark.parametrize("name", ["gaussian-noise", "Gaussian Noise", " gaussian_noise"])
def test_names_in_other_spellings(name: str) -> None:
    assert parse_corruption(name) == "gaussian_noise"


def test_an_unknown_corruption_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown corruption 'gausian_noise': did you mean gaussian_noise"):
        run(scenes(1), "gausian_noise", 1)


@pytest.mark.parametrize("severity", [0, 6, 2.0, True, "3"])
def test_a_severity_is_one_of_five(severity: object) -> None:
    with pytest.raises(ConfigError, match="corruption: severity must be a whole number from 1 to 5, got"):
        run(scenes(1), "fog", severity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 4, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 7, 32, dtype=torch.uint8),
    ],
)
def test_images_that_cannot_be_corrupted_are_refused(images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"corruption: images must be uint8 \(B, C, H, W\) with 1 or 3 channels"):
        run(images, "fog", 1)


def test_an_index_an_image_and_a_known_scale() -> None:
    with pytest.raises(ConfigError, match=r"corruption: index must be whole numbers \(2,\), got \(3,\)"):
        corrupt(scenes(2), "fog", 1, index=torch.arange(3))
    with pytest.raises(ConfigError, match="corruption: scale must be auto or cifar or imagenet, got 'large'"):
        run(scenes(1), "fog", 1, scale="large")
