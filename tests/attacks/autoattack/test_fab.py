from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor

from reference import strong_attacks as reference
from robustfair.attacks.autoattack.fab import Fab, project
from robustfair.values import seeded_generator

Build = Callable[..., object]
EPS = {"linf": 0.05, "l2": 0.3}


def distances(points: Tensor, x: Tensor, norm: str) -> Tensor:
    apart = (points - x).flatten(-3)
    return apart.abs().amax(-1) if norm == "linf" else apart.norm(dim=-1)


def planes(count: int, *, seed: int, share: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Points with pixels on the faces of the box, normals with zeros, and planes at a share of the farthest in reach.

    Half of the planes lie on the other side of their points.
    """
    rng = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(count, 3, 4, 5, generator=rng, dtype=torch.float64)  # noqa: E731
    point = (1.4 * draw() - 0.2).clamp(0, 1)
    normal = (2 * draw() - 1) ** 5 * (draw() > 0.1)
    side = torch.arange(count, dtype=torch.float64) % 2 * 2 - 1
    best = torch.where(normal * side[:, None, None, None] > 0, 1 - point, -point)
    offset = (normal * (point + share * best)).sum((1, 2, 3))
    return point.to(dtype), normal.to(dtype), offset.to(dtype)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1.2), norm=st.sampled_from(["linf", "l2"]))
@settings(max_examples=40, deadline=None)
def test_projection_equals_bisection(seed: int, share: float, norm: str) -> None:
    point, normal, offset = planes(4, seed=seed, share=share)
    ours = project(point, normal, offset, norm)
    for row in range(4):
        flat = [t[row].flatten().tolist() for t in (point, normal)]
        slow = reference.project_on_plane(*flat, float(offset[row]), norm)
        expected = torch.tensor(slow, dtype=torch.float64)
        if norm == "l2" and share > 0.999:
            # The multiplier runs off to infinity where the box only just lets the plane be met.
            held = (normal[row].flatten() * (ours[row].flatten() - expected)).sum()
            assert abs(float(held)) < 1e-9
        else:
            torch.testing.assert_close(ours[row].flatten(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_meets_the_plane_inside_the_box(norm: str, share: float, dtype: torch.dtype) -> None:
    point, normal, offset = planes(64, seed=7, share=share, dtype=dtype)
    moved = project(point, normal, offset, norm)
    at = point + moved
    assert at.min() >= -1e-6
    assert at.max() <= 1 + 1e-6
    apart = (normal * at).sum((1, 2, 3)) - offset
    if share <= 1:
        assert apart.abs().max() < 1e-5
    else:
        before = (normal * point).sum((1, 2, 3)) - offset
        corner = torch.where(normal * before[:, None, None, None] > 0, 0.0, 1.0)
        steep = normal.abs() > 1e-8
        torch.testing.assert_close(at[steep], corner[steep].to(dtype), rtol=0, atol=1e-6)
        assert (moved[normal == 0] == 0).all()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_equals_that_of_the_reference_engine(norm: str) -> None:
    for share in (0.02, 0.3, 0.8, 1.1):
        point, normal, offset = planes(50, seed=3, share=share)
        normal = normal + 1e-3 * (normal == 0)
        theirs = projection_linf if norm == "linf" else projection_l2
        expected = theirs(point.flatten(1), normal.flatten(1), offset).view_as(point)
        torch.testing.assert_close(project(point, normal, offset, norm), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_climbs_every_segment_that_there_is(norm: str) -> None:
    """Where a pixel meets the box at half the multiplier of the next and weighs four times as much, Newton's iteration
    has to climb a segment for each."""
    powers = 2.0 ** torch.arange(20, dtype=torch.float64).view(1, 1, 1, 20)
    point, normal = (1 / powers, powers**2) if norm == "linf" else (torch.ones_like(powers), powers)
    offset = torch.tensor([0.01], dtype=torch.float64)
    slow = reference.project_on_plane(point.flatten().tolist(), normal.flatten().tolist(), 0.01, norm)
    ours = project(point, normal, offset, norm).flatten()
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-9)
    with mock.patch("robustfair.attacks.autoattack.fab.MOST_SEGMENTS", 19):
        assert (project(point, normal, offset, norm).flatten() - ours).abs().max() > 1e-3


def test_projection_stays_where_the_plane_is_unknown() -> None:
    point = torch.rand(3, 1, 2, 2)
    assert (project(point, torch.zeros_like(point), torch.ones(3), "l2") == 0).all()
    assert (project(point, torch.ones_like(point), torch.full((3,), torch.nan), "linf") == 0).all()


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize(("norm", "channels", "classes"), [("linf", 3, 4), ("l2", 1, 12), ("linf", 1, 2), ("l2", 3, 3)])
def test_equals_the_slow_loop(
    scene: Build, course: Build, norm: str, channels: int, classes: int, targeted: bool
) -> None:
    small = scene(2, channels=channels, classes=classes, size=(4, 5), seed=5)
    goal = small.other(min(2, classes - 1)) if targeted else torch.tensor([0, 1])
    search = Fab(name="fab", targeted=targeted, eps=EPS[norm], norm=norm, steps=12)
    ours = course(search, small, goal)
    for row in range(2):
        slow = reference.fab(
            small.model,
            small.x[row].flatten().tolist(),
            small.x.shape[1:],
            int(small.y[row]),
            int(goal[row]) if targeted else None,
            ours.begun["point"][row].flatten().tolist(),
            norm=norm,
            steps=12,
        )
        points = torch.stack([point[row].flatten() for point in ours.points])
        torch.testing.assert_close(points, torch.tensor(slow, dtype=points.dtype), rtol=0, atol=1e-8)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_the_nearest_point_of_the_reference_engine(
    scene: Build, course: Build, norm: str, targeted: bool
) -> None:
    many = scene(8, classes=6, seed=6)
    start = torch.ones_like(many.y)
    search = Fab(name="fab", targeted=targeted, eps=EPS[norm], norm=norm, steps=40)
    ours = course(search, many, many.other(2) if targeted else start)
    name = "Linf" if norm == "linf" else "L2"
    engine = FABAttack_PT(many.model, norm=name, n_iter=40, eps=EPS[norm], device="cpu", targeted=targeted)
    engine.target_class = 3
    draw = torch.rand if norm == "linf" else torch.randn
    drawn = torch.stack([draw(many.x.shape[1:], generator=seeded_generator("cpu", 0, row)) for row in range(8)])
    with mock.patch(f"torch.{'rand' if norm == 'linf' else 'randn'}", return_value=drawn):
        theirs = engine.attack_single_run(many.x, many.y, use_rand_start=not targeted, is_targeted=targeted)
    points = torch.stack(ours.points)
    wrong = torch.stack([logits.argmax(1) != many.y for logits in ours.logits])
    far = distances(points, many.x, norm)
    nearest = far.masked_fill(~wrong, torch.inf).argmin(0)
    found = torch.where(wrong.any(0)[:, None, None, None], points[nearest, torch.arange(8)], many.x)
    assert wrong.any(0).sum() >= 6
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_begin_at_half_the_radius(scene: Build, course: Build, norm: str) -> None:
    few = scene(6, seed=8)
    few.x = few.x * 0.2 + 0.4
    search = Fab(name="fab", targeted=False, eps=0.1, norm=norm, steps=1, restarts=3)
    begun = course(search, few, torch.tensor([0, 1, 2, 0, 1, 2]), iterations=0).begun
    far = distances(begun["point"], few.x, norm)
    torch.testing.assert_close(far, torch.tensor([0, 1, 1, 0, 1, 1]) * 0.05, rtol=0, atol=1e-8, check_dtype=False)
    assert torch.equal(begun["point"][0], few.x[0])
    aimed = Fab(name="fab", targeted=True, eps=0.1, norm=norm, steps=1, restarts=3)
    assert torch.equal(course(aimed, few, few.other(), iterations=0).begun["point"], few.x)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_searches_know_nothing_of_each_other(
    scene: Build, assert_searches_independent: Build, norm: str, targeted: bool
) -> None:
    many = scene(4, seed=9)
    search = Fab(name="fab", targeted=targeted, eps=EPS[norm], norm=norm, steps=10)
    assert_searches_independent(search, many, many.other() if targeted else torch.tensor([0, 1, 0, 2]))
