"""Gates: their grammar, their verdicts, and what an audit that was cut short cannot prove."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.audits import made_audit
from robustfair import metrics
from robustfair.errors import ConfigError, RobustFairError, UnknownNameError
from robustfair.evaluate.gates import Gate, GateResult, check, parse_gate, require_known
from robustfair.evaluate.groups import GroupRates, read_groups, regroup
from robustfair.evaluate.result import Audit

CW = "cw-50(restarts=5, step_size=0.01)"


def toy(**ran: float) -> Audit:
    """Ten cats, ten dogs and ten cars: robust 4, 8 and 6 of ten; `ran` are shares of the cw attack."""
    labels = [c for c in range(3) for _ in range(10)]

    def column(*right: int) -> list[int]:
        return [c if i % 10 < right[c] else (c + 1) % 3 for i, c in enumerate(labels)]

    columns = {"clean": column(9, 10, 8), "pgd-20": column(5, 8, 7), CW: column(4, 9, 6)}
    audit = made_audit(labels, columns, ("cat", "dog", "car"), groups=(0, 0, 1))
    return replace(audit, settings={**audit.settings, CW: {"ran": ran}}) if ran else audit


def gappy() -> Audit:
    """The same with a fourth class, "Mr. Who (1)", of which there is no image, in a group of its own."""
    return replace(toy(), class_names=("cat", "dog", "car", "Mr. Who (1)"), groups=(0, 0, 1, 2))


def grouped(audit: Audit, within: str = "class") -> GroupRates:
    return regroup(audit, replace(read_groups("superclass", audit), names=("animals", "things")), within=within)


def one(text: str, audit: Audit | None = None, groups: GroupRates | None = None) -> GateResult:
    (result,) = check([parse_gate(text)], audit or toy(), groups)
    return result


# Grammar


@pytest.mark.parametrize(
    ("text", "measure", "subject", "attack", "end", "at_least", "bound"),
    [
        ("worst.robust=0.30", "worst", "", "robust", "", True, 0.3),
        (" average.clean >= 80 % ", "average", "", "clean", "", True, 0.8),
        ("worst.pgd-20=.2", "worst", "", "pgd-20", "", True, 0.2),
        ("interval.worst.robust.lower=25%", "worst", "", "robust", "lower", True, 0.25),
        ("interval.average.autoattack.upper<=1", "average", "", "autoattack", "upper", False, 1.0),
        ("class.cat.robust=0", "class", "cat", "robust", "", True, 0.0),
        ("class.Mr. Who (1).cw-50(restarts=5)<=0.2", "class", "Mr. Who (1)", "cw-50(restarts=5)", "", False, 0.2),
        ("class.a=b.pgd-20=0.1", "class", "a=b", "pgd-20", "", True, 0.1),
        ("interval.class.cat.robust.lower=0.1", "class", "cat", "robust", "lower", True, 0.1),
        ("group.big animals.robust=35%", "group", "big animals", "robust", "", True, 0.35),
        ("worst-group.robust=0.35", "worst-group", "", "robust", "", True, 0.35),
        ("range.robust<=0.5", "range", "", "robust", "", False, 0.5),
        ("range.robust>=0.5", "range", "", "robust", "", True, 0.5),
        ("Worst_10pct.robust=0.2", "worst-10pct", "", "robust", "", True, 0.2),
        ("worst-2.5pct.cw-50(step_size=0.01)=0.2", "worst-2.5pct", "", "cw-50(step_size=0.01)", "", True, 0.2),
        (
            "class_mean.cw-20(restarts=5, start=zero)=1%",
            "class-mean",
            "",
            "cw-20(restarts=5, start=zero)",
            "",
            True,
            0.01,
        ),
    ],
)
def test_gates_are_read(text, measure, subject, attack, end, at_least, bound) -> None:
    gate = parse_gate(text)
    expected = (measure, subject, attack, end, at_least, pytest.approx(bound))
    assert (gate.measure, gate.subject, gate.attack, gate.end, gate.at_least, gate.bound) == expected
    assert gate.text == text.strip()


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="=<>"), min_size=1, max_size=12).filter(str.strip),
    st.sampled_from(["robust", "pgd-20", "cw-50(restarts=5, step_size=0.01)"]),
    st.sampled_from([">=", "<=", "="]),
)
def test_any_class_name_can_be_gated(name: str, attack: str, sign: str) -> None:
    name = " ".join(name.split())
    gate = parse_gate(f"class.{name}.{attack}{sign}0.5")
    assert (gate.subject, gate.attack, gate.at_least, gate.bound) == (name, attack, sign != "<=", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worst.robust", "gate: text must be name=value, like worst.robust=0.30, got 'worst.robust'. In a shell, put"),
        ("", "like worst.robust=0.30, got ''"),
        ("worst.robust<0.3", "put quotes around a gate that holds < or >"),
        ("worst.robust=30", r"^worst.robust=30: value must be a fraction of 1, or .* %, got '30'. Did you mean 30%\?$"),
        ("worst.robust=1.5", r"Did you mean 1.5%\?"),
        ("worst.robust=300", r"or a number with %, got '300'$"),
        ("worst.robust=130%", "up to 100%, got '130%'"),
        ("worst.robust=-0.1", "got '-0.1'"),
        ("worst.robust=nan", "got 'nan'"),
        ("worst.robust=a lot", "got 'a lot'"),
        ("robust=0.3", "a measure and an attack, like worst.robust=0.30, got 'robust'"),
        ("wrost.robust=0.3", "unknown measure of a gate 'wrost': did you mean worst"),
        ("worst-200pct.robust=0.3", "worst-Qpct with Q up to 100, got 'worst-200pct'"),
        ("class.robust=0.3", "class.NAME.ATTACK, got 'class.robust'"),
        ("worst.cat.robust=0.3", "worst.ATTACK, got 'worst.cat.robust'"),
        ("interval.worst.robust=0.3", "lower or upper, as the last word of the name, got 'robust'"),
        ("range.robust=0.5", "<= or >= for the range, where more is worse, got 'range.robust=0.5'. Put it in quotes"),
    ],
)
def test_what_is_no_gate_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RobustFairError, match=message) as caught:
        parse_gate(text)
    assert "\n" not in str(caught.value)


# Verdicts


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("worst.robust=0.30", "passed: worst.robust is 0.400 (cat), at least 0.30"),
        ("worst.robust=0.4", "passed: worst.robust is 0.400 (cat), at least 0.40"),
        ("worst.robust=0.41", "failed: worst.robust is 0.400 (cat), below 0.41"),
        ("average.clean=90%", "passed: average.clean is 0.900, at least 0.90"),
        ("average.robust=0.6001", "failed: average.robust is 0.6000, below 0.6001"),
        ("class.dog.pgd-20=0.8", "passed: class.dog.pgd-20 is 0.800, at least 0.80"),
        ("class.dog.pgd-20<=0.7", "failed: class.dog.pgd-20 is 0.800, above 0.70"),
        ("range.robust<=0.4", "passed: range.robust is 0.400, at most 0.40"),
        ("range.pgd-20<=0.2", "failed: range.pgd-20 is 0.300, above 0.20"),
        ("range.pgd-20>=0.3", "passed: range.pgd-20 is 0.300, at least 0.30"),
        ("best.PGD_20=0.8", "passed: best.PGD_20 is 0.800, at least 0.80"),
        ("class-mean.clean=0.9", "passed: class-mean.clean is 0.900, at least 0.90"),
        ("worst-67pct.robust=0.5", "passed: worst-67pct.robust is 0.500, at least 0.50"),
        ("worst.cw-50(step_size=0.01)=0.4", None),
        (
            "worst.CW_50(restarts=5,step_size=0.01)=40%",
            "passed: worst.CW_50(restarts=5,step_size=0.01) is 0.400 (cat), at least 0.40",
        ),
    ],
)
def test_verdicts_by_hand(text: str, line: str | None) -> None:
    if line is None:
        with pytest.raises(UnknownNameError, match="attack in the gate"):
            one(text)
        return
    result = one(text)
    assert result.line == line
    assert (result.status, result.passed) == (line.split(":")[0], line.startswith("passed"))


def test_intervals_are_those_of_the_tables() -> None:
    audit = toy()
    for text, expected in {
        "interval.average.robust.lower=0.1": audit.average_interval("robust")[0],
        "interval.average.robust.upper=0.1": audit.average_interval("robust")[1],
        "interval.worst.pgd-20.lower=0.1": audit.worst_interval("pgd-20")[0],
        "interval.worst.pgd-20.upper=0.1": audit.worst_interval("pgd-20")[1],
        "interval.class.car.robust.lower=0.1": float(audit.interval("robust")[0][2]),
        "interval.class.car.robust.upper=0.1": float(audit.interval("robust")[1][2]),
        "interval.range.robust.upper<=0.1": metrics.bootstrap_statistic(
            audit.correct("robust"), audit.count(), "range"
        ).upper,
    }.items():
        assert one(text, audit).value == expected
    assert one("interval.worst.robust.lower=0.9").line.startswith("failed: interval.worst.robust.lower is 0.")


def test_gates_on_groups() -> None:
    audit = toy()
    groups = grouped(audit)
    assert one("group.animals.robust=0.6", audit, groups).line == "passed: group.animals.robust is 0.600, at least 0.60"
    assert one("worst-group.pgd-20=0.7", audit, groups).line == (
        "failed: worst-group.pgd-20 is 0.650 (animals), below 0.70"
    )
    assert one("interval.worst-group.pgd-20.lower=0.7", audit, groups).value == groups.worst_interval("pgd-20")[0]
    assert one("worst.robust=0.4", audit, groups).value == 0.4
    with pytest.raises(ConfigError, match=r"group.animals.robust=0.6 must be used with --group-by"):
        one("group.animals.robust=0.6")


def test_results_keep_their_order_and_go_into_json() -> None:
    texts = ["worst.robust=0.9", "average.clean=0.5", "class.Mr. Who (1).clean=0.1"]
    results = check(map(parse_gate, texts), gappy())
    assert [result.gate.text for result in results] == texts
    about = json.loads(json.dumps([result.to_dict() for result in results], allow_nan=False))
    assert [entry["status"] for entry in about] == ["failed", "passed", "undecided"]
    assert [entry["value"] for entry in about] == [0.4, 0.9, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worst.autoattack=0.3", "unknown attack in the gate worst.autoattack=0.3 'autoattack': known: clean, cw-50"),
        ("class.cta.robust=0.3", "unknown class in the gate class.cta.robust=0.3 'cta': did you mean cat"),
        ("group.animal.robust=0.3", "unknown group in the gate group.animal.robust=0.3 'animal': did you mean animals"),
    ],
)
def test_unknown_names_show_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        one(text, toy(), grouped(toy()))


def test_gates_are_held_against_names_before_an_audit_runs() -> None:
    def known(*texts: str, groups: tuple[str, ...] | None = None) -> None:
        require_known(map(parse_gate, texts), attacks=["pgd-20"], classes=("cat",), groups=groups)

    known("average.clean=0.3", "worst.robust=0.2", "class.cat.PGD_20=0.1")
    known("group.a.robust=0.3", "worst-group.robust=0.1", groups=("a",))
    for text in ("worst.pgd-50=0.3", "class.dog.clean=0.2", "worst-group.robust=0.3"):
        with pytest.raises(RobustFairError):
            known(text)


# What is not known


CUT = {"apgd-ce": 1.0, "apgd-t": 0.4}


@pytest.mark.parametrize(
    ("text", "whole", "cut"),
    [
        (f"worst.{CW}=0.3", "passed", "undecided"),
        (f"worst.{CW}=0.5", "failed", "failed"),
        (f"worst.{CW}<=0.5", "passed", "passed"),
        (f"worst.{CW}<=0.3", "failed", "undecided"),
        (f"average.{CW}=0.3", "passed", "undecided"),
        (f"class.dog.{CW}=0.3", "passed", "undecided"),
        (f"interval.worst.{CW}.lower=0.05", "passed", "undecided"),
        (f"range.{CW}<=0.9", "passed", "undecided"),
        (f"range.{CW}<=0.1", "failed", "undecided"),
        ("worst.robust=0.3", "passed", "undecided"),
        ("group.things.robust=0.3", "passed", "undecided"),
        ("worst.pgd-20=0.3", "passed", "passed"),
        ("average.clean=0.3", "passed", "passed"),
    ],
)
def test_an_attack_that_was_cut_short_proves_no_lower_gate(text: str, whole: str, cut: str) -> None:
    finished, short = toy(**{"apgd-ce": 1.0, "apgd-t": 1.0}), toy(**CUT)
    assert one(text, finished, grouped(finished)).status == whole
    result = one(text, short, grouped(short))
    assert result.status == cut
    assert result.passed == (cut == "passed")
    if cut == "undecided":
        assert f"is asked, but the time budget left apgd-t of {CW} at 40 %" in result.line
        assert result.line.endswith("the accuracy is an upper bound")


def test_an_attack_that_did_not_run_leaves_its_gates_and_robust_undecided() -> None:
    audit = replace(toy(), provenance={"not_run": ["square"]})
    assert one("worst.Square=0.1", audit).line == (
        "undecided: worst.Square is not known, the time budget left square at 0 %"
    )
    assert one("worst.robust=0.3", audit).status == "undecided"
    assert one("worst.robust=0.5", audit).status == "failed"
    assert one("worst.pgd-20=0.3", audit).status == "passed"


def test_predictions_within_a_group_are_an_upper_bound_too() -> None:
    audit = toy()
    groups = grouped(audit, within="group")
    assert one("group.animals.clean=0.5", audit, groups).status == "passed"
    result = one("group.animals.robust=0.5", audit, groups)
    assert result.status == "undecided"
    assert "aimed at another class, not at another group" in result.line
    assert one("group.animals.robust=0.999", audit, groups).status == "failed"


GAP = "Mr. Who (1) has no images"


@pytest.mark.parametrize("attack", ["clean", "robust", "pgd-20"])
def test_what_is_taken_over_classes_is_not_known_while_one_has_no_images(attack: str) -> None:
    audit = gappy()
    for text in (
        f"worst.{attack}=0.1",
        f"worst.{attack}<=1",
        f"interval.worst.{attack}.lower=0.01",
        f"interval.worst.{attack}.upper<=1",
        f"worst-10pct.{attack}=0.1",
        f"class-mean.{attack}=0.99",
        f"best.{attack}=0.1",
        f"range.{attack}<=0.9",
        f"range.{attack}<=0.01",
    ):
        assert one(text, toy()).status in ("passed", "failed")
        result = one(text, audit)
        assert (result.status, result.line.endswith(f"is asked, but {GAP}")) == ("undecided", True), result.line
    gone = one(f"class.Mr. Who (1).{attack}=0.4", audit)
    assert gone.line == f"undecided: class.Mr. Who (1).{attack} has no images"


def test_a_class_without_images_leaves_alone_what_is_not_about_it() -> None:
    audit = gappy()
    assert one("average.clean=0.5", audit).status == "passed"
    assert one("class.dog.robust=0.8", audit).status == "passed"
    assert one("worst.robust=0.41", audit).line == "failed: worst.robust is 0.400 (cat), below 0.41"
    assert one("interval.worst.robust.lower=0.9", audit).status == "failed"


def test_a_group_without_images_leaves_the_worst_group_undecided() -> None:
    audit = gappy()
    groups = regroup(audit, replace(read_groups("superclass", audit), names=("animals", "things", "people")))
    assert one("group.people.clean=0.1", audit, groups).line == "undecided: group.people.clean has no images"
    assert one("worst-group.clean=0.1", audit, groups).line.endswith("is asked, but people has no images")
    assert one("worst-group.pgd-20=0.7", audit, groups).status == "failed"
    assert one("group.animals.robust=0.6", audit, groups).status == "passed"


@pytest.mark.parametrize(
    "text",
    [
        "worst.robust=0.1",
        "worst.robust=0.99",
        "average.robust=0",
        "average.robust<=1",
        "class.cat.robust=0.1",
        "interval.worst.robust.lower=0.1",
        "range.robust<=1",
        "worst-group.robust=0.1",
    ],
)
def test_robust_is_not_known_where_nothing_attacked_the_model(text: str) -> None:
    audit = replace(toy(), predictions={"clean": toy().predictions["clean"]})
    result = one(text, audit, grouped(audit))
    name = result.gate.name
    assert result.line == (
        f"undecided: {name} is not known, nothing attacked the model, the audit is of clean images alone"
    )
    assert math.isnan(result.value)
    assert one(text.replace("robust", "clean"), audit, grouped(audit)).status != "undecided"
    cut = replace(audit, provenance={"not_run": ["pgd-20"]})
    assert one(text, cut, grouped(cut)).line == f"undecided: {name} is not known, the time budget left pgd-20 at 0 %"


def test_an_attack_of_radius_or_step_zero_is_none() -> None:
    audit = toy()
    none = replace(audit, threat=replace(audit.threat, eps=0.0))
    stood = replace(audit, settings={"pgd-20": {"step_size": 0.0}, CW: {"step_size": 0.01}})
    for name, undecided in (("pgd-20", (none, stood)), (CW, (none,)), ("robust", (none,))):
        for one_of in undecided:
            assert one(f"worst.{name}=0.1", one_of).line == (
                f"undecided: worst.{name} is not known, the radius or the step of the attack is 0, "
                "so that it searched nothing"
            )
    assert one("worst.robust=0.1", stood).status == "passed"
    assert one("worst.clean=0.1", none).status == "passed"


def test_a_tie_for_the_worst_is_said_as_a_tie() -> None:
    labels = [c for c in range(3) for _ in range(4)]
    audit = made_audit(labels, {"clean": labels, "pgd-20": [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 0, 0]}, ("cat", "dog", "car"))
    assert one("worst.robust=0.1", audit).line == "failed: worst.robust is 0.000 (cat and 1 other), below 0.10"
    assert one("worst.clean=0.1", audit).line == "passed: worst.clean is 1.000 (all classes), at least 0.10"


def test_a_value_is_not_refused_for_its_last_bit() -> None:
    gate = Gate(text="", measure="range", subject="", attack="clean", end="", at_least=False, bound=0.3)
    labels = [0] * 10 + [1] * 10
    audit = made_audit(labels, {"clean": [0] * 9 + [1] + [1] * 6 + [0] * 4}, ("a", "b"))
    (result,) = check([gate], audit)
    assert result.value == pytest.approx(0.3)
    assert result.value > 0.3
    assert result.passed
    assert not math.isnan(result.value)
