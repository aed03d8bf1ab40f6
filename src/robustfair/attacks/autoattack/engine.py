"""The engine of AutoAttack: a batch of searches for adversarial points, refilled as places fall free.

An example is attacked until it is broken and then leaves. Searches know nothing of each other, every draw is keyed by
the example, and where several restarts of an example run side by side the earliest that breaks it counts: what becomes
of an example depends neither on the batch size nor on its neighbours, up to the rounding of the network.

The exact model alone decides what is broken: at a point inside the ball and the box it predicts a wrong class, or none
because its logits are no finite numbers. The search may run in a lower precision; points that it takes for adversarial,
or nearly so, are suspects that the exact model is asked about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robustfair.attacks.autoattack.base import Search, SearchNetwork, SearchState, distance, into_ball, margins
from robustfair.attacks.pgd import predicted
from robustfair.config import Norm
from robustfair.errors import ModelError
from robustfair.values import Model, seeded_generator

ROUNDING = 1e-6
"""By how much, and by which share of the radius, a point of a search may lie outside before it is put into the ball."""
UNBROKEN = -1
"""What broke an example that is still robust."""
NEVER = 2**31
"""Restart that broke it."""
JOURNAL_KEYS = {"restart": "round", "iterations": "turns"}
"""Parts of the state of searches that journals hold under another key, which stays."""


@dataclass
class Spent:
    """What a member took on this machine: seconds, and the passes of its network, and the images of each of them."""

    seconds: float = 0.0
    passes: int = 0
    images: int = 0


@dataclass
class AttackResult:
    """What an ensemble did to each of n examples, on the CPU.

    Attributes:
        prediction: (n,) class that the exact model gives at the point found, the one after the label where it gives
            none: the label while the example is robust.
        broken_by: (n,) number of the member that broke it, -1 while it is robust.
        points: example -> (C, H, W) where the exact model gives that class, inside ball and box.
        not_finite: points at which the exact model's logits were no finite numbers.
        ran: member -> share of its work that was done when the run ended.
        how: how it ran on this machine, in words.
        spent: member -> what it took, since the run was begun or went on.
    """

    prediction: Tensor
    broken_by: Tensor
    points: dict[int, Tensor] = field(default_factory=dict)
    not_finite: int = 0
    ran: dict[str, float] = field(default_factory=dict)
    how: str = ""
    spent: dict[str, Spent] = field(default_factory=dict)

    @staticmethod
    def all_robust(labels: Tensor) -> AttackResult:
        """Before the first attack."""
        return AttackResult(labels.cpu().clone(), torch.full_like(labels, UNBROKEN, device="cpu"))

    def state(self) -> dict[str, Tensor]:
        """What is found so far, for `of_state`."""
        found = {
            "prediction": self.prediction,
            "broken_by": self.broken_by,
            "not_finite": torch.tensor(self.not_finite),
        }
        if self.points:
            found["points/example"] = torch.tensor(list(self.points))
            found["points/pixels"] = torch.stack(list(self.points.values()))
        return found

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> AttackResult:
        """What `state` gave."""
        examples = state.get("points/example", torch.empty(0)).tolist()
        points = dict(zip(examples, state.get("points/pixels", torch.empty(0)), strict=True))
        return AttackResult(state["prediction"].clone(), state["broken_by"].clone(), points, int(state["not_finite"]))


@dataclass
class Queue:
    """The searches of one attack that wait: all examples in the first restart before any in the second."""

    examples: Tensor
    restarts: int
    position: int = 0

    def __len__(self) -> int:
        return self.restarts * len(self.examples)

    def take(self, most: int, robust: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `most` searches whose example is robust: examples (B,) and restarts (B,)."""
        examples: list[int] = []
        restarts: list[int] = []
        while len(examples) < most and self.position < len(self):
            restart, row = divmod(self.position, len(self.examples))
            self.position += 1
            example = int(self.examples[row])
            if robust[example]:
                examples.append(example)
                restarts.append(restart)
        return torch.tensor(examples, dtype=torch.int64), torch.tensor(restarts, dtype=torch.int64)


class Ensemble:
    """Searches one after another, each on the examples that all before it have left robust.

    Args:
        exact: the model as given, in eval mode; its word breaks an example.
        network: the network that the searches see.
        distance_network: what those see that measure distances to a boundary, where it is another.
        keep_points: keep where each example was broken.
        searches: the members, in order.
        images: from rows (B,) to pixels (B, C, H, W) on the device; all are classified right as they are.
        labels: (n,) on the device.
        keys: (n,) what each example's draws are keyed by: its place in the audited data set.
        eps, norm: the ball.
        seed: of all draws.
        batch_size: most searches at a time.
    """

    def __init__(
        self,
        exact: Model,
        network: SearchNetwork,
        searches: Sequence[Search],
        *,
        images: Callable[[Tensor], Tensor],
        labels: Tensor,
        keys: Tensor,
        eps: float,
        norm: Norm,
        seed: int,
        batch_size: int,
        distance_network: SearchNetwork | None = None,
        keep_points: bool = True,
    ) -> None:
        self.exact, self.network, self.searches = exact, network, tuple(searches)
        self.images, self.labels, self.keys = images, labels, keys
        self.distance_network, self.keep_points = network if distance_network is None else distance_network, keep_points
        self.eps, self.norm, self.seed, self.batch_size = eps, norm, seed, batch_size
        self.result = AttackResult.all_robust(labels)
        self.broken_in = torch.full_like(self.result.broken_by, NEVER)
        self.member = 0
        self.queue: Queue | None = None
        self.active: SearchState = {}
        self._spent: dict[int, Spent] = {}
        self._ranking: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Whether every search has run."""
        return self.member == len(self.searches)

    def run(self, watch: Callable[[Ensemble], bool] = lambda ensemble: True) -> AttackResult:
        """Go on until all is done, or until `watch`, called after every iteration, says no.

        An iteration that is interrupted has not happened: the state is that before it.
        """
        while not self.finished:
            before = self._snapshot()
            try:
                moved = self._advance()
            except BaseException:
                vars(self).update(before)
                raise
            if moved and not watch(self):
                break
        names = [search.name for search in self.searches]
        self.result.ran = dict(zip(names, self.ran(), strict=True))
        self.result.spent = {names[number]: spent for number, spent in self._spent.items()}
        return self.result

    def ran(self) -> list[float]:
        """Of every search, the share of its work that is done."""
        found = [float(number < self.member) for number in range(len(self.searches))]
        if self.queue is not None and len(self.queue):
            each = self.searches[self.member].iterations
            left = int((each - self.active["iterations"]).sum()) / each if self.active else 0.0
            found[self.member] = (self.queue.position - left) / len(self.queue)
        return found

    def progress(self) -> float:
        """Share of all work that is done, counting forward passes as if no more examples broke."""
        sizes = [search.restarts * search.iterations * search.cost for search in self.searches]
        return sum(size * share for size, share in zip(sizes, self.ran(), strict=True)) / sum(sizes)

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, on the CPU."""
        found = {**self.result.state(), "broken_in": self.broken_in, "member": torch.tensor(self.member)}
        for name, rows in self.active.items():
            last, key = _channels_last(rows), JOURNAL_KEYS.get(name, name)
            found[f"{'channels_last' if last else 'lanes'}/{key}"] = (rows.movedim(1, -1) if last else rows).cpu()
        if self.queue is not None:
            found |= {"queue/examples": self.queue.examples, "queue/position": torch.tensor(self.queue.position)}
        return {name: value.contiguous().clone() for name, value in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state` was taken, with the same searches on the same examples."""
        device = self.labels.device
        self.member, self.broken_in = int(state["member"]), state["broken_in"].clone()
        self.queue, self.active, self.result = None, {}, AttackResult.of_state(state)
        if "queue/position" in state:
            restarts = self.searches[self.member].restarts
            self.queue = Queue(state["queue/examples"], restarts, int(state["queue/position"]))
        names = {key: name for name, key in JOURNAL_KEYS.items()}
        for key, rows in state.items():
            kind, _, part = key.partition("/")
            if kind in ("lanes", "channels_last"):
                name = names.get(part, part)
                self.active[name] = (rows.movedim(-1, 1) if kind == "channels_last" else rows).to(device)

    def _snapshot(self) -> dict[str, Any]:
        """What an iteration changes. It replaces the tensors of `active`, never writes into them: they need no copy."""
        known = self.result
        result = replace(
            known, prediction=known.prediction.clone(), broken_by=known.broken_by.clone(), points=dict(known.points)
        )
        return {
            "member": self.member,
            "queue": None if self.queue is None else replace(self.queue),
            "active": dict(self.active),
            "broken_in": self.broken_in.clone(),
            "result": result,
        }

    def _advance(self) -> bool:
        """One iteration of the attack that is on; False where that was over, and the next one's turn comes."""
        if self.queue is None:
            robust = (self.result.broken_by == UNBROKEN).nonzero().squeeze(1)
            self.queue = Queue(robust, self.searches[self.member].restarts)
        if not self._fill():
            self.member, self.queue = self.member + 1, None
            return False
        self._iterate(self.searches[self.member])
        return True

    def _fill(self) -> bool:
        """Begin searches in the free places of the batch; whether any search is at work."""
        assert self.queue is not None, "filled only while an attack runs"
        free = self.batch_size - (len(self.active["y"]) if self.active else 0)
        examples, restarts = self.queue.take(free, self.result.broken_by == UNBROKEN)
        if len(examples):
            new = self._begin(self.searches[self.member], examples, restarts)
            self.active = {k: torch.cat([self.active[k], new[k]]) for k in new} if self.active else new
        return bool(self.active)

    def _begin(self, search: Search, examples: Tensor, restarts: Tensor) -> SearchState:
        rows = examples.to(self.labels.device)
        x, y = self.images(rows), self.labels[rows]
        target = self._targets()[examples, restarts] if search.targeted else restarts
        keys = self.keys[examples].tolist()
        pairs = zip(keys, restarts.tolist(), strict=True)
        rngs = [seeded_generator("cpu", "search", self.seed, search.name, key, restart) for key, restart in pairs]
        own = search.begin(x, y, target.to(y), rngs)
        zero = torch.zeros_like(y)
        tested = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        return {**own, "example": rows, "restart": restarts.to(y), "iterations": zero, "tested": tested}

    def _targets(self) -> Tensor:
        """(n, K - 1) classes other than the label, the largest clean logit of the exact model first, on the CPU."""
        if self._ranking is None:
            labels = self.labels
            ranked = []
            for rows in torch.arange(len(labels), device=labels.device).split(self.batch_size):
                logits = self._exact(self.images(rows))
                others = logits.scatter(1, labels[rows, None], -torch.inf)
                ranked.append(others.argsort(dim=1, descending=True, stable=True)[:, :-1].cpu())
            self._ranking = torch.cat(ranked)
        return self._ranking

    def _iterate(self, search: Search) -> None:
        active = self.active
        network = self.distance_network if search.measures_distance else self.network
        began, passes, images = time.perf_counter(), network.passes, network.images
        point, logits = search.iterate(active, network)
        margin = margins(logits, active["y"])
        suspect = network.suspects(logits, margin, active["tested"])
        active["iterations"] = active["iterations"] + 1
        leaves = active["iterations"] >= search.iterations
        rows = suspect.nonzero().squeeze(1)
        if len(rows):
            most = self.eps * (1 + ROUNDING) + ROUNDING
            rows = rows[distance(active["x"][rows], point[rows], self.norm) <= most]
            inside = into_ball(active["x"][rows], point[rows], self.eps, self.norm)
            self._judge(active["example"][rows], active["restart"][rows], inside)
            tested = torch.where(margin.isfinite(), margin, active["tested"])
            active["tested"] = active["tested"].index_copy(0, rows, tested[rows].to(active["tested"]))
            leaves = leaves | (self.broken_in.to(leaves.device)[active["example"]] <= active["restart"])
        stays = (~leaves).nonzero().squeeze(1)
        if len(stays) < len(leaves):
            self.active = {name: rows[stays] for name, rows in active.items()} if len(stays) else {}
        spent = self._spent.setdefault(self.member, Spent())
        spent.seconds += time.perf_counter() - began
        spent.passes += network.passes - passes
        spent.images += network.images - images

    def _judge(self, rows: Tensor, restarts: Tensor, points: Tensor) -> None:
        """Ask the exact model about points (B, C, H, W) of the examples `rows`, and note what it breaks first."""
        if len(rows) == 0:
            return
        logits = self._exact(points)
        labels, finite = self.labels[rows], logits.isfinite().all(1)
        self.result.not_finite += int((~finite).sum())
        wrong = predicted(logits, labels)
        broken = (wrong != labels).cpu()
        for at in broken.nonzero().squeeze(1).tolist():
            example, restart = int(rows[at]), int(restarts[at])
            if restart >= self.broken_in[example]:
                continue
            self.broken_in[example] = restart
            self.result.prediction[example] = int(wrong[at])
            self.result.broken_by[example] = self.member
            if self.keep_points:
                self.result.points[example] = points[at].cpu().clone()

    def _exact(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.exact(x)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ModelError(f"the model gives {tuple(logits.shape)} for {len(x)} images: it must give logits (B, K)")
        return logits


def _channels_last(rows: Tensor) -> bool:
    """Whether images lie in memory with their channels last: a search goes on exactly only in the order it began."""
    return rows.ndim == 4 and not rows.is_contiguous() and rows.is_contiguous(memory_format=torch.channels_last)
