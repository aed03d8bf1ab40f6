"""Run a model over batches, clean or attacked, and count or keep what it predicts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from robustfair.attacks.pgd import pgd, predicted
from robustfair.metrics import confusion_pred_true
from robustfair.models.modes import attacking
from robustfair.values import AttackOn, Batch, ClassTally, Model


def predict(model: Model, batch: Batch, attack_on: AttackOn | None = None, *, search: Model | None = None) -> Tensor:
    """(B,) predicted classes, see `predicted`; arguments as for `attacked_logits`."""
    return predicted(attacked_logits(model, batch, attack_on, search=search), batch.y)


def attacked_logits(
    model: Model, batch: Batch, attack_on: AttackOn | None = None, *, search: Model | None = None
) -> Tensor:
    """(B, K) logits in eval mode, on the images or on the attacked images.

    Args:
        search: the model as the attack sees it, such as one in lower precision; None is `model`.
    """
    x = batch.x
    if attack_on is not None:
        x = pgd(model if search is None else search, x, batch.y, attack_on(batch), batch.rng("attack"))
    with attacking(model, "eval"), torch.no_grad():
        return model(x)


def tally_batches(
    model: Model,
    batches: Iterable[Batch],
    num_classes: int,
    attack_on: AttackOn | None = None,
    *,
    search: Model | None = None,
) -> ClassTally:
    """Counts over all batches: clean, and attacked where an attack is given. One host synchronisation, by the caller.

    A robust hit requires a clean hit as well: an image that is misclassified as it is cannot be robust. `search` as for
    `attacked_logits`.
    """
    total = ClassTally()
    for batch in batches:
        clean = predict(model, batch)
        robust = None
        if attack_on is not None:
            attacked = predict(model, batch, attack_on, search=search)
            robust = torch.where(clean == batch.y, attacked, clean)
        total = total + tally(clean, robust, batch.y, num_classes)
    return total


def tally(clean: Tensor | None, robust: Tensor | None, y: Tensor, num_classes: int) -> ClassTally:
    """Predictions (B,) of one batch as counts."""
    return ClassTally(
        None if clean is None else confusion_pred_true(clean, y, num_classes, check=False),
        None if robust is None else confusion_pred_true(robust, y, num_classes, check=False),
    )
