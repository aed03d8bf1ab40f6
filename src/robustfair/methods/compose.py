"""Methods that act together: refused before the first step where they cannot, and held to their claims in every one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustfair.errors import ConflictError
from robustfair.methods.base import Bundle, LossAt, Method, Run
from robustfair.objectives.base import Objective
from robustfair.registry import OBJECTIVES
from robustfair.values import Attack, Batch, Loss, Model, State, StateDict, derive_seed

Edited = TypeVar("Edited", Attack, Batch)


def compose(
    objective: Objective,
    methods: Sequence[Method | Bundle] = (),
    *,
    allow: frozenset[str] = frozenset(),
    validation: bool = True,
) -> Plan:
    """Check that the methods can act together on the objective.

    Args:
        methods: bundles among them become those of their parts that fit, in their place.
        allow: claims that may have several owners, who then act in list order.
        validation: whether the run holds images out.

    Raises:
        ConfigError: a method cannot act on the objective with its settings.
        ConflictError: a method twice; two owners of one claim; a loss term, attacked or held out images that a method
            needs and does not find; a write nobody reads; a bundle beside one of its parts, or without one that fits.
    """
    methods, bundles = _unbundled(objective, methods, allow)
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
                    f"keep one, or pass `allow={{'{claim}'}}` to apply both in list order"
                )
        lacking = _lacking(method, objective)
        if lacking:
            fitting = [
                name for name in OBJECTIVES if name != objective.name and not _unfit(method, OBJECTIVES.get(name))
            ]
            use = " or ".join(fitting) or "another objective"
            raise ConflictError(f"{method.name} {lacking}: use {use}, or drop {method.name}")
        if "validation" in method.needs and not validation:
            raise ConflictError(
                f"{method.name} measures on held out images and this run has none: set validation to a share of each "
                f"class, such as 0.02, or {to_drop(method.name, bundles)}"
            )
        for claim in sorted(method.claims):
            unread = _unread(claim, objective)
            if unread:
                raise ConflictError(f"{method.name} sets {claim}, but {objective.name} {unread}: drop {method.name}")
        if "attack.target" in method.claims and "attack.goal" not in method.claims:
            raise ConflictError(f"{method.name} sets attack.target and keeps the goal, which is not made for one")
        method.check_objective(objective.name)
    for method, replacing in permutations(methods, 2):
        lost = _lost(method, replacing)
        if lost:
            raise ConflictError(
                f"{method.name} sets {lost}, and {replacing.name} replaces the term that reads it: drop one of them"
            )
    return Plan(objective=objective, methods=methods, allow=allow, bundles=bundles)


CLAIM_TEXT = {
    "attack.eps": "the class-wise radius",
    "attack.goal": "what the attack maximises",
    "attack.stop": "when the attack stops",
    "attack.watch": "what is read along the attack",
    "batch.soft": "the soft labels",
    "batch.teacher": "the labels of the teacher",
    "batch.x_adv": "the images that are trained on",
    "loss.label": "the weight of the label term",
    "loss.consistency": "the weight of the consistency term",
    "role.class_weight": "the balance between classes",
    "gradient": "the point where the gradient is taken",
}


@dataclass(frozen=True)
class Unbundled:
    """What became of a bundle.

    Attributes:
        parts: those that act.
        unfit: name of a part -> why the objective has no use for it.
        taken: name of a part -> which listed method sets what it would.
    """

    bundle: Bundle
    parts: tuple[Method, ...]
    unfit: Mapping[str, str]
    taken: Mapping[str, str]

    def reworded(self, text: str) -> str:
        """A message that names settings of the parts, with those of the bundle that give them in their place."""
        for setting, own in self.bundle.sets.items():
            text = text.replace(setting, f"{self.bundle.name}({own})")
        return text

    def remark(self) -> str | None:
        """A sentence for the user if another method keeps out a part that would fit the objective."""
        left = "; ".join(f"{part}, since {reason}" for part, reason in self.taken.items())
        return f"{self.bundle.name} leaves out {left}" if left else None


def to_drop(name: str, bundles: Sequence[Unbundled]) -> str:
    """How a user drops a method, which a bundle may have brought."""
    for entry in bundles:
        others = [part.name for part in entry.parts if part.name != name]
        if len(others) < len(entry.parts):
            instead = f"list {' and '.join(others)} in its place" if others else f"drop {entry.bundle.name}"
            return f"{instead}, since {name} comes with {entry.bundle.name}"
    return f"drop {name}"


def _unbundled(
    objective: Objective, listed: Sequence[Method | Bundle], allow: frozenset[str]
) -> tuple[tuple[Method, ...], tuple[Unbundled, ...]]:
    """The methods of a list, in the place of each bundle those of its parts that act; and what became of each."""
    methods: list[Method] = []
    bundles: list[Unbundled] = []
    for entry in listed:
        if isinstance(entry, Bundle):
            bundles.append(_parted(entry, objective, listed, allow))
            methods += bundles[-1].parts
        else:
            methods.append(entry)
    return tuple(methods), tuple(bundles)


def _parted(
    bundle: Bundle, objective: Objective, listed: Sequence[Method | Bundle], allow: frozenset[str]
) -> Unbundled:
    """What becomes of a bundle on `objective`, beside all that is `listed`."""
    names = [entry.name for entry in listed]
    plain = [entry for entry in listed if not isinstance(entry, Bundle)]
    parts = {part.name: part for part in bundle.parts()}
    if names.count(bundle.name) > 1:
        raise ConflictError(f"{bundle.name} is listed twice: keep one")
    doubled = next((name for name in parts if name in names), None)
    if doubled:
        raise ConflictError(
            f"{bundle.name} stands for {', '.join(parts)} and {doubled} is listed too: give {bundle.name} the settings "
            f"({', '.join(vars(bundle))}), or list the parts in its place"
        )
    unfit, taken = {}, {}
    for name, part in parts.items():
        reason = _unfit(part, objective)
        if reason:
            unfit[name] = reason
        elif reasons := [found for method in plain if (found := _taken(part, method, allow))]:
            taken[name] = reasons[0]
    if len(unfit) == len(parts):
        reason = "; ".join(f"{name} {reason}" for name, reason in unfit.items())
        raise ConflictError(f"no part of {bundle.name} acts on {objective.name}: {reason}: drop {bundle.name}")
    acting = tuple(part for name, part in parts.items() if name not in unfit and name not in taken)
    return Unbundled(bundle, acting, unfit, taken)


def _taken(part: Method, other: Method, allow: frozenset[str]) -> str:
    """Why `part` of a bundle cannot act beside `other`; empty if it can."""
    claim = min((part.claims & other.claims) - allow, default="")
    if claim:
        return f"{other.name} sets {claim} already"
    lost = _lost(part, other)
    return f"{other.name} replaces the term that reads {lost}" if lost else ""


def _unfit(method: Method, objective: Objective | type[Objective]) -> str:
    """Why `objective` has no use for `method`; empty if it has."""
    lacking = _lacking(method, objective)
    unread = {claim: _unread(claim, objective) for claim in sorted(method.claims)}
    return lacking or next((f"sets {claim}, but {objective.name} {why}" for claim, why in unread.items() if why), "")


def _lacking(method: Method, objective: Objective | type[Objective]) -> str:
    """What `method` needs of `objective` and does not find; empty if nothing."""
    if "x_adv" in method.needs and "x_adv" not in objective.reads:
        return f"needs attacked images, and {objective.name} trains without an attack"
    for need in sorted(method.needs - objective.terms - {"x_adv", "validation"}):
        return f"needs the loss term {need!r}, and {objective.name} has only {', '.join(sorted(objective.terms))}"
    if method.labels_of not in (None, objective.label_at):
        return f"sets labels of {method.labels_of}, and {objective.name} asks for those of {objective.label_at}"
    return ""


def _unread(claim: str, objective: Objective | type[Objective]) -> str:
    """Why a write to `claim` would be lost under `objective`; empty if it is read."""
    owner, _, field = claim.partition(".")
    if claim in objective.owns:
        return "is defined by its own"
    if owner == "attack" and "x_adv" not in objective.reads:
        return "trains without an attack"
    if claim == "batch.x" and "teacher" in objective.reads:
        return "has its teacher label the images before that"
    if owner == "batch" and field not in objective.reads | {"x", "y"}:
        return f"does not read {field}"
    return ""


def _lost(method: Method, replacing: Method) -> str:
    """A claim of `method` that nobody reads once `replacing` has acted; empty if there is none."""
    lost = {f"loss.{term}" for term in replacing.replaces}
    if "label" in replacing.replaces:
        lost |= {"batch.soft", "batch.shift"}
    return min(method.claims & lost, default="")


@dataclass(frozen=True)
class Plan:
    """An objective with methods that may act together: each hook of all methods, in list order, checked.

    Attributes:
        methods: plain ones, the parts of bundles among them.
        bundles: what became of those that were listed.
    """

    objective: Objective
    methods: tuple[Method, ...]
    allow: frozenset[str]
    bundles: tuple[Unbundled, ...] = ()

    @property
    def parts(self) -> list[Objective | Method]:
        """The objective and the methods."""
        return [self.objective, *self.methods]

    def remarks(self, epochs: int) -> list[str]:
        """What a user should know before a run of `epochs`: what a bundle leaves out, and of methods."""
        found = [*(bundle.remark() for bundle in self.bundles), *(self.remark(part, epochs) for part in self.methods)]
        return [text for text in found if text]

    def remark(self, method: Method, epochs: int) -> str | None:
        """That of one method, in the settings that a user gives."""
        text = method.remark(epochs)
        for entry in self.bundles:
            text = entry.reworded(text) if text and method in entry.parts else text
        return text

    @property
    def moves_weights(self) -> bool:
        """Whether a method may move the weights between the attack and the loss."""
        return any("around_gradient" in method.hooks() for method in self.methods)

    def networks(self, model: nn.Module, seed: int) -> dict[str, nn.Module]:
        """All networks that objective and methods want beside the model, as "method/name"; draws are keyed by seed and
        method.
        """
        found: dict[str, nn.Module] = {}
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            for part in self.parts:
                torch.manual_seed(derive_seed(seed, "networks", part.name))
                found |= {f"{part.name}/{name}": network for name, network in part.networks(model).items()}
        return found

    def check_classes(self, counts: Tensor, groups: Sequence[int] | None) -> None:
        """Let every method refuse training images that it cannot act on, see `Method.check_classes`."""
        for method in self.methods:
            method.check_classes(counts, groups)

    def prepare(self, batch: Batch, states: Mapping[str, State], run: Run) -> Batch:
        """The batch as the attack finds it."""
        batch = self.objective.prepare(batch, run.networks)
        for method in self.methods:
            edited = method.prepare(batch, states[method.name], run)
            if edited.x_adv is not None:
                raise ConflictError(
                    f"{method.name} sets x_adv before the attack, which sets it anew: do it in examples"
                )
            batch = _checked(method, "batch", batch, edited)
        return batch

    def attacks(self, batch: Batch, states: Mapping[str, State], run: Run) -> dict[str, Attack]:
        """The training attacks on `batch` after all edits, by what they make: "x_adv", and views by name."""
        made = self.objective.attacks(batch)
        for name, attack in made.items():
            for method in self.methods:
                fresh = _fresh(attack)
                edited = method.attack(fresh, batch, states[method.name], run)
                attack = _checked(method, "attack", fresh, edited, original=attack)
            made[name] = attack
        return made

    def examples(self, batch: Batch, states: Mapping[str, State], run: Run) -> Batch:
        """The batch as the loss finds it."""
        for method in self.methods:
            batch = _checked(method, "batch", batch, method.examples(batch, states[method.name], run))
        return batch

    def loss(self, model: Model, batch: Batch, states: Mapping[str, State], run: Run) -> Loss:
        """The objective's loss on `model` after all edits."""
        loss = self.objective(model, batch)
        for method in self.methods:
            edited = method.loss(loss, batch, states[method.name], run)
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


class _Int(int):
    """A whole number or a truth value with an identity of its own, see `_fresh`."""


class _Float(float):
    """A number with an identity of its own, see `_fresh`."""


class _Str(str):
    """A word with an identity of its own, see `_fresh`."""


FRESH = {bool: _Int, int: _Int, float: _Float, str: _Str}


def _fresh(value: Attack) -> Attack:
    """The same attack with plain values that are no other object: whoever writes an equal one is seen to write it."""
    plain = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: FRESH[type(v)](v) for name, v in plain.items() if type(v) in FRESH})


def _checked(method: Method, owner: str, before: Edited, after: Edited, *, original: Edited | None = None) -> Edited:
    """`after` if the method claims all it changed, with what it left alone as `original` (or `before`) has it."""
    kept = before if original is None else original
    left = {}
    for field in fields(before):
        old: object = getattr(before, field.name)
        new: object = getattr(after, field.name)
        if new is old:
            left[field.name] = getattr(kept, field.name)
        elif isinstance(old, Mapping) and isinstance(new, Mapping) and f"{owner}.{field.name}" not in method.claims:
            if any(new.get(key) is not old.get(key) for key in (set(old) | set(new)) - {method.name}):
                raise _unclaimed(method, f"{owner}.{field.name} under another name than its own")
        elif f"{owner}.{field.name}" not in method.claims:
            raise _unclaimed(method, f"{owner}.{field.name}")
    return after if original is None else replace(after, **left)


def _check_loss(method: Method, before: Loss, after: Loss) -> None:
    if after.weight is not before.weight and "loss.weight" not in method.claims:
        raise _unclaimed(method, "loss.weight")
    if after.out is not before.out or before.terms.keys() - after.terms.keys():
        raise _unclaimed(method, "the logits or the set of terms of the loss")
    for name in after.terms:
        term = name in before.terms and after.terms[name] is before.terms[name]
        same = term and after.coef[name] is before.coef[name]
        if not same and f"loss.{name}" not in method.claims:
            raise _unclaimed(method, f"loss.{name}")
        if name in before.terms and not term and name not in method.replaces:
            raise ConflictError(f"{method.name} replaced the term {name!r} of the loss: add it to replaces")


def _unclaimed(method: Method, what: str) -> ConflictError:
    return ConflictError(f"{method.name} changed {what} without claiming it: add the claim, or leave the field alone")
