"""ARD (Goldblum et al., AAAI 2020): at the attacked image, agree with what a robust teacher says of the clean one.

    x' maximises CE(f(x'), y) from x + U(-eps, eps)
    loss = alpha T^2 D_T(z_T(x), f(x')) + (1 - alpha) CE(f(x), y)
    D_T(z, f) = mean over classes of q (log q - log p),  q = softmax(z / T), p = softmax(f / T)

Source: the code of Fair-ARD, which has ARD as its base: alpha 1 and T 30, D is the KL divided by the number of classes
(`kl_over`), the start is not clipped to [0, 1], and batch norm is in train mode during the attack
(`attack_mode="train"`; the default here is "eval", as everywhere). With alpha 1 no label of the data is read, and the
clean pass moves batch norm's running statistics alone, as theirs does.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from robustfair.config import Bounds, Share, config
from robustfair.losses import MaximiseCE, distillation_divergence
from robustfair.objectives.base import label_loss
from robustfair.objectives.taught import KLOver, TaughtObjective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Forward, Loss, Model


def ard_loss(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    label: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float = 30.0,
    kl_over: KLOver = "mean",
) -> Loss:
    """alpha T^2 D_T(teacher, adv) + (1 - alpha) label per example; logits (B, C), `label` (B,). Without it at alpha 1.

    >>> import torch
    >>> flat, sure = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    >>> ard_loss(flat, 2 * sure, flat, torch.ones(1), alpha=0.5, temperature=2).per_example()  # (log 4/3) / 2 + 1/2
    tensor([0.6438])
    """
    scale = alpha * temperature**2 / (clean.shape[1] if kl_over == "mean" else 1)
    terms = {"distil": (distillation_divergence(teacher, adv, temperature), scale)}
    terms |= {"label": (label, 1 - alpha)} if alpha < 1 else {}
    return Loss.of(Forward(clean=clean, adv=adv), **terms)


@OBJECTIVES.register("ard")
@config
class ARD(TaughtObjective):
    """alpha T^2 D(q, f(x')) + (1 - alpha) CE(f(x), y) with q the softened labels of a robust teacher, x' from PGD.

    Attributes:
        alpha: share of the distillation term; 1 leaves the label term out.
        temperature: T, of teacher and student; at most a million, since the loss has its square.
        kl_over: "mean" over the classes, or their "sum", which is the KL.
    """

    name: ClassVar[str] = "ard"
    terms: ClassVar[frozenset[str]] = frozenset({"distil", "label"})
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "teacher", "soft", "shift"})
    taught: ClassVar[tuple[str, ...]] = ("distil",)
    label_at: ClassVar[str] = "x"
    alpha: Share = 1.0
    temperature: Annotated[float, Bounds(gt=0, le=1e6)] = 30.0
    kl_over: KLOver = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha == 1:  # then methods that set labels or weigh their term are refused
            object.__setattr__(self, "terms", frozenset({"distil"}))
            object.__setattr__(self, "reads", TaughtObjective.reads)

    def attack(self, batch: Batch) -> Attack:
        return self.attack_with(batch, MaximiseCE(), "uniform-unclipped")

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        clean = model(batch.x)
        return ard_loss(
            clean,
            model(batch.x_adv),
            batch.teacher["distil"],
            label_loss(clean, batch),
            alpha=self.alpha,
            temperature=self.temperature,
            kl_over=self.kl_over,
        )
