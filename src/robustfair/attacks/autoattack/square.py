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

from robustfair.attacks.autoattack.base import SearchNetwork, SearchState, margins
from robustfair.attacks.pgd import per_pixel
from robustfair.config import Norm
from robustfair.execution.kernels.compiled import is_plain, kernels
from robustfair.values import seeded_generator

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of changed pixels is halved."""
TINY = 1e-12
MEMORY = 0.98
"""What counts of an iteration in the next one, for the share of candidates that are kept."""


class Draws(NamedTuple):
    """Random numbers of Q queries, of one search or all: places of two windows, signs of channels, turns of the bump.

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


class Query(NamedTuple):
    """What M queries do: side (M,), top and left of both windows (M, 4), signs (M, C), whether the bump is turned."""

    side: Tensor
    place: Tensor
    sign: Tensor
    turned: Tensor


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack on a batch of searches.

    Attributes:
        name: for its random streams.
        eps, norm: the ball.
        queries: after the one that judges the start.
        restarts: of each example.
        p_init: share of pixels that the first squares change.
        per_image_windows: each example draws windows and signs of its own.
        rescale_schedule: halve as if the queries were 10,000.
        seed: of the draws that the examples share.
    """

    name: str
    eps: float
    norm: Norm
    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    per_image_windows: bool = False
    rescale_schedule: bool = False
    seed: int = 0

    cost = 1
    measures_distance = False
    targeted = False

    @property
    def iterations(self) -> int:
        """One for every query, and one for the start."""
        return self.queries + 1

    def begin(self, x: Tensor, y: Tensor, target: Tensor, rngs: Sequence[torch.Generator]) -> SearchState:
        """Searches from stripes (linf) or tiles (l2) of random sign."""
        shape = x.shape[1:]
        start = stripes if self.norm == "linf" else tiles
        moved = torch.stack([start(shape, rng) for rng in rngs]).to(x)
        state = {
            "x": x,
            "y": y,
            "restart": target,
            "point": (x + self.eps * (moved if self.norm == "linf" else _unit(moved))).clamp(0, 1),
            "margin": torch.full_like(x[:, 0, 0, 0], -torch.inf),
            "tested": torch.full_like(x[:, 0, 0, 0], -torch.inf),
            "judged": torch.zeros_like(y),
            "iterations": torch.zeros_like(y),
            "stops": torch.ones_like(x[:, 0, 0, 0]),
            "asked": torch.ones_like(x[:, 0, 0, 0]),
        }
        if self.norm == "l2" or self.per_image_windows:
            own = [Draws.of(self.queries, shape[0], rng) for rng in rngs]
            state["sign"] = torch.stack([draw.sign for draw in own]).to(x.device)
            if self.per_image_windows:
                state["place"] = torch.stack([draw.place for draw in own]).to(x.device)
                state["turned"] = torch.stack([draw.turned for draw in own]).to(x.device)
        return state

    def iterate(self, state: SearchState, network: SearchNetwork) -> tuple[Tensor, Tensor]:
        """Judge candidates of every search, up to the first that is kept: the margin grows, or the class is wrong.

        A candidate is drawn from the best point, which few of them change. Where the capacity allows it, the candidates
        of the next queries are therefore judged with it, and those behind the first that is kept, or that the exact
        model is to be asked about, are forgotten: what a search meets is the same as one query at a time.
        """
        rows = torch.arange(len(state["y"]), device=state["y"].device)
        ahead = self._ahead(state, network)
        candidates = self._candidates(state, rows, ahead)
        logits = network.logits(candidates)
        margin = margins(logits, state["y"].repeat_interleave(ahead))
        asked = network.suspects(logits, margin, state["tested"].repeat_interleave(ahead)).view(-1, ahead)
        margin = margin.view(-1, ahead)
        better = (margin > state["margin"][:, None]) | (margin >= 0)
        last = (self.queries - state["judged"]).clamp_max(ahead - 1)
        seen = torch.arange(ahead, device=rows.device) <= last[:, None]
        stop = (better | asked) & seen
        at = torch.where(stop.any(1), stop.int().argmax(1), last)
        kept, candidate = better[rows, at], candidates[rows * ahead + at]
        state["point"] = torch.where(per_pixel(kept, candidate), candidate, state["point"])
        state["margin"] = torch.where(kept, margin[rows, at], state["margin"])
        self._count(state, at, stop.any(1))
        return candidate, logits[rows * ahead + at]

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the square of one query, counted from 0."""
        at = int(query / self.queries * 10_000) if self.rescale_schedule else query
        share = self.p_init / 2 ** sum(at > halving for halving in HALVINGS)
        side = round(math.sqrt(share * height * width))
        if self.norm == "linf":
            return min(max(side, 1), height, width)
        side = max(side, 3)
        return min(side + (side % 2 == 0), height, width)

    def _count(self, state: SearchState, at: Tensor, stopped: Tensor) -> None:
        """Note the queries of an iteration, the one at `at` of each search the last, and whether it changed any."""
        state["judged"] = state["judged"] + at + 1
        state["iterations"] = state["iterations"] + at
        state["stops"] = MEMORY * state["stops"] + stopped
        state["asked"] = MEMORY * state["asked"] + at + 1

    def _ahead(self, state: SearchState, network: SearchNetwork) -> int:
        """Queries to judge at a time: of as many as the capacity allows, as few as make the rest the cheapest.

        Where a share p of the candidates ends an iteration, (1 - (1 - p)^n) / p of n are not forgotten.
        """
        searches = len(state["y"])
        most = min(network.capacity // searches, self.queries)
        if most <= 1:
            return 1
        share = max(float(state["stops"].sum() / state["asked"].sum()), 1 / self.queries)
        counts = torch.arange(1, most + 1)
        cost = (network.fixed + searches * counts) / (1 - (1 - share) ** counts)
        return int(cost.argmin()) + 1

    def _candidates(self, state: SearchState, rows: Tensor, ahead: int) -> Tensor:
        """(B ahead, C, H, W) what the next queries of each search judge, the start before the first of them."""
        rows = rows.repeat_interleave(ahead)
        judged = state["judged"][rows] + torch.arange(ahead, device=rows.device).repeat(len(state["y"]))
        query, started = (judged - 1).clamp(0, self.queries - 1), judged > 0
        draws = self._draws(state, rows, query)
        x, point = state["x"], state["point"]
        if self.norm == "linf":
            draws = draws._replace(side=draws.side * started)
            if is_plain(x) and is_plain(point) and (at_hand := kernels()) is not None:
                places = (draws.place[:, 0], draws.place[:, 1], draws.side)
                return at_hand.squares(point, x, rows, places, draws.sign, self.eps)
        if ahead > 1:
            x, point = x[rows], point[rows]
        if self.norm == "linf":
            moved = self._square_of_signs(x, point, draws)
        else:
            moved = torch.where(per_pixel(started, x), self._moved_bump(x, point, draws), point)
        last = state["x"].is_contiguous(memory_format=torch.channels_last)
        return moved.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _square_of_signs(self, x: Tensor, point: Tensor, draws: Query) -> Tensor:
        """The best point, moved to a corner of the ball inside a window, channel by channel."""
        window = _window(draws.place[:, 0], draws.place[:, 1], draws.side, x)
        corner = torch.add(x, draws.sign[:, :, None, None], alpha=self.eps).clamp(0, 1)
        return torch.where(window, corner, point)

    def _moved_bump(self, x: Tensor, point: Tensor, draws: Query) -> Tensor:
        """The displacement with the mass of a second window moved into a bump in the first."""
        side, place, sign, turned = draws
        apart = point - x
        first, second = (_window(place[:, k], place[:, k + 1], side, x).to(x) for k in (0, 2))

        def length(v: Tensor) -> Tensor:
            return v.square().sum((2, 3), keepdim=True).sqrt()

        there, either = apart * first, torch.maximum(first, second)
        both = length(apart * either)
        bump = self._bumps(x, side, turned, place) * sign[:, :, None, None] + there / (TINY + length(there))
        spare = (self.eps**2 - apart.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / x.shape[1]
        bump = bump / (TINY + length(bump)) * (spare + both.square()).sqrt()
        return (x + self.eps * _unit(apart * (1 - either) + bump)).clamp(0, 1)

    def _draws(self, state: SearchState, rows: Tensor, query: Tensor) -> Query:
        """The draws of queries (M,) of the searches `rows`."""
        x = state["x"]
        shared, sides = _shared(self, *x.shape[1:], x.device)
        at = state["restart"][rows] * self.queries + query
        side = sides[query]

        def drawn(name: str) -> Tensor:
            return state[name][rows, query] if name in state else getattr(shared, name)[at]

        return Query(side, _places(drawn("place"), side, *x.shape[2:]), drawn("sign").to(x), drawn("turned"))

    def _bumps(self, x: Tensor, side: Tensor, turned: Tensor, place: Tensor) -> Tensor:
        """(B, 1, H, W) the bump of each search's side, in its first window."""
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
    """(B, size) place of every row or column of the image in each search's square, -1 outside of it."""
    place = torch.arange(size, device=start.device) - start[:, None]
    return torch.where((place >= 0) & (place < side[:, None]), place, -1)


def _window(top: Tensor, left: Tensor, side: Tensor, x: Tensor) -> Tensor:
    """(B, 1, H, W) flags of the pixels inside the square at each search's place."""
    rows, columns = _within(top, side, x.shape[2]) >= 0, _within(left, side, x.shape[3]) >= 0
    return (rows[:, :, None] & columns[:, None])[:, None]


def _unit(v: Tensor) -> Tensor:
    return v / (torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True) + TINY)


@lru_cache(maxsize=8)
def _shared(square: Square, channels: int, height: int, width: int, device: torch.device) -> tuple[Draws, Tensor]:
    """The draws that the examples share, and the side of every query."""
    rng = seeded_generator("cpu", "square", square.seed, square.name)
    drawn = Draws.of(square.restarts * square.queries, channels, rng)
    sides = torch.tensor([square.side(query, height, width) for query in range(square.queries)])
    return Draws(*(part.to(device) for part in drawn)), sides.to(device)


def _places(place: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """(M, 4) top and left of both windows of these sides (M,), from numbers in [0, 1)."""
    room = torch.stack([height - side, width - side] * 2, 1)
    return (place * room).floor().long()


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
