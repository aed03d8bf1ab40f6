"""Run the AutoAttack family on what a model classifies right: the native engine, or `pyautoattack` as a reference."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.base import TOLERANCES, SearchNetwork, into_ball
from robustfair.attacks.autoattack.engine import UNBROKEN, AttackResult, Ensemble
from robustfair.attacks.autoattack.named import AutoAttack, AutoAttackEngine, Member
from robustfair.config import Precision
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError
from robustfair.execution.capacity import cost_of_a_pass, images_that_fill
from robustfair.execution.folded import search_network
from robustfair.execution.kernels.compiled import missing
from robustfair.execution.measured import fastest, seconds, threads
from robustfair.execution.program import Program
from robustfair.values import Threat, derive_seed

TELL_EVERY = 0.5
"""Seconds between reports of progress."""
MOST_TIMED = 64
"""Images of a timed pass, at most."""
SAVE_EVERY = 60.0
"""Seconds between writings of the journal."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AutoAttackRun:
    """An attack of the AutoAttack family on n images that are all classified right, with either engine.

    Attributes:
        attack: which.
        model: in eval mode; its predictions count, whatever the precision of the searches.
        data: the images, on the device of the model.
        rows: (n,) their places in the audited data set, which key the draws of the native engine.
        threat: norm and radius.
        seed: of the draws.
        batch_size: most searches at a time; fewer where passes are filled by fewer, unless `exactly`.
        exactly: the user asked for that batch size.
        precision: of the searches.
        distance_precision: of those that measure distances to a boundary: FAB's.
        deadline: `time.monotonic()` at which to stop; None never does.
        keep_points: keep where each image was broken.
        save: keeps a state that may be given back.
        tell: hears the share of the work that is done.
    """

    attack: AutoAttack
    model: nn.Module
    data: ImageDataset
    rows: Tensor
    threat: Threat
    seed: int
    batch_size: int
    exactly: bool = True
    precision: Precision = "fp32"
    distance_precision: Precision = "fp32"
    deadline: float | None = None
    keep_points: bool = False
    save: Callable[[Mapping[str, Tensor]], None] = lambda state: None
    tell: Callable[[float], None] = lambda share: None

    def run(
        self, engine: AutoAttackEngine, state: Mapping[str, Tensor]
    ) -> tuple[AttackResult, Mapping[str, Tensor] | None]:
        """Attack the images.

        Args:
            state: where an interrupted run of the same engine stood, or empty.

        Returns:
            The result, and the state where the deadline ended it; None where it ran to its end.
        """
        return self._reference(state) if engine == "reference" else self._native(state)

    def _native(self, state: Mapping[str, Tensor]) -> tuple[AttackResult, Mapping[str, Tensor] | None]:
        attack, data = self.attack, self.data
        example = _pixels(data, torch.arange(min(len(data), 2), device=data.device))
        fixed = cost_of_a_pass(self.model, example)
        filled = images_that_fill(fixed) if data.device.type == "cpu" else self.batch_size
        size = self.batch_size if self.exactly else min(self.batch_size, filled)
        networks = {
            precision: SearchNetwork(
                search_network(self.model, example, precision), TOLERANCES[precision], capacity=size, fixed=fixed
            )
            for precision in {self.precision, self.distance_precision}
        }
        ensemble = Ensemble(
            self.model,
            networks[self.precision],
            [member.search(self.threat, data.num_classes, self.seed) for member in attack.members],
            images=lambda index: _pixels(data, index),
            labels=data.labels,
            keys=self.rows,
            eps=self.threat.eps,
            norm=self.threat.norm,
            seed=derive_seed("strong", self.seed, attack.name),
            batch_size=size,
            distance_network=networks[self.distance_precision],
            keep_points=self.keep_points,
        )
        if state:
            ensemble.restore(state)
        count = self._threads(networks[self.precision], size)
        told = saved = time.monotonic()

        def watch(running: Ensemble) -> bool:
            nonlocal told, saved
            now = time.monotonic()
            if now - told >= TELL_EVERY:
                told = now
                self.tell(running.progress())
            if now - saved >= SAVE_EVERY:
                self.save(running.state())
                saved = time.monotonic()
            return self.deadline is None or now < self.deadline

        with threads(count):
            try:
                result = ensemble.run(watch)
            except KeyboardInterrupt:
                self.save(ensemble.state())
                raise
        result.how = self._how(networks[self.precision], size, count)
        return result, None if min(result.ran.values()) >= 1 else ensemble.state()

    def _threads(self, network: SearchNetwork, size: int) -> int:
        """Threads that passes of this size are fastest with: of a small network one, since several wait for another."""
        available = torch.get_num_threads()
        if available == 1 or self.data.device.type != "cpu":
            return available
        rows = torch.arange(min(size, len(self.data), MOST_TIMED), device=self.data.device)
        images = _pixels(self.data, rows)
        taken = {}
        for count in (available, 1):
            with threads(count):
                taken[str(count)] = seconds(network.logits, images)
        return int(fastest(taken))

    def _how(self, network: SearchNetwork, size: int, count: int) -> str:
        """How it ran, in words."""
        said = [f"searches in {self.precision}"]
        if self.data.device.type == "cpu":
            if isinstance(getattr(network.model, "model", None), Program):
                said.append("convolutions by kernels of its own")
            elif self.precision == "fp32" and (why := missing()):
                said.append(f"convolutions by torch, about half as fast ({why})")
            said.append(f"{count} thread{'s' * (count > 1)}")
        return ", ".join([*said, f"up to {size:,} at a time"])

    def _reference(self, state: Mapping[str, Tensor]) -> tuple[AttackResult, Mapping[str, Tensor] | None]:
        """With `pyautoattack`, member by member, each on the images that those before it left robust.

        Inside a member it keeps no state and looks at no deadline, and its draws depend on the batch: `rows` are not
        read. Predictions are its own; points that are kept are put into ball and box as ours are.
        """
        members, first = self.attack.members, int(state["member"]) if state else 0
        result = AttackResult.of_state(state) if state else AttackResult.all_robust(self.data.labels)
        done = len(members)
        for number in range(first, done):
            robust = (result.broken_by == UNBROKEN).nonzero().squeeze(1)
            if len(robust) == 0:
                break
            if number > first and self.deadline is not None and time.monotonic() >= self.deadline:
                done = number
                break
            self._reference_member(number, robust, result)
            self.save({**result.state(), "member": torch.tensor(number + 1)})
            self.tell((number + 1) / len(members))
        result.ran = {member.name: float(number < done) for number, member in enumerate(members)}
        unfinished = done < len(members)
        return result, {**result.state(), "member": torch.tensor(done)} if unfinished else None

    def _reference_member(self, number: int, rows: Tensor, result: AttackResult) -> None:
        """Run one member on the images `rows`, and note what it breaks."""
        data = self.data.subset(rows.to(self.data.device))
        images = data.images.float() / 255
        with torch.random.fork_rng(devices=[data.device] if data.device.type == "cuda" else []):
            reference = self._reference_attack(self.attack.members[number])
            x_adv, y_adv = reference.run_standard_evaluation(images, data.labels, batch_size=self.batch_size)
        for at in (y_adv != data.labels).nonzero().squeeze(1).tolist():
            example = int(rows[at])
            result.prediction[example] = int(y_adv[at])
            result.broken_by[example] = number
            if self.keep_points:
                inside = into_ball(images[at : at + 1], x_adv[at : at + 1], self.threat.eps, self.threat.norm)
                result.points[example] = inside[0].cpu()

    def _reference_attack(self, member: Member) -> Any:
        """A member as `pyautoattack` runs it."""
        import pyautoattack

        reference = pyautoattack.AutoAttack(
            self.model,
            norm={"linf": "Linf", "l2": "L2"}[self.threat.norm],
            eps=self.threat.eps,
            seed=self.seed,
            version="custom",
            attacks=[member.kind],
            device=self.data.device,
        )
        reference.logger = logging.getLogger("robustfair.reference")
        targets = min(member.targets, self.data.num_classes - 1)
        apgd, apgd_targeted, fab, square = reference.apgd, reference.apgd_targeted, reference.fab, reference.square
        apgd.n_restarts, apgd.n_iter = member.restarts, member.steps
        apgd_targeted.n_target_classes, apgd_targeted.n_iter = targets, member.steps
        apgd_targeted.n_restarts = 1
        fab.n_target_classes, fab.n_iter, fab.n_restarts = targets, member.steps, member.restarts
        square.n_queries, square.p_init = member.queries, member.p_init
        square.n_restarts, square.rescale_schedule = member.restarts, member.rescale_schedule
        return reference


def require_reference(attack: AutoAttack, classes: int) -> None:
    """Refuse what the reference engine cannot run.

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


def _pixels(data: ImageDataset, index: Tensor) -> Tensor:
    """Images in [0, 1], in the layout that convolutions are fastest in; so are the points of all searches then."""
    return (data.images[index].float() / 255).contiguous(memory_format=torch.channels_last)
