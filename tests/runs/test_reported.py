"""Reported numbers: as many as the papers print, as fractions, under the names of the recipes."""

from __future__ import annotations

import pytest

import robustfair as rf
from robustfair.data import CATALOG
from robustfair.errors import UnknownNameError
from robustfair.runs.reported import ReportedNumber, reported
from robustfair.runs.shipped import read_table, tables

ALL = [number for paper in dict.fromkeys(table.split("/")[0] for table in tables()) for number in reported(paper)]
NO_FRACTIONS = {"head-norm-corr", "head-norm-max-min-ratio", "largest-variance"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cfa", 120),
        ("confusional-spectral", 327),
        ("faal-logs", 660),
        ("fair-tat", 640),
        ("hwnwb-decosam", 966),
        ("training-dynamics", 72),
        ("cfa/table-1", 88),
        ("fair-tat/table-1", 184),
        ("hwnwb-decosam/table-2", 336),
        ("confusional-spectral/table-3", 72),
        ("hwnwb-decosam/table-1", None),
        ("hwnwb-decosam/table-10", 14),
    ],
)
def test_the_numbers_of_a_paper_are_all_there(name: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(UnknownNameError, match="did you mean"):
            reported(name)
    else:
        assert len(reported(name)) == count
    assert len(ALL) == 2785


def test_every_row_has_numbers_and_every_number_a_row() -> None:
    for table in tables():
        assert {number.recipe for number in reported(table)} == set(read_table(table).names())


def test_no_two_numbers_are_of_the_same() -> None:
    keys = [(number.recipe, number.checkpoint, number.note, number.attack, number.metric) for number in ALL]
    assert len(set(keys)) == len(keys)


def test_numbers_are_fractions_but_for_three_kinds() -> None:
    for number in ALL:
        assert number.metric in NO_FRACTIONS or 0 <= number.value <= 1, number
        assert number.std is None or 0 < number.std < 0.03
    assert {number.recipe.rpartition("/")[0] for number in ALL if number.std is not None} == {"cfa/table-1"}


def test_a_worst_class_is_not_above_an_average() -> None:
    of = {(n.recipe, n.checkpoint, n.note, n.attack, n.metric): n.value for n in ALL}
    for (*key, metric), value in of.items():
        if metric in ("worst", "worst-10pct", "worst-5pct") and (*key, "average") in of:
            assert value <= of[(*key, "average")], key


def test_class_accuracies_are_those_of_their_average_and_worst() -> None:
    classes = CATALOG["cifar10"].class_names
    of = {(n.recipe, n.checkpoint, n.note, n.attack, n.metric): n.value for n in reported("faal-logs")}
    groups = {key[:4] for key in of}
    assert len(groups) == 55
    for key in groups:
        found = [of[(*key, f"class.{name}")] for name in classes]
        assert min(found) == of[(*key, "worst")]
        assert sum(found) / len(found) == pytest.approx(of[(*key, "average")], abs=6e-5)


@pytest.mark.parametrize(
    ("name", "asked", "value", "std"),
    [
        ("cfa/table-1/trades+cfa", ("best", "autoattack", "worst"), 0.265, 0.004),
        ("cfa/table-1/TRADES + CFA", ("last", "clean", "average"), 0.830, 0.001),
        ("fair-tat/table-2/cifar100/bat+trades", ("last", "autoattack", "worst-10pct"), 0.010, None),
        ("fair-tat/table-3/fair-tat", ("last", "cifar10-c/contrast", "worst"), 0.22, None),
        ("hwnwb-decosam/table-2/wrn-28-5/arow+hwnwb", ("last", "autoattack", "worst"), 0.3005, None),
        ("hwnwb-decosam/table-7/pgd-at", ("last", "autoattack", "worst-5pct"), 0.7215, None),
        ("hwnwb-decosam/figure-1/standard", ("", "clean", "head-norm-corr"), -0.6422, None),
        ("hwnwb-decosam/text-4.2/pgd-at", ("", "", "head-norm-max-min-ratio"), 1.43, None),
        ("confusional-spectral/table-1/trades+frl-rwrm-0.05", ("best", "autoattack", "average"), 0.4997, None),
        ("confusional-spectral/table-7/imagenet/csr", ("", "clean", "hard"), 0.623, None),
        ("confusional-spectral/table-9/csr", ("", "clean", "few-shot"), 0.312, None),
        ("confusional-spectral/table-8/trades", ("best", "", "largest-variance"), 0.17, None),
        ("training-dynamics/table-1/trades+frl", ("", "pgd-20", "std"), 0.139, None),
        ("faal-logs/wrn/trades-awp+faal-awp", ("best", "autoattack", "class.deer"), 0.407, None),
    ],
)
def test_a_number_is_what_the_paper_prints(
    name: str, asked: tuple[str, str, str], value: float, std: float | None
) -> None:
    [found] = reported(name, checkpoint=asked[0], attack=asked[1], metric=asked[2])
    assert (found.value, found.std) == (value, std)


def test_what_tells_two_runs_apart_is_kept() -> None:
    runs = reported("faal-logs/wrn/mart+faal-at", attack="pgd-20", metric="worst")
    assert [(number.note, number.value) for number in runs] == [("run=1", 0.38), ("run=2", 0.378)]
    assert [number.note for number in reported("cfa/text-3.3", metric="worst")] == ["epoch=108", "epoch=110"]


def test_reported_is_public() -> None:
    assert rf.reported is reported
    assert all(isinstance(number, ReportedNumber) for number in rf.reported("cfa"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cfa/table-1/trades+cf",
            r"unknown reported row or table 'cfa/table-1/trades\+cf': did you mean cfa/table-1/trades",
        ),
        ("cfa/table-9", "did you mean cfa/table-"),
        ("official/trades", "unknown reported row or table 'official/trades'"),
        ("", "unknown reported row or table ''"),
        ("cf", "unknown reported row or table 'cf'"),
    ],
)
def test_another_name_shows_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        reported(name)
