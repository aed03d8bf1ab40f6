"""What a method costs, on the smallest work that goes through all of it."""

from __future__ import annotations

import pytest

from benchmarks.method_cost import CASES, Case, main
from robustfair.registry import BUNDLES, METHODS, OBJECTIVES
from robustfair.runs.composition import read_composition

TINY = ["--device", "cpu", "--model", "small-cnn", "--width", "2", "--batch-size", "8", "--batches", "2"]


def test_a_line_sets_an_epoch_with_a_method_beside_one_without() -> None:
    found = main([*TINY, "--repeats", "2", "--threads", "1", "--only", "ccr"])
    (row,) = found.tables[0].rows
    before, after = row["seconds"]
    assert (row["method"], row["base"]) == ("ccr", "trades")
    assert len(before) == len(after) == 2
    assert row["low"] <= row["ratio"] <= row["high"]
    assert row["ratio"] == pytest.approx(sum(b / a for a, b in zip(before, after, strict=True)) / 2)


def test_an_error_in_a_training_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "frl", Case("trades + frl", "trades"))
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--repeats", "1", "--only", "frl"])
    assert ended.value.code == 2
    assert "validation" in capsys.readouterr().err


def test_an_unknown_method_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--only", "ccrr"])
    assert ended.value.code == 2
    assert "ccr" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(CASES))
def test_a_case_differs_from_its_base_in_what_it_is_about(name: str) -> None:
    case = CASES[name]
    with_it, without = read_composition(case.train), read_composition(case.base)
    method = name.split(",")[0]
    if method in OBJECTIVES:
        assert (with_it[0].name, with_it[1]) == (method, without[1])
    else:
        assert with_it[0] == without[0]
        assert len(with_it[1]) > len(without[1])
        assert method in {*METHODS, *BUNDLES}
