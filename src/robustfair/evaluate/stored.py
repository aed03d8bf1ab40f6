"""Audits as a user names them: by file, or by the run whose newest audit that fits is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from robustfair.errors import CheckpointError, DataError
from robustfair.evaluate.audit import Audit, load_audit
from robustfair.evaluate.compare import check_comparable
from robustfair.rundir import RunFolder


class StoredAudit(NamedTuple):
    """An audit and the JSON file it was read from."""

    path: Path
    audit: Audit


def comparable_audits(names: Sequence[Path | str]) -> list[StoredAudit]:
    """One audit a name, all of the same images, classes and threat.

    A run folder, or a folder of audits, stands for its newest audit for which every other name has a comparable one;
    that of the first name decides. Models that bear one label get the names of their files behind it.

    Args:
        names: run folders, folders of audits, and audit JSON files.

    Raises:
        CheckpointError: a name without an audit, or an audit that is damaged.
        DataError: no audit of the first name fits the others; says how the newest differ.
    """
    candidates = [_candidates(Path(name)) for name in names]
    for first in candidates[0]:
        others = [next((each for each in found if _fit(first.audit, each.audit)), None) for found in candidates[1:]]
        chosen = [first, *(other for other in others if other is not None)]
        if len(chosen) == len(names):
            return _told_apart(chosen)
    newest = candidates[0][0].audit
    for found in candidates[1:]:
        check_comparable(newest, found[0].audit)
    raise DataError(f"no audit of {names[0]} is comparable with one of every other: audit all on one data set")


def _candidates(path: Path) -> list[StoredAudit]:
    """The audits that a name may mean, the newest first."""
    if not path.is_dir():
        return [StoredAudit(path, load_audit(path))]
    run = RunFolder(path)
    folder = run.audits if run.exists() or run.audits.is_dir() else path
    found, failed = [], None
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(StoredAudit(file, load_audit(file)))
        except CheckpointError as error:
            failed = error
    if not found:
        raise failed or CheckpointError(f"{path} holds no audit: run robustfair audit {path}")
    return sorted(found, key=lambda each: str(each.audit.provenance.get("date", "")), reverse=True)


def _fit(one: Audit, other: Audit) -> bool:
    try:
        check_comparable(one, other)
    except DataError:
        return False
    return True


def _told_apart(chosen: Sequence[StoredAudit]) -> list[StoredAudit]:
    labels = [each.audit.model for each in chosen]
    return [
        each
        if labels.count(each.audit.model) == 1
        else each._replace(audit=replace(each.audit, model=f"{each.audit.model}, {each.path.stem}"))
        for each in chosen
    ]
