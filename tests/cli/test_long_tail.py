"""Long-tailed training and its groups as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reference.commands import WEIGHTS, Command, Refuses, case, training
from robustfair.data.edits import profile

TAIL = profile(14, 10, 7)
CLEAN = ("--attacks", "clean", "--quiet")


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        case(training("standard", eps=None, steps=None, edit="upweight"), "edit is upweight, which asks a model"),
        case(training("standard", eps=None, steps=None, edit="long-tail(factor=0)"), "long-tail: factor must be"),
        case("audit run --attacks clean --group-by shot(few=101)", "shot: few must be at most many, 100, got 101"),
        case("audit run --attacks clean --group-by difficulty", "add --baseline with the JSON of its audit"),
        case(["audit", "good.pt", *WEIGHTS, "--group-by", "shot"], "does not say how many images of each class"),
        case("compare stored/letters stored/letters --group-by shot", "does not say how many images of each class"),
        case("compare stored/before stored/after --group-by tall", "tall does not exist: group by superclass, shot"),
        case("repair run --out fixed --method logit-adjustment(prior=0.5)", "prior must be a valid string"),
        case("explain nothing.yaml", "does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(refuses: Refuses, argv: list[str], fragments: tuple[str, ...]) -> None:
    refuses(argv, fragments)


def test_a_long_tail_is_trained_said_audited_and_repaired(place: Path, command: Command) -> None:
    words = training("standard + logit-adjustment", eps=None, steps=None, edit="long-tail(factor=7)", select="last")
    trained = command(*words)
    assert trained.code == 0, trained.err
    assert f"on {sum(TAIL):,} images of digits after long-tail(factor=7), small-cnn with" in trained.err
    assert "digits, validation part: 60 images of 10 classes (6 each)" in trained.err
    outcome = command("audit", "new", *CLEAN, "--group-by", "shot(many=10, few=5)")
    assert outcome.code == 0, outcome.err
    assert (
        f"trained on {sum(TAIL)} images (long-tail(factor=7)): 14 of the largest class, 2 of the least" in outcome.out
    )
    for word in ("many", "medium", "few", "Training images: many is more than 10"):
        assert word in outcome.out
    report = (place / "new" / "report.html").read_text()
    assert "many is more than 10" in report
    assert "long-tail(factor=7)" in report
    (stored,) = (place / "new" / "audit").glob("*.json")
    assert json.loads(stored.read_text())["provenance"]["trained_on"] == {
        "images_per_class": TAIL,
        "edit": "long-tail(factor=7)",
    }
    again = command("audit", str(stored), "--group-by", "shot(many=10, few=5)", "--json").json()
    assert again["by_group"]["groups"] == ["many", "medium", "few"]
    assert again["by_group"]["source"] == "shot"

    repaired = command("repair", "new", "--out", "fixed", "--method", "logit-adjustment")
    assert repaired.code == 0, repaired.err
    assert repaired.out.startswith(
        "logit-adjustment: the log of the prior counts taken off the head's bias; new is unch"
    )
    assert command("audit", "fixed", *CLEAN).code == 0
    compared = command("compare", "new", "fixed", "--group-by", "shot(many=10, few=5)", "--json").json()
    assert list(compared["by_group"]["attacks"]["clean"]) == ["classes", "average", "worst", "range"]
    names = [tested["name"] for tested in compared["by_group"]["attacks"]["clean"]["classes"]]
    assert names == ["many", "medium", "few"]
    assert compared["by_group"]["groups"] == "shot"


def test_two_audits_are_compared_by_the_difficulty_of_the_first(place: Path, command: Command) -> None:
    words = ["compare", "stored/before", "stored/after", "--group-by", "difficulty(attack=pgd-2)"]
    for more in ([], ["--paired"], ["--format", "markdown"], ["--format", "latex"]):
        outcome = command(*words, *more)
        assert outcome.code == 0, outcome.err
        for name in ("easy", "medium", "hard"):
            assert name in outcome.out
    compared = command(*words, "--json").json()
    assert [tested["n"] for tested in compared["by_group"]["attacks"]["clean"]["classes"]] == [12, 12, 16]
    assert "schema" in compared
    alike = ("--limit-per-class", 2, "--baseline", "baseline.json")
    audited = command("audit", "run", *CLEAN, *alike, "--group-by", "difficulty", "--json").json()
    assert audited["by_group"]["groups"] == ["easy", "medium", "hard"]
    assert audited["by_group"]["count"] == [6, 6, 8]


def test_an_edit_is_explained(place: Path, command: Command) -> None:
    (place / "tail.yaml").write_text("data: digits\ntrain: standard + class-balanced\nedit: long-tail(factor=7)\n")
    outcome = command("explain", "tail.yaml")
    assert outcome.out.splitlines()[0] == "before all training, edit: long-tail(factor=7)"
    assert "class-balanced: Weigh every example" in outcome.out
