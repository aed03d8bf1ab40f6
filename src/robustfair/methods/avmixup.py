"""AVmixup (Lee et al. 2020): adversarial vertex mixup, soft labels between an image and a point beyond its attack.

    x_av  = clip(x + gamma (x' - x))                              adversarial vertex
    x_mix = w x + (1 - w) x_av,   w ~ U(0, 1) per image
    y_mix = w phi_1(y) + (1 - w) phi_2(y),   phi_i keeps the mass lambda_i at y and spreads the rest evenly
    loss  = cross-entropy of f(x_mix) to y_mix

Source: `pgd_attack.py` of the authors' code, for CIFAR-10: gamma 2, lambda_1 1, lambda_2 0.1, so that with ten classes
the vertex has the uniform label. The paper does not clip the vertex (`clip_vertex=False`); its values for other data
sets are not in the code. Their attack runs on batch statistics and leaves the running ones alone
(`pgd-at(attack_mode=train_frozen)`).

Its robustness is partly masked gradients: an independent run has 61 % under PGD-10 and 21 % under AutoAttack. Audit
what it trains with AutoAttack. The counts of training that other methods read (`ccm`) are those of the mixed images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from robustfair.config import NonNegative, Share, config
from robustfair.losses import kept_mass_labels
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Batch, State


@METHODS.register("avmixup")
@config
class AVmixup(Method):
    """Train on random points between x and its adversarial vertex, with labels mixed alike.

    Attributes:
        gamma: how far the vertex lies, in units of the attack's perturbation; 0 mixes labels alone.
        lambda1: mass that the label of x keeps at its class.
        lambda2: mass that the label of the vertex keeps at its class.
        clip_vertex: keep the vertex in [0, 1].
    """

    name: ClassVar[str] = "avmixup"
    claims: ClassVar[frozenset[str]] = frozenset({"batch.x_adv", "batch.soft"})
    labels_of: ClassVar[Literal["x", "x_adv"] | None] = "x_adv"
    gamma: NonNegative = 2.0
    lambda1: Share = 1.0
    lambda2: Share = 0.1
    clip_vertex: bool = True

    def at_epoch(self, state: State, run: Run) -> State:
        return {
            "labels": kept_mass_labels(self.lambda1, run.num_classes).to(run.device),
            "vertex_labels": kept_mass_labels(self.lambda2, run.num_classes).to(run.device),
        }

    def examples(self, batch: Batch, state: State, run: Run) -> Batch:
        assert batch.x_adv is not None, "compose refuses an objective that does not attack"
        vertex = batch.x + self.gamma * (batch.x_adv - batch.x)
        if self.clip_vertex:
            vertex = vertex.clamp(0, 1)
        w = torch.empty_like(batch.x[:, 0, 0, 0]).uniform_(0, 1, generator=batch.rng(self.name))
        per_pixel, per_class = w[:, None, None, None], w[:, None]
        labels, vertex_labels = (state[key].to(w.dtype)[batch.y] for key in ("labels", "vertex_labels"))
        return replace(
            batch,
            x_adv=per_pixel * batch.x + (1 - per_pixel) * vertex,
            soft=per_class * labels + (1 - per_class) * vertex_labels,
        )
