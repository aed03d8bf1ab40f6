"""Groups by training images and by difficulty, against plain loops; what is not known is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.audits import made_audit, random_audit
from robustfair import metrics
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, DataError, RecipeError, UnknownNameError
from robustfair.evaluate import check, parse_gate
from robustfair.evaluate.compare import compare, compare_many
from robustfair.evaluate.grouping import Difficulty, Shot, recorded_counts
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.evaluate.result import Audit, load_audit
from robustfair.report.layout import render
from robustfair.report.rates import image_lines
from robustfair.report.table import comparison_table, group_table

NAMES = ("a", "b", "c", "d", "e")
COUNTS = (500, 101, 100, 20, 19)


def tail(*, trained_on: tuple[int, ...] | None = COUNTS, seed: int = 0, each: int = 6, **fields: Any) -> Audit:
    """An audit of five classes with as many test images each, whose run recorded what it trained on."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(5 * each) % 5
    hit = torch.rand(len(labels), generator=rng) < 1 - labels / 6
    clean = torch.where(hit, labels, (labels + 1) % 5)
    robust = torch.where(hit & (torch.rand(len(labels), generator=rng) < 0.7), labels, (labels + 1) % 5)
    robust = torch.where(hit, robust, clean)
    known = {} if trained_on is None else {"trained_on": {"images_per_class": list(trained_on)}}
    predictions = {"clean": clean.tolist(), "pgd-20": robust.tolist()}
    return made_audit(labels.tolist(), predictions, NAMES, **{"provenance": known, **fields})


# Shots


def test_shots_follow_the_recorded_counts() -> None:
    audit = tail()
    groups = read_groups("shot", audit)
    assert (groups.names, groups.member.tolist()) == (("many", "medium", "few"), [0, 0, 1, 1, 2])
    rates = regroup(audit, groups)
    for attack in ("clean", "pgd-20", "robust"):
        means = metrics.shots(audit.rate(attack), torch.tensor(COUNTS))
        assert rates.rate(attack).tolist() == pytest.approx([means.many, means.medium, means.few])
        lower, upper = rates.interval(attack)
        assert bool((lower <= rates.rate(attack)).all())
        assert bool((rates.rate(attack) <= upper).all())
    assert rates.about == (
        "Training images: many is more than 100 (2 classes), few is fewer than 20 (1 class), medium lies between "
        "(2 classes)."
    )


@pytest.mark.parametrize("by", ["shot(many=200, few=101)", "Shot(few=101, many=200)"])
def test_thresholds_are_settings(by: str) -> None:
    assert read_groups(by, tail()).member.tolist() == [0, 1, 2, 2, 2]


def test_counts_may_be_given_for_images_of_a_data_set() -> None:
    data = ImageDataset(images=torch.zeros(5, 1, 2, 2, dtype=torch.uint8), labels=torch.arange(5), class_names=NAMES)
    assert read_groups("shot", data, trained_on=COUNTS).member.tolist() == [0, 0, 1, 1, 2]
    assert Shot().groups(torch.tensor(COUNTS)).member.tolist() == [0, 0, 1, 1, 2]


def test_counts_that_are_not_known_are_asked_for() -> None:
    for images in (tail(trained_on=None), random_audit(1)):
        with pytest.raises(DataError, match="does not say how many images of each class it was trained on, as a run"):
            read_groups("shot", images)
    with pytest.raises(DataError, match="shot: 2 classes were trained on, and 5 are audited"):
        read_groups("shot", tail(trained_on=None), trained_on=(1, 2))


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        ("shot(few=101)", ConfigError, "shot: few must be at most many, 100, got 101"),
        ("shot(many=-1)", ConfigError, "shot: many must be"),
        ("shot(least=3)", UnknownNameError, "unknown key of shot 'least'"),
        ("shot + shot", DataError, "does not exist: group by superclass, shot, difficulty, or by a CSV file"),
        ("shot() + difficulty", RecipeError, "names 2 groupings: give one"),
        ("shots", DataError, "shots does not exist: group by superclass, shot, difficulty, or by a CSV file"),
        ("difficulty(attack=1)", ConfigError, "difficulty: attack must be"),
    ],
)
def test_what_cannot_be_read_is_refused(by: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_groups(by, tail())


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shot").write_text("class,group\n" + "".join(f"{name},x\n" for name in NAMES))
    assert read_groups("shot", tail()).names == ("x",)


# Difficulty


@pytest.mark.parametrize("attack", ["clean", "pgd-20", "robust"])
def test_difficulty_is_that_of_the_baseline(attack: str) -> None:
    baseline, audit = tail(seed=1), tail(seed=2)
    groups = read_groups(f"difficulty(attack={attack})", audit, baseline=baseline)
    order = sorted(range(5), key=lambda c: (-baseline.rate(attack)[c], c))
    member = [0] * 5
    for rank, c in enumerate(order):
        member[c] = (0, 1, 1, 2, 2)[rank]
    assert groups.member.tolist() == member
    rates = regroup(audit, groups)
    assert rates.class_names == ("easy", "medium", "hard")
    means = metrics.thirds(audit.rate("pgd-20"), by=baseline.rate(attack))
    assert rates.rate("pgd-20").tolist() == pytest.approx([means.easy, means.medium, means.hard])
    assert f"the accuracy of net under {attack}: easy 1 class, medium 2 classes, hard 2 classes." in rates.about


def test_the_baseline_may_be_a_file(tmp_path: Path) -> None:
    path = tail(seed=1).save(tmp_path, "base")[0]
    named = read_groups(f'difficulty(baseline="{path}")', tail(seed=2), baseline=tail(seed=3))
    given = read_groups("difficulty", tail(seed=2), baseline=load_audit(path))
    assert named.member.tolist() == given.member.tolist()


def test_a_baseline_that_is_missing_or_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="difficulty: the thirds are those of a baseline: add `baseline`"):
        read_groups("difficulty", tail())
    with pytest.raises(DataError, match="the baseline net was audited on other classes than these"):
        read_groups("difficulty", tail(), baseline=random_audit(1))
    with pytest.raises(DataError, match="the audit of net has no image of class class 3: its difficulty is not known"):
        Difficulty().groups(random_audit(1))
    with pytest.raises(UnknownNameError, match="cw-20"):
        read_groups("difficulty(attack=cw-20)", tail(), baseline=tail())


# What reports say


def test_classes_that_weigh_unequally_are_said() -> None:
    even, uneven = tail(), tail()
    kept = torch.arange(30)[(torch.arange(30) % 5 != 1) | (torch.arange(30) < 10)]
    uneven = replace(
        uneven,
        index=kept,
        labels=uneven.labels[kept],
        predictions={name: column[kept] for name, column in uneven.predictions.items()},
    )
    said = "Rates are over images: a class with more test images weighs more."
    assert said not in regroup(even, read_groups("shot", even)).about
    assert said in regroup(uneven, read_groups("shot", uneven)).about


def test_groups_are_in_the_table_the_json_and_gates() -> None:
    audit = tail()
    rates = regroup(audit, read_groups("shot", audit))
    text = render(group_table(rates))
    assert "many is more than 100 (2 classes)" in " ".join(text.split())
    about = json.loads(json.dumps(rates.to_dict(), allow_nan=False))
    assert (about["groups"], about["source"], about["about"]) == (["many", "medium", "few"], "shot", rates.about)
    (result,) = check([parse_gate("group.few.pgd-20=0.0")], audit, rates)
    assert result.passed


def test_an_empty_group_is_nan_and_no_worst() -> None:
    audit = tail(trained_on=(500, 500, 400, 300, 300))
    rates = regroup(audit, read_groups("shot", audit))
    assert rates.count().tolist() == [30, 0, 0]
    assert rates.worst("clean").class_name == "many"
    assert "no images" in render(group_table(rates))


def test_a_long_tail_is_said_below_the_table() -> None:
    assert image_lines(tail()) == ["trained on 740 images: 500 of the largest class, 19 of the least"]
    edited = {"trained_on": {"images_per_class": [40, 20, 10, 9, 8], "edit": "long-tail(factor=5)"}}
    assert image_lines(tail(provenance=edited)) == [
        "trained on 87 images (long-tail(factor=5)): 40 of the largest class, 8 of the least"
    ]
    for counts in ((10, 9, 8, 8, 8), None):
        assert image_lines(tail(trained_on=counts)) == []


# Comparisons by group


def test_a_comparison_by_group_is_that_of_the_groups_as_classes() -> None:
    before, after = tail(seed=1), replace(tail(seed=2), model="other")
    groups = read_groups("shot", before, also=[after])
    found = compare(before, after, groups=groups)
    member = groups.member[before.labels]
    assert (found.class_names, found.groups) == (("many", "medium", "few"), "shot")
    for entry in found.attacks:
        table = metrics.paired_table(before.hits(entry.attack), after.hits(entry.attack), member, 3)
        for tested, cells in zip(entry.classes, table.tolist(), strict=True):
            assert (tested.n, tested.lost, tested.won) == (sum(map(sum, cells)), cells[1][0], cells[0][1])
        assert entry.average == compare(before, after).under(entry.attack).average
    about = found.to_dict()
    assert about["groups"] == "shot"
    assert "groups" not in compare(before, after).to_dict()
    assert found.notes[-1].startswith("Training images: many is more than 100")
    text = render(comparison_table(found))
    assert text.splitlines()[3].split()[0] == "group"


def test_thirds_of_a_model_that_is_compared_hold_its_luck() -> None:
    before, after = tail(seed=1), tail(seed=2)
    groups = read_groups("difficulty", before, baseline=before)
    (found,) = compare_many([before, after], groups=groups)
    assert found.notes[-1] == "thirds of one of the two models hold its luck too: those of another seed do not"


def test_models_that_were_trained_on_other_numbers_are_not_grouped_alike() -> None:
    one, two, unknown = tail(), replace(tail(trained_on=(9, 9, 9, 9, 9)), model="balanced"), tail(trained_on=None)
    assert recorded_counts(one, unknown) == COUNTS
    assert recorded_counts(unknown) is None
    with pytest.raises(DataError, match="net and balanced were trained on other numbers of images"):
        read_groups("shot", one, also=[two])
