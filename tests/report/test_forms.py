"""Audits as text, in the form of a table."""

from __future__ import annotations

from pathlib import Path

from robustfair.evaluate.request import AuditRequest, audit_target
from robustfair.report.forms import audit_lines, before_after_lines
from robustfair.runs.load import load_target
from robustfair.runs.repair import repair_run

QUICK = AuditRequest(attacks="clean,pgd-2", limit_per_class=3, device="cpu")


def test_lines_of_one_audit_and_of_two(run: Path, tmp_path: Path) -> None:
    before = load_target(str(run))
    after, _ = repair_run(str(run), "hwnwb", tmp_path / "repaired")
    first, second = (audit_target(target, QUICK) for target in (before, after))
    single = "\n".join(audit_lines(first)).splitlines()
    assert [line.split()[0] for line in single if line.split()[1:2] == ["3"]] == list("0123456789")
    assert [line.split()[0] for line in single if " average " in line and "worst class" in line] == ["clean", "pgd-2"]
    double = "\n".join(before_after_lines(first, second)).splitlines()
    for part in ("before", "after"):
        assert [line.split()[1] for line in double if line.startswith(f"{part}  ")] == ["clean", "pgd-2"]
    assert any(line.startswith("note: Fewer than 30 images") for line in single)
