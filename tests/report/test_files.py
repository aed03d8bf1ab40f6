"""What an audit leaves on disk, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reference.runs import changes, tree
from robustfair.errors import RobustFairError, RobustFairWarning
from robustfair.evaluate.request import AuditRequest, audit_target
from robustfair.evaluate.result import load_audit
from robustfair.evaluate.runner import AttackRunner
from robustfair.report.files import write_outputs
from robustfair.runs.load import load_target

QUICK = AuditRequest(attacks="clean,pgd-2", limit_per_class=3, device="cpu")


def test_outputs_of_a_run_lie_in_its_folder(run: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK)
    paths = write_outputs(target, found)
    assert [path.suffix for path in paths] == [".json", ".npz", ".html"]
    assert [path.parent for path in paths] == [run / "audit", run / "audit", run]
    read = load_audit(paths[0])
    assert read.to_dict() == found.to_dict()
    assert "trades(beta=2)" in paths[2].read_text(encoding="utf-8")


def test_outputs_lie_where_the_user_says(run: Path, tmp_path: Path) -> None:
    target = load_target(str(run))
    found = audit_target(target, QUICK)
    before = tree(run)
    paths = write_outputs(target, found, out=tmp_path / "a" / "b", report=tmp_path / "c" / "page.html")
    assert [path.parent for path in paths] == [tmp_path / "a" / "b", tmp_path / "a" / "b", tmp_path / "c"]
    assert changes(before, tree(run)) == []
    assert len(write_outputs(target, found, html=False)) == 2
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_the_journal_of_a_finished_audit_goes_when_it_is_saved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    target, folder = load_target(str(run)), None if out is None else tmp_path / out
    kept = folder or run / "audit"
    found = audit_target(target, QUICK, out=folder)
    (journal,) = kept.iterdir()
    assert journal.name.startswith("unfinished-")
    monkeypatch.delattr(AttackRunner, "_attack")
    again = audit_target(target, QUICK, out=folder)
    assert again.correct("pgd-2").tolist() == found.correct("pgd-2").tolist()
    left = journal.with_name(f".{journal.name}.123.tmp")
    left.write_bytes(b"half")
    write_outputs(target, again, out=folder)
    assert journal.exists(), "which audit it was is not known"
    write_outputs(target, again, request=replace(QUICK, checks=True), out=folder)
    assert {path.suffix for path in kept.iterdir()} == {".json", ".npz"}


def test_the_journal_of_an_audit_that_was_cut_stays(run: Path) -> None:
    target, request = load_target(str(run)), AuditRequest(attacks="square(queries=20)", max_minutes=1e-9)
    with pytest.warns(RobustFairWarning, match="goes on"):
        found = audit_target(target, request)
    write_outputs(target, found, request=request)
    assert len(list((run / "audit").glob("unfinished-*"))) == 1


def test_a_model_from_elsewhere_leaves_nothing_unasked(run: Path, tmp_path: Path) -> None:
    target = replace(load_target(str(run)), folder=None, checkpoint=None, meta={})
    found = audit_target(target, replace(QUICK, data="digits"))
    assert write_outputs(target, found) == []


def test_file_names_are_plain_and_tell_the_audit(run: Path) -> None:
    target = load_target(str(run))
    request = AuditRequest(attacks="clean,cw-2(restarts=2, step_size=1/255)", limit_per_class=1, eps="8/255", seed=3)
    path, *_ = write_outputs(target, audit_target(target, request))
    assert not set(path.name) & set(' /\\:*?"<>|()')
    for part in ("clean", "cw-2", "linf", "8", "best", "seed-3"):
        assert part in path.name
    assert load_audit(path).attacks == ("clean", "cw-2(restarts=2, step_size=1/255)")


def test_a_report_of_two_audits_of_other_images_is_refused_before_anything_is_written(run: Path) -> None:
    target = load_target(str(run))
    first, other = (audit_target(target, replace(QUICK, limit_per_class=n)) for n in (2, 3))
    before = tree(run)
    with pytest.raises(RobustFairError, match="not of the same images"):
        write_outputs(target, first, baseline=other)
    assert changes(before, tree(run)) == []
