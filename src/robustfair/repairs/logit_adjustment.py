"""Post-hoc logit adjustment (Menon et al. 2021, eq. 9): predict argmax_y z_y - log(pi_y^tau + 1e-12).

The prior pi is what the model was trained under, so that what is left is how much more likely a class is than its
frequency says. The numbers are taken off the bias of the head, once: attacks at the audit go through the edited model,
and a head without a bias gets one. Written as the method of the same name, which adds them while training.

On classes of equal frequency the paper's prior moves all logits alike. What the model itself prefers is the other
reading: how often it predicts every class on images that it was not trained on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustfair.attacks.predict import tally_batches
from robustfair.config import Count, NonNegative, config, require
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import RobustFairWarning
from robustfair.methods.logit_adjustment import FLOOR, Prior, log_prior, measured_prior, read_prior, require_length
from robustfair.models.head import Head, find_head
from robustfair.registry import REPAIRS
from robustfair.repairs.base import Repair

BATCH = 500


@REPAIRS.register("logit-adjustment")
@config
class PostHocLogitAdjustment:
    """Take tau log pi off the logits of a trained model, so that frequent classes are predicted less.

    Attributes:
        prior: "counts" of the images that the model was trained on; "predicted", how often it predicts every class on
            `images`; or a positive number a class, as `LogitAdjustment` takes them.
        tau: power of the prior; 0 does nothing.
        counts: (C,) images of each class, for prior counts; those of the run where one is repaired.
        images: for prior predicted; the validation images where a run is repaired. Never those of an audit.
    """

    name: ClassVar[str] = "logit-adjustment"
    prior: Prior = "counts"
    tau: NonNegative = 1.0
    counts: tuple[Count, ...] | None = None
    images: ImageDataset | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", read_prior(self.name, self.prior, ("counts", "predicted")))

    @property
    def needs_data(self) -> bool:
        return self.prior == "predicted"

    def check_classes(self, num_classes: int) -> None:
        for numbers in (self.prior, self.counts):
            if isinstance(numbers, tuple):
                require_length(self.name, numbers, num_classes)

    def of_run(self, counts: Sequence[int] | None, held: Callable[[], ImageDataset | None]) -> Repair:
        """With the counts or the images that the user has not given; see `ReadsRun`."""
        if self.prior == "counts" and self.counts is None and counts is not None:
            hint = "Give a prior of your own"
            require(min(counts) > 0, self.name, "counts", allowed="above 0 in every class", got=counts, hint=hint)
            return replace(self, counts=tuple(counts))
        if self.prior == "predicted" and self.images is None:
            images = held()
            allowed, hint = "counts or numbers where the run held no images out", "Or train with `validation`"
            require(images is not None, self.name, "prior", allowed=allowed, got=self.prior, hint=hint)
            return replace(self, images=images)
        return self

    def __call__(self, model: nn.Module, *, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` with another bias of its head; all else is bit-identical.

        Raises:
            ConfigError: the prior is of another number of classes, or what it is read off is not there.
            ModelError: no head is found, see `find_head`.
        """
        repaired = copy.deepcopy(model)
        head = find_head(repaired, example)
        shift = log_prior(self._prior(repaired, head), self.tau).to(head.weight.device)
        if float(shift.max() - shift.min()) < FLOOR:
            warnings.warn(
                "logit-adjustment takes as much off every logit: it changes nothing; give another prior",
                RobustFairWarning,
                stacklevel=2,
            )
        with torch.no_grad():
            before = torch.zeros_like(shift) if head.bias is None else head.bias.double()
            bias = nn.Parameter((before - shift).to(head.weight.dtype), requires_grad=head.weight.requires_grad)
        if head.bias is None:
            head.bias = bias
        else:
            with torch.no_grad():
                head.bias.copy_(bias)
        return repaired

    def describe(self) -> str:
        """One line that says what changes.

        >>> PostHocLogitAdjustment(prior=(0.75, 0.25)).describe()
        "the log of the prior (0.75, 0.25) taken off the head's bias"
        """
        power = "" if self.tau == 1 else f", to the power {self.tau:g},"
        return f"the log of the prior {self.prior}{power} taken off the head's bias"

    def _prior(self, model: nn.Module, head: Head) -> Tensor:
        """(C,) up to a common factor."""
        assert not isinstance(self.prior, Tensor), "read when the config was made"
        classes = len(head.weight)
        if self.prior == "predicted":
            hint = "Give images that the model was not trained on, and never those of the audit"
            require(self.images is not None, self.name, "images", allowed="given", got=None, hint=hint)
            assert self.images is not None
            got = self.images.num_classes
            require(got == classes, self.name, "images", allowed=f"of {classes} classes, as the model has", got=got)
            batches = evaluation_batches(self.images.to(head.weight.device), BATCH)
            counted = tally_batches(model, batches, classes).clean_pred_true
            assert counted is not None, "there are images"
            return measured_prior(counted, "predicted")
        numbers = self.counts if self.prior == "counts" else self.prior
        hint = "A run records them; else give the number of training images of each class, or a prior"
        require(numbers is not None, self.name, "counts", allowed="given", got=None, hint=hint)
        assert isinstance(numbers, tuple)
        require_length(self.name, numbers, classes)
        return torch.tensor(numbers, dtype=torch.float64)
