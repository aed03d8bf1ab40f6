"""Label smoothing (Szegedy et al. 2016): the label term asks for a softened distribution instead of one class.

Two definitions are in use, and they differ: with amount s

    uniform:    (1 - s) e_y + s / C                       PyTorch's own, ARoW
    off-class:  1 - s at y, s / (C - 1) elsewhere         the bag-of-tricks study of adversarial training

off-class with s is uniform with s C / (C - 1). The attack goes on maximising its own goal, on hard labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from robustfair.config import Share, config
from robustfair.losses import kept_mass_labels
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Batch, State


@METHODS.register("label-smoothing")
@config
class LabelSmoothing(Method):
    """Soft labels for objectives that read them.

    Attributes:
        amount: s in [0, 1]; 0 keeps hard labels.
        kind: "uniform" or "off-class".
    """

    name: ClassVar[str] = "label-smoothing"
    claims: ClassVar[frozenset[str]] = frozenset({"batch.soft"})
    amount: Share = 0.1
    kind: Literal["uniform", "off-class"] = "uniform"

    def at_epoch(self, state: State, run: Run) -> State:
        removed = self.amount
        if self.kind == "uniform":
            removed *= (run.num_classes - 1) / run.num_classes
        return {"labels": kept_mass_labels(1 - removed, run.num_classes).to(run.device)}

    def examples(self, batch: Batch, state: State, run: Run) -> Batch:
        return replace(batch, soft=state["labels"].to(batch.x.dtype)[batch.y])
