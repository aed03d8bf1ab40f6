"""The protocol by which methods compose: three edits, one scope, two ticks, one export.

A method is a frozen dataclass, its config. What changes over time is a flat dict of tensors that the trainer owns,
saves and hands back. Edits take a value and return a value. `compose` refuses what cannot act together before any
step is taken; while training, every edit is checked against the method's claims, so that claims cannot rot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from robustfair.errors import ConflictError
from robustfair.objectives.base import Objective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, ClassTally, Loss, Model, State, StateDict


class LossAt(Protocol):
    """The loss of the current batch, evaluated on another model or on the same one with other weights."""

    def __call__(self, model: Model, *, edited: bool = True) -> Loss:
        """With the edits of all methods, or as the objective has it."""
        ...


class Run(Protocol):
    """What a method may see of the training run, at a boundary or inside a scope."""

    model: nn.Module
    objective: Objective
    num_classes: int
    epochs: int
    epoch: int
    """Epochs completed, which is also the 0-based number of the epoch about to start."""
    step: int
    """Optimizer steps completed."""
    weight_decay: float
    """What the optimizer adds to the gradient, in units of the weights."""
    train: ClassTally | None
    """Counts of the epoch just completed, from the forward passes of training itself; None before the first."""

    def validate(self) -> ClassTally:
        """Clean and robust counts of the current weights on the validation split; computed once per boundary."""
        ...

    def inputs(self) -> Iterator[Tensor]:
        """Clean training images as augmented for training, for re-estimating batch norm."""
        ...


class Method:
    """Base of all methods: every hook does nothing. A method overrides one to three of them and nothing else."""

    name: ClassVar[str]
    claims: ClassVar[frozenset[str]] = frozenset()
    """Fields it edits ("attack.eps", "loss.label", "batch.x_adv", "gradient", "model", "export.ema") and roles it plays
    ("role.class_weight"). A property where the config decides."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Loss terms that must exist."""
    labels_of: ClassVar[Literal["x", "x_adv"] | None] = None
    """Images that the soft labels it sets belong to; None for labels that hold for either."""

    def attack(self, attack: Attack, batch: Batch, state: State) -> Attack:
        """Edit: radius, step, goal, stop rule."""
        return attack

    def examples(self, batch: Batch, state: State) -> Batch:
        """Edit, after the attack: x_adv, soft labels."""
        return batch

    def loss(self, loss: Loss, batch: Batch, state: State) -> Loss:
        """Edit: coefficients, weight, an extra term."""
        return loss

    def around_gradient(self, run: Run, batch: Batch, loss_at: LossAt, state: State) -> AbstractContextManager[None]:
        """Scope of forward and backward; may move weights inside (restored from a copy) and edit .grad at the end."""
        return nullcontext()

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        """Tick after every optimizer step."""
        return state

    def at_epoch(self, state: State, run: Run) -> State:
        """Tick at every boundary: before the first epoch with {}, then after each."""
        return state

    def export(self, state: State, run: Run) -> Mapping[str, StateDict]:
        """Named weights to validate and save beside the raw ones, such as an average."""
        return {}

    def remark(self, epochs: int) -> str | None:
        """A sentence for the user if this config will do nothing, or something surprising, in a run of `epochs`."""
        return None

    def hooks(self) -> list[str]:
        """Names of the hooks this method overrides, in protocol order."""
        return [hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Method, hook)]


HOOKS = ("attack", "examples", "loss", "around_gradient", "after_step", "at_epoch", "export")


def compose(objective: Objective, methods: Sequence[Method] = (), *, allow: frozenset[str] = frozenset()) -> Plan:
    """Check that the methods can act together on the objective.

    Args:
        allow: claims that may have several owners, who then act in list order.

    Raises:
        ConflictError: a method twice; two owners of one claim; a loss term that does not exist; a write nobody reads.
    """
    owners: dict[str, str] = {}
    names = [method.name for method in methods]
    for method in methods:
        if names.count(method.name) > 1:
            raise ConflictError(f"{method.name} is listed twice: keep one")
        for claim in sorted(method.claims):
            other = owners.setdefault(claim, method.name)
            if other != method.name and claim not in allow:
                raise ConflictError(
                    f"{other} and {method.name} both set {claim} ({CLAIM_TEXT.get(claim, 'one field, two owners')}): "
                    f"keep one, or pass allow={{'{claim}'}} to apply both in list order"
                )
        lacking = _lacking(method, objective)
        if lacking:
            fitting = [name for name in OBJECTIVES if _fits(method, OBJECTIVES.get(name))]
            use = " or ".join(fitting) or "another objective"
            raise ConflictError(f"{method.name} {lacking}: use {use}, or drop {method.name}")
        for claim in sorted(method.claims):
            unread = _unread(claim, objective)
            if unread:
                raise ConflictError(f"{method.name} sets {claim}, but {objective.name} {unread}: drop {method.name}")
    return Plan(objective=objective, methods=tuple(methods), allow=allow)


CLAIM_TEXT = {
    "attack.eps": "the class-wise radius",
    "attack.goal": "what the attack maximises",
    "attack.stop": "when the attack stops",
    "batch.soft": "the soft labels",
    "batch.x_adv": "the images that are trained on",
    "loss.label": "the weight of the label term",
    "loss.consistency": "the weight of the consistency term",
    "role.class_weight": "the balance between classes",
    "gradient": "the point where the gradient is taken",
}


def _fits(method: Method, objective: type[Objective]) -> bool:
    """Whether `objective` has what `method` needs and reads what it sets."""
    return not _lacking(method, objective) and not any(_unread(claim, objective) for claim in method.claims)


def _lacking(method: Method, objective: Objective | type[Objective]) -> str:
    """What `method` needs of `objective` and does not find; empty if nothing."""
    for need in sorted(method.needs - objective.terms):
        return f"needs the loss term {need!r}, and {objective.name} has only {', '.join(sorted(objective.terms))}"
    if method.labels_of not in (None, objective.label_at):
        return f"sets labels of {method.labels_of}, and {objective.name} asks for those of {objective.label_at}"
    return ""


def late(name: str, begin: int, epochs: int) -> str | None:
    """The remark of a method whose first epoch comes after the end of the run."""
    if begin < epochs:
        return None
    return f"{name} begins at epoch {begin} and this run ends after {epochs}: it will never act; lower {name}(begin)"


def _unread(claim: str, objective: Objective | type[Objective]) -> str:
    """Why a write to `claim` would be lost under `objective`; empty if it is read."""
    if claim.startswith("attack.") and "x_adv" not in objective.reads:
        return "trains without an attack"
    if claim.startswith("batch.") and claim.removeprefix("batch.") not in objective.reads:
        return f"does not read {claim.removeprefix('batch.')}"
    return ""


@dataclass(frozen=True)
class Plan:
    """An objective with methods that may act together: each hook of all methods, in list order, checked."""

    objective: Objective
    methods: tuple[Method, ...]
    allow: frozenset[str]

    @property
    def moves_weights(self) -> bool:
        """Whether a method may move the weights between the attack and the loss."""
        return any("around_gradient" in method.hooks() for method in self.methods)

    def attack(self, batch: Batch, states: Mapping[str, State]) -> Attack | None:
        """The training attack on `batch` after all edits; None if the objective trains on clean images."""
        attack = self.objective.attack(batch)
        if attack is None:
            return None
        for method in self.methods:
            edited = method.attack(attack, batch, states[method.name])
            _check_fields(method, "attack", attack, edited)
            attack = edited
        return attack

    def examples(self, batch: Batch, states: Mapping[str, State]) -> Batch:
        for method in self.methods:
            edited = method.examples(batch, states[method.name])
            _check_fields(method, "batch", batch, edited)
            batch = edited
        return batch

    def loss(self, model: Model, batch: Batch, states: Mapping[str, State]) -> Loss:
        """The objective's loss on `model` after all edits."""
        loss = self.objective(model, batch)
        for method in self.methods:
            edited = method.loss(loss, batch, states[method.name])
            _check_loss(method, loss, edited)
            loss = edited
        return loss

    @contextmanager
    def around_gradient(self, run: Run, batch: Batch, loss_at: LossAt, states: Mapping[str, State]) -> Iterator[None]:
        """All scopes, entered in list order and left in reverse, so that each undoes its own change first."""
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.around_gradient(run, batch, loss_at, states[method.name]))
            yield

    def after_step(self, states: Mapping[str, State], batch: Batch, loss: Loss, run: Run) -> dict[str, State]:
        return {m.name: m.after_step(states[m.name], batch, loss, run) for m in self.methods}

    def at_epoch(self, states: Mapping[str, State], run: Run) -> dict[str, State]:
        """All epoch ticks; weights may change here only under the claim "model"."""
        new = {}
        for method in self.methods:
            before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            new[method.name] = method.at_epoch(states.get(method.name, {}), run)
            now = run.model.state_dict()
            moved = any(not torch.equal(now[name], tensor) for name, tensor in before.items())
            if moved and "model" not in method.claims:
                raise ConflictError(f"{method.name} changed the weights at an epoch boundary without claiming 'model'")
        return new

    def export(self, states: Mapping[str, State], run: Run) -> dict[str, StateDict]:
        """All candidates in the order of their names, whatever the order of the methods."""
        candidates: dict[str, StateDict] = {}
        for method in self.methods:
            exported = method.export(states[method.name], run)
            unclaimed = {f"export.{name}" for name in exported} - method.claims
            if unclaimed:
                raise ConflictError(f"{method.name} exports {', '.join(sorted(unclaimed))} without claiming it")
            candidates.update(exported)
        return dict(sorted(candidates.items()))


def _check_fields(method: Method, owner: str, before: Attack | Batch, after: Attack | Batch) -> None:
    for field in fields(before):
        changed = getattr(after, field.name) is not getattr(before, field.name)
        if changed and f"{owner}.{field.name}" not in method.claims:
            raise _unclaimed(method, f"{owner}.{field.name}")


def _check_loss(method: Method, before: Loss, after: Loss) -> None:
    if after.weight is not before.weight and "loss.weight" not in method.claims:
        raise _unclaimed(method, "loss.weight")
    if after.out is not before.out or before.terms.keys() - after.terms.keys():
        raise _unclaimed(method, "the logits or the set of terms of the loss")
    for name in after.terms:
        same = (
            name in before.terms and after.terms[name] is before.terms[name] and after.coef[name] is before.coef[name]
        )
        if not same and f"loss.{name}" not in method.claims:
            raise _unclaimed(method, f"loss.{name}")


def _unclaimed(method: Method, what: str) -> ConflictError:
    return ConflictError(f"{method.name} changed {what} without claiming it: add the claim, or leave the field alone")
