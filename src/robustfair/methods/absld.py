"""ABSLD (Zhao et al., NeurIPS 2024): the labels of a teacher at a temperature per class, lower for harder classes.

    q_adv = softmax(z_T(x) / T_adv[y]),  q_clean = softmax(z_T(x) / T_clean[y]),  both T one at the start
    x' maximises KL(q_adv || p(x')),  loss = 5/6 D(q_adv, p(x')) + 1/6 D(q_clean, p(x)), that of `rslad`
    S_c  = mean CE(f, y) over the epoch's images of class c, at x' for T_adv and at x for T_clean, as training saw them
    d    = S - mean of S over the classes
    T_c <- clip(T_c - rate d_c / max |d|, 0.5, 5)  after every epoch: a class of larger loss gets sharper labels

Source: the authors' code; of the paper only its abstract was at hand. Departures: in the code the two tempered labels
share their memory, so that both end up divided by T_adv T_clean, a slip (`compat="official"`); and S sums over the
images of a class, where this takes the mean (`compat="official"` too), the same on balanced classes. Their `rt` falls
by 10 with each drop of the learning rate, so here the rate follows it under any schedule (`follow_lr`). Equal losses
leave T alone, where theirs divide zero by zero; so does a class without images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config
from robustfair.losses import cross_entropy
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State

AT = ("adv", "clean")
TERM = {"adv": "distil", "clean": "distil_clean"}


def tempered(temperature: Tensor, losses: Tensor, rate: float, lowest: float = 0.5, highest: float = 5.0) -> Tensor:
    """clip(T - rate d / max |d|) with d the losses less their mean over the classes, (C,); nan losses move nothing.

    >>> tempered(torch.ones(3), torch.tensor([100.0, 140.0, 60.0]), rate=0.1)
    tensor([1.0000, 0.9000, 1.1000])
    """
    gap = (losses - losses.nanmean()).nan_to_num(0)
    largest = gap.abs().max()
    share = torch.where(largest > 0, gap / largest, gap)
    return (temperature - rate * share).clamp(lowest, highest)


@METHODS.register("absld")
@config
class ABSLD(Method):
    """Sharper labels of the teacher for classes of larger loss, softer ones for classes of smaller.

    Attributes:
        rate: how far the temperature of the most extreme class moves in an epoch.
        lowest, highest: what temperatures are kept in.
        follow_lr: let the rate fall with the learning rate, as the authors lower both at once.
        compat: "official" divides both labels by the product of the two temperatures and sums the losses of a class.
    """

    name: ClassVar[str] = "absld"
    claims: ClassVar[frozenset[str]] = frozenset({"batch.teacher"})
    needs: ClassVar[frozenset[str]] = frozenset({"distil", "distil_clean"})
    rate: NonNegative = 0.1
    lowest: Annotated[float, Bounds(gt=0, le=1)] = 0.5
    highest: Annotated[float, Bounds(ge=1)] = 5.0
    follow_lr: bool = True
    compat: Literal["official"] | None = None

    def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
        divisor = {at: state[f"temperature_{at}"] for at in AT}
        if self.compat == "official":
            divisor = dict.fromkeys(AT, divisor["adv"] * divisor["clean"])
        teacher = dict(batch.teacher)
        for at in AT:
            logits = teacher[TERM[at]]
            teacher[TERM[at]] = logits / divisor[at].to(logits.dtype)[batch.y, None]
        return replace(batch, teacher=teacher)

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        found = dict(state)
        for at, logits in {"adv": loss.out.adv, "clean": loss.out.clean}.items():
            assert logits is not None, "an objective with both terms has the logits of both"
            sums, count = sums_per_class(cross_entropy(logits.detach(), batch.y), batch.y, run.num_classes)
            found |= {f"loss_{at}": state[f"loss_{at}"] + sums, "count": state["count"] + count}
        return found

    def at_epoch(self, state: State, run: Run) -> State:
        none = torch.zeros(run.num_classes, dtype=torch.float64, device=run.device)
        fresh = {"count": none, "loss_adv": none, "loss_clean": none}
        if not state:
            return {**fresh, "temperature_adv": none + 1, "temperature_clean": none + 1}
        count = run.total(state["count"])
        seen = torch.where(count > 0, 1.0, torch.nan) if self.compat == "official" else count
        rate = self.rate * (run.lr_share if self.follow_lr else 1)
        for at in AT:
            losses = run.total(state[f"loss_{at}"]) / seen
            moved = tempered(state[f"temperature_{at}"], losses, rate, self.lowest, self.highest)
            fresh[f"temperature_{at}"] = moved
        return fresh
