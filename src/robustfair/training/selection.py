"""The images that a run holds out, and which weights win on them."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.config import Select, require
from robustfair.data import ImageDataset
from robustfair.data.load.parts import listed
from robustfair.data.split import stratified_split
from robustfair.errors import DataError
from robustfair.methods.compose import Plan, to_drop
from robustfair.training.state import ScoredWeights
from robustfair.values import ClassTally

SPLIT_SEED = 0
"""One split for all runs, whatever their seed: methods are compared on the same images."""
_ROUNDING = 1e-12


def score(tallied: ClassTally, select: Select) -> float:
    """The selection statistic of one measurement: robust where attacked, else clean; classes without images ignored."""
    hits = tallied.clean_pred_true if tallied.robust_pred_true is None else tallied.robust_pred_true
    assert hits is not None
    average, worst = metrics.average(hits), metrics.worst(metrics.class_accuracy(hits))
    return float({"average": average, "worst": worst, "average+worst": average + worst, "last": 0.0}[select])


def better(new: ScoredWeights, best: ScoredWeights) -> bool:
    """Whether a candidate that was measured after `best` takes its place.

    The higher score does; of equal ones the higher score on clean images, then the later epoch; in one epoch the raw
    weights come before averages, and the averages in the order of their methods. Scores are compared up to the rounding
    of a sum, and a clean score that is not known decides nothing.
    """
    for one, other in ((new.score, best.score), (new.clean, best.clean)):
        if abs(one - other) > _ROUNDING:
            return one > other
    return new.epoch > best.epoch


def few_validation_images(train: Tensor, held: Tensor, select: Select) -> str:
    """Why selection on so few validation images says little, "" where there are enough or nothing is selected.

    Args:
        train, held: labels (N,) of the images that are trained on, and held out.
    """
    classes = int(torch.cat([train, held]).max()) + 1
    kept, out = (torch.bincount(labels.cpu(), minlength=classes) for labels in (train, held))
    least = int(out[kept + out > 0].min())
    if select == "last" or least >= metrics.FEW_IMAGES:
        return ""
    few = "no validation image" if least == 0 else f"{least} validation image{'s' if least > 1 else ''}"
    return f"weights are selected on {few} of a class, and fewer than {metrics.FEW_IMAGES} leave the choice to chance"


def require_validation(validation: float | ImageDataset, select: Select) -> None:
    """Refuse what is no share, and a selection rule that has no images to measure it on."""
    selects = "a share of each class, or a data set"
    share = isinstance(validation, ImageDataset) or 0 <= validation < 1
    require(share, "fit", "validation", allowed=f"{selects}: at least 0 and below 1", got=validation)
    require(select == "last" or validation != 0, "fit", "validation", allowed=selects, got=0, hint="Or `select='last'`")


def require_every_class(held: ImageDataset | None, plan: Plan) -> None:
    """Refuse methods that measure on held out images where a class has none: its rate would be no number.

    Raises:
        DataError: names the classes, and what to do.
    """
    names = [method.name for method in plan.methods if "validation" in method.needs]
    measuring = " and ".join(names)
    if held is None or not measuring:
        return
    counts = zip(held.class_names, held.class_counts().tolist(), strict=True)
    absent = [name for name, count in counts if count == 0]
    if absent:
        raise DataError(
            f"{held.name}: no validation image of class {listed(absent)}, and {measuring} would measure every class "
            f"on them: give it an image to hold out beside one to train on, or "
            + " and ".join(to_drop(name, plan.bundles) for name in names)
        )


def held_out(labels: Tensor, validation: float) -> tuple[Tensor, Tensor]:
    """Indices kept for training and held out for validation; the same for every run on these labels."""
    kept, held = stratified_split(labels, validation, seed=SPLIT_SEED)
    needed = "a share that leaves an image to measure on"
    require(len(held) > 0, "fit", "validation", allowed=needed, got=validation, hint="Or 0, with `select='last'`")
    return kept, held


def with_validation(train: ImageDataset, validation: float | ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images."""
    if isinstance(validation, ImageDataset):
        same = validation.class_names == train.class_names and validation.images.shape[1:] == train.images.shape[1:]
        if not same or len(validation) == 0:
            raise DataError(
                f"{validation.name} cannot validate {train.name}: other classes, other image sizes, or empty"
            )
        return train, validation
    if validation == 0:
        return train, None
    kept, held = held_out(train.labels, validation)
    return train.subset(kept), train.subset(held)
