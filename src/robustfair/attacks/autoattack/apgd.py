"""Auto-PGD: projected gradient ascent with momentum that halves its own step, from Croce and Hein, ICML 2020.

The losses are the cross-entropy, the difference of logits ratio (DLR) and its targeted form. Code and paper disagree on
whether a window with exactly 75 % of rises halves the step; the official `autopgd_base.py` halves, and is followed here
in all: the first rise of a run is counted against a zero, and the momentum after a restart from the best point is that
of the point left behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustfair.attacks.autoattack.base import SearchNetwork, SearchState
from robustfair.attacks.pgd import per_pixel
from robustfair.config import Norm
from robustfair.losses import cross_entropy

TINY = 1e-12
ApgdLoss = Literal["ce", "dlr", "dlr-targeted", "ce-targeted"]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) difference of logits ratio, positive where the class is wrong; for three classes or more.

    >>> dlr(torch.tensor([[3.0, 1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor([-0.6667])
    """
    ranked = logits.topk(3, dim=1).values
    own = logits.gather(1, y[:, None]).squeeze(1)
    rival = torch.where(own == ranked[:, 0], ranked[:, 1], ranked[:, 0])
    return (rival - own) / (ranked[:, 0] - ranked[:, 2] + TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(B,) the same towards one class; for four classes or more.

    >>> dlr_targeted(torch.tensor([[3.0, 1.0, 0.0, -1.0]]), torch.tensor([0]), torch.tensor([2]))
    tensor([-0.8571])
    """
    ranked = logits.topk(4, dim=1).values
    own, wanted = (logits.gather(1, k[:, None]).squeeze(1) for k in (y, target))
    return (wanted - own) / (ranked[:, 0] - 0.5 * (ranked[:, 2] + ranked[:, 3]) + TINY)


def _ce(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, y)


def _dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return dlr(logits, y)


def _ce_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return -cross_entropy(logits, target)


LOSSES = {"ce": _ce, "dlr": _dlr, "dlr-targeted": dlr_targeted, "ce-targeted": _ce_targeted}
CLASSES: Mapping[ApgdLoss, int] = {"ce": 2, "dlr": 3, "dlr-targeted": 4, "ce-targeted": 2}
"""Fewest classes for which a loss is defined."""


@dataclass(frozen=True, kw_only=True)
class Apgd:
    """APGD on a batch of searches.

    Attributes:
        name: for its random streams.
        loss: what it climbs.
        eps, norm: the ball.
        steps: gradient steps; one more pass judges the start.
        restarts: of each example, or target classes for the targeted loss.
        rho: share of rises in a window up to which the step is halved.
    """

    name: str
    loss: ApgdLoss
    eps: float
    norm: Norm
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    cost = 2
    measures_distance = False

    @property
    def iterations(self) -> int:
        """One for every point that is judged."""
        return self.steps + 1

    @property
    def targeted(self) -> bool:
        """Whether a restart goes for a class of its own."""
        return self.loss in ("dlr-targeted", "ce-targeted")

    def begin(self, x: Tensor, y: Tensor, target: Tensor, rngs: Sequence[torch.Generator]) -> SearchState:
        """Searches from random points on the surface of the ball, clipped to the box."""
        random = torch.rand if self.norm == "linf" else torch.randn
        noise = torch.stack([random(x.shape[1:], generator=rng) for rng in rngs]).to(x)
        noise = 2 * noise - 1 if self.norm == "linf" else noise
        start = (x + self.eps * self._unit(noise)).clamp(0, 1)
        zero = torch.zeros_like(x[:, 0, 0, 0])
        return {
            "x": x,
            "y": y,
            "target": target,
            "point": start,
            "before": start.clone(),
            "best": start.clone(),
            "best_gradient": torch.zeros_like(x),
            "best_loss": torch.full_like(zero, -torch.inf),
            "best_at_check": zero.clone(),
            "last_loss": zero.clone(),
            "rises": zero.clone(),
            "step_size": torch.full_like(zero, 2 * self.eps),
            "halved": torch.ones_like(y, dtype=torch.bool),
            "window": torch.full_like(y, self._share(0.22)),
            "since_check": torch.zeros_like(y),
            "judged": torch.zeros_like(y),
        }

    def iterate(self, state: SearchState, network: SearchNetwork) -> tuple[Tensor, Tensor]:
        """Judge the points and step on from them."""
        point = state["point"]
        logits, gradient = network.gradient(point, LOSSES[self.loss], state["y"], state["target"])
        loss = LOSSES[self.loss](logits, state["y"], state["target"])
        first = state["judged"] == 0
        self._remember(state, loss, gradient, first)
        start, gradient = self._halve(state, gradient, first)
        self._step(state, start, gradient, first)
        state["judged"] = state["judged"] + 1
        return point, logits

    def _remember(self, state: SearchState, loss: Tensor, gradient: Tensor, first: Tensor) -> None:
        """The best point so far, and whether the loss rose. The start is no step, and is compared with nothing."""
        better = loss > state["best_loss"]
        at = per_pixel(better, gradient)
        state["best"] = torch.where(at, state["point"], state["best"])
        state["best_gradient"] = torch.where(at, gradient, state["best_gradient"])
        state["best_loss"] = torch.where(better, loss, state["best_loss"])
        state["best_at_check"] = torch.where(first, loss, state["best_at_check"])
        state["rises"] = state["rises"] + ((loss > state["last_loss"]) & ~first)
        state["last_loss"] = torch.where(first, state["last_loss"], loss)

    def _halve(self, state: SearchState, gradient: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Where to step from and along: at a checkpoint without progress the best point, with half the step."""
        state["since_check"] = state["since_check"] + ~first
        check = state["since_check"] == state["window"]
        stuck = state["rises"] <= self.rho * state["window"]
        flat = ~state["halved"] & (state["best_at_check"] >= state["best_loss"])
        halve = check & (stuck | flat)
        state["halved"] = torch.where(check, halve, state["halved"])
        state["best_at_check"] = torch.where(check, state["best_loss"], state["best_at_check"])
        state["rises"] = torch.where(check, 0.0, state["rises"])
        state["since_check"] = torch.where(check, 0, state["since_check"])
        shorter = (state["window"] - self._share(0.03)).clamp_min(self._share(0.06))
        state["window"] = torch.where(check, shorter, state["window"])
        state["step_size"] = torch.where(halve, state["step_size"] / 2, state["step_size"])
        back = per_pixel(halve, gradient)
        return torch.where(back, state["best"], state["point"]), torch.where(back, state["best_gradient"], gradient)

    def _step(self, state: SearchState, start: Tensor, gradient: Tensor, first: Tensor) -> None:
        x, momentum = state["x"], start - state["before"]
        direction = gradient.sign() if self.norm == "linf" else self._unit(gradient)
        ahead = self._project(x, start + per_pixel(state["step_size"], x) * direction)
        share = per_pixel(torch.where(first, 1.0, 0.75).to(x), x)
        state["before"] = start
        state["point"] = self._project(x, start + share * (ahead - start) + (1 - share) * momentum)

    def _project(self, x: Tensor, point: Tensor) -> Tensor:
        if self.norm == "linf":
            return torch.minimum(torch.maximum(point, x - self.eps), x + self.eps).clamp(0, 1)
        apart = point - x
        return (x + self._unit(apart) * self._length(apart).clamp_max(self.eps)).clamp(0, 1)

    def _share(self, of_steps: float) -> int:
        return max(int(of_steps * self.steps), 1)

    def _unit(self, v: Tensor) -> Tensor:
        return v / (self._length(v) + TINY)

    def _length(self, v: Tensor) -> Tensor:
        if self.norm == "linf":
            return v.abs().amax((1, 2, 3), keepdim=True)
        return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
