"""WAT (Li and Liu, AAAI 2023): worst-class adversarial training, exponential weights over classes against a learner.

The player holds a weight for each of the C classes and one for the average over all images. After every epoch its
experts' costs are the losses of the current weights, in eval mode, on the validation images under the objective's own
attack; their sum over epochs makes the weights of the next:

    cost_c = mean of l_i over the images of class c          cost_C = mean of l_i over all images
    w_j = C exp(eta sum of cost_j) / sum_k exp(eta sum of cost_k)                       j, k = 0..C
    L = mean of (w_{y_i} + w_C) l_i,   l_i = CE_i + beta KL_i on TRADES, which is what the paper trains

Source: the script of the authors. One vector weighs all terms of the loss. Until there are costs its weights are all 1,
which makes the first epoch's loss twice the objective's, and later ones about 2 C / (C + 1) times it;
`init="normalised"` begins with that. The exponential is a softmax, the same number without overflow.

Departures. A class's sum is divided by its own images; the code divides C times it by the number of all, which is the
same on a balanced split (`cost_denominator="images"`), and counts the last batch as full ("padded"). The theory is of
the mixture of all iterates; the classifier is the last one, as in the code, or what the run selects. The code trains
and validates at 0.031 with steps of 0.007, here at the objective's radius and step, and never on what no epoch follows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import NonNegative, config
from robustfair.methods.base import Method, Run
from robustfair.metrics import sums_per_class
from robustfair.registry import METHODS
from robustfair.values import Batch, Loss, State

PADDED_TO = 128
"""Images in a batch of the authors' code, which counts as many for the last one of a validation pass."""
Denominator = Literal["class", "images", "padded"]


def expert_weights(costs: Tensor, eta: float) -> Tensor:
    """(C + 1,) weights that sum to C, of the cumulative costs (C + 1,), the average's last.

    >>> expert_weights(torch.tensor([1.2, 2.0, 1.5, 1.566667]), 0.1)
    tensor([0.7227, 0.7829, 0.7447, 0.7497])
    """
    return (len(costs) - 1) * torch.softmax(eta * costs, 0)


def expert_costs(sums: Tensor, count: Tensor, denominator: Denominator = "class") -> Tensor:
    """(C + 1,) costs of an epoch, of the classes and then of their average.

    Args:
        sums: (C,) summed loss of each class.
        count: (C,) its images.
        denominator: what a class's sum is divided by: "class", its images; "images", all images / C; "padded", the same
            with the number of all images, here and in the average, raised to whole batches of 128.

    >>> expert_costs(torch.tensor([2.0, 12.0]), torch.tensor([1.0, 3.0])).tolist()
    [2.0, 4.0, 3.5]
    """
    images = count.sum()
    if denominator == "padded":
        images = (images / PADDED_TO).ceil() * PADDED_TO
    each = count if denominator == "class" else images / len(count)
    return torch.cat([sums / each, (sums.sum() / images)[None]])


@METHODS.register("wat")
@config
class WAT(Method):
    """Worst-class adversarial training: weigh classes by the exponential of their cumulative validation loss.

    Attributes:
        eta: learning rate of the weights.
        init: weights of the first epoch: all 1 ("official"), or those of equal costs ("normalised").
        cost_denominator: see `expert_costs`.
    """

    name: ClassVar[str] = "wat"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.weight", "role.class_weight"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv", "validation"})
    eta: NonNegative = 0.1
    init: Literal["official", "normalised"] = "official"
    cost_denominator: Denominator = "class"

    def at_epoch(self, state: State, run: Run) -> State:
        if not state:
            costs = torch.zeros(run.num_classes + 1, dtype=torch.float64, device=run.device)
            weights = torch.ones_like(costs) if self.init == "official" else expert_weights(costs, self.eta)
            return {"costs": costs, "weights": weights}
        if run.finished:
            return state
        costs = state["costs"] + expert_costs(*validation_losses(run), self.cost_denominator)
        return {"costs": costs, "weights": expert_weights(costs, self.eta)}

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        weights = state["weights"].to(loss.weight.dtype)
        return loss.weighted(weights[batch.y] + weights[-1])

    def remark(self, epochs: int) -> str | None:
        if epochs > 1:
            return None
        return "wat weighs classes from the second epoch on and this run ends after 1: it will only scale the loss"


def validation_losses(run: Run) -> tuple[Tensor, Tensor]:
    """Summed loss (C,) and images (C,) per class of the validation split, in float64, under the objective's attacks."""
    sums = torch.zeros(run.num_classes, dtype=torch.float64, device=run.device)
    count = torch.zeros_like(sums)
    for batch in run.batches("validation", run.objective.attacks):
        losses = run.objective(run.predict, batch).per_example()
        of_batch, images = sums_per_class(losses, batch.y, run.num_classes)
        sums, count = sums + of_batch, count + images
    return run.total(sums), run.total(count)
