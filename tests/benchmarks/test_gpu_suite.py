from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import autoattack, gpu_suite
from benchmarks.gpu_suite import Suite, Task, run_all, summary
from benchmarks.rows import OutOfTimeError, Row, Way, fast_rows, row_lines, train_row
from robustfair.data import ImageDataset, Splits
from robustfair.errors import CheckpointError
from robustfair.evaluate.run import audit
from robustfair.files import write_json
from robustfair.methods import CCM, EMA
from robustfair.objectives import PGDAT
from robustfair.training.schedule import Schedule
from robustfair.values import Threat

Data = Callable[..., ImageDataset]
NEVER = float("inf")


@pytest.fixture
def way(tmp_path: Path, tiny_data: Data) -> Way:
    splits = Splits(train=tiny_data((9, 8, 7)), test=tiny_data((4, 4, 4), seed=1))
    return Way(splits, tmp_path / "work", "cpu", precision="fp32", compile=False, model="small-cnn", width=2)


@pytest.fixture
def row() -> Row:
    methods = (CCM(begin=1), EMA(decay=0.5))
    return Row("some row", PGDAT(steps=2), methods, Schedule(epochs=3, batch_size=8))


def suite(way: Way, results: Path, *, deadline: float = NEVER, small: bool = False) -> Suite:
    return Suite(results, replace(way, validation=0.2), deadline, small)


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a row without what depends on the clock."""
    history = [
        {key: value for key, value in epoch.items() if key not in ("seconds", "images_per_second")}
        for epoch in record["history"]
    ]
    audits = {
        name: {attack: numbers["confusion"] for attack, numbers in found["attacks"].items()}
        for name, found in record["audits"].items()
    }
    return {"history": history, "audits": audits, "train": record["train"]}


def test_a_row_that_ran_out_of_time_goes_on_where_it_stopped(way: Way, row: Row, tmp_path: Path) -> None:
    way = replace(way, validation=0.2)
    with pytest.raises(OutOfTimeError, match="some row stands at epoch 1 of 3"):
        train_row(row, way, deadline=time.monotonic())
    with pytest.raises(OutOfTimeError, match="some row stands at epoch 2 of 3"):
        train_row(row, way, deadline=time.monotonic())
    with pytest.raises(OutOfTimeError, match="some row is trained and not yet audited"):
        train_row(row, way, deadline=time.monotonic())
    resumed = train_row(row, way, NEVER)
    whole = train_row(row, replace(way, work=tmp_path / "other"), NEVER)
    assert without_clock(resumed) == without_clock(whole)
    assert len(resumed["history"]) == 3
    assert list(resumed["audits"]) == ["model", "model + hwnwb", "ema", "ema + hwnwb"]


def test_lines_are_read_off_the_counts() -> None:
    numbers = {"correct": [3, 1], "count": [4, 4]}
    record = {
        "name": "a",
        "wall_seconds": 60.0,
        "images_per_second": 7.0,
        "audits": {"model": {"count": [4, 4], "attacks": dict.fromkeys(("clean", "pgd-20", "cw-20"), numbers)}},
    }
    line = row_lines([record])[0]
    assert (line["pgd-20"], line["pgd-20_worst"]) == (50.0, 25.0)


def test_finished_tasks_are_kept_and_failed_ones_tried_again(way: Way, tmp_path: Path) -> None:
    calls: list[str] = []

    def fine(suite: Suite) -> dict[str, Any]:
        calls.append("fine")
        return {"text": "all is well"}

    def failing(suite: Suite) -> dict[str, Any]:
        calls.append("failing")
        raise RuntimeError("no kernel image")

    todo = [Task("fine", 0, fine), Task("failing", 0, failing)]
    lines = run_all(suite(way, tmp_path / "out"), todo)
    assert lines[1] == "failing: failed, see failing.error.txt"
    assert "no kernel image" in (tmp_path / "out" / "failing.error.txt").read_text()
    assert run_all(suite(way, tmp_path / "out"), [todo[0], Task("failing", 0, fine)])[0] == "fine: done before"
    assert calls == ["fine", "failing", "fine"]
    assert not (tmp_path / "out" / "failing.error.txt").exists()
    assert "all is well" in summary(tmp_path / "out", todo)


def test_what_would_not_end_in_time_is_not_begun(way: Way, tmp_path: Path) -> None:
    def never(suite: Suite) -> dict[str, Any]:
        raise AssertionError("begun")

    lines = run_all(suite(way, tmp_path, deadline=time.monotonic() + 30), [Task("long", 60, never)])
    assert lines[0].startswith("long: not begun, ")


def test_the_suite_runs_whole_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["correctness", "attack", "epoch", "memory", "row trades + ccm"]
    argv = ["--small", "--data", "digits", "--device", "cpu", "--resume", str(tmp_path), "--only", *only]
    assert gpu_suite.main(argv) == 0
    assert gpu_suite.main([*argv, "--table"]) == 0
    shown = capsys.readouterr().out
    assert "| trades + ccm + ccr fast" in shown
    found = json.loads((tmp_path / "correctness.json").read_text())["found"]
    plain = found["tables"][0]["rows"][0]
    assert plain["case"] == "pgd-at fp32 deterministic"
    assert plain["largest"] == pytest.approx(8, abs=1e-4)
    assert plain["repeats"]


def test_the_suite_runs_autoattack_beside_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--small", "--data", "digits", "--device", "cpu", "--resume", str(tmp_path), "--only", "autoattack"]
    assert gpu_suite.main(argv) == 0
    (whole,) = json.loads((tmp_path / "autoattack.json").read_text())["found"]["tables"][0]["rows"]
    assert (whole["model"], whole["images"], whole["calls"], whole["peak"]) == ("autoattack victim", 20, 1, None)
    assert 0 <= whole["robust"] <= whole["clean"] <= 1
    assert whole["seconds"] > 0
    theirs, ours = json.loads((tmp_path / "autoattack-compared.json").read_text())["found"]["tables"][0]["rows"]
    assert (theirs["case"], ours["case"]) == ("reference", "ours bf16")
    assert ours["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert theirs["agree"] == 1
    assert 0.5 <= ours["agree"] <= 1
    shown = capsys.readouterr().out
    assert "autoattack: done before" not in shown
    assert gpu_suite.main(argv) == 0
    assert "autoattack: done before" in capsys.readouterr().out


def test_autoattack_comes_after_the_speed_tables_and_before_the_other_rows() -> None:
    names = [task.name for task in gpu_suite.tasks(fast_rows())]
    at = names.index("autoattack")
    assert names[at - 1 : at + 2] == ["memory", "autoattack", "autoattack-compared"]
    assert all(name.startswith("row ") for name in names[at + 2 :])
    assert f"row {fast_rows()[0].name}" in names[:at]


def test_autoattack_takes_the_first_row_that_is_trained(way: Way, row: Row, tmp_path: Path) -> None:
    here = suite(way, tmp_path / "out", small=True)
    rows = [replace(row, name="one"), replace(row, name="two"), replace(row, name="three")]
    assert gpu_suite.victim(rows, here)[0].name == "autoattack victim"
    for name in ("two", "three"):
        train_row(here.sized(replace(row, name=name)), here.way, NEVER)
    chosen, model = gpu_suite.victim(rows, here)
    assert chosen == here.sized(rows[1])
    again = gpu_suite.victim(rows, here)[1]
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.fixture
def whole(way: Way, tiny_net: Callable[..., Any], tmp_path: Path) -> Callable[..., autoattack.Row]:
    """A function that evaluates a small model under a cheap attack, going on in its folder; with a deadline."""
    args = autoattack.options().parse_args(
        ["--device", "cpu", "--precision", "fp32", "--attack", "apgd-ce(steps=3)", "--batch-size", "5"]
    )

    def run(deadline: float = NEVER) -> autoattack.Row:
        model = tiny_net().eval()
        return autoattack.whole(model, way.splits.test, Threat(eps=0.05), args, tmp_path / "kept", deadline)

    return run


def test_an_evaluation_that_ran_out_of_time_goes_on_and_adds_up(
    whole: Callable[..., autoattack.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = autoattack.attacked

    def cut(*given: Any, **more: Any) -> Any:
        time.sleep(0.2)
        return usual(*given, **more | {"max_minutes": 1e-9})

    with pytest.raises(OutOfTimeError, match="no time is left to begin"):
        whole(time.monotonic())
    monkeypatch.setattr(autoattack, "attacked", cut)
    for _ in range(2):
        with pytest.warns(match="minutes are over"), pytest.raises(OutOfTimeError, match="goes on at the next call"):
            whole()
    monkeypatch.setattr(autoattack, "attacked", usual)
    found = whole()
    assert found["calls"] == 3
    assert found["seconds"] >= 0.4
    monkeypatch.setattr(autoattack, "attacked", None)
    assert whole() == found


def test_time_of_which_nothing_is_left_does_not_count(whole: Callable[..., autoattack.Row], tmp_path: Path) -> None:
    """Without a journal an evaluation begins anew, and so does its clock."""
    (tmp_path / "kept").mkdir()
    about = {"schema": autoattack.WHOLE_SCHEMA, "calls": 4, "seconds": 1000.0, "peak": 7.0}
    write_json(tmp_path / "kept" / "whole.json", about)
    found = whole()
    assert (found["calls"], found["peak"]) == (1, None)
    assert found["seconds"] < 1000


def test_an_evaluation_is_that_of_an_audit(
    whole: Callable[..., autoattack.Row], way: Way, tiny_net: Callable[..., Any]
) -> None:
    found = whole()
    usual = audit(tiny_net().eval(), way.splits.test, attacks="apgd-ce(steps=3)", eps=0.05, precision="fp32")
    assert (found["clean"], found["robust"]) == (usual.average("clean"), usual.average("apgd-ce(steps=3)"))


def test_a_table_of_nothing_has_empty_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--table", "--resume", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "# correctness\n\n-\n" in shown
    lines = [line for line in shown.splitlines() if line.startswith("| ") and "--" not in line]
    heading, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert heading == list(gpu_suite.ROW_COLUMNS)
    assert [row[0] for row in rows] == [row.name for row in fast_rows()]
    assert all(cell == "-" for row in rows for cell in row[1:])


def test_results_of_other_settings_are_not_mixed(
    way: Way, tmp_path: Path, row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [Task("fine", 0, lambda suite: {"text": "fine"})]
    run_all(suite(way, tmp_path / "out"), todo)
    suite(way, tmp_path / "out").require_own_results(todo)
    with pytest.raises(CheckpointError, match=r"fine\.json was measured with another small \(False, now True\)"):
        suite(way, tmp_path / "out", small=True).require_own_results(todo)
    train_row(row, way, NEVER)
    with pytest.raises(CheckpointError, match="begun with other settings"):
        train_row(row, replace(way, width=3), NEVER)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "rwo"], "--only rwo: no task begins so"),
        (["--resume", __file__], "is a file: name a folder"),
        (["--device", "gpu"], "--device gpu: "),
        (["--minutes", "nan"], "must be above 0, got nan"),
    ],
)
def test_wrong_use_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main([*argv, "--data", "digits"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_ends_the_call_and_not_the_results(way: Way, tmp_path: Path) -> None:
    def interrupted(suite: Suite) -> dict[str, Any]:
        raise KeyboardInterrupt

    lines = run_all(suite(way, tmp_path), [Task("long", 0, interrupted), Task("next", 0, interrupted)])
    assert lines == ["long: interrupted, goes on at the next call"]


def test_data_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--data", str(tmp_path / "nothing"), "--resume", str(tmp_path)])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err
