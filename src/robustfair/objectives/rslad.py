"""RSLAD (Zi et al., ICCV 2021): robust soft labels of a teacher, for the clean and for the attacked image.

    x' maximises KL(q || p(x'))  from x + 0.001 N(0, 1),  q = softmax(z_T(x)) of a frozen robust teacher
    loss = 5/6 D(q, p(x')) + 1/6 D(q, p(x)),  D(q, p) = mean over classes of q (log(q + 1e-5) - log p)

Source: the loss and attack that ABSLD and Fair-RSLAD build on, as their codes have them: no label of the data is read,
D is the KL divided by the number of classes (`kl_over`), and 1e-5 stands in the logarithm of the teacher's side alone,
so that it moves no gradient. Departure: 8/255 and 2/255 under linf as everywhere here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustfair.config import NonNegative, Share, config
from robustfair.losses import MaximiseSoftCE, at_least_float32, distillation_divergence
from robustfair.objectives.taught import KLOver, TaughtObjective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Forward, Loss, Model


def rslad_loss(
    clean: Tensor,
    adv: Tensor,
    teacher_clean: Tensor,
    teacher_adv: Tensor,
    *,
    clean_share: float = 1 / 6,
    kl_over: KLOver = "mean",
    eps_log: float = 1e-5,
) -> Loss:
    """(1 - s) D(q_adv, p(x')) + s D(q_clean, p(x)) per example, all of them softmax of logits (B, C).

    >>> flat, sure = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    >>> rslad_loss(flat, sure, flat, flat, kl_over="sum", eps_log=0).per_example()  # 5/6 (log 4/3) / 2
    tensor([0.1199])
    """
    scale = 1 / clean.shape[1] if kl_over == "mean" else 1.0
    return Loss.of(
        Forward(clean=clean, adv=adv),
        distil=(distillation_divergence(teacher_adv, adv, eps_log=eps_log), scale * (1 - clean_share)),
        distil_clean=(distillation_divergence(teacher_clean, clean, eps_log=eps_log), scale * clean_share),
    )


@OBJECTIVES.register("rslad")
@config
class RSLAD(TaughtObjective):
    """5/6 D(q, f(x')) + 1/6 D(q, f(x)) with q the labels of a robust teacher, x' maximising the KL from q.

    Attributes:
        clean_share: weight of the clean term; that of the attacked one is what is left to 1.
        kl_over: "mean" over the classes, or their "sum", which is the KL.
        eps_log: floor under the logarithm of the teacher's side.
    """

    name: ClassVar[str] = "rslad"
    terms: ClassVar[frozenset[str]] = frozenset({"distil", "distil_clean"})
    taught: ClassVar[tuple[str, ...]] = ("distil", "distil_clean")
    clean_share: Share = 1 / 6
    kl_over: KLOver = "mean"
    eps_log: NonNegative = 1e-5

    def attack(self, batch: Batch) -> Attack:
        labels = torch.softmax(at_least_float32(batch.teacher["distil"]), 1)
        return self.attack_with(batch, MaximiseSoftCE(), "gauss001", target=labels)

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None, "fit attacks the batch before it asks for the loss"
        return rslad_loss(
            model(batch.x),
            model(batch.x_adv),
            batch.teacher["distil_clean"],
            batch.teacher["distil"],
            clean_share=self.clean_share,
            kl_over=self.kl_over,
            eps_log=self.eps_log,
        )
