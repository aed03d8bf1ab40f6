"""Sequential audits: the words of a rule, its rounds, where it stops, what its intervals hold, and how it goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.until import FAAL, PLAIN, audit_of, simulate, truth_of
from robustfair.data import ImageDataset
from robustfair.errors import CheckpointError, ConfigError, DataError, RobustFairWarning, UnknownNameError
from robustfair.evaluate import sequential
from robustfair.evaluate.gates import check, measured, parse_gate
from robustfair.evaluate.groups import read_groups
from robustfair.evaluate.plan import AuditPlan
from robustfair.evaluate.result import Audit, load_audit
from robustfair.evaluate.run import audit
from robustfair.evaluate.sequential import (
    FIRST,
    LEAST,
    MOST,
    NARROW,
    NO_TIME,
    USED_UP,
    Rounds,
    Until,
    audit_until,
    parse_until,
    until_line,
)
from robustfair.report.forms import audit_lines

Same = Callable[[Audit, Audit], bool]
ATTACK: dict[str, Any] = {"attacks": "pgd-3", "eps": 0.03, "step_size": 0.03}
NAMES = ("ant", "bee", "cow", "dog")


class Line(nn.Module):
    """Four classes on the line of one pixel, which change at 0.25, 0.5 and 0.75; counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 1, 1) -> logits (B, 4)."""
        self.seen += len(x)
        centres = torch.tensor([0.125, 0.375, 0.625, 0.875])
        return -self.scale * (x.flatten(1) - centres).square()


def on_the_line(counts: tuple[int, ...], robust: tuple[float, ...]) -> ImageDataset:
    """Images of `Line`: of each class, all right when clean, a share deep inside and the others 0.01 from a border."""
    pixels, labels = [], []
    for label, (n, share) in enumerate(zip(counts, robust, strict=True)):
        edge = 0.24 + 0.25 * label if label < 3 else 0.76
        deep = torch.arange(n) < round(share * n)
        pixels.append(torch.where(deep, 0.125 + 0.25 * label, edge))
        labels.append(torch.full((n,), label))
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    images = (torch.cat(pixels)[order] * 255).round().to(torch.uint8).view(-1, 1, 1, 1)
    return ImageDataset(images=images, labels=torch.cat(labels)[order], class_names=NAMES, name="line")


@pytest.fixture(scope="module")
def line() -> ImageDataset:
    """4,000 images; the second class is clearly the worst."""
    return on_the_line((1000,) * 4, (0.9, 0.2, 0.7, 0.8))


# Words


@pytest.mark.parametrize(
    ("text", "expected", "half_width"),
    [
        ("worst.robust=+-2", "worst.robust=+-2", 0.02),
        (" worst.robust = ±2 % ", "worst.robust=+-2", 0.02),
        ("Worst.robust=+/-2.50", "worst.robust=+-2.5", 0.025),
        ("average.clean=+-0.5%", "average.clean=+-0.5", 0.005),
        ("class.Mr. Who (1).cw-50(restarts=5)=+-50", "class.Mr. Who (1).cw-50(restarts=5)=+-50", 0.5),
        ("class.a=b.pgd-20=+-3", "class.a=b.pgd-20=+-3", 0.03),
        ("worst_10pct.robust=+-4", "worst-10pct.robust=+-4", 0.04),
    ],
)
def test_rules_are_read(text: str, expected: str, half_width: float) -> None:
    rule = parse_until(text)
    assert (rule.text, rule.half_width) == (expected, pytest.approx(half_width))
    assert parse_until(rule.text) == rule


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("worst.robust=2", ConfigError, r"stopping rule: text must be name=\+-points, like worst.robust=\+-2, got 'w"),
        ("worst.robust", ConfigError, "got 'worst.robust'"),
        ("", ConfigError, "got ''"),
        ("worst.robust=+-", ConfigError, r"like worst.robust=\+-2"),
        ("worst.robust=+-two", ConfigError, "half-width must be percentage points from 0.1 to 50, got 'two'"),
        ("worst.robust=+-0", ConfigError, "got '0'"),
        ("worst.robust=+-nan", ConfigError, "got 'nan'"),
        ("worst.robust=+--1", ConfigError, "got '-1'"),
        ("worst.robust=+-60%", ConfigError, "from 0.1 to 50, got '60'"),
        ("worst.robust=+-0.02", ConfigError, r"got '0.02'. Did you mean \+-2\?"),
        ("robust=+-2", ConfigError, r"stopping rule: name must be a measure and an attack, like worst.robust=\+-2"),
        ("wrost.robust=+-2", UnknownNameError, "unknown measure of a stopping rule 'wrost': did you mean worst"),
        ("class.robust=+-2", ConfigError, "class.NAME.ATTACK"),
        ("group.animals.robust=+-2", ConfigError, "measure must be over classes, not groups, got 'group'"),
        ("worst-group.robust=+-2", ConfigError, "not groups, got 'worst-group'"),
    ],
)
def test_rules_that_cannot_be_read(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_until(text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("class.cat.robust=+-2", "unknown class in the stopping rule class.cat.robust=[+]-2 'cat'"),
        ("worst.cw-20=+-2", "unknown attack in the stopping rule worst.cw-20=[+]-2 'cw-20'"),
    ],
)
def test_a_rule_on_what_the_audit_does_not_hold_is_refused_before_any_pass(
    line: ImageDataset, rule: str, message: str
) -> None:
    model = Line()
    with pytest.raises(UnknownNameError, match=message):
        audit_until(model, line, rule, **ATTACK)
    with pytest.raises(UnknownNameError, match="unknown argument of audit 'epss': did you mean eps"):
        audit_until(model, line, "worst.robust=+-2", epss=1)
    assert model.seen == 0


# Rounds


def rounds(text: str, sizes: tuple[int, ...] = (1000,) * 4) -> Rounds:
    return Rounds(rule=parse_until(text), class_names=NAMES, sizes=torch.tensor(sizes))


def test_the_first_round_takes_as_many_of_each_class() -> None:
    assert rounds("worst.robust=+-2", (1000, 20, 0, 60)).first().tolist() == [FIRST, 20, 0, FIRST]


@pytest.mark.parametrize(
    ("half_width", "factor"), [(0.04, MOST), (0.021, LEAST), (0.02 * 1.5**0.5, 1.5), (0.5, MOST), (0.0201, LEAST)]
)
def test_a_round_takes_what_the_width_asks_for_within_bounds(half_width: float, factor: float) -> None:
    n = torch.full((4,), 100)
    after = rounds("class-mean.robust=+-2").after(1, n // 2, n, half_width)
    assert after.tolist() == pytest.approx([100 * factor] * 4, abs=1)


@pytest.mark.parametrize(
    ("text", "going_on"),
    [
        ("worst.robust=+-2", [0, 1]),
        ("best.robust=+-2", [3]),
        ("range.robust=+-2", [0, 1, 3]),
        ("worst-50pct.robust=+-2", [0, 1]),
        ("worst-75pct.robust=+-2", [0, 1, 2]),
        ("class.cow.robust=+-2", [2]),
        ("average.robust=+-2", [0, 1, 2, 3]),
        ("class-mean.robust=+-2", [0, 1, 2, 3]),
    ],
)
def test_only_classes_that_can_change_the_number_go_on(text: str, going_on: list[int]) -> None:
    n, correct = torch.full((4,), 400), torch.tensor([80, 100, 200, 320])
    after = rounds(text).after(3, correct, n, 0.2)
    assert (after > n).nonzero().flatten().tolist() == going_on
    assert torch.equal(rounds(text, (400,) * 4).after(3, correct, n, 0.2), n), "nothing is left to take"


def test_a_class_without_images_neither_counts_nor_stops_the_others() -> None:
    n, correct = torch.tensor([50, 0, 50, 50]), torch.tensor([25, 0, 5, 5])
    assert rounds("worst.robust=+-2", (1000, 0, 60, 1000)).after(1, correct, n, 0.1).tolist() == [50, 0, 60, 100]


def test_later_rounds_leave_a_class_out_less_easily() -> None:
    n, correct = torch.full((4,), 100), torch.tensor([20, 47, 90, 90])
    found = [rounds("worst.robust=+-2").counting(number, correct, n).tolist() for number in (1, 20)]
    assert found == [[True, False, False, False], [True, True, False, False]]


def test_the_average_takes_classes_in_their_shares() -> None:
    of = rounds("average.robust=+-2", (3000, 600, 400, 0))
    assert of.first().tolist() == [113, 23, 15, 0]
    after = of.after(1, torch.tensor([50, 10, 5, 0]), of.first(), 0.04)
    assert after.tolist() == pytest.approx([226, 46, 30, 0], abs=2)


# Coverage


@pytest.mark.parametrize(
    ("rates", "sizes", "asked", "share"),
    [
        (PLAIN, (1000,) * 10, "worst.robust=+-4", 0.35),
        (FAAL, (20_000,) * 10, "worst.robust=+-3", 0.05),
        ((0.1,) * 10, (1000,) * 10, "worst.robust=+-4", 0.4),
        ((0.37,) * 5 + (0.65,) * 5, (1000,) * 10, "worst.robust=+-4", 0.6),
        (PLAIN, (1000,) * 10, "class.3.robust=+-3", 0.2),
        (PLAIN, (5000, 4000, 2000, 1000, 500, 400, 300, 200, 100, 60), "average.robust=+-2", 0.4),
    ],
    ids=["spread", "faal", "ties", "clusters", "class", "average"],
)
def test_intervals_at_the_stop_hold_the_truth(
    rates: tuple[float, ...], sizes: tuple[int, ...], asked: str, share: float
) -> None:
    """In at least nine of ten audits, as those of all images do; and the audit is cheaper by far."""
    rng, truth, rule = np.random.default_rng(3), truth_of(rates, sizes, asked), parse_until(asked)
    stopped = [simulate(rates, sizes, asked, rng)[0] for _ in range(100)]
    assert np.mean([each.holds(truth) for each in stopped]) >= 0.9
    assert np.mean([int(each.images.sum()) for each in stopped]) < share * sum(sizes)
    assert all(each.half_width <= rule.half_width for each in stopped)


def test_the_average_of_unlike_shares_is_not_that_of_the_images_attacked() -> None:
    """Stopping at the worst class leaves mostly its images; their plain mean is far off, the average is not."""
    rng = np.random.default_rng(0)
    sizes, truth = (1000,) * 10, float(np.mean(PLAIN))
    held, pooled = 0, []
    for _ in range(100):
        found, _ = simulate(PLAIN, sizes, "worst.robust=+-4", rng)
        correct = torch.from_numpy(rng.binomial(found.images.numpy(), PLAIN))
        result = audit_of(correct, found.images, sizes)
        lower, upper = result.average_interval("attack")
        held += lower <= truth <= upper
        pooled.append(int(correct.sum()) / int(found.images.sum()))
    assert held >= 90
    assert np.mean(pooled) < truth - 0.1


# Audits


def test_it_stops_where_the_worst_class_is_known_well_enough(line: ImageDataset) -> None:
    model, said = Line(), []
    found = audit_until(model, line, "worst.robust=+-4", on_round=said.append, **ATTACK)
    about = found.provenance["until"]
    counts = found.count().tolist()
    assert (about["asked"], about["stopped"]) == ("worst.robust=+-4", NARROW)
    assert about["images"][0] == [FIRST] * 4
    assert about["images"][-1] == counts
    assert about["of"] == [line.fingerprint, 4000]
    lower, upper = found.worst_interval("robust")
    assert (upper - lower) / 2 == about["half_width"] <= 0.04
    assert found.worst("robust").name == "bee"
    assert lower < 0.2 < upper
    assert counts[1] == max(counts) > 300
    assert [counts[0], counts[2], counts[3]] == [FIRST, 2 * FIRST, FIRST]
    assert found.complete
    assert re.fullmatch(r"round 1: 200 images, worst\.robust \d+\.\d % \+-\d+ points", said[0])
    assert len(said) == len(about["images"])
    assert until_line(found) == (
        f"until worst.robust=+-4: narrow enough at +-{100 * about['half_width']:.2g} points, after {len(said)} rounds "
        f"and {sum(counts):,} of 4,000 images (ant: 50, bee: {counts[1]:,}, cow: 100, dog: 50)"
    )
    assert until_line(found) in audit_lines(found)


def test_it_is_the_audit_of_the_images_that_it_attacked(line: ImageDataset, tmp_path: Path) -> None:
    found = audit_until(Line(), line, "worst.robust=+-5", attacks="fgsm,pgd-3", eps=0.03, step_size=0.03)
    images = line.drawn_rows(found.index, "by hand")
    plain = audit(Line(), images, attacks="fgsm,pgd-3", eps=0.03, step_size=0.03)
    assert torch.equal(found.index, found.index.sort().values)
    assert len(found.index.unique()) == len(found.index)
    for attack in plain.attacks:
        assert torch.equal(found.prediction(attack), plain.prediction(attack))
    assert torch.equal(found.labels, plain.labels)
    assert (found.fingerprint, found.drawn_from) == (plain.fingerprint, (1000,) * 4)
    assert found.settings == plain.settings
    assert found.provenance["input_gradients"] == plain.provenance["input_gradients"]
    assert found.provenance["seed"] == 0
    assert found.provenance["sample"] == f"{len(found.index):,} of 4,000 images, until worst.robust=+-5"
    assert AuditPlan.of(found).key != AuditPlan.of(plain).key
    read = load_audit(found.save(tmp_path, "sequential")[0])
    assert read.to_dict() == found.to_dict()
    assert until_line(read) == until_line(found)
    (gate,) = check([parse_gate("interval.worst.robust.lower=0.05")], read)
    assert gate.passed


def test_its_average_is_that_of_the_data_and_groups_are_refused(line: ImageDataset) -> None:
    found = audit_until(Line(), line, "worst.robust=+-4", **ATTACK)
    rate = found.rate("pgd-3")
    assert found.average("pgd-3") == pytest.approx(float(rate.mean()))
    assert found.summary("pgd-3")["average"] == found.average("pgd-3")
    assert found.average("pgd-3") == pytest.approx(0.65, abs=0.06)
    pooled = float(found.hits("pgd-3").double().mean())
    assert pooled < 0.45
    assert "average: every class weighs by its share of the 4,000 images" in audit_lines(found)
    with pytest.raises(DataError, match="the sample holds another share of some classes than of others"):
        read_groups("superclass", found)


def test_the_same_call_finds_the_same_and_another_seed_other_images(line: ImageDataset, same: Same) -> None:
    one, two, other = (
        audit_until(Line(), line, "worst.robust=+-5", seed=seed, **ATTACK | {"attacks": "pgd-3,square(queries=5)"})
        for seed in (0, 0, 1)
    )
    assert same(one, two)
    assert torch.equal(one.index, two.index)
    assert one.provenance["until"] == two.provenance["until"]
    assert not torch.equal(one.index[:100], other.index[:100])


def test_its_first_round_is_the_stratified_sample(line: ImageDataset) -> None:
    found = audit_until(Line(), line, "worst.robust=+-50", seed=3, **ATTACK)
    assert torch.equal(found.index, line.sample(200, stratified=True, seed=3).drawn.places)  # type: ignore[union-attr]
    assert not found.reweighted


def test_it_stops_where_no_images_are_left_of_the_classes_that_count() -> None:
    data = on_the_line((300, 120, 300, 300), (0.9, 0.2, 0.8, 0.8))
    found = audit_until(Line(), data, "worst.robust=+-1", **ATTACK)
    assert found.provenance["until"]["stopped"] == USED_UP
    assert found.count()[1] == 120
    assert found.count()[[0, 2, 3]].tolist() == [50, 50, 50]
    assert "no images left of the classes that count at +-" in until_line(found)
    everything = audit_until(Line(), data, "class-mean.robust=+-0.1", **ATTACK)
    assert torch.equal(everything.index, torch.arange(1020))
    assert not everything.reweighted


def test_one_class_and_other_numbers(line: ImageDataset) -> None:
    of_one = audit_until(Line(), line, "class.dog.pgd-3=+-5", **ATTACK)
    assert of_one.count()[:3].tolist() == [FIRST] * 3
    assert of_one.count()[3] > 150
    for name in ("average.robust=+-3", "range.robust=+-6", "worst-50pct.pgd-3=+-4"):
        found = audit_until(Line(), line, name, **ATTACK)
        rule = parse_until(name)
        _, lower, upper = measured(rule, rule.attack, found)
        assert (upper - lower) / 2 <= rule.half_width


def test_members_and_points_stay_with_their_images(line: ImageDataset) -> None:
    attacks = "apgd-ce(steps=5),square(queries=20)"
    found = audit_until(Line(), line, "worst.robust=+-6", attacks=attacks, eps=0.03, keep_points=True)
    assert found.provenance["until"]["stopped"] == NARROW
    assert len(found.provenance["until"]["images"]) > 1
    for name in found.attacks[1:]:
        broken = found.broken_by[name] == 0
        assert torch.equal(broken, ~found.hits(name))
        assert sorted(found.points[name]) == broken.nonzero().flatten().tolist()
        for row, point in found.points[name].items():
            image = line.images[found.index[row]] / 255
            assert float((point - image).abs().max()) <= 0.03 + 1e-6
            assert int(Line()(point[None]).argmax()) == int(found.predictions[name][row])
        assert found.settings[name]["ran"] == {name: 1.0}


def test_it_can_run_on_a_sample(line: ImageDataset) -> None:
    sample = line.sample(1000, stratified=True, seed=5)
    found = audit_until(Line(), sample, "worst.robust=+-5", **ATTACK)
    assert found.drawn_from == (1000,) * 4
    assert set(found.index.tolist()) <= set(sample.drawn.places.tolist())  # type: ignore[union-attr]
    assert torch.equal(found.labels, line.labels[found.index])
    assert f"{len(found.index)} of 1,000 images" in until_line(found)


# Stops and journals


def test_an_interrupted_audit_goes_on_and_ends_the_same(
    line: ImageDataset, tmp_path: Path, same: Same, at_pass: Callable[..., Any]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    keys = ATTACK | {"attacks": "pgd-3,square(queries=30)", "batch_size": 50}
    model = Line()
    with at_pass(model, 10**9, stop) as passes:
        whole = audit_until(model, line, "worst.robust=+-4", **keys)
    for number in (passes[0] // 3, passes[0] // 2, passes[0] - 3):
        journal = tmp_path / str(number) / "unfinished.safetensors"
        model = Line()
        with at_pass(model, number, stop), pytest.raises(KeyboardInterrupt):
            audit_until(model, line, "worst.robust=+-4", journal=journal, **keys)
        assert list(journal.parent.glob("unfinished-round-*.safetensors"))
        model = Line()
        with at_pass(model, 10**9, stop) as more:
            found = audit_until(model, line, "worst.robust=+-4", journal=journal, **keys)
        assert more[0] < passes[0]
        assert same(found, whole)
        assert found.fingerprint == whole.fingerprint
        assert not list(journal.parent.glob("unfinished*"))


def test_time_ends_it_with_the_rounds_that_ran(
    line: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: Same
) -> None:
    whole = audit_until(Line(), line, "worst.robust=+-4", **ATTACK)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    journal = tmp_path / "unfinished.safetensors"

    def late(text: str) -> None:
        now[0] += 60.0 * text.startswith("round 2")

    told = r"^audit: 1 minutes are over before worst\.robust=\+-4: 300 images, .* points\. The same command goes on"
    with pytest.warns(RobustFairWarning, match=told):
        cut = audit_until(Line(), line, "worst.robust=+-4", max_minutes=1, on_round=late, journal=journal, **ATTACK)
    assert cut.provenance["until"]["stopped"] == NO_TIME
    assert cut.provenance["until"]["images"] == whole.provenance["until"]["images"][:2]
    assert cut.complete
    assert len(list(tmp_path.glob("unfinished-round-*"))) == 2
    model = Line()
    found = audit_until(model, line, "worst.robust=+-4", max_minutes=1, journal=journal, **ATTACK)
    assert same(found, whole)
    assert list(tmp_path.iterdir()) == []


def test_time_within_a_round_leaves_it_out_and_within_the_first_is_told(
    line: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, model = [0.0], Line()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 60.0))
    keys = ATTACK | {"attacks": "pgd-3,cw-3,square(queries=50)", "checks": False}
    with pytest.warns(RobustFairWarning, match=r"left cw-3 at 0 %, .* Robust accuracies are upper bounds\.$"):
        cut = audit_until(model, line, "worst.cw-3=+-4", max_minutes=3, **keys)
    assert not cut.complete
    assert until_line(cut).startswith("until worst.cw-3=+-4: out of time, after 1 round and 200 of 4,000 images")
    assert (cut.provenance["until"]["stopped"], len(cut.labels)) == (NO_TIME, 200)
    now[0] = 0.0
    audit_until(model, line, "worst.robust=+-50", **keys)
    first = now[0] / 60
    now[0] = 0.0
    with pytest.warns(RobustFairWarning, match="minutes are over before") as warned:
        some = audit_until(model, line, "worst.robust=+-4", max_minutes=first + 4, **keys)
    assert some.complete
    assert (some.provenance["until"]["stopped"], len(some.labels)) == (NO_TIME, 200)
    assert len([each for each in warned if "minutes are over" in str(each.message)]) == 1


def test_a_journal_of_another_model_is_refused(line: ImageDataset, tmp_path: Path) -> None:
    journal = tmp_path / "unfinished.safetensors"
    audit_until(Line(), line, "worst.robust=+-5", journal=journal, keep_journal=True, **ATTACK)
    assert list(tmp_path.glob("unfinished-round-*"))
    other = Line()
    with torch.no_grad():
        other.scale.mul_(2)
    with pytest.raises(CheckpointError, match=r"unfinished-round-1\.safetensors belongs to another audit .*model"):
        audit_until(other, line, "worst.robust=+-5", journal=journal, **ATTACK)


def test_progress_names_the_round_and_the_model_is_looked_at_once(
    line: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = sequential.audit

    def watched(*given: Any, **keys: Any) -> Audit:
        asked.append(keys["checks"])
        return real(*given, **keys)

    monkeypatch.setattr(sequential, "audit", watched)
    heard: list[str] = []
    audit_until(Line(), line, "worst.robust=+-6", on_progress=lambda attack, *_: heard.append(attack), **ATTACK)
    assert asked[0]
    assert len(asked) > 1
    assert not any(asked[1:])
    assert list(dict.fromkeys(heard))[:3] == ["clean, round 1", "pgd-3, round 1", "clean, round 2"]


def test_no_images_are_refused(line: ImageDataset) -> None:
    with pytest.raises(DataError, match="no images to audit on"):
        audit_until(Line(), line.subset([]), "worst.robust=+-2", **ATTACK)


def test_a_rule_is_a_quantity_of_gates() -> None:
    gate, rule = parse_gate("worst-10pct.pgd-20=0.2"), parse_until("worst-10pct.pgd-20=+-2")
    assert (gate.name, gate.measure, gate.attack) == (rule.name, rule.measure, rule.attack)
    assert replace(rule, half_width=0.1) == Until(
        text=rule.text, measure="worst-10pct", subject="", attack="pgd-20", half_width=0.1
    )
