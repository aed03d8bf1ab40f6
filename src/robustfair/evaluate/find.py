"""Audits as a user names them: by file, or by the run whose newest audit that fits is meant."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from robustfair.errors import CheckpointError, DataError
from robustfair.evaluate.compare import check_comparable
from robustfair.evaluate.result import ROBUST, Audit, load_audit
from robustfair.grammar import read_path
from robustfair.registry import canonical
from robustfair.runs.folder import RunFolder


class StoredAudit(NamedTuple):
    """An audit and the JSON file it was read from."""

    path: Path
    audit: Audit


def comparable_audits(names: Sequence[Path | str], attacks: Sequence[str] = ()) -> list[StoredAudit]:
    """One audit a name, all of the same images, classes and threat.

    A run folder, or a folder of audits, stands for its newest audit for which every other name has a comparable one;
    that of the first name decides, and of the others the one that shares most attacks with it. Models that bear one
    label get the names of their files behind it.

    Args:
        names: run folders, folders of audits, and audit JSON files.
        attacks: what the audits are wanted for: those of a folder that hold it all come first.

    Raises:
        CheckpointError: a name without an audit, or an audit that is damaged.
        DataError: no audit of the first name fits the others; says how the newest differ.
    """
    candidates = [sorted(_candidates(read_path(name)), key=partial(_lacks, attacks)) for name in names]
    for first in candidates[0]:
        fitting = [[each for each in found if _fit(first.audit, each.audit)] for found in candidates[1:]]
        if all(fitting):
            return _told_apart([first, *(min(found, key=partial(_unlike, first)) for found in fitting)])
    newest = candidates[0][0].audit
    for found in candidates[1:]:
        check_comparable(newest, found[0].audit)
    raise DataError(f"no audit of {names[0]} is comparable with one of every other: audit all on one data set")


def _candidates(path: Path) -> list[StoredAudit]:
    """The audits that a name may mean, the newest first."""
    if not path.is_dir():
        return [StoredAudit(path, load_audit(path))]
    run = RunFolder(path).model_folder()
    folder = run.audits if run.exists() or run.audits.is_dir() else path
    found, failed = [], None
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(StoredAudit(file, load_audit(file)))
        except CheckpointError as error:
            failed = error
    if not found:
        raise failed or CheckpointError(f"{path} holds no audit: run robustfair audit {shlex.quote(str(path))}")
    return sorted(found, key=lambda each: str(each.audit.provenance.get("date", "")), reverse=True)


def _lacks(attacks: Sequence[str], stored: StoredAudit) -> int:
    return len({canonical(attack) for attack in attacks} - set(stored.audit.attacks) - {ROBUST})


def _unlike(first: StoredAudit, other: StoredAudit) -> int:
    return len(set(first.audit.attacks) ^ set(other.audit.attacks))


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
