"""Whether a network that labels the images can label these: looked at before the first step, on a few hundred."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import ModelError, RobustFairWarning
from robustfair.models.head import check_outputs
from robustfair.models.pixels import LEAST_SKILL, expected_preparation, hits_of, sample_of
from robustfair.objectives.base import Objective


def check_teachers(objective: Objective, model: nn.Module, train: ImageDataset, device: torch.device) -> None:
    """Look at all networks of an objective; those that it is made of stay where they are.

    Raises:
        ConfigError: there is none, or its name alone.
        ModelError: it takes no such images, has other classes, or expects other pixels than those in [0, 1].
    """
    for name, network in objective.networks(model).items():
        check_teacher(f"{name} of {objective.name}", network.to(device), train)


def check_teacher(what: str, network: nn.Module, train: ImageDataset) -> None:
    """As `check_teachers`, of one network on the device of the images."""
    try:
        check_outputs(network, train.num_classes, next(evaluation_batches(train, 2)).x)
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error
    device = train.images.device
    found = expected_preparation(network, train, device)
    if found is not None:
        raise ModelError(
            f"{what} is given pixels in [0, 1] and expects others. {found.text} Put it behind "
            'robustfair.models.Normalised, or name its statistics: teacher="weights.pt(arch=..., normalise=...)"'
        )
    sample, chance = sample_of(train, device), 1 / train.num_classes
    right = float(hits_of(network, sample).float().mean())
    if right - chance < LEAST_SKILL * (1 - chance):
        warnings.warn(
            f"{what} is right on {100 * right:.1f} % of {len(sample)} training images, where chance is "
            f"{100 * chance:.1f} %: is it trained, and on these classes in this order?",
            RobustFairWarning,
            stacklevel=3,
        )
