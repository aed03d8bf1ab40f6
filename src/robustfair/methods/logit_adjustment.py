"""Logit adjustment (Menon et al. 2021): in training, the label term compares z + tau log pi with the label.

    L = CE(z + log(pi^tau + 1e-12), y)                     pi the prior of the classes, eq. (10) of the paper

The model predicts by z alone, so that its logits need not learn what the prior explains. 1e-12 is of the authors' code.
The other form of the paper, eq. (9), takes the same numbers off the logits of a model that was trained without them: it
is the repair of the same name.

The paper's prior are the counts of the training images, and with equal counts every logit moves alike and nothing
changes. CSR's table 7 lists the method on balanced data and does not say with which prior: here it may be numbers of
your own, or measured on the passes that trained: the accuracy of z in every class, or how often z predicts it. The
training answers each measurement, so that those of single epochs (`decay=0`) swing, and on a long tail of digits ended
below plain training: earlier epochs count too, each less by a factor. A class that was never right or never predicted
counts as if half an image had been: log 0 would be the whole loss.
The attack of an adversarial objective keeps its goal, without the prior.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import NonNegative, Share, config, require
from robustfair.errors import ConfigError, RobustFairWarning
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS, canonical
from robustfair.values import Batch, State

Prior = str | tuple[float, ...] | Tensor
MEASURED = ("accuracy", "predicted")
FLOOR = 1e-12
LEAST = 0.5
"""Images that a class counts for at least, in a prior that is measured."""


def log_prior(prior: Tensor, tau: float = 1.0) -> Tensor:
    """log(pi^tau + 1e-12), (C,) float64, with pi = `prior` (C,) over its sum.

    >>> log_prior(torch.tensor([6.0, 2.0])).exp()
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    share = prior.double() / prior.max()  # first, since the sum of large numbers may be infinite
    share = share / share.sum()
    return torch.log(share**tau + FLOOR)


def measured_prior(counts_pred_true: Tensor, prior: Literal["accuracy", "predicted"]) -> Tensor:
    """(C,) float64 from confusion counts (C, C): the "accuracy" of every class, or how many are "predicted" as it.

    >>> measured_prior(torch.tensor([[3, 4], [1, 0]]), "accuracy")  # of the second class nothing is right
    tensor([0.7500, 0.1250], dtype=torch.float64)
    >>> measured_prior(torch.tensor([[3, 4], [1, 0]]), "predicted")
    tensor([7., 1.], dtype=torch.float64)
    """
    if prior == "predicted":
        return counts_pred_true.sum(1).double().clamp(min=LEAST)
    return counts_pred_true.diagonal().double().clamp(min=LEAST) / counts_pred_true.sum(0)


def read_prior(owner: str, prior: Prior, words: Sequence[str]) -> str | tuple[float, ...]:
    """One of `words`, in any spelling, or a positive number a class, also as text with commas.

    >>> read_prior("logit-adjustment", "0.5, 0.25, 0.25", ["counts"])
    (0.5, 0.25, 0.25)

    Raises:
        ConfigError: anything else.
    """
    if isinstance(prior, Tensor):
        prior = tuple(prior.detach().double().flatten().tolist())
    elif isinstance(prior, str) and canonical(prior) in words:
        return canonical(prior)
    allowed = f"{', '.join(words)}, or a positive number a class, such as 0.5, 0.3, 0.2"
    try:
        numbers = prior.strip("()[] ,").split(",") if isinstance(prior, str) else prior
        read = tuple(float(number) for number in numbers)
    except ValueError:
        raise ConfigError(owner, "prior", allowed=allowed, got=prior) from None
    require(len(read) > 1 and all(0 < n < math.inf for n in read), owner, "prior", allowed=allowed, got=prior)
    return read


def require_length(owner: str, prior: str | tuple[float, ...], num_classes: int) -> None:
    """Refuse numbers that are not one a class.

    Raises:
        ConfigError: there are more, or fewer.
    """
    fits = isinstance(prior, str) or len(prior) == num_classes
    require(fits, owner, "prior", allowed=f"{num_classes} numbers, one a class", got=len(prior))


@METHODS.register("logit-adjustment")
@config
class LogitAdjustment(Method):
    """Compare z + tau log pi with the label, so that logits need not learn how frequent a class is.

    Attributes:
        prior: "counts" of the training images; the "accuracy" of every class, or how often it is "predicted", both at
            the images whose label the objective asks for and from the second epoch on (at the clean ones on bat, whose
            last clean points are not counted); or a positive number a class, up to a common factor: a tuple, list or
            tensor (C,), or text such as "0.5, 0.3, 0.2".
        tau: power of the prior; 0 does nothing.
        decay: of what a measured prior counted before, an epoch; 0 takes the last epoch alone.
    """

    name: ClassVar[str] = "logit-adjustment"
    claims: ClassVar[frozenset[str]] = frozenset({"batch.shift", "role.class_weight"})
    prior: Prior = "counts"
    tau: NonNegative = 1.0
    decay: Share = 0.8

    def __post_init__(self) -> None:
        read = read_prior(self.name, self.prior, ("counts", *MEASURED))
        object.__setattr__(self, "prior", read)

    def check_classes(self, counts: Tensor, groups: Sequence[int] | None = None) -> None:
        assert not isinstance(self.prior, Tensor), "read when the config was made"
        require_length(self.name, self.prior, len(counts))
        absent = (counts == 0).nonzero().flatten().tolist()
        hint = "Give a positive number a class, or train on images of each"
        allowed = "numbers of your own, or predicted, where a class has no training image"
        usable = not absent or self.prior not in ("counts", "accuracy")
        got = f"{self.prior} without an image of class {', '.join(map(str, absent))}"
        require(usable, self.name, "prior", allowed=allowed, got=got, hint=hint)

    def at_epoch(self, state: State, run: Run) -> State:
        if self.prior in MEASURED:
            return self._measured(state, run)
        numbers = torch.tensor(self.prior, dtype=torch.float64) if isinstance(self.prior, tuple) else None
        counts = torch.bincount(run.labels, minlength=run.num_classes) if numbers is None else numbers
        shift = log_prior(counts, self.tau)
        if run.epoch == 0 and float(shift.max() - shift.min()) < FLOOR:
            text = "logit-adjustment moves all logits alike, since "
            text += "tau is 0" if self.tau == 0 else "all classes have the same prior"
            warnings.warn(f"{text}: it changes nothing; give another prior", RobustFairWarning, stacklevel=2)
        return {"shift": shift.to(run.device)}

    def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
        return replace(batch, shift=state["shift"].to(batch.x.dtype))

    def _measured(self, state: State, run: Run) -> State:
        """The shift (C,), and the counts (C, C) that it is from; no shift before an epoch is over."""
        none = torch.zeros(run.num_classes, run.num_classes, dtype=torch.float64, device=run.device)
        if run.train is None:
            return {"shift": none[0], "counts_pred_true": none}
        passes = [run.train.clean_pred_true, run.train.robust_pred_true]
        first, other = passes[::-1] if run.objective.label_at == "x_adv" else passes
        now = other if first is None else first
        assert now is not None, "training makes one of the passes"
        counts = self.decay * state.get("counts_pred_true", none) + now.to(run.device)
        prior = measured_prior(counts, "accuracy" if self.prior == "accuracy" else "predicted")
        return {"shift": log_prior(prior, self.tau), "counts_pred_true": counts}
