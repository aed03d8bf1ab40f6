"""Which stored audit a name means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reference.audits import random_audit
from robustfair.errors import CheckpointError, DataError
from robustfair.evaluate.find import comparable_audits
from robustfair.evaluate.result import Audit
from robustfair.values import Threat


def saved(folder: Path, stem: str, day: int, **fields: object) -> Audit:
    audit = replace(random_audit(day, model=folder.name), provenance={"date": f"2026-05-{day:02}T00:00:00+00:00"})
    audit = replace(audit, **fields)
    audit.save(folder / "audit", stem)
    return audit


def test_a_run_stands_for_its_newest_audit(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    saved(one, "z-old", 1)
    newest = saved(one, "a-new", 9)
    saved(two, "only", 5)
    first, second = comparable_audits([one, str(two)])
    assert (first.path, second.path) == (one / "audit" / "a-new.json", two / "audit" / "only.json")
    assert first.audit.provenance == newest.provenance
    assert [each.audit.model for each in (first, second)] == ["one", "two"]


def test_the_newest_pair_that_fits_is_taken(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    saved(one, "other-radius", 9, threat=Threat(eps=0.5))
    saved(one, "plain", 3)
    saved(two, "plain", 4)
    saved(two, "other-images", 8, fingerprint="beef")
    found = comparable_audits([one, two, two / "audit" / "plain.json"])
    assert [each.path.stem for each in found] == ["plain"] * 3


def test_audits_of_one_model_are_told_apart_by_their_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, "a", 1)
    saved(run, "b", 2)
    for named in (run, run / "audit", run / "audit" / "b.npz"):
        found = comparable_audits([run / "audit" / "a.json", named])
        assert [each.audit.model for each in found] == ["run, a", "run, b"]


def test_what_holds_no_audit_that_fits_is_refused(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    three.mkdir()
    saved(one, "plain", 1)
    saved(two, "other", 1, threat=Threat(eps=0.5))
    with pytest.raises(DataError, match=r"the audits of one and two are under different threats"):
        comparable_audits([one, two])
    with pytest.raises(CheckpointError, match=r"three holds no audit: run robustfair audit"):
        comparable_audits([one, three])
    with pytest.raises(CheckpointError, match=r"absent\.json does not exist"):
        comparable_audits([one, tmp_path / "absent.json"])
    (one / "audit" / "plain.npz").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cut or damaged"):
        comparable_audits([one, two])


def test_names_that_fit_only_one_by_one_are_refused(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    saved(one, "a", 2)
    saved(one, "b", 1, threat=Threat(eps=0.5))
    saved(two, "a", 1)
    saved(three, "b", 1, threat=Threat(eps=0.5))
    with pytest.raises(DataError, match="the audits of one and three are under different threats"):
        comparable_audits([one, two, three])
