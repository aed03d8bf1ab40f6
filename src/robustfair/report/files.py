"""What an audit leaves on disk: its own files and its page, in the folder of the run or where the user said."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustfair.config import require
from robustfair.evaluate.compare import check_comparable
from robustfair.evaluate.corruptions import CorruptionAudit
from robustfair.evaluate.gates import GateResult
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.request import AuditRequest, audit_stem, remove_journal
from robustfair.evaluate.result import Audit
from robustfair.report.corruptions import write_corruption_report
from robustfair.report.html import write_report
from robustfair.runs.load import Target
from robustfair.runs.recipe import read_recipe


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
        written += result.save(audits, audit_stem(target, result, elsewhere=out is not None))
    page = report or (folder.report if folder and html else None)
    if page is not None:
        history = folder.history() if folder else None
        recipe = read_recipe(str(folder.recipe), {}).values() if folder else None
        more: dict[str, Any] = {"history": history or None, "recipe": recipe, "rates": rates, "gates": gates}
        written.append(write_report(page, result, baseline=baseline, **more))
    if request is not None:
        remove_journal(target, request, result, out)
    return written


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
