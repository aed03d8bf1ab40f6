"""Run the AutoAttack family on what a model classifies right: the native engine, or `pyautoattack` as a reference."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.base import BF16_TOLERANCE, SearchNetwork, into_ball
from robustfair.attacks.autoattack.engine import STANDS, Ensemble, Verdicts, Victims
from robustfair.attacks.autoattack.named import Member, StrongAttack
from robustfair.config import Precision
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError
from robustfair.execution.folded import search_network
from robustfair.values import Threat, derive_seed

TELL_EVERY = 0.5
"""Seconds between reports of progress."""
SAVE_EVERY = 60.0
"""Seconds between writings of the journal."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a strong attack did to n images, on the CPU.

    Attributes:
        prediction: (n,) class at the point found, the label where none was.
        broken_by: (n,) number of the member that broke the image, -1 where none did.
        ran: member -> share of its work that was done.
        not_finite: attacked points whose logits were no finite numbers.
        points: image -> (C, H, W) where the model gives that class.
    """

    prediction: Tensor
    broken_by: Tensor
    ran: Mapping[str, float]
    not_finite: int
    points: Mapping[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a strong attack runs, whatever it attacks.

    Attributes:
        threat: norm and radius.
        seed: of its draws.
        batch_size: searches at a time.
        precision: of the searches; the verdict is always that of the model as given.
        distance_precision: of FAB's, which measures distances to a boundary.
        deadline: `time.monotonic()` at which to stop; None never does.
        keep_points: keep where each image was broken.
    """

    threat: Threat
    seed: int
    batch_size: int
    precision: Precision = "fp32"
    distance_precision: Precision = "fp32"
    deadline: float | None = None
    keep_points: bool = False


def run_native(
    attack: StrongAttack,
    model: nn.Module,
    data: ImageDataset,
    rows: Tensor,
    terms: Terms,
    *,
    state: Mapping[str, Tensor] | None = None,
    save: Callable[[Mapping[str, Tensor]], None] | None = None,
    tell: Callable[[float], None] | None = None,
) -> tuple[Outcome, Mapping[str, Tensor] | None]:
    """Attack images that are all classified right, with our engine.

    Args:
        model: in eval mode.
        data: (n, C, H, W) images on the model's device.
        rows: (n,) their places in the audited data set, which key the draws.
        state: where an interrupted run stood.
        save: keeps a state that may be given back.
        tell: hears the share of the work that is done.

    Returns:
        The outcome, and the state where the deadline ended it; None where it ran to its end.
    """
    searches = [member.search(terms.threat, data.num_classes, terms.seed) for member in attack.members]
    example = _pixels(data, torch.arange(min(len(data), 2), device=data.device))
    networks = {
        precision: _network(model, precision, example, terms.batch_size)
        for precision in {terms.precision, terms.distance_precision}
    }
    ensemble = Ensemble(
        model,
        networks[terms.precision],
        Victims(images=lambda index: _pixels(data, index), labels=data.labels, keys=rows),
        searches,
        eps=terms.threat.eps,
        norm=terms.threat.norm,
        seed=derive_seed("strong", terms.seed, attack.name),
        batch_size=terms.batch_size,
        distance_network=networks[terms.distance_precision],
        keep_points=terms.keep_points,
    )
    if state:
        ensemble.restore(state)
    told = saved = time.monotonic()

    def watch(now_at: Ensemble) -> bool:
        nonlocal told, saved
        now = time.monotonic()
        if tell and now - told >= TELL_EVERY:
            told = now
            tell(now_at.progress())
        if save and now - saved >= SAVE_EVERY:
            save(now_at.state())
            saved = time.monotonic()
        return terms.deadline is None or now < terms.deadline

    try:
        verdicts = ensemble.run(watch)
    except KeyboardInterrupt:
        if save:
            save(ensemble.state())
        raise
    found = _outcome(attack, verdicts, ensemble.ran())
    return found, None if min(found.ran.values()) >= 1 else ensemble.state()


def run_reference(
    attack: StrongAttack,
    model: nn.Module,
    data: ImageDataset,
    rows: Tensor,
    terms: Terms,
    *,
    state: Mapping[str, Tensor] | None = None,
    save: Callable[[Mapping[str, Tensor]], None] | None = None,
    tell: Callable[[float], None] | None = None,
) -> tuple[Outcome, Mapping[str, Tensor] | None]:
    """The same with `pyautoattack`, member by member, each on what those before it left standing.

    Inside a member it keeps no state and looks at no deadline, and its draws depend on the batch: `rows` are not read.
    Verdicts are its own; points that are kept are put into ball and box as ours are.
    """
    found, first = Verdicts.none_on(data.labels), 0
    if state:
        found, first = Verdicts.of_state(state), int(state["member"])
    done = len(attack.members)
    for number in range(first, done):
        standing = (found.broken_by == STANDS).nonzero().squeeze(1)
        if len(standing) == 0:
            break
        if number > first and terms.deadline is not None and time.monotonic() >= terms.deadline:
            done = number
            break
        left = data.subset(standing.to(data.device))
        _reference_member(attack.members[number], number, model, left, standing, terms, found)
        if save:
            save({**found.state(), "member": torch.tensor(number + 1)})
        if tell:
            tell((number + 1) / len(attack.members))
    ran = [float(number < done) for number in range(len(attack.members))]
    unfinished = None if min(ran) >= 1 else {**found.state(), "member": torch.tensor(done)}
    return _outcome(attack, found, ran), unfinished


def _network(model: nn.Module, precision: Precision, example: Tensor, capacity: int) -> SearchNetwork:
    if precision == "fp32":
        return SearchNetwork(model, capacity=capacity)
    return SearchNetwork(search_network(model, example), tolerance=BF16_TOLERANCE, capacity=capacity)


def _pixels(data: ImageDataset, index: Tensor) -> Tensor:
    """Images in [0, 1], in the layout that convolutions are fastest in; so are the points of all searches then."""
    return (data.images[index].float() / 255).contiguous(memory_format=torch.channels_last)


def _outcome(attack: StrongAttack, verdicts: Verdicts, ran: Sequence[float]) -> Outcome:
    names = [member.name for member in attack.members]
    return Outcome(
        prediction=verdicts.prediction,
        broken_by=verdicts.broken_by,
        ran=dict(zip(names, ran, strict=True)),
        not_finite=verdicts.not_finite,
        points=verdicts.points,
    )


def require_reference(attack: StrongAttack, classes: int) -> None:
    """Refuse what `run_reference` cannot run.

    Raises:
        ConfigError: too few classes for a member, or a setting that the reference has not.
    """
    for member in attack.members:
        warning = member.warning(classes)
        if warning:
            hint = "Use `engine=native`, which puts the cross-entropy in its place"
            raise ConfigError(member.kind, "engine", allowed="native", got="reference", hint=f"{warning}. {hint}")
        if member.per_image_windows:
            raise ConfigError(member.kind, "per_image_windows", allowed="false with engine=reference", got=True)


def _reference_member(
    member: Member, number: int, model: nn.Module, standing: ImageDataset, rows: Tensor, terms: Terms, found: Verdicts
) -> None:
    """Run one member on the images that stand, which are `rows` of the victims, and note what it breaks."""
    images = standing.images.float() / 255
    with torch.random.fork_rng(devices=[standing.device] if standing.device.type == "cuda" else []):
        engine = _reference_engine(member, model, standing, terms)
        x_adv, y_adv = engine.run_standard_evaluation(images, standing.labels, batch_size=terms.batch_size)
    for at in (y_adv != standing.labels).nonzero().squeeze(1).tolist():
        example = int(rows[at])
        found.prediction[example] = int(y_adv[at])
        found.broken_by[example] = number
        if terms.keep_points:
            inside = into_ball(images[at : at + 1], x_adv[at : at + 1], terms.threat.eps, terms.threat.norm)
            found.points[example] = inside[0].cpu()


def _reference_engine(member: Member, model: nn.Module, data: ImageDataset, terms: Terms) -> Any:
    from pyautoattack import AutoAttack

    engine = AutoAttack(
        model,
        norm={"linf": "Linf", "l2": "L2"}[terms.threat.norm],
        eps=terms.threat.eps,
        seed=terms.seed,
        version="custom",
        attacks=[member.kind],
        device=data.device,
    )
    engine.logger = logging.getLogger("robustfair.reference")
    targets = min(member.targets, data.num_classes - 1)
    engine.apgd.n_restarts, engine.apgd.n_iter = member.restarts, member.steps
    engine.apgd_targeted.n_target_classes, engine.apgd_targeted.n_iter = targets, member.steps
    engine.apgd_targeted.n_restarts = 1
    engine.fab.n_target_classes, engine.fab.n_iter, engine.fab.n_restarts = targets, member.steps, member.restarts
    engine.square.n_queries, engine.square.p_init = member.queries, member.p_init
    engine.square.n_restarts, engine.square.rescale_schedule = member.restarts, member.rescale_schedule
    return engine
