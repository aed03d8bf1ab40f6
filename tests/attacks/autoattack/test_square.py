from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from reference import strong_attacks as reference
from robustfair.attacks.autoattack.base import SearchNetwork, margins
from robustfair.attacks.autoattack.square import Draws, Square, bump, stripes, tiles
from robustfair.values import seeded_generator

Build = Callable[..., Any]
EPS = {"linf": 0.05, "l2": 0.5}
FIXED = 1e6
"""A pass that costs so much takes as many candidates as there is room for."""


def draws_of(search: Square, begun: dict[str, Tensor], row: int) -> list[tuple[list[float], list[int], bool]]:
    """What each query of a search of the first restart draws: places, signs, whether its bump is turned."""
    channels = begun["x"].shape[1]
    shared = Draws.of(
        search.restarts * search.queries, channels, seeded_generator("cpu", "square", search.seed, search.name)
    )
    parts = {name: begun[name][row] if name in begun else getattr(shared, name) for name in ("place", "sign", "turned")}
    rows = zip(*(parts[name][: search.queries].tolist() for name in parts), strict=True)
    return list(rows)


def tile_draws(grid: tuple[int, int], channels: int, rng: torch.Generator) -> list[tuple[bool, Tensor]]:
    """Whether each tile is turned and its signs, row by row."""
    turned = torch.rand(*grid, 1, 1, 1, generator=rng) > 0.5
    sign = 2 * torch.randint(2, (*grid, channels, 1, 1), generator=rng) - 1
    return list(zip(turned.flatten().tolist(), sign.flatten(0, 1), strict=True))


def start_of(search: Square, shape: torch.Size, row: int, seed: int = 0) -> Tensor:
    """The pattern that a search of a course begins with."""
    return (stripes if search.norm == "linf" else tiles)(shape, seeded_generator("cpu", seed, row)).double()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    ("norm", "channels", "size", "classes"),
    [("linf", 3, (6, 6), 5), ("linf", 1, (5, 8), 2), ("l2", 3, (7, 6), 12), ("l2", 1, (10, 10), 3)],
)
def test_equals_the_slow_search(
    scene: Build,
    course: Build,
    norm: str,
    channels: int,
    size: tuple[int, int],
    classes: int,
    rescaled: bool,
    own: bool,
) -> None:
    small = scene(2, channels=channels, classes=classes, size=size, seed=1)
    search = Square(
        name="square",
        eps=EPS[norm],
        norm=norm,
        queries=70,
        restarts=2,
        per_image_windows=own,
        rescale_schedule=rescaled,
    )
    ours = course(search, small)
    for row in range(2):
        slow = reference.square(
            small.model,
            small.x[row].flatten().tolist(),
            small.x.shape[1:],
            int(small.y[row]),
            start_of(search, small.x.shape[1:], row).flatten().tolist(),
            draws_of(search, ours.begun, row),
            eps=EPS[norm],
            norm=norm,
            schedule=(lambda query: int(query / 70 * 10000)) if rescaled else (lambda query: query),
        )
        points = torch.stack([point[row].flatten() for point in ours.points])
        torch.testing.assert_close(points, torch.tensor(slow["points"], dtype=points.dtype), rtol=0, atol=1e-9)
        kept = [-float(state["margin"][row]) for state in ours.states]
        assert kept == pytest.approx(slow["margins"], abs=1e-9)
        best = torch.tensor(slow["best"], dtype=points.dtype)
        torch.testing.assert_close(ours.states[-1]["point"][row].flatten(), best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_judging_ahead_meets_the_same_points(scene: Build, norm: str, own: bool, gaps: bool) -> None:
    few = scene(5, channels=3, classes=4, size=(6, 6), seed=2)
    search = Square(name="square", eps=EPS[norm] / 10, norm=norm, queries=200, per_image_windows=own)

    def model(x: Tensor) -> Tensor:
        """With gaps, one point in ten has no logits."""
        none = (1e6 * x.sum((1, 2, 3), keepdim=True)).flatten(1).remainder(1) < 0.1
        return torch.where(none & torch.tensor(gaps), torch.nan, few.model(x))

    def run(capacity: int) -> tuple[dict[str, Tensor], list[list[tuple[int, float]]], int]:
        """The state at the end, of each search the queries that it kept or that had no margin, and the passes."""
        rngs = [seeded_generator("cpu", 0, row) for row in range(5)]
        state = search.begin(few.x, few.y, torch.zeros_like(few.y), rngs)
        network, iterations, kept = SearchNetwork(model, capacity=capacity, fixed=FIXED), 0, [[] for _ in range(5)]
        while int(state["judged"].min()) < search.iterations:
            before = state["margin"].clone()
            point, logits = search.iterate(state, network)
            iterations += 1
            torch.testing.assert_close(model(point), logits, rtol=0, atol=1e-12, equal_nan=True)
            for row in range(5):
                if state["margin"][row] != before[row]:
                    kept[row].append((int(state["judged"][row]), float(state["margin"][row])))
                    assert torch.equal(point[row], state["point"][row])
                elif logits[row].isnan().any() and int(state["judged"][row]) < search.iterations:
                    kept[row].append((int(state["judged"][row]), 0.0))
            if capacity:  # a search that is through waits for the others, as it would not in an ensemble
                assert int((state["iterations"] + iterations - state["judged"]).abs().max()) == 0
        return state, kept, iterations

    one, kept_one, iterations_one = run(0)
    many, kept_many, iterations_many = run(60)
    assert iterations_one == search.iterations
    assert iterations_many < 0.8 * iterations_one
    assert kept_one == kept_many
    assert sum(map(len, kept_one)) > 10
    assert torch.equal(one["point"], many["point"])


def test_judging_ahead_passes_over_no_point_that_the_exact_model_is_asked_about() -> None:
    search = Square(name="square", eps=0.02, norm="linf", queries=300)
    draw = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(192, 4, generator=draw, dtype=torch.float64)
    x = torch.rand(20, 3, 8, 8, generator=draw, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        """Logits that are all large at one point in seven: a share of them covers more margins there."""
        large = torch.sin(1e4 * x.sum((1, 2, 3))) > 0.9
        return x.flatten(1) @ weight + 10 * large[:, None]

    def asked(capacity: int) -> list[list[int]]:
        y = model(x).argmax(1)
        state = search.begin(x, y, torch.zeros_like(y), [seeded_generator("cpu", 0, row) for row in range(20)])
        network, found = SearchNetwork(model, tolerance=2**-6, capacity=capacity, fixed=FIXED), [[] for _ in range(20)]
        while int(state["judged"].min()) < search.iterations:
            waits = state["judged"] >= search.iterations
            _, logits = search.iterate(state, network)
            margin = margins(logits, y)
            near = (margin >= -network.tolerance * logits.abs().amax(1)) & (margin > state["tested"]) & ~waits
            state["tested"] = torch.where(near, margin, state["tested"])
            for row in near.nonzero().flatten().tolist():
                found[row].append(int(state["judged"][row]))
        return found

    one = asked(0)
    assert sum(map(len, one)) > 20
    assert asked(200) == one


class Replayed(SquareAttack):
    """The reference engine on one image with the draws of one of our searches in place of its own."""

    def __init__(self, search: Square, draws: list[Any], signs: Iterator[Tensor], turns: Iterator[bool], **rest: Any):
        super().__init__(n_queries=search.queries, eps=search.eps, p_init=search.p_init, resc_schedule=False, **rest)
        self.places = iter([place for query, *_ in draws for place in (query if self.norm == "L2" else query[:2])])
        self.signs, self.turns = signs, turns

    def random_int(self, low: int = 0, high: int = 1, shape: object = None) -> Tensor:
        return torch.tensor([low + int((high - low) * next(self.places))])

    def random_choice(self, shape: list[int]) -> Tensor:
        return next(self.signs).reshape(shape).double()

    def eta(self, s: int) -> Tensor:
        turned = next(self.turns)
        with mock.patch("torch.rand", return_value=torch.tensor([0.9 if turned else 0.1])):
            return super().eta(s)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("channels", "side"), [(3, 10), (1, 8), (3, 16)])
def test_equals_the_reference_engine(scene: Build, course: Build, norm: str, channels: int, side: int) -> None:
    many = scene(4, channels=channels, size=(side, side), seed=2)
    search = Square(name="square", eps=EPS[norm] / 3, norm=norm, queries=220)
    ours = course(search, many)
    logits = torch.stack(ours.logits)
    for row in range(4):
        draws = draws_of(search, ours.begun, row)
        rng, begin, turned = seeded_generator("cpu", 0, row), [], []
        if norm == "linf":
            begin.append(stripes(many.x.shape[1:], rng)[:, :1])
        else:
            grid = (side // (side // 5),) * 2
            turned, begin = zip(*tile_draws(grid, channels, rng), strict=True)
        engine = Replayed(
            search,
            draws,
            iter([*begin, *(torch.tensor(sign) for _, sign, _ in draws)]),
            iter([*turned, *(turn for _, _, turn in draws)]),
            predict=many.model,
            norm="Linf" if norm == "linf" else "L2",
        )
        x, y = many.x[row : row + 1], many.y[row : row + 1]
        engine.init_hyperparam(x)
        queries, best = engine.attack_single_run(x, y)
        broken = [i for i, z in enumerate(logits[:, row]) if reference.margin(z.tolist(), int(y)) <= 0]
        assert int(queries) == (broken[0] + 1 if broken else search.iterations)
        found = ours.points[broken[0]] if broken else ours.states[-1]["point"]
        torch.testing.assert_close(found[row], best[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 8), (28, 28), (32, 48)])
def test_sides_follow_the_schedule(norm: str, size: tuple[int, int]) -> None:
    for p_init in (0.8, 0.05, 1.0):
        search = Square(name="square", eps=0.1, norm=norm, p_init=p_init)
        theirs = SquareAttack(None, p_init=p_init, eps=0.1, resc_schedule=False)
        for query in [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999, 6001, 8001]:
            side = search.side(query, *size)
            assert side == reference.side(query, p_init, (3, *size), norm)
            share = theirs.p_selection(query)
            assert norm == "l2" or side == min(max(round((share * size[0] * size[1]) ** 0.5), 1), *size)
            assert norm == "linf" or side % 2 == 1 or side == min(size)


@pytest.mark.parametrize("turned", [False, True])
def test_bump_equals_its_definition(turned: bool) -> None:
    for side in range(1, 30):
        ours = bump(side, turned)
        assert float(ours.norm()) == pytest.approx(1, abs=1e-12)
        slow = torch.tensor(reference.bump(side, turned), dtype=torch.float64)
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    assert torch.equal(bump(9, True), bump(9, False).T)


@pytest.mark.parametrize("shape", [(3, 10, 10), (1, 8, 8), (2, 28, 28), (3, 32, 48), (1, 9, 25)])
def test_tiles_equal_their_definition(shape: tuple[int, int, int]) -> None:
    ours = tiles(torch.Size(shape), seeded_generator("cpu", 1))
    grid = (shape[1] // (shape[1] // 5), shape[2] // (shape[1] // 5))
    draws = [
        (turned, sign.flatten().tolist()) for turned, sign in tile_draws(grid, shape[0], seeded_generator("cpu", 1))
    ]
    slow = torch.tensor(reference.tiles(shape, draws), dtype=torch.float64).view(shape)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)


def test_stripes_are_signs_that_run_down_the_columns() -> None:
    found = stripes(torch.Size((3, 5, 400)), seeded_generator("cpu", 0))
    assert set(found.unique().tolist()) == {-1, 1}
    assert (found == found[:, :1]).all()
    assert abs(float(found.float().mean())) < 0.1


def test_draws_are_uniform() -> None:
    place, sign, turned = Draws.of(4000, 3, seeded_generator("cpu", 0))
    assert (place.shape, sign.shape, turned.shape) == ((4000, 4), (4000, 3), (4000,))
    assert place.min() >= 0
    assert place.max() < 1
    assert set(sign.unique().tolist()) == {-1, 1}
    for part in (place - 0.5, sign, turned.double() - 0.5):
        assert float(part.double().mean().abs()) < 0.03


class NoGradient(nn.Module):
    """Refuses to be differentiated, and counts what it is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        self.asked += len(x)
        return self.model(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_asks_once_a_query_and_for_no_gradient(scene: Build, course: Build, norm: str) -> None:
    few = scene(3)
    few.model = NoGradient(few.model)
    search = Square(name="square", eps=EPS[norm], norm=norm, queries=60)
    ours = course(search, few)
    assert few.model.asked == 3 * search.iterations == 3 * 61
    margins = torch.stack([state["margin"] for state in ours.states])
    stands = margins < 0
    assert (margins.diff(dim=0)[stands[1:]] >= 0).all()
    assert (margins[-1] > margins[0]).all()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_searches_know_nothing_of_each_other(
    scene: Build, assert_searches_independent: Build, norm: str, own: bool
) -> None:
    search = Square(name="square", eps=EPS[norm], norm=norm, queries=60, restarts=2, per_image_windows=own)
    assert_searches_independent(search, scene(4, seed=3), torch.tensor([0, 1, 0, 1]))


@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    norm=st.sampled_from(["linf", "l2"]),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_images_of_any_size(channels: int, height: int, width: int, norm: str, own: bool, seed: int) -> None:
    search = Square(name="square", eps=EPS[norm], norm=norm, queries=15, per_image_windows=own, seed=seed)
    x = torch.rand(2, channels, height, width, generator=seeded_generator("cpu", seed))
    y = torch.zeros(2, dtype=torch.long)
    state = search.begin(x, y, y, [seeded_generator("cpu", seed, row) for row in range(2)])
    network = SearchNetwork(lambda z: torch.stack([z.flatten(1).sum(1), 1 - z[:, 0, 0, 0]], 1))
    for _ in range(search.iterations):
        point, _ = search.iterate(state, network)
        apart = (point - x).flatten(1)
        assert (apart.abs().amax() if norm == "linf" else apart.norm(dim=1).amax()) <= EPS[norm] + 1e-6
        assert point.min() >= 0
        assert point.max() <= 1
