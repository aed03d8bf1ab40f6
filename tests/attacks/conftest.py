"""Small classification problems near their boundaries, and a search run from begin to end outside the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.base import Search, SearchNetwork, SearchState
from robustfair.values import seeded_generator


class OneByOne(nn.Module):
    """A network that sees every image alone, so that its rounding does not depend on the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return torch.cat([self.model(image) for image in x.split(1)])


@dataclass
class Scene:
    """A network in eval mode, and images that it classifies as `y` by small margins."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def one_by_one(self) -> Scene:
        """The same scene with a network that sees every image alone."""
        return replace(self, model=OneByOne(self.model))

    def at(self, rows: list[int]) -> Scene:
        """The same network on some of the images."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def other(self, rank: int = 1) -> Tensor:
        """The class of the next largest logit, or one further down."""
        with torch.no_grad():
            return self.model(self.x).argsort(dim=1, descending=True)[:, rank]


@dataclass
class Course:
    """What a search did: points (L, C, H, W) and logits of every iteration, the state after it, and before all."""

    points: list[Tensor]
    logits: list[Tensor]
    states: list[SearchState]
    begun: SearchState


@pytest.fixture(scope="session")
def scene(tiny_net: Callable[..., nn.Module]) -> Callable[..., Scene]:
    """A function that builds a scene; logits are centred over its images, so that classes vary and lie close."""

    def build(
        images: int = 4,
        *,
        channels: int = 3,
        classes: int = 5,
        size: tuple[int, int] = (5, 5),
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Scene:
        model = tiny_net(channels=channels, classes=classes, seed=seed, dtype=dtype).eval().requires_grad_(False)
        draw = torch.rand(images, channels, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        x = (draw * 1.2 - 0.1).clamp(0, 1)
        model.head.bias -= model(x).mean(0)
        return Scene(model, x, model(x).argmax(1))

    return build


@pytest.fixture(scope="session")
def course() -> Callable[..., Course]:
    """A function that runs a search on all images of a scene, or goes on from a state, one iteration at a time."""

    def run(
        search: Search,
        scene: Scene,
        target: Tensor | None = None,
        *,
        seed: int = 0,
        iterations: int | None = None,
        state: SearchState | None = None,
    ) -> Course:
        rngs = [seeded_generator("cpu", seed, row) for row in range(len(scene.x))]
        target = torch.zeros_like(scene.y) if target is None else target
        state = search.begin(scene.x, scene.y, target, rngs) if state is None else dict(state)
        found = Course([], [], [], dict(state))
        for _ in range(search.iterations if iterations is None else iterations):
            point, logits = search.iterate(state, SearchNetwork(scene.model))
            found.points.append(point)
            found.logits.append(logits)
            found.states.append(dict(state))
        return found

    return run


@pytest.fixture
def double() -> Iterator[None]:
    """The reference engine in float64: its casts to float32 are lifted, and what it allocates is float64."""
    before, cast = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.Tensor.float = cast  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def assert_searches_independent(course: Callable[..., Course]) -> Callable[..., None]:
    """A function that compares a search on all images with each image alone, and with one joined to others later."""

    def check(search: Search, scene: Scene, target: Tensor | None = None) -> None:
        many = scene.one_by_one()
        target = torch.zeros_like(scene.y) if target is None else target
        together = course(search, many, target)
        points, logits = torch.stack(together.points), torch.stack(together.logits)
        half = search.iterations // 2
        begun = course(search, many, target, iterations=half)
        for row in range(len(scene.x)):
            other = (row + 1) % len(scene.x)
            late, early = begun.begun, begun.states[-1]
            state = {name: torch.cat([late[name][other][None], early[name][row][None]]) for name in early}
            pool = course(search, many.at([other, row]), state=state, iterations=search.iterations - half)
            assert torch.equal(torch.stack([point[1] for point in pool.points]), points[half:, row])
            assert torch.equal(torch.stack([z[0] for z in pool.logits]), logits[: search.iterations - half, other])
            own = {name: rows[row][None] for name, rows in begun.begun.items()}
            alone = course(search, many.at([row]), state=own)
            assert torch.equal(torch.stack([point[0] for point in alone.points]), points[:, row])

    return check
