"""The frozen values that flow through a training step, and nothing but torch.

Shapes: B images in a batch, C classes (channels in `x`: read from the context), all pixels in [0, 1], radii in the same
unit, rates as fractions. "Per example" is (B,), "per class" is (C,). A confusion matrix names its axis order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor, nn

from robustfair.config import Bounds, Norm

State = Mapping[str, Tensor]
StateDict = Mapping[str, Tensor]
Model = Callable[[Tensor], Tensor]
Mode = Literal["eval", "train", "train_frozen"]
Network = Annotated[
    str | nn.Module | None, Bounds(allowed="a module, or text that names a model as `robustfair audit` does")
]
"""A second network in a config. Text is read where a recipe is made ready to run; `fit` takes modules alone."""
BATCH_NORM = nn.modules.batchnorm._BatchNorm
"""Base of all batch-norm layers, whatever their dimension."""


def derive_seed(*keys: object) -> int:
    """A 63-bit seed from any keys: every draw is keyed by (seed, position, purpose), so no draw moves another.

    >>> derive_seed(0, "attack") == derive_seed(0, "attack") != derive_seed(0, "augment")
    True
    """
    plain = tuple(int(key) if isinstance(key, Integral) else key for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(device: torch.device | str, *keys: object) -> torch.Generator:
    """A generator on `device` whose stream depends on `keys` alone."""
    return torch.Generator(device).manual_seed(derive_seed(*keys))


@dataclass(frozen=True)
class Batch:
    """One mini-batch: `x` (B, C, H, W) in [0, 1], `y` (B,), `index` (B,) rows of the training set, a seed of its own.

    The rest appears on the way: attacks set `x_adv` and `views`, methods may set any of it.

    Attributes:
        x_adv: (B, C, H, W) the attacked images.
        watched: (B,) what `Attack.watch` came to on the way to `x_adv`; None where no method watches.
        soft: (B, C) labels as distributions, for the term "label".
        teacher: (B, C) logits by name of a term of the loss, which asks for their softmax as its labels.
        shift: (C,) or (B, C) added to the logits that the term "label" compares with the labels.
        views: further attacked images by name, for objectives that train on more than one.
        extra: what a method keeps from one of its hooks to the next, under its own name.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    seed: int
    x_adv: Tensor | None = None
    watched: Tensor | None = None
    soft: Tensor | None = None
    shift: Tensor | None = None
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, images: str) -> Tensor:
        """(B, C, H, W) the images "x", "x_adv", or those of a view by its name."""
        if images in ("x", "x_adv"):
            found = self.x if images == "x" else self.x_adv
            assert found is not None, "an objective that asks for attacked images has them"
            return found
        return self.views[images]

    def rng(self, name: str) -> torch.Generator:
        """The random stream called `name` of this batch: adding a method never moves another's numbers."""
        return seeded_generator(self.x.device, self.seed, name)


class Goal(Protocol):
    """What an attack maximises, per example. `needs_clean` asks for the logits at x, computed once per attack."""

    needs_clean: bool

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor: ...


class Stop(Protocol):
    """When an example stops moving. The state is a tensor (B,), so that the rule stays free of host synchronisation."""

    def start(self, y: Tensor) -> Tensor: ...

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """From the logits at the current point: the new state and the mask (B,) of examples that take this step."""
        ...


class Watch(Protocol):
    """What is read along an attack, one value per example, such as a count of steps. It moves no point."""

    def start(self, y: Tensor) -> Tensor: ...

    def __call__(self, seen: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """From the logits at the point that a step leaves: the new value (B,)."""
        ...


@dataclass(frozen=True, eq=False)
class StopWhenWrong:
    """Stop rule of friendly adversarial training and BAT: a wrong example steps on while it has budget, paying 1.

    State (B,): budget left, -1 once stopped. A budget of 0 stops at the first error.
    """

    tau: Tensor | int

    def start(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y) + self.tau

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        pays = (logits.argmax(1) != y) & (state >= 0)
        state = state - pays.to(state.dtype)
        return state, state >= 0


@dataclass(frozen=True)
class Attack:
    """One projected-gradient attack, complete: radius and step per example (B,), the rest shared.

    Attributes:
        eps: (B,) radius in pixel units.
        step_size: (B,) length of one step, same unit.
        steps: number of gradient steps; 0 returns the start.
        goal: what to maximise.
        norm: "linf" or "l2".
        start: name of the start rule, see `STARTS` and `GRADIENT_START` of `robustfair.attacks.pgd`.
        start_radius: how far a uniform start reaches, in units of eps.
        mode: batch norm during the attack: "eval", "train" (updates running statistics) or "train_frozen" (does not).
        target: what the goal is given in place of the labels: classes (B,) to go for, or distributions (B, C). Stop
            rules read the labels all the same.
        stop: which examples stop early; None lets all take every step.
        watch: what to read at the points that steps leave, of the examples that take them and of the last start; the
            batch carries it as `watched`. A frozen dataclass of numbers and texts, so that recorded attacks have it.
        keep: the "last" iterate; the "best" one by the goal; or, for an example that its rule stopped, the one before
            the one that it stopped at ("inside": the last that was still in its class).
        restarts: independent starts; the best by `goal` is kept per example (by correctness first under a stop rule).
        box_first: l2 only: clip to [0, 1] before the ball, as TRADES does, not after it.
        box: keep the images in [0, 1]; False leaves the ball alone to bound them.
        ball: keep the images within eps of x; False lets them go where start and steps lead.
        noise: standard deviation of the Gaussian noise added to every step, before the projection, in pixel units.
    """

    eps: Tensor
    step_size: Tensor
    steps: int
    goal: Goal
    norm: Norm = "linf"
    start: str = "uniform"
    start_radius: float = 1.0
    mode: Mode = "eval"
    target: Tensor | None = None
    stop: Stop | None = None
    watch: Watch | None = None
    keep: Literal["last", "best", "inside"] = "last"
    restarts: int = 1
    box_first: bool = False
    box: bool = True
    ball: bool = True
    noise: float = 0.0


AttackOn = Callable[[Batch], Attack]
"""From a batch to the attack on it: radii are per example, so an attack exists only for given examples."""
AttacksOn = Callable[[Batch], Mapping[str, Attack]]
"""From a batch to several attacks by what they make, as `Objective.attacks`: "x_adv", and views by name."""


@dataclass(frozen=True)
class Forward:
    """Logits (B, C) that the loss was computed from; None where the objective does not need that pass.

    Attributes:
        views: those at further attacked images, by the name of the view.
    """

    clean: Tensor | None = None
    adv: Tensor | None = None
    views: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, images: str) -> Tensor:
        """(B, C) logits at a view, at "x" or at "x_adv"; of the last two the other where that pass was not made."""
        if images in self.views:
            return self.views[images]
        first, other = (self.adv, self.clean) if images == "x_adv" else (self.clean, self.adv)
        logits = other if first is None else first
        assert logits is not None, "a loss comes from the logits of some images"
        return logits


@dataclass(frozen=True)
class Loss:
    """A loss before its reduction: total = mean over examples of weight * sum over terms of coef * term.

    Entries are per example (B,), so a class weight, class beta or mask is a product. A term () is one number for the
    batch as a whole, such as a variance over classes: coef * term joins the total as it is, whatever the examples
    weigh. Edits return a new value. Terms add up in the order of their names, whoever added them first.
    """

    out: Forward
    terms: Mapping[str, Tensor]
    coef: Mapping[str, Tensor]
    weight: Tensor

    @staticmethod
    def of(out: Forward, **terms: tuple[Tensor, float]) -> Loss:
        """Build from name=(term (B,), coefficient)."""
        first = next(iter(terms.values()))[0]
        return Loss(
            out=out,
            terms={name: term for name, (term, _) in terms.items()},
            coef={name: torch.full_like(term, coef, requires_grad=False) for name, (term, coef) in terms.items()},
            weight=torch.ones_like(first, requires_grad=False),
        )

    def scaled(self, name: str, factor: Tensor) -> Loss:
        """Multiply the coefficient of one term by `factor` (B,)."""
        return replace(self, coef={**self.coef, name: self.coef[name] * factor})

    def weighted(self, factor: Tensor) -> Loss:
        """Multiply the weight of every example by `factor` (B,)."""
        return replace(self, weight=self.weight * factor)

    def plus(self, name: str, term: Tensor, coef: Tensor) -> Loss:
        """Add a term with its coefficient, both (B,), or both () for one number of the batch; the name must be new."""
        assert name not in self.terms, f"loss term {name!r} exists already"
        return replace(self, terms={**self.terms, name: term}, coef={**self.coef, name: coef})

    def per_example(self) -> Tensor:
        """(B,) weighted sum of the terms that are per example."""
        return self.weight * sum(value for value in self._scaled_terms() if value.ndim)

    def total(self) -> Tensor:
        """The scalar that is differentiated: the one place where the mean over the batch is taken."""
        return sum((value for value in self._scaled_terms() if not value.ndim), self.per_example().mean())

    def _scaled_terms(self) -> list[Tensor]:
        """Every term times its coefficient, in the order of their names."""
        return [self.coef[name] * self.terms[name] for name in sorted(self.terms)]


@dataclass(frozen=True)
class ClassTally:
    """Predictions of one pass as confusion counts (C, C) int64, rows predicted, columns true. Adds up with `+`.

    Either part is None where that pass was not made. Rates are fractions in float64, nan for a class without images.
    """

    clean_pred_true: Tensor | None = None
    robust_pred_true: Tensor | None = None

    def __add__(self, other: ClassTally) -> ClassTally:
        return ClassTally(
            _add(self.clean_pred_true, other.clean_pred_true), _add(self.robust_pred_true, other.robust_pred_true)
        )

    def over(self, total: Callable[[Tensor], Tensor]) -> ClassTally:
        """These counts with `total` of each part, such as the sum over processes."""
        parts = (self.clean_pred_true, self.robust_pred_true)
        return ClassTally(*(None if part is None else total(part) for part in parts))

    @property
    def count(self) -> Tensor:
        """(C,) images seen per class."""
        counts = self.robust_pred_true if self.robust_pred_true is not None else self.clean_pred_true
        assert counts is not None, "an empty tally has no counts"
        return counts.sum(0)

    @property
    def clean(self) -> Tensor:
        """(C,) clean accuracy per class."""
        return _recall(self.clean_pred_true, "clean")

    @property
    def robust(self) -> Tensor:
        """(C,) accuracy per class on the attacked images."""
        return _recall(self.robust_pred_true, "robust")


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _recall(counts_pred_true: Tensor | None, part: str) -> Tensor:
    assert counts_pred_true is not None, f"this tally has no {part} part"
    return counts_pred_true.diagonal().double() / counts_pred_true.sum(0)


def default_eps(norm: Norm) -> float:
    """The radius that most papers train and test at: 8/255 for linf, 128/255 for l2."""
    return 8 / 255 if norm == "linf" else 128 / 255


def default_step(norm: Norm, eps: float) -> float:
    """Step of PGD at a radius: eps/4 for linf (2/255 at 8/255), 15/128 eps for l2 (15/255 at 128/255, Rice et al.)."""
    return eps / 4 if norm == "linf" else eps * 15 / 128


@dataclass(frozen=True)
class Threat:
    """The adversary a run or an audit is about: norm and radius in pixel units, and the step of its PGD."""

    norm: Norm = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
