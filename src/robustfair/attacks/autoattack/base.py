"""The contract between an attack of the AutoAttack family and the engine that runs it, and the measures they share.

An attack of the AutoAttack family is a `Search`. One search is one restart, or one target class, on one example; many
run side by side, independently, as a batch. Their state is a mapping of tensors with a row for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from robustfair.attacks.pgd import input_gradient, per_pixel, require_graph
from robustfair.config import Norm, Precision
from robustfair.values import Model

SearchState = dict[str, Tensor]
"""State of a batch of searches, a row (B, ...) each; "x" and "y" are the example."""
Loss = Callable[..., Tensor]
"""From logits (B, K) and classes (B,) to values (B,)."""
TOLERANCES: Mapping[Precision, float] = {"fp32": 2.0**-10, "bf16": 2.0**-6}
"""Share of the largest logit by which the margin of a search network may be wrong. In bf16 two roundings to 8 bits, and
as much again; in float32 a hundred times what folding and transformed convolutions were seen to change."""


class SearchNetwork:
    """The network that a search attacks: its logits, and its gradients with respect to the images.

    Args:
        model: (B, C, H, W) -> logits (B, K), float32 at least.
        tolerance: share of the largest logit by which its margins may differ from the exact model's.
        capacity: images that a pass may take; a search may use what the batch leaves of it.
        fixed: what a pass costs whatever its images, in images.

    Attributes:
        passes, images: so far: forward and backward passes, and the images of each of them.
    """

    def __init__(self, model: Model, tolerance: float = 0.0, capacity: int = 0, fixed: float = 0.0) -> None:
        self.model = model
        self.tolerance = tolerance
        self.capacity, self.fixed = capacity, fixed
        self.passes = 0
        self.images = 0

    def _count(self, x: Tensor, passes: int) -> None:
        self.passes += passes
        self.images += passes * len(x)

    def suspects(self, logits: Tensor, margin: Tensor, tested: Tensor) -> Tensor:
        """(B,) where the exact model is to be asked: it may be wrong there, or the logits are no numbers.

        Args:
            margin: (B,) of `logits` (B, K).
            tested: (B,) largest margin that it was asked about before; below it only a wrong class is new.
        """
        near = margin >= -self.tolerance * logits.abs().amax(1)
        return near & ((margin > tested) | (margin >= 0)) | ~logits.isfinite().all(1)

    def logits(self, x: Tensor) -> Tensor:
        """(B, K), without a graph."""
        self._count(x, 1)
        with torch.no_grad():
            return self.model(x)

    def gradient(self, x: Tensor, loss: Loss, *classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) at `x`, and the gradient (B, C, H, W) of `loss(logits, *classes)`, each example's its own.

        Where the gradient is no finite number it is zero, so that no search carries it on.
        """
        self._count(x, 2)
        z = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(z)
            gradient = input_gradient(loss(logits, *classes), z)
        return logits.detach(), _finite(gradient)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) at `x` and their gradients (B, K, C, H, W): K backward passes."""
        z = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(z)
            require_graph(logits)
            rows = [torch.autograd.grad(logits[:, k].sum(), z, retain_graph=True)[0] for k in range(logits.shape[1])]
        self._count(x, 1 + len(rows))
        return logits.detach(), _finite(torch.stack(rows, 1))


class Search(Protocol):
    """One attack as a state machine over a batch of searches."""

    @property
    def name(self) -> str:
        """For its random streams and for reports."""
        ...

    @property
    def restarts(self) -> int:
        """Searches for each example, one for each restart or target class."""
        ...

    @property
    def iterations(self) -> int:
        """Iterations of one search."""
        ...

    @property
    def cost(self) -> int:
        """Forward passes that an iteration takes about, a backward pass counting as one."""
        ...

    @property
    def measures_distance(self) -> bool:
        """Whether it measures distances to a boundary, which low precision blurs."""
        ...

    @property
    def targeted(self) -> bool:
        """Whether each restart goes for a class of its own: the first for the likeliest other one."""
        ...

    def begin(self, x: Tensor, y: Tensor, target: Tensor, rngs: Sequence[torch.Generator]) -> SearchState:
        """New searches for images (B, C, H, W) and labels (B,); a CPU generator for each draws its numbers.

        Args:
            target: (B,) class that the restart goes for where the search is targeted, else the number of the restart.
        """
        ...

    def iterate(self, state: SearchState, network: SearchNetwork) -> tuple[Tensor, Tensor]:
        """Run one iteration of every search: a point of each (B, C, H, W) and the logits (B, K) there.

        An attack that takes several at once, as if one after another, counts those beyond the first in "iterations".
        """
        ...


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) largest other logit minus that of the label: positive where the class is wrong."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own.squeeze(1)


def distance(x: Tensor, point: Tensor, norm: Norm) -> Tensor:
    """(B,) norm of `point - x`, in float64."""
    apart = (point.double() - x.double()).flatten(1)
    return apart.abs().amax(1) if norm == "linf" else apart.norm(dim=1)


def into_ball(x: Tensor, point: Tensor, eps: float, norm: Norm) -> Tensor:
    """The point, put into ball and box in float64 and rounded to the type of `x`: outside by a rounding at most."""
    apart = point.double() - x.double()
    if norm == "linf":
        apart = apart.clamp(-eps, eps)
    else:
        length = apart.flatten(1).norm(dim=1)
        apart = apart * per_pixel((eps / length.clamp_min(1e-300)).clamp_max(1.0), apart)
    return (x.double() + apart).clamp(0, 1).to(x.dtype)


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(0.0, posinf=0.0, neginf=0.0)
