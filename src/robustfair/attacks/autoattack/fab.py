"""Fast Adaptive Boundary attack: the nearest point of another class, by linearising the network; Croce and Hein 2020.

Each iteration projects the current point and the image itself onto the hyperplane where two classes tie, inside the
box, and takes a step between the two; a point of another class is drawn back towards the image. The radius plays no
part in the search: a point counts if it happens to lie in the ball. After the official `fab_base.py`, without the
final line search of the stand-alone version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from robustfair.attacks.autoattack.base import SearchNetwork, SearchState
from robustfair.attacks.pgd import per_pixel
from robustfair.config import Norm

FLAT = 1e-8
"""Up to this slope a pixel counts as flat under l2, and stays where it is."""
MOST_SEGMENTS = 100
"""Newton steps of a projection at most: three do as a rule, a score where the box only just lets the plane be met."""
LOOK_EVERY = 5
"""Newton steps after which a GPU is asked whether all searches have arrived, which waits for it; a CPU after each."""


@dataclass(frozen=True, kw_only=True)
class Fab:
    """FAB on a batch of searches.

    Attributes:
        name: for its random streams.
        targeted: towards one class a restart, else towards the class whose tie is nearest at every point.
        eps, norm: the ball; `eps` scales the starts of restarts after the first.
        steps: iterations.
        restarts: of each example, or target classes.
        alpha: largest share of the step that comes from the image's own projection.
        eta: by how much a projection overshoots the hyperplane.
        beta: share of its displacement that a point of another class keeps.
    """

    name: str
    targeted: bool
    eps: float
    norm: Norm
    steps: int = 100
    restarts: int = 1
    alpha: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    cost = 3
    measures_distance = True

    @property
    def iterations(self) -> int:
        """One for every step."""
        return self.steps

    def begin(self, x: Tensor, y: Tensor, target: Tensor, rngs: Sequence[torch.Generator]) -> SearchState:
        """Searches from the image; from the second restart of the untargeted attack on, near it at random."""
        starts = []
        for image, goal, rng in zip(x, target.tolist(), rngs, strict=True):
            starts.append(image if self.targeted or goal == 0 else self._near(image, rng))
        return {
            "x": x,
            "y": y,
            "target": target,
            "point": torch.stack(starts),
        }

    def iterate(self, state: SearchState, network: SearchNetwork) -> tuple[Tensor, Tensor]:
        """Step from the points, judge where that leads, and draw back what is of another class."""
        x, point = state["x"], state["point"]
        apart, normal = self._tie(state, network)
        offset = (normal * point).sum((1, 2, 3)) - apart
        from_point = project(point, normal, offset, self.norm)
        from_image = project(x, normal, offset, self.norm)
        a, b = (self._length(d).clamp_min(1e-8) for d in (from_point, from_image))
        share = per_pixel((a / (a + b)).clamp(0, self.alpha), x)
        ahead = (1 - share) * (point + self.eta * from_point) + share * (x + self.eta * from_image)
        ahead = ahead.clamp(0, 1)
        logits = network.logits(ahead)
        wrong = per_pixel(logits.argmax(1) != state["y"], x)
        state["point"] = torch.where(wrong, x + self.beta * (ahead - x), ahead)
        return ahead, logits

    def _tie(self, state: SearchState, network: SearchNetwork) -> tuple[Tensor, Tensor]:
        """By how much the other class leads (B,), and the gradient of that (B, C, H, W)."""
        y, target, point = state["y"], state["target"], state["point"]
        if self.targeted:
            logits, gradient = network.gradient(point, lead, y, target)
            return lead(logits, y, target), gradient
        logits, gradients = network.jacobian(point)
        rows = torch.arange(len(y), device=y.device)
        apart = logits - logits[rows, y][:, None]
        normals = gradients - gradients[rows, y][:, None]
        dual = normals.flatten(2).abs().sum(2) if self.norm == "linf" else normals.flatten(2).norm(dim=2)
        distance = (apart.abs() / (dual + 1e-12)).scatter(1, y[:, None], torch.inf)
        nearest = distance.argmin(1)
        return apart[rows, nearest], normals[rows, nearest]

    def _near(self, image: Tensor, rng: torch.Generator) -> Tensor:
        if self.norm == "linf":
            noise = 2 * torch.rand(image.shape, generator=rng) - 1
            length = noise.abs().max()
        else:
            noise = torch.randn(image.shape, generator=rng)
            length = noise.norm()
        return (image + 0.5 * self.eps * (noise / length).to(image)).clamp(0, 1)

    def _length(self, v: Tensor) -> Tensor:
        return v.abs().amax((1, 2, 3)) if self.norm == "linf" else torch.linalg.vector_norm(v, dim=(1, 2, 3))


def lead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(B,) logit of the target minus that of the label."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def project(point: Tensor, normal: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """Shortest displacement that takes each point onto its hyperplane without leaving the box.

    It solves min |d| subject to <normal, point + d> = offset and 0 <= point + d <= 1; where no such d is, it goes as
    far as the box lets it. Every pixel moves in proportion to a multiplier until it meets the box. What that makes up
    of the gap is a concave, piecewise linear function of the multiplier, on which Newton's iteration climbs from zero
    to the root segment by segment; a search that has arrived rests, so that searches know nothing of each other.

    Args:
        point: (B, C, H, W) in [0, 1].
        normal: (B, C, H, W).
        offset: (B,).
        norm: "linf" or "l2", of the displacement.

    Returns:
        (B, C, H, W).

    >>> two = torch.tensor([0.5, 0.9]).view(1, 1, 1, 2)
    >>> project(two, torch.ones_like(two), torch.tensor([1.7]), "linf").flatten()
    tensor([0.2000, 0.1000])
    """
    gap = (normal * point).sum((1, 2, 3)) - offset
    towards = -normal * per_pixel(torch.where(gap < 0, -1.0, 1.0).to(point), point)
    if norm == "l2":
        towards = hardshrink(towards, FLAT)
    limit, steep = torch.where(towards < 0, point, 1 - point), towards.abs()
    rate, rise = (1.0, steep) if norm == "linf" else (steep, steep * steep)
    gap = gap.abs()
    out_of_reach = (steep * limit).sum((1, 2, 3)) < gap
    multiplier = torch.zeros_like(gap)
    every = 1 if point.device.type == "cpu" else LOOK_EVERY
    for step in range(MOST_SEGMENTS):
        moved = per_pixel(multiplier, point) * rate
        slope = torch.where(moved < limit, rise, 0.0).sum((1, 2, 3))
        missing = gap - (steep * torch.minimum(moved, limit)).sum((1, 2, 3))
        short = (missing > 4 * torch.finfo(gap.dtype).eps * gap) & (slope > 0) & ~out_of_reach
        if step % every == every - 1 and not short.any():
            break
        multiplier = torch.where(short, multiplier + missing / slope, multiplier)
    moved = torch.minimum(per_pixel(multiplier, point) * rate, limit)
    return towards.sign() * torch.where(per_pixel(out_of_reach, point), limit, moved)
