"""An audit of a target as a user asks for it: which images, which threat, and where what is known is kept meanwhile."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustfair.config import require
from robustfair.data import ImageDataset, load_dataset
from robustfair.errors import DataError, RobustFairError, RobustFairWarning
from robustfair.evaluate.compare import check_comparable
from robustfair.evaluate.corruptions import CorruptionAudit, audit_corruptions
from robustfair.evaluate.diagnostics.masking import diagnose_gradients, diagnostics_cut
from robustfair.evaluate.journal import Journal
from robustfair.evaluate.plan import AuditPlan, attack_names, threat
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.evaluate.run import Progress, audit
from robustfair.evaluate.sequential import NO_TIME, audit_until, parse_until, remove_round_journals
from robustfair.grammar import parse_norm
from robustfair.runs.load import Target
from robustfair.values import Threat


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What to audit with; None takes what the run was trained with, else the usual.

    Attributes:
        attacks: comma-separated names.
        data, image_size, limit_per_class: the images: test split of a named set, or all of a source without splits.
        images, stratified: a sample of so many of them, as many of every class if stratified; drawn with `seed`.
        until: stop as soon as a number is known so well, see `robustfair.evaluate.sequential`.
        norm, eps, step_size: the threat; 8/255 under linf if the run does not say.
        batch_size, seed, precision, engine, max_minutes, device: see `robustfair.evaluate.run.audit`.
        points: keep where the model fails under attacks of the AutoAttack family.
        checks: attack a sample again and again after the audit, in what is left of its time, to see whether the
            gradients lead anywhere.
    """

    attacks: str
    data: str | None = None
    image_size: int | None = None
    limit_per_class: int | None = None
    images: int | None = None
    stratified: bool = False
    until: str | None = None
    norm: str | None = None
    eps: str | None = None
    step_size: str | None = None
    batch_size: int | None = None
    seed: int = 0
    precision: str = "auto"
    engine: str = "native"
    max_minutes: float | None = None
    points: bool = False
    checks: bool = False
    device: str = "auto"

    def dataset(self, default: Mapping[str, Any] | None = None) -> tuple[ImageDataset, str]:
        """The images to audit on and which part of the data they are; `default` is the run's own data.

        Raises:
            DataError: none is named, or the run's images changed since.
            ConfigError: a sample that cannot be drawn.
        """
        alone = self.images is None or self.limit_per_class is None
        require(alone, "audit", "images", allowed="left out beside `limit_per_class`", got=self.images)
        sampled = self.images is not None or not self.stratified
        require(sampled, "audit", "stratified", allowed="given with `images`, how many to draw", got=self.stratified)
        known = default or {}
        name = known.get("name") if self.data is None else self.data
        if name is None:
            raise DataError("audit: this model does not say what data it is for: add --data with a name or a path")
        size = known.get("image_size") if self.image_size is None else self.image_size
        splits = load_dataset(name, image_size=size)
        same = (name, size) == (known.get("name"), known.get("image_size"))
        if same and splits.train.fingerprint != known.get("fingerprint"):
            raise DataError(f"audit: the images of {name} changed since the run: name others with --data")
        part = "test" if "test" in splits.parts else next(iter(splits.parts))
        data = splits.test if part == "test" else splits.only
        if self.images is not None:
            return data.sample(self.images, stratified=self.stratified, seed=self.seed), part
        return data if self.limit_per_class is None else data.limit_per_class(self.limit_per_class), part


def audit_target(
    target: Target,
    request: AuditRequest,
    *,
    images: tuple[ImageDataset, str] | None = None,
    out: Path | None = None,
    baseline: Audit | None = None,
    on_images: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
    on_round: Callable[[str], None] | None = None,
) -> Audit:
    """Audit a loaded model on the images and the threat it was made for, or the requested ones.

    An interruption or an error of the thorough checks, which follow the attacks, ends them and keeps the audit. The
    journal of a finished audit stays, for the caller who has yet to save it.

    Args:
        images: what `request.images` gave, where the caller has loaded them already.
        out: where the audit will be saved, if not in the run's folder; an unfinished one keeps what it knows there.
        baseline: an audit that this one will be compared with; one of other images is refused before any attack.
        on_images: called with a line on the images, before the first attack.
        on_progress: see `robustfair.evaluate.run.audit`.
        on_round: see `robustfair.evaluate.sequential.audit_until`.

    Raises:
        DataError: the images' classes are not those the model was trained on.
        ConfigError: a baseline beside `until`.
    """
    began = time.monotonic()
    data, part = _images_for(target, request, images)
    trained_for = target.meta.get("threat") or {}
    norm = trained_for.get("norm", "linf") if request.norm is None else request.norm
    usual = trained_for["eps"] if parse_norm(norm) == trained_for.get("norm") else None
    eps = usual if request.eps is None else request.eps
    limits = threat(norm, eps, request.step_size)
    if baseline is not None:
        allowed = "left out beside `until`, where the model decides which images are attacked"
        require(request.until is None, "audit", "baseline", allowed=allowed, got=baseline.model)
        _require_comparable(baseline, data, limits)
    if on_images is not None:
        on_images(data.count_line(part))
    run = audit if request.until is None else partial(audit_until, until=request.until, on_round=on_round)
    result = run(
        target.model,
        data,
        attacks=request.attacks,
        norm=norm,
        eps=eps,
        step_size=request.step_size,
        batch_size=request.batch_size,
        seed=request.seed,
        precision=request.precision,
        engine=request.engine,
        max_minutes=request.max_minutes,
        journal=journal_path(target, request, data.fingerprint, len(data), limits, out),
        keep_journal=True,
        keep_points=request.points,
        device=request.device,
        label=target.label,
        split=part,
        on_progress=on_progress,
    )
    result = replace(result, provenance={**result.provenance, **_trained_on(target)})
    if not request.checks:
        return result
    spent = (time.monotonic() - began) / 60
    try:
        found = diagnose_gradients(
            target.model,
            data,
            limits,
            seed=request.seed,
            batch_size=request.batch_size,
            precision=request.precision,  # type: ignore[arg-type]
            max_minutes=None if request.max_minutes is None else request.max_minutes - spent,
            on_progress=on_progress,
        )
    except KeyboardInterrupt:
        found = (diagnostics_cut("they were interrupted"),)
    except RobustFairError as error:
        found = (diagnostics_cut(str(error), "the audit itself is whole"),)
    checks = [*result.provenance["checks"], *map(asdict, found)]
    return replace(result, provenance={**result.provenance, "checks": checks})


def _trained_on(target: Target) -> dict[str, Any]:
    """The images of each class that the run recorded, and the edit that left them, for the provenance of an audit."""
    counts = target.meta.get("images_per_class")
    if counts is None:
        return {}
    edit = target.meta["data"].get("edit")
    return {"trained_on": {"images_per_class": counts, **({} if edit is None else {"edit": edit})}}


def _require_comparable(baseline: Audit, data: ImageDataset, limits: Threat) -> None:
    """Refuse a baseline that the audit to come could not be compared with."""
    labels = data.labels.cpu()
    to_come = replace(
        baseline,
        model="this model",
        data=data.name,
        class_names=data.class_names,
        index=torch.arange(len(data)) if data.drawn is None else data.drawn.places,
        drawn_from=None if data.drawn is None else data.drawn.class_counts,
        labels=labels,
        predictions={CLEAN: labels},
        broken_by={},
        threat=limits,
        fingerprint=data.fingerprint,
    )
    check_comparable(baseline, to_come)


def corruptions_of(
    target: Target,
    request: AuditRequest,
    *,
    corruptions: str,
    severities: Sequence[int],
    frost: Path | None = None,
    published: Path | None = None,
    images: tuple[ImageDataset, str] | None = None,
    on_images: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
) -> CorruptionAudit:
    """Audit a loaded model under common corruptions; arguments as for `audit_corruptions` and `audit_target`."""
    data, part = _images_for(target, request, images)
    if on_images is not None:
        on_images(data.count_line(part))
    return audit_corruptions(
        target.model,
        data,
        corruptions=corruptions,
        severities=severities,
        frost=frost,
        published=published,
        batch_size=request.batch_size,
        device=request.device,
        seed=request.seed,
        precision=request.precision,  # type: ignore[arg-type]
        label=target.label,
        split=part,
        on_progress=on_progress,
    )


def _images_for(
    target: Target, request: AuditRequest, images: tuple[ImageDataset, str] | None
) -> tuple[ImageDataset, str]:
    """The images of an audit and their part, of the classes that the model was trained on."""
    data, part = request.dataset(target.meta.get("data")) if images is None else images
    if part == "train" and data.fingerprint == target.meta.get("data", {}).get("fingerprint"):
        text = f"{data.name} has no test part: this audits the images the model was trained on, which flatters it"
        warnings.warn(text, RobustFairWarning, stacklevel=3)
    trained_on = tuple(target.meta.get("class_names", data.class_names))
    if trained_on != data.class_names:
        raise DataError(
            f"{target.label} was trained on the classes {', '.join(trained_on[:4])}, ... and {data.name} has "
            f"{', '.join(data.class_names[:4])}, ...: labels would not mean the same; choose the model's own data"
        )
    return data, part


def journal_path(
    target: Target, request: AuditRequest, fingerprint: str, images: int, limits: Threat, out: Path | None
) -> Path | None:
    """Where an audit that is not saved keeps what it knows; None where there is nowhere to."""
    audits = out or (target.folder.audits if target.folder else None)
    if audits is None:
        return None
    plan = AuditPlan(
        attacks=attack_names(request.attacks),
        threat=limits,
        seed=request.seed,
        precision=request.precision,  # type: ignore[arg-type]
        engine=request.engine,  # type: ignore[arg-type]
        batch_size=request.batch_size,
        points=request.points,
        fingerprint=fingerprint,
        images=images,
        checkpoint=target.checkpoint,
        model=target.label if out is not None or target.folder is None else None,
        until=None if request.until is None else parse_until(request.until).text,
    )
    return audits / plan.journal_name


def remove_journal(target: Target, request: AuditRequest, result: Audit, out: Path | None) -> None:
    """A finished audit is saved: what it knew until then goes; arguments as for `audit_target`."""
    about = result.provenance.get("until")
    if not result.complete or (about is not None and about["stopped"] == NO_TIME):
        return
    fingerprint, images = (result.fingerprint, len(result.labels)) if about is None else about["of"]
    journal = journal_path(target, request, fingerprint, images, result.threat, out)
    if journal is not None and about is None:
        Journal(journal, {}).remove()
    elif journal is not None:
        remove_round_journals(journal)


def audit_stem(target: Target, result: Audit, *, elsewhere: bool) -> str:
    """A name that only the same audit has; `elsewhere` than in a run's own folder it tells models apart too."""
    model = target.label if elsewhere or target.folder is None else None
    plan = AuditPlan.of(result, checkpoint=target.checkpoint, model=model)
    return plan.stem(result.attacks, complete=result.complete)
