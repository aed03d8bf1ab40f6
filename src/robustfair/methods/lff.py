"""LfF (Nam et al. 2020), learning from failure: a second network learns what is easy, and the model learns the rest.

Two networks train together. For every training image each keeps a moving average of its cross-entropy,

    m <- decay m + (1 - decay) CE                          the first visit stores CE itself

divided by the largest average of the class over all training images: l_b of the biased network, l_d of the model.

    model             mean of W CE,   W = l_b / (l_b + l_d + 1e-8), without gradient          eq. (3) and algorithm 1
    biased network    mean of the generalised cross-entropy (1 - p_y^q) / q                   eq. (1)

so that an image that the biased network gets wrong counts for more. The model is the debiased network: it alone is
validated, saved as the run's model, and audited.

The authors' code takes q p_y^q CE for the generalised cross-entropy, with p_y^q held constant: q times the gradient of
the formula. It is the default, as published numbers come from it; `gce="paper"` is the formula. Their networks are
drawn apart, and here the biased one is a copy of the model whose layers draw their starting weights anew, as torch has
them. On an adversarial objective both see the images whose label it asks for, which are attacked on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from robustfair.config import Bounds, Share, config
from robustfair.losses import cross_entropy
from robustfair.methods.base import Method, Run
from robustfair.models.averages import reinitialised
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State


def generalised_cross_entropy(ce: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q, (B,), of the probability p = exp(-ce) of the label; its gradient is p^q times that of `ce`.

    >>> generalised_cross_entropy(torch.tensor([4.0]).log(), q=0.5)  # p 1/4
    tensor([1.])
    """
    return -torch.expm1(-q * ce) / q


def average_loss(before: Tensor, loss: Tensor, seen: Tensor, decay: float) -> Tensor:
    """The moving average (B,) after `loss` (B,), from the one `before`, which is 0 where `seen` (B,) is 0.

    >>> average_loss(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0]), decay=0.7)
    tensor([3.0000, 1.7000])
    """
    return decay * before + (1 - decay * seen) * loss


def relative_difficulty(biased: Tensor, debiased: Tensor) -> Tensor:
    """W (B,) from both relative losses (B,).

    >>> relative_difficulty(torch.tensor([0.6, 0.0]), torch.tensor([0.2, 0.0]))
    tensor([0.7500, 0.0000])
    """
    return biased / (biased + debiased + 1e-8)


@METHODS.register("lff")
@config
class LfF(Method):
    """Train a biased network beside the model, and weigh an image by how much harder it is for that one.

    Attributes:
        q: of the generalised cross-entropy, in (0, 1]; 1 is 1 - p.
        decay: of the averages, in [0, 1]; 0 takes the current losses.
        gce: "official" or "paper", see above.
    """

    name: ClassVar[str] = "lff"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.label", "loss.biased"})
    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    q: Annotated[float, Bounds(gt=0, le=1)] = 0.7
    decay: Share = 0.7
    gce: Literal["official", "paper"] = "official"

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return {"biased": reinitialised(model, torch.default_generator)}

    def at_epoch(self, state: State, run: Run) -> State:
        if state:
            return state
        like = next(run.model.parameters())
        return {name: like.new_zeros(len(run.labels)) for name in ("biased", "debiased", "seen")}

    def examples(self, batch: Batch, state: State, run: Run) -> Batch:
        images = batch.at(run.objective.label_at)
        return replace(batch, extra={**batch.extra, self.name: run.networks[f"{self.name}/biased"](images)})

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        ce = cross_entropy(batch.extra[self.name], batch.y)
        new = self._averages(state, ce, loss.terms["label"], batch, run)
        relative = {name: new[name] / largest_of_class(new[name], run)[run.labels] for name in ("biased", "debiased")}
        weight = relative_difficulty(relative["biased"][batch.index], relative["debiased"][batch.index])
        loss = loss.scaled("label", weight)
        if self.gce == "paper":
            return loss.plus("biased", generalised_cross_entropy(ce, self.q), torch.ones_like(weight))
        return loss.plus("biased", ce, self.q * torch.exp(-self.q * ce.detach()))

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        ce = cross_entropy(batch.extra[self.name], batch.y)
        return self._averages(state, ce, loss.terms["label"], batch, run)

    @torch.no_grad()
    def _averages(self, state: State, biased: Tensor, debiased: Tensor, batch: Batch, run: Run) -> dict[str, Tensor]:
        """Both averages (N,) and what was seen (N,), with the losses (B,) of this batch."""
        seen = state["seen"][batch.index]
        rows = [
            average_loss(state[name][batch.index], loss.to(seen.dtype), seen, self.decay)
            for name, loss in (("biased", biased), ("debiased", debiased))
        ]
        here = torch.stack([*rows, torch.ones_like(seen)])
        whole = run.total(here.new_zeros(len(here), len(run.labels)).index_copy(1, batch.index, here))
        changed, times = whole[-1] > 0, whole[-1].clamp(min=1)
        new = {
            name: torch.where(changed, row / times, state[name])
            for name, row in zip(("biased", "debiased"), whole, strict=False)
        }
        return {**new, "seen": torch.maximum(state["seen"], changed.to(seen.dtype))}


def largest_of_class(averages: Tensor, run: Run) -> Tensor:
    """(C,) the largest of `averages` (N,) in every class of the training images, above 0."""
    tiny = torch.finfo(averages.dtype).tiny
    return averages.new_full((run.num_classes,), tiny).scatter_reduce(0, run.labels, averages, "amax")
