"""HWNwB, head weight normalisation with bias: every class gets a head row of the same length.

Source: "Class-wise disparity in adversarial training: implicit bias perspective". After adversarial training easy
classes have long rows and hard classes short ones, so W_k becomes W_k / ||W_k||_2, once, with the bias b and the
features psi kept: argmax_k (W_k / ||W_k||_2) . psi(x) + b_k. Attacks at the audit go through the edited head.

Beyond the paper: `target_norm`. With a bias the prediction depends on the common length of the rows, which the paper
sets to 1; "mean" and "keep-frobenius" keep the scale of the logits, and so what the bias weighs beside them.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustfair.config import config
from robustfair.errors import ModelError
from robustfair.models.head import find_head
from robustfair.registry import REPAIRS

TargetNorm = Literal["unit", "mean", "keep-frobenius"]


def normalise_rows(weight: Tensor, target_norm: TargetNorm = "unit") -> Tensor:
    """Scale each row of `weight` (C, ...) to one common L2 norm, directions unchanged; computed in float64.

    The norm is 1 ("unit"), the mean of the row norms ("mean"), or their root mean square ("keep-frobenius").

    Raises:
        ModelError: a row is zero or not finite, so it has no direction.

    >>> normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """
    rows = weight.detach().cpu().double().flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    unusable = [
        k for k, norm in enumerate(norms.flatten().tolist()) if norm == 0 or norm != norm or norm == float("inf")
    ]
    if unusable:
        raise ModelError(
            f"hwnwb: the head rows of classes {unusable} are zero or not finite and have no direction to keep. "
            "Train the head on these classes first, or take an earlier checkpoint"
        )
    target = {"unit": 1.0, "mean": norms.mean(), "keep-frobenius": norms.square().mean().sqrt()}[target_norm]
    return (rows * (target / norms)).view(weight.shape).to(weight)


@REPAIRS.register("hwnwb")
@config
class HWNwB:
    """Head weight normalisation with bias. On a head without bias it equals tau-normalisation with tau = 1.

    Attributes:
        target_norm: common norm of the rows: "unit" (the paper), "mean" or "keep-frobenius" of the trained rows.
        keep_bias: False sets the bias to 0, the paper's ablation (tau-normalisation with tau = 1).
    """

    name: ClassVar[str] = "hwnwb"
    needs_data: ClassVar[bool] = False

    target_norm: TargetNorm = "unit"
    keep_bias: bool = True

    def __call__(self, model: nn.Module, *, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` with the edited head; all else is bit-identical.

        Raises:
            ModelError: no head is found (see `find_head`), or a row of it is zero.
        """
        repaired = copy.deepcopy(model)
        head = find_head(repaired, example)
        with torch.no_grad():
            head.weight.copy_(normalise_rows(head.weight, self.target_norm))
            if head.bias is not None and not self.keep_bias:
                head.bias.zero_()
        return repaired

    def describe(self) -> str:
        """One line that says what changes.

        >>> HWNwB(target_norm="mean").describe()
        'HWNwB: head rows scaled to their mean norm, bias kept'
        """
        norm = {"unit": "norm 1", "mean": "their mean norm", "keep-frobenius": "their root mean square norm"}
        return f"HWNwB: head rows scaled to {norm[self.target_norm]}, bias {'kept' if self.keep_bias else 'set to 0'}"
