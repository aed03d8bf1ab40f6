"""Stored audits read again, and audits beside a baseline or in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reference.commands import TEN, Command
from reference.runs import changes, tree


def test_a_stored_audit_is_read_again_without_attacking(place: Path, command: Command) -> None:
    first = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2, "--json")
    stored = next(path for path in (place / "run" / "audit").glob("clean,pgd-2*.json"))
    before = tree(place)
    again = command("audit", stored, "--json", "--fail-under", "average.clean=0")
    assert again.code == 0
    assert json.loads(again.out)["attacks"] == json.loads(first.out)["attacks"]
    assert command("audit", stored, "--fail-under", "worst.pgd-2=100%").code == 1
    assert changes(before, tree(place)) == []


def test_a_gate_on_what_nothing_measured_is_undecided_everywhere(place: Path, command: Command) -> None:
    words = ["--attacks", "clean", "--limit-per-class", 2, "--fail-under", "worst.robust=0"]
    outcome = command("audit", "run", *words, "--report", "page.html", "--quiet")
    line = "undecided: worst.robust is not known, nothing attacked the model, the audit is of clean images alone"
    assert (outcome.code, outcome.out.splitlines()[-1]) == (1, line)
    assert line in (place / "page.html").read_text(encoding="utf-8")
    found = command("audit", "run", *words, "--json")
    assert found.code == 1
    assert json.loads(found.out)["gates"] == [
        {"gate": "worst.robust=0", "value": None, "status": "undecided", "line": line}
    ]
    assert line in found.err
    stored = next(path for path in (place / "run" / "audit").glob("clean_*.json"))
    again = command("audit", stored, "--fail-under", "worst.robust=0")
    assert (again.code, again.out.splitlines()[-1]) == (1, line)


def test_a_stored_audit_beside_a_baseline_is_shown_as_a_run_is(place: Path, command: Command) -> None:
    (before,) = (place / "stored" / "before").glob("*.json")
    (after,) = (place / "stored" / "after").glob("*.json")
    files = tree(place)
    outcome = command("audit", after, "--baseline", before)
    assert outcome.code == 0, outcome.err
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "pgd-2" in line for line in outcome.out.splitlines())
    for name in TEN:
        assert sum(line.split()[:2] == [name, "4"] for line in outcome.out.splitlines()) == 1
    found = command("audit", after, "--baseline", before, "--json").json()
    assert found["comparison"] == command("compare", before, after, "--json").json()
    assert found["attacks"] == json.loads(after.read_text())["attacks"]
    (other,) = (place / "stored" / "fewer").glob("*.json")
    for form in ("table", "json"):
        refused = command("audit", after, "--baseline", other, "--format", form)
        assert (refused.code, refused.out) == (2, "")
        assert "not of the same images" in refused.err
        assert command("audit", after, "--baseline", other, "--report", "page.html", "--format", form).code == 2
    assert changes(files, tree(place)) == []


def test_a_stored_audit_gets_its_report(place: Path, command: Command) -> None:
    (before,) = (place / "stored" / "before").glob("*.json")
    (after,) = (place / "stored" / "after").glob("*.json")
    files = tree(place)
    outcome = command("audit", after, "--report", "deep/one.html", "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "wrote deep/one.html"
    command("audit", after, "--baseline", before, "--report", "deep/two.html", "--json").json()
    one, two = ((place / "deep" / f"{name}.html").read_text(encoding="utf-8") for name in ("one", "two"))
    name = json.loads(before.read_text())["model"]
    assert (name in one, name in two) == (False, True)
    judged = command("audit", after, "--report", "deep/three.html", "--fail-under", "average.clean=1", "--quiet")
    assert judged.code == 1
    assert "failed: average.clean is" in (place / "deep" / "three.html").read_text(encoding="utf-8")
    assert "failed:" not in one
    new = {path for path in tree(place) if path not in files}
    assert {Path(path).suffix for path in new} <= {"", ".html"}


def test_a_run_beside_a_baseline_has_the_comparison_in_its_json(place: Path, command: Command) -> None:
    words = ["--attacks", "clean", "--limit-per-class", 2, "--baseline", "baseline.json", "--json"]
    found = command("audit", "repaired", *words).json()
    assert list(found["comparison"]["attacks"]) == ["clean"]


def test_audits_of_two_models_in_one_folder_stay_apart(place: Path, command: Command) -> None:
    shutil.copytree(place / "run", place / "other")
    for run in ("run", "other"):
        assert command("audit", run, "--attacks", "clean", "--limit-per-class", 2, "--out", "shared").code == 0
        which = ["--which", "fog", "--severities", 1, "--limit-per-class", 2]
        assert command("corruptions", run, *which, "--out", "shared").code == 0
    assert len(list((place / "shared").glob("clean_*.json"))) == 2
    assert len(list((place / "shared").glob("corruptions_*.json"))) == 2


def test_a_baseline_of_other_images_is_refused_before_any_attack(place: Path, command: Command) -> None:
    command("audit", "run", "--attacks", "clean", "--limit-per-class", 2)
    stored = next(path for path in (place / "run" / "audit").glob("clean_*20-images*.json"))
    outcome = command("audit", "run", "--attacks", "clean,pgd-400(restarts=50)", "--baseline", stored)
    assert outcome.code == 2
    assert "not of the same images" in outcome.err
