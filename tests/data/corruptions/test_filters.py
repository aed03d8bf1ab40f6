"""Every operation against plain loops over pixels, Pillow or scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from reference import corruptions as reference
from robustfair.data.corruptions import filters

SIZES = [(9, 9), (8, 13)]


def images(batch: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def blobs(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Grey levels (B, 1, H, W) of drops with soft and hard edges on a black ground."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0.6, 0.3, (batch, height, width)))
    soft = np.stack([ndimage.gaussian_filter(plane, 1.0) for plane in noise.numpy()])
    return torch.from_numpy(np.floor(np.where(soft < 0.62, 0, soft).clip(0, 1) * 255)).float()[:, None]


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("sigma", "truncate"), [(0.0, 4.0), (0.25, 4.0), (0.8, 4.0), (2.0, 3.0)])
@pytest.mark.parametrize("border", ["nearest", "reflect"])
def test_smooth_is_a_gaussian_blur(size: tuple[int, int], sigma: float, truncate: float, border: str) -> None:
    x = images(1, 2, *size)
    found = filters.smooth(x, sigma, truncate=truncate, border=border)  # type: ignore[arg-type]
    for c in range(2):
        close(found[0, c], reference.gaussian_blur(x[0, c].double().numpy(), sigma, truncate, border))


def test_smooth_takes_kernels_wider_than_the_image() -> None:
    x = images(1, 1, 8, 11)
    for border, mode in (("nearest", "nearest"), ("reflect", "reflect")):
        found = filters.smooth(x, 6.0, border=border)  # type: ignore[arg-type]
        close(found[0, 0], ndimage.gaussian_filter(x[0, 0].double().numpy(), 6.0, mode=mode))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 3, 21])
def test_correlate(size: tuple[int, int], k: int) -> None:
    x, kernel = images(2, 1, *size), torch.rand(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel /= kernel.sum()
    for b in range(2):
        close(filters.correlate(x, kernel)[b, 0], reference.correlate(x[b, 0].double().numpy(), kernel.numpy()))


@pytest.mark.parametrize(
    ("radius", "alias"), [(0.3, 0.4), (0.5, 0.6), (1, 0.2), (1.5, 0.1), (3, 0.1), (6, 0.5), (8, 0.5), (10, 0.5)]
)
def test_disk_is_the_whole_one_without_its_zeros(radius: float, alias: float) -> None:
    whole, found = reference.disk(radius, alias), filters.disk(radius, alias).numpy()
    pad = (len(whole) - len(found)) // 2
    np.testing.assert_allclose(np.pad(found, pad), whole, rtol=0, atol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("degrees", [0.0, 45.0, -45.0, -90.0, 30.0, -127.3])
def test_move_follows_its_line(degrees: float) -> None:
    x = images(3, 2, 9, 12)
    found = filters.move(x, 6, 2.5, torch.tensor([10.0, degrees, -80.0]))
    for c in range(2):
        close(found[1, c], reference.motion_blur(x[1, c].double().numpy(), 6, 2.5, degrees))


@pytest.mark.parametrize(("reach", "iterations"), [(1, 1), (2, 2), (4, 1), (5, 1)])
def test_shuffled_is_the_walk_of_the_generator(reach: int, iterations: int) -> None:
    height, width = 10, 13
    walk = (iterations, max(0, height - 2 * reach), max(0, width - 2 * reach))
    shifts = torch.randint(-reach, reach, (3, *walk, 2), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    levels = torch.randint(0, 256, (3, 2, height, width), generator=torch.Generator().manual_seed(1))
    found = filters.take(levels, filters.shuffled(shifts, height, width, reach))
    for image, shift, got in zip(levels, shifts, found, strict=True):
        expected = reference.glass_walk(image.permute(1, 2, 0).numpy(), shift.numpy().astype(int), reach)
        np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [(8, 9), (32, 33), (224, 17)])
@pytest.mark.parametrize("factor", [1.0, 1.03, 1.25, 2.25, 4.5])
def test_zoom_is_that_of_scipy_cut_to_its_middle(size: tuple[int, int], factor: float) -> None:
    x = images(2, 2, *size)
    grids = [filters.zoom_grid(side, factor) for side in size]
    found = filters.zoom(x, grids[0], grids[1])
    middle = tuple(
        slice((side - inner) // 2, (side + inner) // 2) for side, (inner, _) in zip(size, grids, strict=True)
    )
    for b, c in ((0, 0), (1, 1)):
        grown = ndimage.zoom(x[b, c].double().numpy()[middle], factor, order=1)
        top, left = ((big - side) // 2 for big, side in zip(grown.shape, size, strict=True))
        close(found[b, c], grown[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("size", [*SIZES, (12, 8)])
def test_warp_moves_three_corners(size: tuple[int, int]) -> None:
    x = images(2, 2, *size)
    shifts = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(3)) * 3 - 1.5
    found = filters.warp(x, shifts)
    for b in range(2):
        for c in range(2):
            close(found[b, c], reference.warp(x[b, c].double().numpy(), shifts[b].double().numpy()), 1e-5)


def test_warp_by_nothing_changes_nothing_and_by_one_pixel_shifts() -> None:
    x = images(2, 1, 9, 9)
    close(filters.warp(x, torch.zeros(2, 3, 2)), x.numpy())
    shifted = filters.warp(x, torch.tensor([1.0, 0.0]).expand(2, 3, 2))
    close(shifted[..., 1:], x[..., :-1].numpy(), 1e-6)


def test_warp_of_corners_on_one_line_stays_finite() -> None:
    corners = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
    assert bool(filters.warp(images(1, 1, 9, 9), -corners[None]).isfinite().all())


@pytest.mark.parametrize("size", SIZES)
def test_bend_reads_beside_the_place(size: tuple[int, int]) -> None:
    x, fields = images(2, 1, *size), images(2, 2, *size, seed=1) * 24 - 12
    found = filters.bend(x, fields[:, 0], fields[:, 1])
    for b in range(2):
        expected = reference.bend(*(plane.double().numpy() for plane in (x[b, 0], fields[b, 0], fields[b, 1])))
        close(found[b, 0], expected, 1e-5)


@given(sizes=st.tuples(*[st.integers(1, 40)] * 4), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_box_resize_is_that_of_pillow_to_the_bit(sizes: tuple[int, int, int, int], seed: int) -> None:
    height, width, rows, columns = sizes
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    narrow = Image.fromarray(levels).resize((columns, height), Image.Resampling.BOX)
    expected = np.asarray(narrow.resize((columns, rows), Image.Resampling.BOX))
    found = filters.box_resize(torch.from_numpy(levels).double()[None, None], rows, columns)
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)


@pytest.mark.parametrize("decay", [3, 1.75])
def test_height_map_is_diamond_square(decay: float) -> None:
    noise = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = filters.height_map(noise, decay)
    assert found.aminmax() == (0, 1)
    for b in range(2):
        close(found[b], reference.height_map(noise[b].double().numpy(), decay), 1e-5)


@pytest.mark.parametrize("size", [(24, 24), (15, 31)])
def test_edges_are_those_of_canny(size: tuple[int, int]) -> None:
    levels = blobs(4, *size)
    found = filters.edges(levels)
    assert 0.05 < float(found.float().mean()) < 0.8
    for b in range(4):
        np.testing.assert_array_equal(found[b, 0].numpy(), reference.canny(levels[b, 0].numpy()))


def test_a_weak_edge_stays_where_it_leads_to_a_strong_one() -> None:
    levels = torch.zeros(2, 1, 12, 12)
    levels[:, :, :, 6:] = 20.0
    levels[1, :, :2, 6:] = 200.0
    alone, joined = filters.edges(levels)
    assert not alone.any()
    assert bool(joined[0, 4:, 5:7].any(1).all())


@given(share=st.floats(0, 0.2), height=st.integers(1, 45), width=st.integers(1, 45), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_distance_is_that_of_the_shortest_way(share: float, height: int, width: int, seed: int) -> None:
    marked = np.random.default_rng(seed).random((height, width)) < share / 4
    found = filters.distance(torch.from_numpy(marked)[None, None])
    close(found[0, 0], reference.distance(marked), 1e-5)


def test_distance_is_near_that_of_euclid() -> None:
    marked = np.random.default_rng(0).random((40, 40)) < 0.01
    exact = ndimage.distance_transform_edt(~marked).clip(max=20)
    found = filters.distance(torch.from_numpy(marked)[None, None])[0, 0].numpy()
    assert np.abs(found - exact).max() < 0.03 * 20


def test_distance_does_not_cross_from_image_to_image() -> None:
    marked = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    marked[0, 0, 4, 4] = True
    assert bool((filters.distance(marked)[1] == 20).all())


def test_equalise() -> None:
    levels = torch.cat([blobs(2, 12, 12), torch.full((1, 1, 12, 12), 7.0)])
    found = filters.equalise(levels)
    for b in range(3):
        np.testing.assert_array_equal(found[b, 0].numpy(), reference.equalise(levels[b, 0].numpy()))
    assert found[0].aminmax() == (0, 255)
