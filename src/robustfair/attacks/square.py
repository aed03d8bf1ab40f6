"""Square attack: random search over squares of pixels by the margin alone, without gradients; Andriushchenko 2020.

As AutoAttack runs it (`square.py`): the schedule of sizes is not rescaled to the number of queries, and all examples
share the windows of a query, under linf its signs too. `per_image_windows` and `rescale_schedule` are the readings of
the stand-alone code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from robustfair.attacks.lanes import Lanes, Passes, margins
from robustfair.attacks.pgd import per_pixel
from robustfair.config import Norm
from robustfair.values import seeded_generator

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of changed pixels is halved."""
TINY = 1e-12


class Draws(NamedTuple):
    """Random numbers of Q queries, of one lane or of all: places of two windows, signs of channels, turns of the bump.

    `place` (Q, 4) is uniform in [0, 1), `sign` (Q, C) is +-1, `turned` (Q,) is a flag.
    """

    place: Tensor
    sign: Tensor
    turned: Tensor

    @staticmethod
    def of(queries: int, channels: int, rng: torch.Generator) -> Draws:
        place = torch.rand(queries, 4, generator=rng)
        sign = 2 * torch.randint(2, (queries, channels), generator=rng, dtype=torch.int8) - 1
        return Draws(place, sign, torch.rand(queries, generator=rng) > 0.5)


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack as lanes.

    Attributes:
        name: for its random streams.
        eps, norm: the ball.
        queries: after the one that judges the start.
        rounds: restarts.
        p_init: share of pixels that the first squares change.
        per_image_windows: each example draws windows and signs of its own.
        rescale_schedule: halve as if the queries were 10,000.
        seed: of the draws that the examples share.
    """

    name: str
    eps: float
    norm: Norm
    queries: int = 5000
    rounds: int = 1
    p_init: float = 0.8
    per_image_windows: bool = False
    rescale_schedule: bool = False
    seed: int = 0

    cost = 1
    fine = False
    targeted = False

    @property
    def turns(self) -> int:
        """One for every query, and one for the start."""
        return self.queries + 1

    def begin(self, x: Tensor, y: Tensor, target: Tensor, rngs: Sequence[torch.Generator]) -> Lanes:
        """Lanes at stripes (linf) or tiles (l2) of random sign."""
        shape = x.shape[1:]
        start = stripes if self.norm == "linf" else tiles
        moved = torch.stack([start(shape, rng) for rng in rngs]).to(x)
        lanes = {
            "x": x,
            "y": y,
            "round": target,
            "point": (x + self.eps * (moved if self.norm == "linf" else _unit(moved))).clamp(0, 1),
            "margin": torch.full_like(x[:, 0, 0, 0], -torch.inf),
            "judged": torch.zeros_like(y),
        }
        if self.norm == "l2" or self.per_image_windows:
            own = [Draws.of(self.queries, shape[0], rng) for rng in rngs]
            lanes["sign"] = torch.stack([draw.sign for draw in own]).to(x.device)
            if self.per_image_windows:
                lanes["place"] = torch.stack([draw.place for draw in own]).to(x.device)
                lanes["turned"] = torch.stack([draw.turned for draw in own]).to(x.device)
        return lanes

    def turn(self, lanes: Lanes, passes: Passes) -> tuple[Tensor, Tensor]:
        """Judge a candidate of every lane and keep it where the margin grows or the class is wrong."""
        started = lanes["judged"] > 0
        move = self._square_of_signs if self.norm == "linf" else self._moved_bump
        candidate = torch.where(per_pixel(started, lanes["x"]), move(lanes), lanes["point"])
        logits = passes.logits(candidate)
        margin = margins(logits, lanes["y"])
        better = (margin > lanes["margin"]) | (margin >= 0)
        lanes["point"] = torch.where(per_pixel(better, candidate), candidate, lanes["point"])
        lanes["margin"] = torch.where(better, margin, lanes["margin"])
        lanes["judged"] = lanes["judged"] + 1
        return candidate, logits

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the square of one query, counted from 0."""
        at = int(query / self.queries * 10_000) if self.rescale_schedule else query
        share = self.p_init / 2 ** sum(at > halving for halving in HALVINGS)
        side = round(math.sqrt(share * height * width))
        if self.norm == "linf":
            return min(max(side, 1), height, width)
        side = max(side, 3)
        return min(side + (side % 2 == 0), height, width)

    def _square_of_signs(self, lanes: Lanes) -> Tensor:
        """The best point, moved to a corner of the ball inside a window, channel by channel."""
        x, (side, place, sign, _) = lanes["x"], self._draws(lanes)
        window = _window(place[:, 0], place[:, 1], side, x)
        corner = torch.add(x, sign[:, :, None, None], alpha=self.eps).clamp(0, 1)
        return torch.where(window, corner, lanes["point"])

    def _moved_bump(self, lanes: Lanes) -> Tensor:
        """The displacement with the mass of a second window moved into a bump in the first."""
        x, (side, place, sign, turned) = lanes["x"], self._draws(lanes)
        apart = lanes["point"] - x
        first, second = (_window(place[:, k], place[:, k + 1], side, x).to(x) for k in (0, 2))

        def length(v: Tensor) -> Tensor:
            return v.square().sum((2, 3), keepdim=True).sqrt()

        there, either = apart * first, torch.maximum(first, second)
        both = length(apart * either)
        bump = self._bumps(x, side, turned, place) * sign[:, :, None, None] + there / (TINY + length(there))
        spare = (self.eps**2 - apart.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / x.shape[1]
        bump = bump / (TINY + length(bump)) * (spare + both.square()).sqrt()
        return (x + self.eps * _unit(apart * (1 - either) + bump)).clamp(0, 1)

    def _draws(self, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each lane's query: side (L,), top and left of both windows (L, 4), signs (L, C), turn (L,)."""
        x, query = lanes["x"], (lanes["judged"] - 1).clamp_min(0)
        shared, sides = _shared(self, *x.shape[1:], x.device)
        rows = torch.arange(len(query), device=x.device)
        at = lanes["round"] * self.queries + query
        side = sides[query]

        def drawn(name: str) -> Tensor:
            return lanes[name][rows, query] if name in lanes else getattr(shared, name)[at]

        drawn_place = drawn("place")
        rows_and_columns = (drawn_place[:, k] * (x.shape[2 + k % 2] - side) for k in range(4))
        place = torch.stack(list(rows_and_columns), 1).floor().long()
        return side, place, drawn("sign").to(x), drawn("turned")

    def _bumps(self, x: Tensor, side: Tensor, turned: Tensor, place: Tensor) -> Tensor:
        """(L, 1, H, W) the bump of each lane's side, in its first window."""
        sides, table = _bump_table(self, *x.shape[2:], x.device, x.dtype)
        bumps = table[torch.searchsorted(sides, side), turned.long()]
        row, column = (_within(place[:, k], side, x.shape[2 + k]) + 1 for k in (0, 1))
        at = row[:, :, None] * bumps.shape[2] + column[:, None]
        return bumps.flatten(1).gather(1, at.flatten(1)).view_as(at)[:, None]


def stripes(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """(C, H, W) of +-1, the same down every column."""
    channels, height, width = shape
    sign = 2 * torch.randint(2, (channels, 1, width), generator=rng) - 1
    return sign.expand(channels, height, width)


def tiles(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """(C, H, W), float64, of bumps side by side, each channel of each with a sign of its own."""
    channels, height, width = shape
    side = max(height // 5, 1)
    offset, grid = max((height - 5 * side) // 2, 0), (height // side, width // side)
    turned = torch.rand(*grid, 1, 1, 1, generator=rng) > 0.5
    sign = 2 * torch.randint(2, (*grid, channels, 1, 1), generator=rng) - 1
    each = torch.where(turned, bump(side, True), bump(side, False)) * sign
    whole = each.permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * side, grid[1] * side)
    tiled = torch.zeros(shape, dtype=torch.float64)
    part = tiled[:, offset : offset + whole.shape[1], offset : offset + whole.shape[2]]
    part += whole[:, : part.shape[1], : part.shape[2]]
    return tiled


@lru_cache(maxsize=64)
def bump(side: int, turned: bool) -> Tensor:
    """(side, side) of unit length, float64: a positive half over a negative one, each falling off from its middle."""
    half = side // 2
    whole = torch.cat([_half(half, side), -_half(side - half, side)])
    whole = whole / whole.norm()
    return whole.T if turned else whole


def _half(height: int, width: int) -> Tensor:
    """(height, width) of unit length: nested rectangles, the k-th adding 1 / (k + 1)^2."""
    found = torch.zeros(height, width, dtype=torch.float64)
    row, column = height // 2, width // 2
    for k in range(max(row, column) + 1):
        top, left = max(row - k, 0), max(column - k, 0)
        found[top : min(row + k + 1, height), left : min(column + k + 1, width)] += 1 / (k + 1) ** 2
    return found / found.norm().clamp_min(TINY)


def _within(start: Tensor, side: Tensor, size: int) -> Tensor:
    """(L, size) place of every row or column of the image in each lane's square, -1 outside of it."""
    place = torch.arange(size, device=start.device) - start[:, None]
    return torch.where((place >= 0) & (place < side[:, None]), place, -1)


def _window(top: Tensor, left: Tensor, side: Tensor, x: Tensor) -> Tensor:
    """(L, 1, H, W) flags of the pixels inside the square at each lane's place."""
    rows, columns = _within(top, side, x.shape[2]) >= 0, _within(left, side, x.shape[3]) >= 0
    return (rows[:, :, None] & columns[:, None])[:, None]


def _unit(v: Tensor) -> Tensor:
    return v / (torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True) + TINY)


@lru_cache(maxsize=8)
def _shared(square: Square, channels: int, height: int, width: int, device: torch.device) -> tuple[Draws, Tensor]:
    """The draws that the examples share, and the side of every query."""
    rng = seeded_generator("cpu", "square", square.seed, square.name)
    drawn = Draws.of(square.rounds * square.queries, channels, rng)
    sides = torch.tensor([square.side(query, height, width) for query in range(square.queries)])
    return Draws(*(part.to(device) for part in drawn)), sides.to(device)


@lru_cache(maxsize=8)
def _bump_table(
    square: Square, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sides (S,) of the schedule in order, and their bumps (S, 2, side + 1, side + 1), upright and turned.

    The first row and column, and what a smaller bump leaves free, are zero: there an index from outside leads.
    """
    sides = sorted({square.side(query, height, width) for query in range(square.queries)})
    table = torch.zeros(len(sides), 2, sides[-1] + 1, sides[-1] + 1, dtype=dtype)
    for level, side in enumerate(sides):
        for turned in (False, True):
            table[level, int(turned), 1 : side + 1, 1 : side + 1] = bump(side, turned)
    return torch.tensor(sides, device=device), table.to(device)
