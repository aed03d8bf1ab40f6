"""The attacks of an audit, run on a data set that is resident on the device: a column of predictions for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.named import AnyAttack, NamedAttack
from robustfair.attacks.pgd import input_gradient
from robustfair.attacks.strong import Engine, StrongAttack
from robustfair.attacks.sweep import predict
from robustfair.config import Precision
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.evaluate.capacity import CPU_BUDGET
from robustfair.evaluate.journal import Journal
from robustfair.evaluate.strong import Outcome, Terms, run_native, run_reference
from robustfair.losses import cross_entropy
from robustfair.models.head import require_finite
from robustfair.training.precision import InPrecision
from robustfair.values import Batch, Threat, derive_seed

Progress = Callable[[str, int, int], None]
CLEAN = "clean"
JACOBIANS = 4
"""Copies of the gradients of all classes that untargeted FAB holds at a time."""
NOW = "now/"
"""Prefix in a journal of the state of the attack that runs."""


class OutOfTimeError(Exception):
    """The deadline came in an attack that keeps no state."""


@dataclass
class Columns:
    """What an audit has found so far; tensors on the CPU.

    Attributes:
        predictions: attack -> (N,), clean first; an image that is wrong when clean keeps that class.
        seconds: attack -> time it took.
        ran: strong attack -> member -> share of its work that was done.
        broken_by: strong attack -> (N,) number of the member that broke the image, -1 where none did.
        not_finite: strong attack -> attacked points at which the logits were no finite numbers.
        points: strong attack -> image -> (C, H, W) where the model gives the prediction.
        gradients: of the images that are right when clean: how many have none that an attack can follow.
        not_run: attacks that the deadline left out.
    """

    predictions: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ran: dict[str, dict[str, float]] = field(default_factory=dict)
    broken_by: dict[str, Tensor] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    points: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    gradients: dict[str, int] | None = None
    not_run: list[str] = field(default_factory=list)

    def about(self, attack: str) -> dict[str, Any]:
        """What a strong attack's settings should say of its run."""
        if attack not in self.ran:
            return {}
        return {"ran": self.ran[attack], "not_finite": self.not_finite[attack]}

    def state(self) -> dict[str, Tensor]:
        """The finished attacks as tensors, for a journal."""
        found: dict[str, Tensor] = {}
        for name, column in self.predictions.items():
            found[f"column/{name}"] = column
            found[f"seconds/{name}"] = torch.tensor(self.seconds[name], dtype=torch.float64)
            if name in self.ran:
                found[f"broken_by/{name}"] = self.broken_by[name]
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
        if isinstance(attack, StrongAttack):
            self.ran[name] = dict.fromkeys((member.name for member in attack.members), 1.0)
            self.broken_by[name] = state[f"broken_by/{name}"]
            self.not_finite[name] = int(state[f"not_finite/{name}"])
        if f"points/{name}/image" in state:
            images = state[f"points/{name}/image"].tolist()
            self.points[name] = dict(zip(images, state[f"points/{name}/pixels"], strict=True))
        if name == CLEAN and "gradients" in state:
            keys = ("images", "zero", "not_finite")
            self.gradients = dict(zip(keys, state["gradients"].tolist(), strict=True))
        return True


@dataclass(frozen=True, kw_only=True)
class Sweeper:
    """Runs attacks one after another.

    Attributes:
        model: as given, in eval mode and on the device of the data: its predictions count.
        data: the images.
        threat: norm, radius and step that all attacks share.
        batch_size: images at a time.
        seed: of random starts.
        precisions: "pgd", "strong" and "fab" -> precision that these attacks search in. FAB alone was found weaker in
            bf16; in an ensemble APGD has gone before it, and it searches as the others do.
        engine: of the strong attacks.
        deadline: `time.monotonic()` at which to stop.
        keep_points: keep where the model fails.
        on_progress: see `robustfair.evaluate.audit.audit`.
    """

    model: nn.Module
    data: ImageDataset
    threat: Threat
    batch_size: int
    seed: int
    precisions: Mapping[str, Precision]
    engine: Engine = "native"
    deadline: float | None = None
    keep_points: bool = False
    on_progress: Progress | None = None

    def run(self, suite: Sequence[AnyAttack], journal: Journal | None = None) -> Columns:
        """All attacks of `suite`, which begins with clean, as far as time goes."""
        found, known = Columns(), {} if journal is None else journal.read()
        labels = self.data.labels.cpu()
        survivors, rows = self.data, torch.arange(len(self.data))
        cut = False
        for attack in suite:
            began = time.perf_counter()
            if not found.take(attack, known):
                if attack.needs_gradient and (cut or self._late()):
                    found.not_run.append(attack.name)
                    continue
                state = {name.removeprefix(NOW): value for name, value in known.items() if name.startswith(NOW)}
                known = {}
                cut = not self._attack(attack, survivors, rows, found, state, journal)
                if attack.name in found.predictions:
                    found.seconds[attack.name] = round(time.perf_counter() - began, 3)
            if not attack.needs_gradient:
                rows = (found.predictions[CLEAN] == labels).nonzero().squeeze(1)
                survivors = self.data.subset(rows.to(self.data.device))
                if len(suite) > 1 and found.gradients is None:
                    found.gradients = self._gradients(survivors)
            if journal is not None and not cut:
                journal.write(found.state())
        if journal is not None and not cut and not found.not_run:
            journal.remove()
        return found

    def _attack(
        self,
        attack: AnyAttack,
        survivors: ImageDataset,
        rows: Tensor,
        found: Columns,
        state: Mapping[str, Tensor],
        journal: Journal | None,
    ) -> bool:
        """Run one attack and note what it did; False where time was up before its end."""
        if isinstance(attack, StrongAttack):
            return self._strong(attack, survivors, rows, found, state, journal)
        try:
            column = self._restarts(survivors, attack).cpu()
        except OutOfTimeError:
            found.not_run.append(attack.name)
            return False
        if attack.needs_gradient:
            column = found.predictions[CLEAN].clone().index_copy_(0, rows, column)
        found.predictions[attack.name] = column
        return True

    def _strong(
        self,
        attack: StrongAttack,
        survivors: ImageDataset,
        rows: Tensor,
        found: Columns,
        state: Mapping[str, Tensor],
        journal: Journal | None,
    ) -> bool:
        name, count = attack.name, len(survivors)
        terms = Terms(
            threat=self.threat,
            seed=self.seed,
            lanes=self._lanes(attack),
            keep_points=self.keep_points,
            precision=self.precisions["strong"],
            fine_precision=self.precisions["strong" if len(attack.members) > 1 else "fab"],
            deadline=self.deadline,
        )

        def save(now: Mapping[str, Tensor]) -> None:
            if journal is not None:
                journal.write(found.state() | {f"{NOW}{key}": value for key, value in now.items()})

        def tell(share: float) -> None:
            if self.on_progress:
                self.on_progress(name, round(share * count), count)

        unfinished = None
        if count == 0:
            outcome = _nothing(attack)
        elif self.engine == "reference":
            outcome = run_reference(attack, self.model, survivors, terms)
        else:
            outcome, unfinished = run_native(
                attack, self.model, survivors, rows, terms, state=state, save=save if journal else None, tell=tell
            )
        if unfinished is not None:
            save(unfinished)
        done = min(outcome.ran.values()) >= 1
        if done:
            tell(1.0)
        found.predictions[name] = found.predictions[CLEAN].clone().index_copy_(0, rows, outcome.prediction)
        found.broken_by[name] = torch.full_like(found.predictions[CLEAN], -1).index_copy_(0, rows, outcome.broken_by)
        found.ran[name], found.not_finite[name] = dict(outcome.ran), outcome.not_finite
        if self.keep_points:
            found.points[name] = {int(rows[at]): point for at, point in outcome.points.items()}
        return done

    def _gradients(self, data: ImageDataset) -> dict[str, int]:
        """How many images give the cross-entropy a gradient that no attack can follow: all zero, or not finite."""
        found = {"images": len(data), "zero": 0, "not_finite": 0}
        for batch in evaluation_batches(data, self.batch_size):
            x = batch.x.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = cross_entropy(self.model(x), batch.y)
                gradient = input_gradient(loss, x) if loss.requires_grad else torch.zeros_like(x)
            gradient = gradient.flatten(1)
            found["zero"] += int((gradient == 0).all(1).sum())
            found["not_finite"] += int((~gradient.isfinite()).any(1).sum())
        return found

    def _restarts(self, data: ImageDataset, attack: NamedAttack) -> Tensor:
        """Predictions (N,) under `attack`. Where fooled images stay so, a restart takes only those that are left."""
        if not attack.freeze or attack.restarts == 1:
            return self._predict(data, attack, attack.name, done=0, total=len(data))
        column, rows = data.labels.clone(), torch.arange(len(data), device=data.device)
        for restart in range(attack.restarts):
            done, total = (restart + 1) * len(data) - len(rows), attack.restarts * len(data)
            once = replace(attack, restarts=1)
            column[rows] = self._predict(data.subset(rows), once, attack.name, restart, done=done, total=total)
            rows = (column == data.labels).nonzero().squeeze(1)
        return column

    def _predict(self, data: ImageDataset, attack: NamedAttack, name: str, *keys: int, done: int, total: int) -> Tensor:
        search = InPrecision(self.model, self.precisions["pgd"], data.images.device.type)
        on = (lambda batch: attack.on(batch, self.threat)) if attack.needs_gradient else None
        columns = [data.labels[:0]]
        for position, batch in enumerate(evaluation_batches(data, self.batch_size)):
            if attack.needs_gradient and self._late():
                raise OutOfTimeError
            batch = replace(batch, seed=derive_seed("audit", self.seed, name, *keys, position))
            columns.append(self._clean(batch) if on is None else predict(self.model, batch, on, search=search))
            done += len(batch.y)
            if self.on_progress:
                self.on_progress(name, done, total)
        return torch.cat(columns)

    def _clean(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            logits = self.model(batch.x)
        require_finite(self.model, logits, batch.index)
        return logits.argmax(1)

    def _lanes(self, attack: StrongAttack) -> int:
        """Searches at a time: fewer where one holds the gradients of every class."""
        if all(member.kind != "fab" for member in attack.members):
            return self.batch_size
        each = JACOBIANS * 4 * self.data.num_classes * self.data.images[0].numel()
        return max(1, min(self.batch_size, CPU_BUDGET // (2 * each)))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def search_precisions(asked: str, device: torch.device) -> dict[str, Precision]:
    """Precision that each family of attacks searches in: what was asked for, or what suits it on this hardware."""
    if asked == "auto":
        return {"pgd": "fp32", "strong": "bf16" if has_bf16(device) else "fp32", "fab": "fp32"}
    return dict.fromkeys(("pgd", "strong", "fab"), asked)  # type: ignore[arg-type]


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products, without which they are slower than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _nothing(attack: StrongAttack) -> Outcome:
    """The outcome where no image is right to begin with."""
    none = torch.empty(0, dtype=torch.int64)
    ran = dict.fromkeys((member.name for member in attack.members), 1.0)
    return Outcome(prediction=none, broken_by=none, ran=ran, not_finite=0, points={})
