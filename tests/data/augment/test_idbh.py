"""IDBH and CropShift against Pillow and plain loops, image by image, and the distributions of their draws."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import augment as reference
from robustfair.data.augment.crops import AUGMENTATIONS, parse_augmentation
from robustfair.data.augment.idbh import (
    CHOICES,
    IDBH,
    OPERATIONS,
    CropShift,
    Draws,
    Shifts,
    apply,
    crop_shift,
    first_fit,
)
from robustfair.data.datasets import ImageDataset
from robustfair.data.loader import Loader
from robustfair.errors import ConfigError
from robustfair.values import seeded_generator

SHIFTS = ("lost_columns", "lost_rows", "crop_left", "crop_top", "cut_left", "cut_top")
RECTANGLE = ("top", "left", "rows", "columns")
VERSIONS = ("idbh", "idbh-strong", "idbh-svhn")
SIZES = [(32, 32), (28, 28), (31, 45), (64, 20), (3, 5), (2, 2), (1, 7)]


def pictures(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise, one level, a narrow range, black and white, soft blobs, black above noise, in turn; uint8."""
    rng = np.random.default_rng(seed)
    shape = (channels, height, width)
    out = []
    for number in range(count):
        low, high = sorted(rng.integers(0, 256, 2))
        kind = number % 6
        if kind == 1:
            image = np.broadcast_to(rng.integers(0, 256, (channels, 1, 1)), shape)
        elif kind == 2:
            image = rng.integers(low, high + 1, shape)
        elif kind == 3:
            image = 255 * rng.integers(0, 2, shape)
        elif kind == 4:
            image = (rng.normal(0, 8, shape).cumsum(2) + 128).clip(0, 255)
        else:
            image = rng.integers(0, 256, shape)
        image = image.astype(np.uint8)
        if kind == 5:
            image[:, : height // 3] = 0
        out.append(image)
    return torch.from_numpy(np.stack(out))


def still(count: int) -> Shifts:
    """Draws that leave every image where it is."""
    none = torch.zeros(count, dtype=torch.int64)
    return Shifts(mirrored=none.bool(), **dict.fromkeys(SHIFTS, none))


def only(operation: str, strength: torch.Tensor, upright: torch.Tensor) -> Draws:
    """Draws of one operation and nothing else."""
    none = torch.zeros(len(strength), dtype=torch.int64)
    return Draws(
        shifts=still(len(strength)),
        operation=none + OPERATIONS.index(operation),
        strength=strength.double(),
        upright=upright,
        **dict.fromkeys(RECTANGLE, none),
    )


def unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def check_operation(images: torch.Tensor, operation: str, strength: torch.Tensor, upright: torch.Tensor) -> None:
    """Every image, bit for bit, as Pillow makes it."""
    found = apply(images, only(operation, strength, upright))
    for got, image, number, axis in zip(
        found.numpy(), images.numpy(), strength.tolist(), upright.tolist(), strict=True
    ):
        np.testing.assert_array_equal(got, unit(reference.colour_shape(image, operation, number, axis)))


def strengths(operation: str, count: int, seed: int = 0) -> torch.Tensor:
    """Both ends of the wider range and numbers between them, in turn with either sign where a sign is drawn."""
    _, low, high = CHOICES["shape"][operation]
    drawn = torch.empty(count, dtype=torch.float64).uniform_(low, high, generator=seeded_generator("cpu", seed))
    drawn[:2] = torch.tensor([low, high])
    if operation == "rotation":
        drawn.round_()
    if operation in ("shear", "rotation"):
        drawn *= 1 - 2 * (torch.arange(count) % 2)
    return drawn


def reference_shift(images: torch.Tensor, shifts: Shifts) -> np.ndarray:
    drawn = {name: getattr(shifts, name).tolist() for name in ("mirrored", *SHIFTS)}
    each = [dict(zip(drawn, values, strict=True)) for values in zip(*drawn.values(), strict=True)]
    return np.stack([reference.crop_shift(image, **one) for image, one in zip(images.numpy(), each, strict=True)])


def reference_idbh(images: torch.Tensor, draws: Draws) -> Iterator[np.ndarray]:
    for number, image in enumerate(reference_shift(images, draws.shifts)):
        operation = OPERATIONS[int(draws.operation[number])]
        strength, upright = float(draws.strength[number]), bool(draws.upright[number])
        rectangle = [int(getattr(draws, name)[number]) for name in RECTANGLE]
        yield reference.erase(unit(reference.colour_shape(image, operation, strength, upright)), *rectangle)


# Operations


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_an_operation_is_pillows_bit_for_bit(operation: str, channels: int, size: tuple[int, int]) -> None:
    images = pictures(96, channels, *size)
    check_operation(images, operation, strengths(operation, 96), torch.arange(96) % 3 == 0)


@pytest.mark.parametrize("operation", ["saturation", "brightness", "contrast", "sharpness"])
def test_blends_of_all_levels_at_many_factors(operation: str) -> None:
    levels = torch.randperm(3 * 256, generator=seeded_generator("cpu", 0)).remainder(256).to(torch.uint8)
    images = levels.view(1, 3, 16, 16).expand(600, -1, -1, -1)
    factors = strengths(operation, 600, seed=1)
    factors[2] = 1
    check_operation(images, operation, factors, torch.zeros(600, dtype=torch.bool))


def test_grey_of_many_colours() -> None:
    line = torch.arange(0, 256, 5)
    colours = torch.cartesian_prod(line, line, line).to(torch.uint8)
    images = colours.T.reshape(1, 3, 52, 52 * 52)
    check_operation(images, "saturation", torch.tensor([0.1]), torch.tensor([False]))


@pytest.mark.parametrize("operation", ["autocontrast", "equalise"])
def test_tables_of_every_range_of_levels(operation: str) -> None:
    """Both ends from the whole range; the counts of few pixels round each way."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(0, 256, (800, 2)), 1)
    images = np.stack([rng.integers(low, high + 1, (1, 17, 31)) for low, high in ends]).astype(np.uint8)
    check_operation(torch.from_numpy(images), operation, torch.ones(800), torch.zeros(800, dtype=torch.bool))


def test_equalising_may_exceed_the_range_and_is_cut_off() -> None:
    """With a step of 1 the table would reach 400."""
    image = torch.zeros(1, 1, 1, 401, dtype=torch.uint8)
    image[..., 400] = 7
    check_operation(image, "equalise", torch.ones(1), torch.tensor([False]))
    assert apply(image, only("equalise", torch.ones(1), torch.tensor([False]))).amax() == 1


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (33, 47), (96, 64)])
def test_every_angle(size: tuple[int, int]) -> None:
    degrees = torch.cat([torch.arange(1, 31), -torch.arange(1, 31)])
    check_operation(pictures(60, 1, *size), "rotation", degrees, torch.zeros(60, dtype=torch.bool))


def test_a_shear_keeps_the_centre_of_the_axis_that_slants() -> None:
    """Along x each row moves by its height over the middle row, so that the two halves go opposite ways."""
    images = torch.zeros(2, 1, 8, 20, dtype=torch.uint8)
    images[..., 10] = 255
    found = apply(images, only("shear", torch.tensor([0.35, -0.35]), torch.tensor([False, False])))
    assert found[0, 0].argmax(1).tolist() == [11, 11, 11, 10, 10, 9, 9, 9]
    assert found[1, 0].argmax(1).tolist() == [9, 9, 9, 10, 10, 11, 11, 11]


# CropShift


@given(
    batch=st.integers(1, 6),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(6, 12),
    width=st.integers(6, 12),
    span=st.tuples(st.integers(0, 5), st.integers(0, 6)).map(sorted),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_crop_shift_equals_padding_the_crop_and_cutting_a_window(
    batch: int, channels: int, height: int, width: int, span: list[int], flip: bool, seed: int
) -> None:
    images = pictures(batch, channels, height, width, seed)
    augment = CropShift(low=span[0], high=span[1], flip=flip)
    shifts = augment.draw(batch, seeded_generator("cpu", seed))
    expected = reference_shift(images, shifts)
    np.testing.assert_array_equal(crop_shift(images, shifts).numpy(), expected)
    got = augment(images, seeded_generator("cpu", seed))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), unit(expected))


def chi_square(values: torch.Tensor, count: int) -> float:
    """Of whole numbers that should be uniform on 0 to count - 1, and that take no other value."""
    counts = torch.bincount(values, minlength=count).double()
    assert len(counts) == count
    expected = len(values) / count
    return ((counts - expected) ** 2 / expected).sum().item()


def lines_lost(x: torch.Tensor) -> torch.Tensor:
    """Black rows and columns (B,) of images (B, 1, H, W)."""
    return ((x == 0).all(3).sum(2) + (x == 0).all(2).sum(2))[:, 0]


def test_lost_rows_and_columns_add_up_to_s_which_is_uniform() -> None:
    count = 11_000
    images = torch.full((count, 1, 24, 24), 255, dtype=torch.uint8)
    shifts = CropShift().draw(count, seeded_generator("cpu", 0))
    lost = lines_lost(crop_shift(images, shifts))
    assert torch.equal(lost, shifts.lost_rows + shifts.lost_columns)
    assert chi_square(lost, 11) < 29.6, "the 99.9 % quantile of chi-square with 10 degrees of freedom"


def test_the_parts_of_s_are_uniform() -> None:
    count = 60_000
    shifts = CropShift(low=5, high=5).draw(count, seeded_generator("cpu", 1))
    assert abs(shifts.mirrored.double().mean() - 0.5) < 4 * 0.5 / count**0.5
    assert torch.equal(shifts.lost_rows + shifts.lost_columns, torch.full((count,), 5))
    assert chi_square(shifts.lost_columns, 6) < 20.6, "the 99.9 % quantile with 5 degrees of freedom"
    for name, lost in (("left", shifts.lost_columns), ("top", shifts.lost_rows)):
        crop, cut = (getattr(shifts, f"{step}_{name}")[lost == 4] for step in ("crop", "cut"))
        assert max(crop.max(), cut.max()) == 4
        assert chi_square(crop * 5 + cut, 25) < 51.2, "the 99.9 % quantile with 24 degrees of freedom"
    two = shifts.lost_columns == 2
    across_and_down = shifts.cut_left[two] * 4 + shifts.cut_top[two]
    assert chi_square(across_and_down, 12) < 31.3, "the 99.9 % quantile with 11 degrees of freedom"


def test_losing_nothing_is_the_identity() -> None:
    images = pictures(12, 3, 9, 7)
    for augment in (CropShift(low=0, high=1, flip=False), CropShift(low=0, high=0, flip=False)):
        np.testing.assert_array_equal(augment(images, seeded_generator("cpu", 0)).numpy(), unit(images.numpy()))


def test_all_pixels_of_the_crop_stay_visible() -> None:
    """Every level of an image occurs once: what is seen is a rectangle of (H - c_y) x (W - c_x) of its pixels."""
    images = (torch.arange(12 * 15) + 1).to(torch.uint8).view(1, 1, 12, 15).expand(64, -1, -1, -1)
    shifts = CropShift().draw(64, seeded_generator("cpu", 2))
    for number, image in enumerate(crop_shift(images, shifts)):
        seen = image[image > 0].tolist()
        lost_rows, lost_columns = int(shifts.lost_rows[number]), int(shifts.lost_columns[number])
        assert len(seen) == len(set(seen)) == (12 - lost_rows) * (15 - lost_columns)
        rows, columns = {(level - 1) // 15 for level in seen}, {(level - 1) % 15 for level in seen}
        assert max(rows) - min(rows) + 1 == len(rows) == 12 - lost_rows
        assert max(columns) - min(columns) + 1 == len(columns) == 15 - lost_columns


# IDBH


@given(
    batch=st.integers(1, 8),
    channels=st.sampled_from([1, 3]),
    height=st.integers(11, 20),
    width=st.integers(11, 20),
    version=st.sampled_from(VERSIONS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_idbh_equals_its_steps_one_image_at_a_time(
    batch: int, channels: int, height: int, width: int, version: str, seed: int
) -> None:
    images = pictures(batch, channels, height, width, seed)
    augment = AUGMENTATIONS[version]
    assert isinstance(augment, IDBH)
    draws = augment.draw(batch, height, width, seeded_generator("cpu", seed))
    got = augment(images, seeded_generator("cpu", seed))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), np.stack(list(reference_idbh(images, draws))))


@pytest.mark.parametrize("version", VERSIONS)
def test_idbh_on_a_batch_of_small_colour_images(version: str) -> None:
    images, augment = pictures(256, 3, 32, 32), AUGMENTATIONS[version]
    assert isinstance(augment, IDBH)
    draws = augment.draw(256, 32, 32, seeded_generator("cpu", 5))
    assert set(draws.operation.tolist()) == set(range(8))
    expected = np.stack(list(reference_idbh(images, draws)))
    np.testing.assert_array_equal(augment(images, seeded_generator("cpu", 5)).numpy(), expected)


@pytest.mark.parametrize("colour_shape", CHOICES)
def test_operations_and_strengths_have_their_distributions(colour_shape: str) -> None:
    count = 80_000
    augment = IDBH(colour_shape=colour_shape)  # type: ignore[arg-type]
    draws = augment.draw(count, 32, 32, seeded_generator("cpu", 0))
    assert sum(choice[0] for choice in CHOICES[colour_shape].values()) == pytest.approx(1)
    deviation = 0.0
    for number, (name, (probability, low, high)) in enumerate(CHOICES[colour_shape].items()):
        mine = draws.operation == number
        expected = probability * count
        deviation += (int(mine.sum()) - expected) ** 2 / expected
        size = draws.strength[mine].abs()
        assert low <= size.min() <= size.max() <= high
        spread = 4 * 0.3 * (high - low) / len(size) ** 0.5
        assert abs(size.mean() - (low + high) / 2) <= spread, "four standard errors and more"
        negative = (draws.strength[mine] < 0).double().mean()
        assert abs(negative - 0.5) < 0.03 if name in ("shear", "rotation") else negative == 0
    assert deviation < 24.4, "the 99.9 % quantile of chi-square with 7 degrees of freedom"
    assert abs(draws.upright.double().mean() - 0.5) < 0.01
    degrees = draws.strength[draws.operation == OPERATIONS.index("rotation")].abs()
    assert degrees.unique().tolist() == list(range(1, 1 + int(CHOICES[colour_shape]["rotation"][2])))


def test_the_versions_are_those_of_the_authors() -> None:
    weak, strong, svhn = (parse_augmentation(name) for name in ("IDBH", "idbh_strong", "idbh-svhn"))
    assert weak == IDBH(shift=(0, 11), colour_shape="color", erase_probability=0.5, erase_area=(0.02, 0.33), flip=True)
    assert strong == IDBH(erase_probability=1.0)
    assert svhn == IDBH(shift=(0, 9), colour_shape="shape", erase_probability=1.0, erase_area=(0.02, 0.5))
    assert parse_augmentation("crop-shift") == CropShift(low=0, high=11, flip=True)


def test_shift_and_flip_are_those_of_crop_shift() -> None:
    draws = IDBH(shift=(3, 3), flip=False).draw(500, 32, 32, seeded_generator("cpu", 0))
    assert set((draws.shifts.lost_rows + draws.shifts.lost_columns).tolist()) == {3}
    assert not draws.shifts.mirrored.any()
    assert IDBH().draw(500, 32, 32, seeded_generator("cpu", 0)).shifts.mirrored.any()


# Erasing


@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    candidates=st.lists(st.tuples(st.floats(0.02, 1.0), st.floats(0.3, 3.3)), min_size=1, max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_the_first_candidate_that_fits_is_taken(height: int, width: int, candidates: list[tuple[float, float]]) -> None:
    areas, ratios = [part * height * width for part, _ in candidates], [ratio for _, ratio in candidates]
    found = first_fit(*(torch.tensor([row], dtype=torch.float64) for row in (areas, ratios)), height, width)
    assert tuple(map(int, found)) == reference.first_fit(areas, ratios, height, width)


def test_where_no_candidate_fits_nothing_is_erased() -> None:
    whole = IDBH(erase_probability=1.0, erase_area=(1.0, 1.0), shift=(0, 0))
    draws = whole.draw(64, 8, 8, seeded_generator("cpu", 0))
    assert not draws.rows.any()
    assert torch.equal(first_fit(torch.full((1, 10), 64.0), torch.ones(1, 10), 8, 8)[0], torch.zeros(1).long())
    images = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    flat = draws.operation == OPERATIONS.index("equalise")
    assert flat.any()
    assert (whole(images, seeded_generator("cpu", 0))[flat] == 1).all()


@pytest.mark.parametrize(("version", "probability"), [("idbh", 0.5), ("idbh-strong", 1.0), ("idbh-svhn", 1.0)])
def test_erased_area_and_corner(version: str, probability: float) -> None:
    count, height, width = 20_000, 30, 20
    augment = AUGMENTATIONS[version]
    assert isinstance(augment, IDBH)
    draws = augment.draw(count, height, width, seeded_generator("cpu", 0))
    hit = draws.rows > 0
    assert abs(hit.double().mean() - probability) <= 4 * (probability * (1 - probability) / count) ** 0.5
    rows, columns = draws.rows[hit], draws.columns[hit]
    assert (rows < height).all()
    assert (columns < width).all()
    # Either side is rounded by up to half a pixel.
    area, slack = rows * columns, (rows + columns) / 2 + 0.25
    smallest, largest = (part * height * width for part in augment.erase_area)
    assert (area - slack <= largest).all()
    assert (area + slack >= smallest).all()
    assert area.max() > 0.9 * largest
    for start, length, size in ((draws.top, draws.rows, height), (draws.left, draws.columns, width)):
        assert start.min() == 0
        assert ((start + length)[hit] <= size).all()
        assert ((start + length)[hit] == size).any(), "the far edge is within reach"
        room = size - length[hit]
        assert abs(start[hit].sum() / room.sum() - 0.5) < 0.02


def test_corners_of_one_rectangle_are_uniform() -> None:
    draws = IDBH(erase_probability=1.0).draw(60_000, 8, 8, seeded_generator("cpu", 0))
    three = draws.rows == 3
    assert chi_square(draws.top[three], 6) < 20.6, "the 99.9 % quantile with 5 degrees of freedom"


def test_a_rectangle_is_black_and_no_more() -> None:
    images = torch.full((64, 3, 20, 30), 255, dtype=torch.uint8)
    drawn = IDBH(erase_probability=1.0).draw(64, 20, 30, seeded_generator("cpu", 0))
    draws = only("brightness", torch.ones(64), torch.zeros(64, dtype=torch.bool))
    found = apply(images, Draws(**{**vars(draws), **{name: getattr(drawn, name) for name in RECTANGLE}}))
    assert torch.equal((found == 0).sum((2, 3)), (drawn.rows * drawn.columns)[:, None].expand(64, 3))
    assert set(found.unique().tolist()) == {0.0, 1.0}


# Both


@pytest.mark.parametrize("name", ["crop-shift", *VERSIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_generator_state_gives_the_same_images(name: str, channels: int) -> None:
    images = pictures(24, channels, 14, 18)
    before, augment = images.clone(), AUGMENTATIONS[name]
    first, again = (augment(images, seeded_generator("cpu", 3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, seeded_generator("cpu", 4)))
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.is_contiguous()
    assert 0 <= first.min() <= first.max() <= 1


def test_an_epoch_repeats() -> None:
    images = pictures(20, 3, 12, 12)
    data = ImageDataset(images=images, labels=torch.arange(20) % 2, class_names=("a", "b"))
    torch.manual_seed(0)
    first = list(Loader(data, 8, augment="idbh-strong", seed=1).epoch(3))
    torch.manual_seed(1)
    again = list(Loader(data, 8, augment="idbh-strong", seed=1).epoch(3))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.x, AUGMENTATIONS["idbh-strong"](images[one.index], one.rng("augment")))


@pytest.mark.parametrize("name", ["crop-shift", "idbh"])
def test_no_images(name: str) -> None:
    none = torch.empty(0, 3, 12, 12, dtype=torch.uint8)
    assert AUGMENTATIONS[name](none, seeded_generator("cpu", 0)).shape == none.shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deterministic_algorithms_suffice(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images = pictures(16, 3, 12, 12).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (IDBH()(images, seeded_generator(device, 0)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_synchronisation_on_the_gpu_and_the_images_of_the_cpu() -> None:
    images = pictures(256, 3, 32, 32)
    there, generator = images.cuda(), seeded_generator("cuda", 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        CropShift()(there, generator)
        draws = IDBH().draw(256, 32, 32, generator)
        found = apply(there, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = {name: value.cpu() for name, value in vars(draws).items() if name != "shifts"}
    shifts = Shifts(**{name: value.cpu() for name, value in vars(draws.shifts).items()})
    levels = (apply(images, Draws(shifts=shifts, **values)) * 255).round()
    assert torch.equal((found.cpu() * 255).round(), levels)


# Errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CropShift(low=3, high=2), r"crop-shift: low and high must be .* 0 <= low <= high, got \(3, 2\)"),
        (lambda: CropShift(low=-1), r"crop-shift: low and high must be .*, got \(-1, 11\)"),
        (lambda: CropShift(low=0.5), r"crop-shift: low and high must be whole numbers .*, got \(0.5, 11\)"),  # type: ignore[arg-type]
        (lambda: IDBH(shift=(3, 2)), r"idbh: shift must be .* 0 <= low <= high, got \(3, 2\)"),
        (lambda: IDBH(erase_probability=1.5), r"idbh: erase_probability must be in \[0, 1\], got 1.5"),
        (lambda: IDBH(erase_probability=-0.1), "idbh: erase_probability must be"),
        (lambda: IDBH(erase_probability=float("nan")), "idbh: erase_probability must be"),
        (
            lambda: IDBH(erase_area=(0.3, 0.2)),
            r"idbh: erase_area must be .* smallest <= largest <= 1, got \(0.3, 0.2\)",
        ),
        (lambda: IDBH(erase_area=(0.0, 0.2)), "idbh: erase_area must be"),
        (lambda: IDBH(erase_area=(0.2, 1.1)), "idbh: erase_area must be"),
        (lambda: IDBH(colour_shape="colour"), "idbh: colour_shape must be 'color' or 'shape', got 'colour'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("crop-shift", (2, 3, 10, 12), r"crop-shift: low and high must be low below and high at most 10, the shorter "),
        ("idbh", (2, 3, 12, 10), r"idbh: shift must be .* of 12x10 images, got \(0, 11\)\. Take crop-flip, or"),
        ("idbh", (2, 2, 12, 12), r"idbh: images must be grey or RGB \(1 or 3 channels\), got .*\. Take crop-shift"),
    ],
)
def test_images_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AUGMENTATIONS[name](torch.zeros(shape, dtype=torch.uint8), seeded_generator("cpu", 0))


def test_the_largest_range_leaves_one_row() -> None:
    images = pictures(64, 1, 11, 11)
    assert CropShift(low=10, high=10)(images, seeded_generator("cpu", 0)).shape == images.shape
    with pytest.raises(ConfigError, match="low below and high at most 11"):
        CropShift(low=11, high=11)(images, seeded_generator("cpu", 0))
