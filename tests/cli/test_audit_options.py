"""`robustfair audit` with the AutoAttack family, checks, budgets, gates, groups and formats."""

from __future__ import annotations

import html
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reference.commands import AUDIT, FAST, INTERRUPTED, Command
from reference.runs import changes, tree
from robustfair.attacks.autoattack.square import Square
from robustfair.data import load_dataset
from robustfair.evaluate.diagnostics import masking
from robustfair.runs.load import load_target


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_an_audit_by_either_engine(place: Path, command: Command, engine: str) -> None:
    words = ["--attacks", "apgd-ce(steps=5)", "--engine", engine, "--limit-per-class", 3]
    found = command("audit", "run", *words, "--json").json()
    assert list(found["attacks"]) == ["clean", "apgd-ce(steps=5)"]
    about = found["attacks"]["apgd-ce(steps=5)"]
    assert about["settings"]["ran"] == {"apgd-ce(steps=5)": 1.0}
    assert found["provenance"]["engine"] == engine
    lost = [c - r for c, r in zip(found["attacks"]["clean"]["correct"], about["correct"], strict=True)]
    assert about["fell_to"] == {"apgd-ce(steps=5)": lost}
    assert sum(lost) > 0


def test_engines_and_points_are_audits_of_their_own(place: Path, command: Command) -> None:
    words = ["audit", "run", "--attacks", "apgd-ce(steps=3)", "--limit-per-class", 2]
    for engine in ("native", "reference"):
        assert command(*words, "--engine", engine).code == 0
    assert len(list((place / "run" / "audit").glob("*.json"))) == 2


def test_points_are_saved_beside_the_audit(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", FAST, "--limit-per-class", 3, "--points")
    assert outcome.code == 0, outcome.err
    wrote = [Path(line.removeprefix("wrote ")) for line in outcome.out.splitlines() if line.startswith("wrote ")]
    assert [path.suffix for path in wrote] == [".json", ".npz", ".safetensors", ".html"]
    points, arrays = load_file(wrote[2]), np.load(wrote[1])
    images = load_dataset("digits").test.limit_per_class(3).images / 255
    model = load_target("run").model
    assert len(points["apgd-ce(steps=5)/image"])
    for name in ("apgd-ce(steps=5)", "square(queries=20)"):
        rows = points[f"{name}/image"].tolist()
        assert sorted(rows) == (arrays[f"{name}:broken_by"] == 0).nonzero()[0].tolist()
        for row, point in zip(rows, points[f"{name}/pixels"], strict=True):
            assert (point - images[row]).abs().max() <= 0.1 + 1e-6
            assert int(model(point[None]).argmax()) == arrays[name][row] != arrays["labels"][row]


def test_checks_say_what_hides_gradients(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "SAMPLE", 10)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=20)")
    words = ["--attacks", "fgsm", "--limit-per-class", 2, "--checks"]
    plain = command("audit", "run", *words, "--json").json()["provenance"]["checks"]
    assert {check["code"] for check in plain} <= {"not-converged"}
    torch.manual_seed(0)
    noisy = command("audit", "zoo_of_test:Noisy", "--data", "digits", *words)
    assert noisy.code == 0
    lines = noisy.out.splitlines()
    assert sum("The same images give other logits at every pass" in line for line in lines) == 1
    assert any(line.startswith("warning: The same images give other logits at every pass") for line in lines)
    told = [line for line in noisy.err.splitlines() if line.startswith("check ")]
    assert any(line.startswith("check pgd-100: ") for line in told)


def test_checks_of_a_model_without_gradients_keep_the_audit(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "SAMPLE", 10)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=20)")
    torch.manual_seed(0)  # of the weights: nothing is attacked of a model that is right nowhere
    words = ["--data", "digits", "--attacks", "square(queries=20)", "--limit-per-class", 2, "--checks"]
    found = command("audit", "zoo_of_test:Blind", *words, "--out", "kept")
    assert found.code == 0, found.err
    (line,) = (line for line in found.out.splitlines() if "could not be made: the model gives no gradient" in line)
    assert line.startswith("warning: The checks with gradients, by pgd-20, ")
    assert "square(queries=20) by itself leaves" in line
    assert sorted(path.suffix for path in (place / "kept").iterdir()) == [".json", ".npz"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here refuses root")
def test_a_folder_that_cannot_be_written_is_one_line(place: Path, command: Command) -> None:
    outcome = command("audit", "run", *AUDIT, "--quiet", "--out", "/proc/self")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: /proc/self/unfinished-\w+\.safetensors: .+\n", outcome.err)


def test_random_output_is_said_without_being_asked(place: Path, command: Command) -> None:
    found = command("audit", "zoo_of_test:Noisy", "--data", "digits", *AUDIT, "--json").json()
    assert "random-output" in {check["code"] for check in found["provenance"]["checks"]}


@pytest.mark.parametrize(
    ("gates", "code", "lines"),
    [
        (["worst.robust=0"], 0, [r"passed: worst\.robust is 0\.\d+ \(\d( and \d others?)?\), at least 0\.00"]),
        (["average.clean>=0.99"], 1, [r"failed: average\.clean is 0\.\d+, below 0\.99"]),
        (
            ["range.robust<=1", "average.clean=99%", "interval.worst.robust.lower=0"],
            1,
            [r"passed: range\.robust is .*, at most 1\.00", r"failed: average\.clean .*", r"passed: interval\.worst.*"],
        ),
        (
            ["class.3.pgd-2=0", "worst-10pct.clean=0"],
            0,
            [r"passed: class\.3\.pgd-2 .*", r"passed: worst-10pct\.clean .*"],
        ),
    ],
)
def test_gates_decide_the_exit_code(
    place: Path, command: Command, gates: list[str], code: int, lines: list[str]
) -> None:
    words = [word for gate in gates for word in ("--fail-under", gate)]
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3]
    outcome = command(*audit, *words)
    assert outcome.code == code, outcome.err
    said = outcome.out.splitlines()[-len(lines) :]
    assert all(re.fullmatch(line, text) for line, text in zip(lines, said, strict=True)), said
    assert list((place / "run" / "audit").glob("*.json")), "an audit that fails a gate is saved too"
    as_json = command(*audit, *words, "--json")
    assert as_json.code == code
    found = json.loads(as_json.out)["gates"]
    assert [gate["gate"] for gate in found] == gates
    assert {gate["status"] for gate in found} <= {"passed", "failed"}
    assert [line for line in as_json.err.splitlines() if re.match("passed|failed", line)] == [
        gate["line"] for gate in found
    ]


def test_groups_of_classes_and_of_images(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2]
    stored = command(*audit, "--json").json()
    right = stored["attacks"]["pgd-2"]["correct"]
    found = command(*audit, "--group-by", "parity.csv", "--json").json()["by_group"]
    assert found["groups"] == ["even", "odd"]
    assert found["count"] == [10, 10]
    assert found["attacks"]["pgd-2"]["correct"] == [sum(right[0::2]), sum(right[1::2])]
    by_image = command(*audit, "--group-by", "images.csv", "--json").json()["by_group"]
    assert by_image["groups"] == ["first", "rest"]
    assert by_image["count"] == [5, 15]
    shown = command(
        *audit, "--group-by", "parity.csv", "--fail-under", "group.odd.clean=0", "--fail-under", "worst-group.pgd-2=1"
    )
    assert shown.code == 1
    for name in ("even", "odd"):
        assert sum(line.split()[:2] == [name, "10"] for line in shown.out.splitlines()) == 1
    assert shown.out.splitlines()[-2].startswith("passed: group.odd.clean is ")
    assert shown.out.splitlines()[-1].startswith("failed: worst-group.pgd-2 is ")


def test_an_audit_for_papers(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2, "--group-by", "parity.csv"]
    outcomes = {form: command(*audit, "--format", form) for form in ("markdown", "latex", "json", "table")}
    assert all(outcome.code == 0 for outcome in outcomes.values())
    assert "wrote" not in "".join(outcomes[form].out for form in ("markdown", "latex", "json"))
    assert re.search(r"^\|.*pgd-2.*\|$", outcomes["markdown"].out, re.MULTILINE)
    assert outcomes["latex"].out.count(r"\begin{tabular}") == 2
    assert outcomes["latex"].out.count(r"\bottomrule") == 2
    for text in (outcomes["markdown"].out, outcomes["latex"].out):
        assert "even" in text
        assert "odd" in text
    assert outcomes["json"].json()["by_group"]["groups"] == ["even", "odd"]
    assert "wrote" in outcomes["table"].out


def test_a_budget_ends_an_audit_and_the_same_command_goes_on(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    cut = command(*audit, "--max-minutes", "1e-9", "--fail-under", "worst.robust=0")
    assert cut.code == 1
    warned = [line for line in cut.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert "minutes are over: the time budget left " in warned[0]
    assert "square(queries=20) at 0 %" in warned[0]
    assert "The same command goes on" in warned[0]
    assert any(line.startswith("warning: Not all attacks ran to their end: the time") for line in cut.out.splitlines())
    assert cut.out.splitlines()[-1].startswith("undecided: worst.robust is ")
    first = {path.name for path in (place / "run" / "audit").iterdir()}
    assert sum("_cut_" in name for name in first) == 2
    (unfinished,) = (name for name in first if name.startswith("unfinished-"))
    whole = command(*audit, "--json").json()
    second = {path.name for path in (place / "run" / "audit").iterdir()}
    assert first - second == {unfinished}
    assert not any("_cut_" in name for name in second - first)
    assert list(whole["attacks"]) == ["clean", "apgd-ce(steps=5)", "square(queries=20)"]
    assert not whole["provenance"]["not_run"]
    fresh = command("audit", "run", "--attacks", FAST, "--limit-per-class", 2, "--out", "fresh", "--json").json()
    assert fresh["attacks"] == whole["attacks"]


def test_a_budget_without_a_folder_promises_nothing(place: Path, command: Command) -> None:
    before = tree(place)
    model = ["good.safetensors", "--arch", "small-cnn", "--width", 4, "--data", "digits"]
    outcome = command("audit", *model, "--attacks", "square(queries=9)", "--max-minutes", "1e-9")
    assert outcome.code == 0
    assert "the time budget left square(queries=9) at " in outcome.err
    assert "goes on" not in outcome.err
    assert changes(before, tree(place)) == []


def test_control_c_in_an_audit_is_one_line_and_the_same_command_goes_on(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    turn, turns, gone_on = Square.iterate, [], []

    def interrupted(self: Square, *args: Any) -> Any:
        turns.append(1)
        if len(turns) == 2 and not gone_on:
            signal.raise_signal(signal.SIGINT)
        return turn(self, *args)

    monkeypatch.setattr(Square, "iterate", interrupted)
    try:
        outcome = command(*audit)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.out) == (130, "")
    images, *progress, last = outcome.err.splitlines()
    assert images == "digits, test part: 20 images of 10 classes (2 each)"
    assert last == INTERRUPTED
    assert all(" images, " in line for line in progress)
    (left,) = (place / "run" / "audit").iterdir()
    assert left.name.startswith("unfinished-")
    turns.clear()
    gone_on.append(True)
    found = command(*audit, "--json").json()
    went_on = len(turns)
    assert not left.exists()
    turns.clear()
    fresh = command(*audit, "--out", "fresh", "--json").json()
    assert went_on == len(turns) - 1, "the turn of Square that was done is not done again"
    assert fresh["attacks"] == found["attacks"]


def test_a_stratified_sample_is_audited_and_named(place: Path, command: Command) -> None:
    words = ["audit", "run", "--attacks", "clean,pgd-2", "--images", 40, "--stratified", "--seed", 3]
    outcome = command(*words)
    assert outcome.code == 0
    test = load_dataset("digits").test
    sample = test.sample(40, stratified=True, seed=3)
    line = "40 of 359 images of 10 classes (4 each), as many of each class, drawn with seed 3"
    assert f"digits, test part: {line}" in outcome.err
    assert "40 of 359 images, as many of each class, drawn with seed 3\n" in outcome.out
    assert "average: every class weighs by its share of the 359 images" in outcome.out
    found = command(*words, "--json").json()
    (stored,) = (place / "run" / "audit").glob("*.json")
    assert "_40-images_" in stored.name
    assert found == json.loads(stored.read_text()) | {"provenance": found["provenance"]}
    assert found["data"]["fingerprint"] == sample.fingerprint
    assert found["data"]["drawn_from"] == test.class_counts().tolist()
    assert sample.drawn is not None
    assert np.load(stored.with_suffix(".npz"))["index"].tolist() == sample.drawn.places.tolist()
    correct, sizes = np.array(found["attacks"]["pgd-2"]["correct"]), test.class_counts().numpy()
    assert np.isclose(found["attacks"]["pgd-2"]["summary"]["average"], (correct / 4 * sizes).sum() / sizes.sum())
    assert command("compare", str(stored), "run").code == 0
    page = (place / "run" / "report.html").read_text()
    assert "40 of 359 images, as many of each class, drawn with seed 3" in page


def test_a_plain_sample_needs_no_weights(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", "clean", "--images", 50)
    assert "50 of 359 images, drawn with seed 0\n" in outcome.out
    assert "weighs" not in outcome.out


def test_samples_of_other_seeds_are_not_compared(place: Path, command: Command) -> None:
    for seed in (1, 2):
        words = ["--attacks", "clean", "--images", 20, "--stratified", "--seed", seed, "--out", f"seed-{seed}"]
        assert command("audit", "run", *words).code == 0
    outcome = command("compare", "seed-1", "seed-2")
    assert outcome.code == 2
    assert "are not of the same images (20 and 20)" in outcome.err


def test_a_sequential_audit_says_what_it_took_and_why_it_stopped(place: Path, command: Command) -> None:
    words = ["audit", "run", "--attacks", "pgd-2", "--until", "worst.robust=±30%"]
    outcome = command(*words)
    assert outcome.code == 0
    assert "round 1: " in outcome.err
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("until "))
    assert line.startswith("until worst.robust=+-30: narrow enough at +-")
    assert "of 359 images (0: 3" in line
    (stored,) = (place / "run" / "audit").glob("*.json")
    assert "_until-worst.robust=+-30_" in stored.name
    about = json.loads(stored.read_text())["provenance"]["until"]
    assert (about["asked"], about["stopped"]) == ("worst.robust=+-30", "narrow enough")
    assert line in html.unescape((place / "run" / "report.html").read_text().replace("<wbr>", ""))
    again = command("audit", str(stored), "--fail-under", "worst.robust=0.99")
    assert again.code == 1
    assert line in again.out
    assert list((place / "run" / "audit").glob("unfinished*")) == []


def test_a_sequential_audit_out_of_time_goes_on(place: Path, command: Command) -> None:
    words = ["audit", "run", "--attacks", "pgd-2,cw-2", "--until", "worst.robust=+-30", "--json"]
    cut = command(*words, "--max-minutes", "1e-9")
    assert cut.code == 0
    assert "minutes are over before worst.robust=+-30" in cut.err
    assert cut.json()["provenance"]["until"]["stopped"] == "out of time"
    assert len(list((place / "run" / "audit").glob("unfinished-*-round-1.safetensors"))) == 1
    assert command(*words).json()["provenance"]["until"]["stopped"] == "narrow enough"
    assert list((place / "run" / "audit").glob("unfinished*")) == []
