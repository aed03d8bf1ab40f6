from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import autoattack, gpu_suite, measure
from benchmarks.gpu import speed
from benchmarks.gpu.check import data_of
from benchmarks.gpu.files import MOST_BYTES, MOST_FILES, bring_weights, left_out
from benchmarks.gpu.suite import ROW_COLUMNS, TASK_SCHEMA, Suite, Task, run_all, summary
from benchmarks.rows import OutOfTimeError, Row, Way, passes_of, row_lines, target_rows, train_row
from robustfair.data import ImageDataset, Splits
from robustfair.errors import CheckpointError
from robustfair.evaluate.run import audit
from robustfair.files import write_json
from robustfair.methods import CCM, EMA
from robustfair.models import create_model
from robustfair.objectives import PGDAT
from robustfair.training.fit import fit
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


SMALL = ["--small", "--data", "digits", "--device", "cpu"]


def test_the_suite_trains_and_times_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--rows", "fast", "--resume", str(tmp_path), "--only", "speed-narrow-128", "row trades + ccm"]
    assert gpu_suite.main(argv) == 0
    assert gpu_suite.main([*argv, "--table"]) == 0
    shown = capsys.readouterr().out
    assert "| trades + ccm + ccr fast" in shown
    assert "| tf32 eager |" in shown


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["attack", "epoch", "memory"])
def test_scripts_are_given_options_that_they_have(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: bool
) -> None:
    given: list[Any] = []

    def read(options: Any, measured: Any, argv: Any) -> measure.Report:
        given.append(options.parse_args(argv))
        return measure.Report(name, {}, [])

    monkeypatch.setattr(measure, "run", read)
    (task,) = (task for task in gpu_suite.tasks(()) if task.name == name)
    task.run(suite(way, tmp_path, small=small))
    assert given[0].device == "cpu"


def test_a_lease_in_three_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NOTES.md has it: the first call without data, and what is fetched keeps to its limits after each."""
    monkeypatch.setattr(gpu_suite, "all_checks", lambda setting: [{"check": "logits", "passes": "yes"}])
    monkeypatch.setitem(gpu_suite.ROWS, "target", lambda: target_rows()[:1])
    row, results = target_rows()[0].name, tmp_path / "results"

    def call(out: str, *argv: str, data: str = "digits") -> tuple[int, str]:
        code = gpu_suite.main([*SMALL, "--data", data, "--resume", str(results), "--out", str(tmp_path / out), *argv])
        files = list((tmp_path / out).iterdir())
        assert len(files) <= MOST_FILES
        assert all(path.is_file() and path.stat().st_size <= MOST_BYTES for path in files)
        return code, (tmp_path / out / "suite.md").read_text()

    code, text = call("one", "--only", "correctness", "speed-128", data=str(tmp_path / "half of it"))
    assert code == 0
    assert "1 of 1 checks pass." in text
    assert "| bf16 eager |" in text

    code, text = call("two", "--only", f"row {row}", f"aa-first {row}", f"aa-all {row}")
    assert code == 0
    assert "first 20 test images" in text
    assert "on all test images" in text
    first, whole = (
        json.loads((results / f"{task} {row}.json".replace(" ", "-")).read_text())["found"]["tables"][0]["rows"][0]
        for task in ("aa-first", "aa-all")
    )
    assert (first["images"], whole["images"], first["calls"]) == (20, 20, 1)
    assert 0 <= first["low"] <= first["robust"] <= first["high"] <= 1
    assert "model-1-of-1.safetensors" in [path.name for path in (tmp_path / "two").iterdir()]
    found = json.loads((tmp_path / "two" / "suite.json").read_text())["tasks"]
    assert set(found) == {path.stem for path in results.glob("*.json")}
    capsys.readouterr()
    assert call("three", "--only", "correctness", f"row {row}")[0] == 0
    assert f"row {row}: done before" in capsys.readouterr().out


def test_all_images_are_attacked_only_where_half_of_the_first_stand(
    way: Way, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = suite(way, tmp_path / "out", small=True)
    every = gpu_suite.autoattacked(row, None)
    assert run_all(here, [Task("aa", 0, every)]) == ["aa: not run, the row is not trained"]
    train_row(here.sized(row), here.way, NEVER)
    folder = gpu_suite.folder_of(row, here.way).audits / "first"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "whole.json", {"schema": autoattack.WHOLE_SCHEMA, "robust": 0.4})
    (line,) = run_all(here, [Task("aa", 0, every)])
    assert line == "aa: not run, 40.00% of the first images stood; name it with --only to run it"
    (line,) = run_all(replace(here, forced=True), [Task("aa", 0, every)])
    assert line.endswith(" s")


def test_rows_are_trained_uncompiled_where_a_check_of_compiled_attacks_failed(way: Way, tmp_path: Path) -> None:
    here = suite(replace(way, compile=True), tmp_path)
    assert here.checked_way().compile

    def checked(name: str, passes: str) -> None:
        rows = [{"check": "logits, fp32", "passes": "NO"}, {"check": name, "passes": passes}]
        write_json(here.file("correctness"), {"schema": TASK_SCHEMA, "found": {"tables": [{"rows": rows}]}})

    checked("replayed, compiled, bf16, linf: pixels", "yes")
    assert here.checked_way().compile
    for name in ("replayed, compiled, bf16, linf: pixels", "replays", "compiled step"):
        checked(name, "NO")
        assert not here.checked_way().compile
        assert not here.settings()["compile"]


def test_weights_come_in_files_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    weights = {f"layer{number}": torch.full((100,), float(number)) for number in range(7)}
    monkeypatch.setattr("benchmarks.gpu.files.SHARD", 800)
    paths = bring_weights(weights, tmp_path, {"row": "some"})
    assert [path.name for path in paths] == [f"model-{number}-of-4.safetensors" for number in range(1, 5)]
    again = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert again.keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in again.items())
    assert left_out(paths) == []
    monkeypatch.setattr("benchmarks.gpu.files.SHARD", 400)
    assert bring_weights(weights, tmp_path, {}) == []


def test_the_weights_of_the_target_fit_into_what_may_be_fetched(tmp_path: Path) -> None:
    assert len(bring_weights(create_model("preact-resnet18").state_dict(), tmp_path, {})) == 4
    assert left_out(sorted(tmp_path.iterdir())) == []


def test_a_way_that_does_not_run_has_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(case: speed.Case, *given: Any) -> Any:
        if case.mode == speed.REDUCED:
            raise RuntimeError("no Triton\nand a long story")
        return usual(case, *given)

    usual = speed.step_of
    monkeypatch.setattr(speed, "step_of", failing)
    cases = [speed.Case("bf16", speed.REDUCED), speed.Case("fp32", speed.EAGER)]
    table = speed.compared("small-cnn", 2, 4, cases, "cpu", repeats=1, deadline=NEVER)
    naive, reduced, eager = table.rows
    assert (naive["case"], naive["ratio"]) == ("naive", 1)
    assert reduced == {"case": "bf16 reduce-overhead", "why": "RuntimeError: no Triton"}
    assert eager["ratio"] == pytest.approx(naive["median"] / eager["median"])


class Counted(TorchDispatchMode):
    """Adds up the floating-point operations of convolutions and products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("row", target_rows()[:3], ids=lambda row: row.name)
def test_the_cost_of_a_row_is_what_its_steps_compute(row: Row) -> None:
    once = measure.forward_flops(create_model("preact-resnet18", width=4).eval(), torch.rand(1, 3, 32, 32))
    methods = tuple(replace(method, begin=0) for method in row.methods if method.name == "awp")
    options: dict[str, Any] = {"methods": methods, "validation": 0, "select": "last", "kernels": False}
    spent = []
    for epochs in (1, 2):
        with Counted() as counted:
            schedule = Schedule(epochs=epochs, batch_size=10)
            fit(create_model("preact-resnet18", width=4), data_of(10), row.objective, schedule=schedule, **options)
        spent.append(counted.total)
    assert (spent[1] - spent[0]) / 10 / once == pytest.approx(passes_of(row), rel=0.02)


def test_each_row_is_attacked_before_the_next_is_trained() -> None:
    names = [task.name for task in gpu_suite.tasks(target_rows())]
    first, second = (row.name for row in target_rows()[:2])
    assert names[:2] == ["correctness", "speed-128"]
    assert names[2:6] == [f"row {first}", f"aa-first {first}", f"aa-all {first}", f"row {second}"]
    assert len(set(names)) == len(names)


def test_the_suite_runs_autoattack_beside_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--resume", str(tmp_path), "--only", "autoattack-compared"]
    assert gpu_suite.main(argv) == 0
    theirs, ours = json.loads((tmp_path / "autoattack-compared.json").read_text())["found"]["tables"][0]["rows"]
    assert (theirs["case"], ours["case"]) == ("reference", "ours bf16")
    assert ours["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert theirs["agree"] == 1
    assert 0.5 <= ours["agree"] <= 1
    capsys.readouterr()
    assert gpu_suite.main(argv) == 0
    assert "autoattack-compared: done before" in capsys.readouterr().out


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
    assert heading == list(ROW_COLUMNS)
    assert [row[0] for row in rows] == [row.name for row in target_rows()]
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
