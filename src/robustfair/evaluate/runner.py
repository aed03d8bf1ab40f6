"""Runs the attacks of an audit on a data set that is resident on the device: predictions of every image for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.base import SearchNetwork
from robustfair.attacks.autoattack.engine import AttackResult
from robustfair.attacks.autoattack.named import AutoAttack, AutoAttackEngine
from robustfair.attacks.named import AnyAttack, NamedAttack
from robustfair.attacks.pgd import input_gradient, predicted
from robustfair.attacks.predict import attacked_logits
from robustfair.config import Precision
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import CheckpointError
from robustfair.evaluate.autoattack import SAVE_EVERY, AutoAttackRun
from robustfair.evaluate.journal import Journal
from robustfair.execution.capacity import CPU_BUDGET
from robustfair.execution.device import has_bf16
from robustfair.execution.folded import search_network
from robustfair.execution.measured import fastest, seconds
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import InPrecision
from robustfair.losses import cross_entropy
from robustfair.models.head import require_finite
from robustfair.models.modes import attacking
from robustfair.values import Batch, Threat, derive_seed

Progress = Callable[[str, int, int], None]
CLEAN = "clean"
JACOBIANS = 4
"""Copies of the gradients of all classes that untargeted FAB holds at a time."""
NOW = "now/"
"""Prefix in a journal of the state of the attack that runs."""
SPENT = "spent"
"""Seconds that it took before."""
Save = Callable[[Mapping[str, Tensor]], None]
Precisions = tuple[dict[str, Precision], str | None]
TIMED_IMAGES = 32
"""Images of a timed pass."""


@dataclass
class PgdProgress:
    """How far fgsm, pgd-K or cw-K has come on n images, on the CPU.

    Attributes:
        prediction: (n,) class found for each image, its label where none was yet.
        rows: images of the restart that is on: all, or those that are not fooled yet.
        restart: its number.
        done: how many of them it has attacked; how many it takes at a time may change when a run goes on.
        not_finite: attacked images so far whose logits were no finite numbers.
    """

    prediction: Tensor
    rows: Tensor
    restart: int = 0
    done: int = 0
    not_finite: int = 0

    def state(self) -> dict[str, Tensor]:
        """For a journal."""
        counts = {name: torch.tensor(getattr(self, name)) for name in ("restart", "done", "not_finite")}
        return {"column": self.prediction, "rows": self.rows, **counts}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> PgdProgress:
        """What `state` gave."""
        counts = (int(state[name]) for name in ("restart", "done", "not_finite"))
        return PgdProgress(state["column"], state["rows"], *counts)


@dataclass
class SuiteResult:
    """What an audit has found so far; tensors on the CPU.

    Attributes:
        predictions: attack -> (N,), clean first; an image that is wrong when clean keeps that class.
        seconds: attack -> time it took.
        ran: AutoAttack -> member -> share of its work that was done.
        broken_by: AutoAttack -> (N,) number of the member that broke the image, -1 where none did.
        not_finite: attack -> attacked points at which the logits were no finite numbers: no image is right there.
        points: AutoAttack -> image -> (C, H, W) where the model gives the prediction.
        searches: AutoAttack -> how it searched on this machine, in words.
        spent: AutoAttack -> member -> seconds, passes and images of them, where it ran here.
        gradients: of the images that are right when clean: how many have none that an attack can follow.
        not_run: attacks that the deadline left without predictions.
        begun: those of them that were begun, and the share of their work that was done and is kept for the next time.
    """

    predictions: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ran: dict[str, dict[str, float]] = field(default_factory=dict)
    broken_by: dict[str, Tensor] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    points: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    searches: dict[str, str] = field(default_factory=dict)
    spent: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    gradients: dict[str, int] | None = None
    not_run: list[str] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)

    def about(self, attack: str) -> dict[str, Any]:
        """What an attack's settings should say of its run."""
        count = self.not_finite.get(attack, 0)
        if attack in self.ran:
            return {"ran": self.ran[attack], "not_finite": count}
        return {"not_finite": count} if count else {}

    def state(self) -> dict[str, Tensor]:
        """The finished attacks as tensors, for a journal."""
        found: dict[str, Tensor] = {}
        for name, prediction in self.predictions.items():
            found[f"column/{name}"] = prediction
            found[f"seconds/{name}"] = torch.tensor(self.seconds[name], dtype=torch.float64)
            if name in self.ran:
                found[f"broken_by/{name}"] = self.broken_by[name]
            if name in self.not_finite:
                found[f"not_finite/{name}"] = torch.tensor(self.not_finite[name])
            if name in self.points:
                found[f"points/{name}/image"] = torch.tensor(list(self.points[name]), dtype=torch.int64)
                pixels = list(self.points[name].values())
                found[f"points/{name}/pixels"] = torch.stack(pixels) if pixels else torch.empty(0)
        if self.gradients is not None:
            found["gradients"] = torch.tensor(list(self.gradients.values()))
        return found

    def take(self, attack: AnyAttack, state: Mapping[str, Tensor]) -> bool:
        """Take over a finished attack from a journal, if it is there."""
        name = attack.name
        if f"column/{name}" not in state:
            return False
        self.predictions[name] = state[f"column/{name}"]
        self.seconds[name] = float(state[f"seconds/{name}"])
        if isinstance(attack, AutoAttack):
            self.ran[name] = dict.fromkeys((member.name for member in attack.members), 1.0)
            self.broken_by[name] = state[f"broken_by/{name}"]
        if f"not_finite/{name}" in state:
            self.not_finite[name] = int(state[f"not_finite/{name}"])
        if f"points/{name}/image" in state:
            images = state[f"points/{name}/image"].tolist()
            self.points[name] = dict(zip(images, state[f"points/{name}/pixels"], strict=True))
        if name == CLEAN and "gradients" in state:
            keys = ("images", "zero", "not_finite")
            self.gradients = dict(zip(keys, state["gradients"].tolist(), strict=True))
        return True


@dataclass(frozen=True, kw_only=True)
class AttackRunner:
    """Runs attacks one after another.

    Attributes:
        model: as given, in eval mode and on the device of the data: its predictions count.
        data: the images.
        threat: norm, radius and step that all attacks share.
        batch_size: images at a time.
        autoattack_batch_size: searches of an AutoAttack member at a time, at most.
        exactly: the user asked for that batch size.
        seed: of random starts.
        precisions: "pgd", "strong" and "fab" -> precision that these attacks search in. FAB alone was found weaker in
            bf16; in an ensemble APGD has gone before it, and it searches as the others do.
        engine: of AutoAttack.
        deadline: `time.monotonic()` at which to stop.
        keep_points: keep where the model fails.
        on_progress: see `robustfair.evaluate.run.audit`.
    """

    model: nn.Module
    data: ImageDataset
    threat: Threat
    batch_size: int
    autoattack_batch_size: int
    seed: int
    precisions: Mapping[str, Precision]
    exactly: bool = True
    engine: AutoAttackEngine = "native"
    deadline: float | None = None
    keep_points: bool = False
    on_progress: Progress | None = None

    def run(
        self, suite: Sequence[AnyAttack], journal: Journal | None = None, *, keep_journal: bool = False
    ) -> SuiteResult:
        """All attacks of `suite`, which begins with clean, as far as time goes: an iteration of one at least."""
        found, known = SuiteResult(), {} if journal is None else journal.read()
        labels = self.data.labels.cpu()
        survivors, rows = self.data, torch.arange(len(self.data))
        cut = worked = False
        for attack in suite:
            taken = found.take(attack, known)
            if taken and attack.is_clean:
                self._require_same(found.predictions[CLEAN], journal)
            if not taken:
                if not attack.is_clean and (cut or (worked and self._late())):
                    found.not_run.append(attack.name)
                    continue
                state = {name.removeprefix(NOW): value for name, value in known.items() if name.startswith(NOW)}
                known = {}
                cut = not self._attack(attack, survivors, rows, found, state, journal)
                worked = not attack.is_clean
            if attack.is_clean:
                rows = (found.predictions[CLEAN] == labels).nonzero().squeeze(1)
                survivors = self.data.subset(rows.to(self.data.device))
                if len(suite) > 1 and found.gradients is None:
                    found.gradients = self._gradients(survivors)
            if journal is not None and not cut and not taken:
                journal.write(found.state())
        if journal is not None and not keep_journal and not cut and not found.not_run:
            journal.remove()
        return found

    def _attack(
        self,
        attack: AnyAttack,
        survivors: ImageDataset,
        rows: Tensor,
        found: SuiteResult,
        state: dict[str, Tensor],
        journal: Journal | None,
    ) -> bool:
        """Run one attack and note what it did; False where time was up before its end."""
        began, before = time.perf_counter(), float(state.pop(SPENT, 0.0))

        def spent() -> float:
            return before + time.perf_counter() - began

        def save(now: Mapping[str, Tensor]) -> None:
            if journal is not None:
                now = {**now, SPENT: torch.tensor(spent(), dtype=torch.float64)}
                journal.write(found.state() | {f"{NOW}{key}": value for key, value in now.items()})

        if isinstance(attack, AutoAttack):
            done = self._run_autoattack(attack, survivors, rows, found, state, save)
        elif attack.is_clean:
            found.predictions[attack.name], done = self._run_clean().cpu(), True
        else:
            progress, share = self._run_pgd(survivors, attack, state, save)
            done = share == 1
            if not done:
                found.not_run.append(attack.name)
                found.begun[attack.name] = share
            else:
                found.predictions[attack.name] = (
                    found.predictions[CLEAN].clone().index_copy_(0, rows, progress.prediction)
                )
                found.not_finite[attack.name] = progress.not_finite
        if attack.name in found.predictions:
            found.seconds[attack.name] = round(spent(), 3)
        return done

    def _run_autoattack(
        self,
        attack: AutoAttack,
        survivors: ImageDataset,
        rows: Tensor,
        found: SuiteResult,
        state: Mapping[str, Tensor],
        save: Save,
    ) -> bool:
        name, count = attack.name, len(survivors)

        def tell(share: float) -> None:
            if self.on_progress:
                self.on_progress(name, int(share * count), count)

        run = AutoAttackRun(
            attack=attack,
            model=self.model,
            data=survivors,
            rows=rows,
            threat=self.threat,
            seed=self.seed,
            batch_size=self._autoattack_batch_size(attack),
            exactly=self.exactly,
            keep_points=self.keep_points,
            precision=self.precisions["strong"],
            distance_precision=self.precisions["strong" if len(attack.members) > 1 else "fab"],
            deadline=self.deadline,
            save=save,
            tell=tell,
        )
        if count == 0:
            result, unfinished = AttackResult.all_robust(survivors.labels), None
            result.ran = dict.fromkeys((member.name for member in attack.members), 1.0)
        else:
            result, unfinished = run.run(self.engine, state)
            found.searches[name] = result.how
            found.spent[name] = {member: asdict(spent) for member, spent in result.spent.items()}
        if unfinished is None:
            tell(1.0)
        else:
            save(unfinished)
        found.predictions[name] = found.predictions[CLEAN].clone().index_copy_(0, rows, result.prediction)
        found.broken_by[name] = torch.full_like(found.predictions[CLEAN], -1).index_copy_(0, rows, result.broken_by)
        found.ran[name], found.not_finite[name] = result.ran, result.not_finite
        if self.keep_points:
            found.points[name] = {int(rows[at]): point for at, point in result.points.items()}
        return unfinished is None

    def _gradients(self, data: ImageDataset) -> dict[str, int] | None:
        """How many images give the cross-entropy a gradient that no attack can follow: all zero, or not finite.

        Looked at are all, or as many as there is time for. None where the gradient cannot be taken at all; `audit` has
        refused attacks that need it then.
        """
        found = {"images": 0, "zero": 0, "not_finite": 0}
        for batch in evaluation_batches(data, self.batch_size):
            if found["images"] and self._late():
                break
            x = batch.x.detach().requires_grad_(True)
            try:
                with torch.enable_grad():
                    loss = cross_entropy(self.model(x), batch.y)
                    gradient = input_gradient(loss, x) if loss.requires_grad else torch.zeros_like(x)
            except Exception:  # a foreign module may raise anything in a graph that it was not made for
                return None
            gradient = gradient.flatten(1)
            found["images"] += len(gradient)
            found["zero"] += int((gradient == 0).all(1).sum())
            found["not_finite"] += int((~gradient.isfinite()).any(1).sum())
        return found

    def _run_clean(self, *, quiet: bool = False) -> Tensor:
        predictions, done = [self.data.labels[:0]], 0
        for batch in evaluation_batches(self.data, self.batch_size):
            with torch.no_grad():
                logits = self.model(batch.x)
            require_finite(self.model, logits, batch.index)
            predictions.append(logits.argmax(1))
            done += len(batch.y)
            if self.on_progress and not quiet:
                self.on_progress(CLEAN, done, len(self.data))
        return torch.cat(predictions)

    def _require_same(self, known: Tensor, journal: Journal | None) -> None:
        """Refuse to go on with what a journal says of other predictions: the same weights may serve another function.

        A few images, one in a thousand, may lie so near a boundary that rounding decides them.
        """
        different = int((self._run_clean(quiet=True).cpu() != known).sum())
        if different * 1000 > len(known):
            where = "the journal" if journal is None else journal.path
            raise CheckpointError(
                f"{where} is of a model that predicted {different} of {len(known)} clean images otherwise: delete it "
                "to begin the audit anew"
            )

    def _run_pgd(
        self, data: ImageDataset, attack: NamedAttack, state: Mapping[str, Tensor], save: Save
    ) -> tuple[PgdProgress, float]:
        """What `attack` finds, and the share of its work that was done: below 1 where time was up.

        Where fooled images stay so, a restart takes only those that are left.
        """
        labels = data.labels.cpu()
        progress = PgdProgress.of_state(state) if state else PgdProgress(labels.clone(), torch.arange(len(data)))
        restarts = attack.restarts if attack.freeze else 1
        once = attack if restarts == 1 else replace(attack, restarts=1)
        moved, told, saved = False, 0, time.monotonic()
        try:
            while progress.restart < restarts:
                part = data.subset(progress.rows[progress.done :].to(data.device))
                for batch in evaluation_batches(part, self.batch_size):
                    if moved and self._late():
                        save(progress.state())
                        return progress, told / (restarts * len(data))
                    position = progress.done // self.batch_size
                    keys = (position,) if restarts == 1 else (progress.restart, position)
                    self._attack_batch(
                        once, replace(batch, seed=derive_seed("audit", self.seed, attack.name, *keys)), progress
                    )
                    moved, told = True, (progress.restart + 1) * len(data) - (len(progress.rows) - progress.done)
                    if self.on_progress:
                        self.on_progress(attack.name, told, restarts * len(data))
                    if time.monotonic() - saved >= SAVE_EVERY:
                        save(progress.state())
                        saved = time.monotonic()
                left = (progress.prediction == labels).nonzero().squeeze(1)
                progress = PgdProgress(progress.prediction, left, progress.restart + 1, not_finite=progress.not_finite)
        except KeyboardInterrupt:
            save(progress.state())
            raise
        if self.on_progress and told < restarts * len(data):
            self.on_progress(attack.name, restarts * len(data), restarts * len(data))
        return progress, 1.0

    def _attack_batch(self, attack: NamedAttack, batch: Batch, progress: PgdProgress) -> None:
        """Attack the batch at hand and note the classes found."""
        search = InPrecision(self.model, self.precisions["pgd"], batch.x.device.type)
        logits = attacked_logits(self.model, batch, lambda given: attack.on(given, self.threat), search=search)
        rows = progress.rows[progress.done :][: len(logits)]
        progress.prediction[rows] = predicted(logits, batch.y).cpu()
        progress.not_finite += int((~logits.isfinite()).any(1).sum())
        progress.done += len(logits)

    def _autoattack_batch_size(self, attack: AutoAttack) -> int:
        """Searches at a time: fewer where one holds the gradients of every class."""
        if all(member.kind != "fab" for member in attack.members):
            return self.autoattack_batch_size
        each = JACOBIANS * 4 * self.data.num_classes * self.data.images[0].numel()
        return max(1, min(self.autoattack_batch_size, CPU_BUDGET // (2 * each)))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def search_precisions(asked: str, model: nn.Module, images: Tensor, attacks: Sequence[AutoAttack]) -> Precisions:
    """Precision that each family of attacks searches in: what was asked for, or what is fastest on this machine.

    Args:
        model: in eval mode, on its device.
        images: some, (B, C, H, W) in [0, 1], to time passes on.
        attacks: of the AutoAttack family that are to run; without any there is nothing to time.

    Returns:
        A mapping from "pgd", "strong" and "fab" to precisions, and what was timed, for the user.
    """
    if asked != "auto":
        return dict.fromkeys(("pgd", "strong", "fab"), asked), None  # type: ignore[arg-type]
    found: dict[str, Precision] = {"pgd": "fp32", "strong": "fp32", "fab": "fp32"}
    if not attacks or not has_bf16(images.device):
        return found, None
    taken: dict[str, float] = {}
    gradients = any(attack.needs_gradient for attack in attacks)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    with attacking(model, "eval"), kept_memory(images.device):
        for precision in precisions:
            network = SearchNetwork(search_network(model, images[:2], precision))
            pass_ = partial(_gradient, network) if gradients else network.logits
            taken[precision] = seconds(pass_, images) / len(images)
    found["strong"] = fastest(taken)  # type: ignore[assignment]
    listed = ", ".join(f"{name} {1e6 * each:,.0f}" for name, each in taken.items())
    what = "gradient" if gradients else "forward pass"
    return found, f"{found['strong']}, of {listed} microseconds an image and {what}"


def _gradient(network: SearchNetwork, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return network.gradient(images, cross_entropy, labels)[1]
