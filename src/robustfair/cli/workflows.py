"""What the commands do beyond training: audit a target, repair a run, and the demo that does it all."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robustfair.attacks.named import parse_attacks
from robustfair.cli.progress import AuditProgress, TrainingProgress
from robustfair.config import RobustFairWarning, format_eps, parse_norm, require
from robustfair.data import ImageDataset, load_dataset
from robustfair.errors import DataError, RobustFairError
from robustfair.evaluate.audit import BATCH_SIZE, CLEAN, Audit, audit, threat
from robustfair.evaluate.compare import Comparison, check_comparable, compare
from robustfair.evaluate.corruptions import CorruptionAudit, audit_corruptions
from robustfair.evaluate.diagnostics.diagnostic import Finding
from robustfair.evaluate.diagnostics.masking import checks_cut, thorough_findings
from robustfair.evaluate.diagnostics.results import compare_findings, findings
from robustfair.evaluate.gates import GateResult
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.journal import Journal
from robustfair.report.console import Screen
from robustfair.report.corruptions import write_corruption_report
from robustfair.report.html import write_report
from robustfair.report.layout import ALL_ROWS, render
from robustfair.report.rates import member_lines, summary_lines
from robustfair.report.table import before_after_table, class_table, comparison_table, group_table, table_of
from robustfair.report.text import latex, markdown
from robustfair.runs.folder import RunFolder
from robustfair.runs.load import Target
from robustfair.runs.recipe import read_recipe
from robustfair.runs.repair import repair_into, to_repair
from robustfair.runs.run import read_repair, train
from robustfair.values import Threat

SEVERITY = {"warn": "warning", "note": "note"}
DEMO_ATTACKS = "clean,pgd-20,cw-50(restarts=5)"


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What to audit with; None takes what the run was trained with, else the usual.

    Attributes:
        attacks: comma-separated names.
        data, image_size, limit_per_class: the images: test split of a named set, or all of a source without splits.
        norm, eps, step_size: the threat; 8/255 under linf if the run does not say.
        batch_size, seed, precision, engine, max_minutes, device: see `robustfair.evaluate.audit.audit`.
        points: keep where the model fails under attacks of the AutoAttack family.
        checks: attack a sample again and again after the audit, in what is left of its time, to see whether the
            gradients lead anywhere.
    """

    attacks: str
    data: str | None = None
    image_size: int | None = None
    limit_per_class: int | None = None
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

    def images(self, default: Mapping[str, Any] | None = None) -> tuple[ImageDataset, str]:
        """The images to audit on and which part of the data they are; `default` is the run's own data.

        Raises:
            DataError: none is named, or the run's images changed since.
        """
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
        return data if self.limit_per_class is None else data.limit_per_class(self.limit_per_class), part


def require_outputs(
    target: Target, *, out: Path | None = None, report: Path | None = None, points: bool = False
) -> None:
    """Refuse, before an audit runs, places that its files could not be written to.

    Raises:
        ConfigError: `report` is a folder, `out` is a file, a file stands above them, or `points` have no folder.
        RecipeError: the recipe of the run is damaged.
    """
    placed = not points or out is not None or target.folder is not None
    require(placed, "audit", "points", allowed="saved in a folder", got=target.label, hint="Name one with --out")
    if report is not None:
        hint = f"Try {report}/report.html"
        require(not report.is_dir(), "report", "path", allowed="a file name", got=str(report), hint=hint)
    for path in (out, None if report is None else report.parent):
        above = path
        while above is not None and not above.exists():
            above = above.parent
        require(above is None or above.is_dir(), "audit", "output", allowed="in a folder", got=str(path))
    if target.folder is not None:
        read_recipe(str(target.folder.recipe), {})


def audit_target(
    target: Target,
    request: AuditRequest,
    *,
    images: tuple[ImageDataset, str] | None = None,
    out: Path | None = None,
    baseline: Audit | None = None,
    quiet: bool = False,
) -> Audit:
    """Audit a loaded model on the images and the threat it was made for, or the requested ones.

    An interruption or an error of the thorough checks, which follow the attacks, ends them and keeps the audit. The
    journal of a finished audit stays until `write_outputs` has saved it.

    Args:
        images: what `request.images` gave, where the caller has loaded them already.
        out: where the audit will be saved, if not in the run's folder; an unfinished one keeps what it knows there.
        baseline: an audit that this one will be compared with; one of other images is refused before any attack.

    Raises:
        DataError: the images' classes are not those the model was trained on.
    """
    began = time.monotonic()
    data, part = _images_for(target, request, images)
    trained_for = target.meta.get("threat") or {}
    norm = trained_for.get("norm", "linf") if request.norm is None else request.norm
    usual = trained_for["eps"] if parse_norm(norm) == trained_for.get("norm") else None
    eps = usual if request.eps is None else request.eps
    limits = threat(norm, eps, request.step_size)
    if baseline is not None:
        _require_comparable(baseline, data, limits)
    with AuditProgress(quiet=quiet, images=data.count_line(part)) as progress:
        result = audit(
            target.model,
            data,
            attacks=request.attacks,
            norm=norm,
            eps=eps,
            step_size=request.step_size,
            batch_size=request.batch_size,
            seed=request.seed,
            precision=request.precision,  # type: ignore[arg-type]
            engine=request.engine,  # type: ignore[arg-type]
            max_minutes=request.max_minutes,
            journal=_journal(target, request, data.fingerprint, len(data), limits, out),
            keep_journal=True,
            keep_points=request.points,
            device=request.device,
            label=target.label,
            split=part,
            on_progress=progress,
        )
        if not request.checks:
            return result
        spent = (time.monotonic() - began) / 60
        try:
            found = thorough_findings(
                target.model,
                data,
                limits,
                seed=request.seed,
                batch_size=request.batch_size,
                precision=request.precision,  # type: ignore[arg-type]
                max_minutes=None if request.max_minutes is None else request.max_minutes - spent,
                on_progress=progress,
            )
        except KeyboardInterrupt:
            found = (checks_cut("they were interrupted"),)
        except RobustFairError as error:
            found = (checks_cut(str(error), "the audit itself is whole"),)
    checks = [*result.provenance["checks"], *map(asdict, found)]
    return replace(result, provenance={**result.provenance, "checks": checks})


def _require_comparable(baseline: Audit, data: ImageDataset, limits: Threat) -> None:
    """Refuse a baseline that the audit to come could not be compared with."""
    labels = data.labels.cpu()
    to_come = replace(
        baseline,
        model="this model",
        data=data.name,
        class_names=data.class_names,
        index=torch.arange(len(data)),
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
    quiet: bool = False,
) -> CorruptionAudit:
    """Audit a loaded model under common corruptions; arguments as for `audit_corruptions` and `audit_target`."""
    data, part = _images_for(target, request, images)
    with AuditProgress(quiet=quiet, images=data.count_line(part)) as progress:
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
            on_progress=progress,
        )


def write_corruptions(
    target: Target, result: CorruptionAudit, *, out: Path | None = None, report: Path | None = None
) -> list[Path]:
    """Save a corruption audit, and its page, into the run's folder or where the user said; the paths written."""
    audits = out or (target.folder.audits if target.folder else None)
    written: list[Path] = []
    if audits is not None:
        identity = [result.fingerprint, result.corruptions, result.severities, result.provenance["source"]]
        identity += [result.provenance["seed"], result.provenance["precision"]]
        about = repr([*identity, target.label if out is not None or target.folder is None else None])
        parts = ["corruptions", target.checkpoint, f"{len(result.labels)}-images"]
        stem = "_".join(part for part in parts if part)
        written += result.save(audits, f"{stem}_{hashlib.sha256(about.encode()).hexdigest()[:8]}")
    page = report or (target.folder.path / "corruptions.html" if target.folder else None)
    if page is not None:
        written.append(write_corruption_report(page, result))
    return written


def _images_for(
    target: Target, request: AuditRequest, images: tuple[ImageDataset, str] | None
) -> tuple[ImageDataset, str]:
    """The images of an audit and their part, of the classes that the model was trained on."""
    data, part = request.images(target.meta.get("data")) if images is None else images
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


def _journal(
    target: Target, request: AuditRequest, fingerprint: str, images: int, limits: Threat, out: Path | None
) -> Path | None:
    """Where an audit that is not saved keeps what it knows; None where there is nowhere to."""
    audits = out or (target.folder.audits if target.folder else None)
    if audits is None:
        return None
    names = [attack.name for attack in parse_attacks(request.attacks)]
    about = repr(
        [
            [CLEAN, *(name for name in names if name != CLEAN)],
            limits,
            request.seed,
            request.precision,
            request.engine,
            BATCH_SIZE if request.batch_size is None else request.batch_size,
            fingerprint,
            images,
            target.checkpoint,
            request.points,
            target.label if out is not None or target.folder is None else None,
        ]
    )
    return audits / f"unfinished-{hashlib.sha256(about.encode()).hexdigest()[:8]}.safetensors"


def write_outputs(
    target: Target,
    result: Audit,
    *,
    baseline: Audit | None = None,
    request: AuditRequest | None = None,
    out: Path | None = None,
    report: Path | None = None,
    html: bool = True,
    rates: GroupRates | None = None,
    gates: Sequence[GateResult] = (),
) -> list[Path]:
    """Save an audit, and its report, into the run's folder or where the user said; returns the paths written.

    A file name tells attacks, threat, checkpoint, images and seed, so that only the same audit replaces itself.
    `request` is what `audit_target` was given, and `out` too: with it the journal of a complete audit goes at the end.
    """
    folder = target.folder
    if baseline is not None:
        check_comparable(baseline, result)
    written: list[Path] = []
    audits = out or (folder.audits if folder else None)
    if audits is not None:
        written += result.save(audits, _stem(target, result, elsewhere=out is not None))
    page = report or (folder.report if folder and html else None)
    if page is not None:
        history = folder.history() if folder else None
        recipe = read_recipe(str(folder.recipe), {}).values() if folder else None
        more: dict[str, Any] = {"history": history or None, "recipe": recipe, "rates": rates, "gates": gates}
        written.append(write_report(page, result, baseline=baseline, **more))
    if request is not None and result.complete:
        journal = _journal(target, request, result.fingerprint, len(result.labels), result.threat, out)
        if journal is not None:
            Journal(journal, {}).remove()
    return written


def _stem(target: Target, result: Audit, *, elsewhere: bool) -> str:
    """A name that only the same audit has; `elsewhere` than in a run's own folder it tells models apart too."""
    attacks = ",".join(result.attacks)
    parts = [
        attacks if len(attacks) <= 80 else f"{attacks[:80]}...",
        f"{result.threat.norm}-{format_eps(result.threat.eps)}",
        target.checkpoint,
    ]
    seed = result.provenance["seed"]
    parts += [f"{len(result.labels)}-images", f"seed-{seed}" if seed else None, None if result.complete else "cut"]
    identity = [
        attacks,
        result.fingerprint,
        result.threat.step_size,
        result.provenance["precision"],
        result.provenance["engine"],
        result.provenance["batch_size"],
        result.provenance["not_run"],
        bool(result.points),
        target.label if elsewhere or target.folder is None else None,
    ]
    parts.append(hashlib.sha256(repr(identity).encode()).hexdigest()[:8])
    return re.sub(r"[^\w.,=+-]+", "-", "_".join(part for part in parts if part))


class RepairAudits(NamedTuple):
    """A run and its repair, each with its audit; a sentence on what the repair did; and the paths written."""

    before: Target
    after: Target
    first: Audit
    second: Audit
    text: str
    written: list[Path]


def repair_with_audits(
    source: str,
    method: str,
    out: Path,
    request: AuditRequest,
    *,
    checkpoint: str | None = None,
    html: bool = False,
    quiet: bool = False,
) -> RepairAudits:
    """Audit a run, repair it into `out`, audit that too, and save both audits and the report of the second.

    A request that cannot be audited leaves no folder. Killed at any moment, the same call goes on.

    Args:
        html: write a report of the run before its repair too.
    """
    fix, folder = read_repair(method), RunFolder(out)
    with folder.owned() as killed:
        before = to_repair(source, method, folder, checkpoint, killed)
        first = audit_target(before, request, quiet=quiet)
        after, text = repair_into(before, fix, method, folder)
        second = audit_target(after, request, quiet=quiet)
        written = write_outputs(before, first, request=request, html=html)
        written += write_outputs(after, second, baseline=first, request=request)
        folder.update_manifest(status="complete")
    return RepairAudits(before, after, first, second, text, written)


def run_demo(
    out: Path | None, seed: int, epochs: int | None, *, quiet: bool = False, screen: Screen = ALL_ROWS
) -> Iterator[str]:
    """Train, audit, repair, audit again and report; yields what to print, as it is measured."""
    base = out or _free(Path("runs/demo"))
    recipe = read_recipe("demo", {"seed": seed} | ({} if epochs is None else {"epochs": epochs}))
    trained, repaired = base / "trained", base / "repaired"
    RunFolder(base).require_free()
    with TrainingProgress(quiet=quiet) as progress:
        train(recipe, trained, on_start=progress.start, on_step=progress.step, on_epoch=progress.epoch)
    request = AuditRequest(attacks=DEMO_ATTACKS)
    done = repair_with_audits(str(trained), "hwnwb", repaired, request, html=True, quiet=quiet)
    yield done.text
    yield ""
    yield from before_after_lines(done.first, done.second, screen)
    yield ""
    yield from (f"wrote {path}" for path in done.written)


def audit_lines(result: Audit, screen: Screen = ALL_ROWS) -> list[str]:
    """An audit in text: class table, a line per attack, findings."""
    lines = [*summary_lines(result), *member_lines(result), *_finding_lines(findings(result))]
    return [render(class_table(result), screen), *map(screen.fold, lines)]


def audit_text(
    result: Audit,
    form: str,
    *,
    baseline: Audit | None = None,
    rates: GroupRates | None = None,
    checked: Sequence[GateResult] = (),
    screen: Screen = ALL_ROWS,
) -> str:
    """An audit, its groups and its gates as "table" (without the gates), "json", "markdown" or "latex"."""
    if form == "json":
        about = result.to_dict()
        if baseline is not None:
            about["comparison"] = compare(baseline, result).to_dict()
        if rates is not None:
            about["by_group"] = rates.to_dict()
        if checked:
            about["gates"] = [gate.to_dict() for gate in checked]
        return json.dumps(about, allow_nan=False)
    if form == "table":
        shown = audit_lines(result, screen) if baseline is None else before_after_lines(baseline, result, screen)
        return "\n".join([*shown, *([] if rates is None else [render(group_table(rates), screen)])])
    write = {"markdown": markdown, "latex": latex}[form]
    first = result if baseline is None else compare(baseline, result)
    return "\n".join(write(table_of(part)) for part in (first, rates) if part is not None)


def before_after_lines(before: Audit, after: Audit, screen: Screen = ALL_ROWS) -> list[str]:
    """Two audits in text: classes side by side, a line per attack, findings on the second and on the change."""
    lines = [
        *(f"before  {line}" for line in summary_lines(before)),
        *(f"after   {line}" for line in summary_lines(after)),
        *_finding_lines([*findings(after), *compare_findings(before, after)]),
    ]
    return [render(before_after_table(before, after), screen), *map(screen.fold, lines)]


def comparison_text(found: Sequence[Comparison], form: str, screen: Screen = ALL_ROWS) -> str:
    """Comparisons as "table", "json", "markdown" or "latex"."""
    if form == "json":
        dicts = [one.to_dict() for one in found]
        return json.dumps(dicts if len(dicts) > 1 else dicts[0], allow_nan=False)
    if form == "table":
        return "\n".join(render(comparison_table(one), screen) for one in found)
    return "\n".join({"markdown": markdown, "latex": latex}[form](table_of(one)) for one in found)


def _finding_lines(found: Iterable[Finding]) -> list[str]:
    return [f"{SEVERITY[finding.severity]}: {finding.text} {finding.advice}" for finding in found]


def _free(path: Path) -> Path:
    """`path`, or path-2, path-3, ...: the first that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
