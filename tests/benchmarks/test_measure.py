from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import robustfair
from benchmarks import measure
from benchmarks.measure import SCHEMA, SPEED_COLUMNS, Report, Table, Timing
from robustfair.errors import ConfigError
from robustfair.files import read_json


def options() -> argparse.ArgumentParser:
    return measure.parser("some", "What it does.\n\nMore.", batch_size=(8, 16), precision="fp32")


def some_report(args: argparse.Namespace) -> Report:
    rows = [{"case": "a", "median": 0.5}, {"case": "b", "median": None, "more": [1, 2]}]
    return Report(
        "some", measure.settings(args), [Table("title", {"case": "{case}", "s": "{median:.2f}"}, rows)], ["n."]
    )


# Timing


def test_median_spread_and_ratio_are_those_of_the_repeats() -> None:
    timings = {"slow": Timing((4.0, 8.0, 6.0, 100.0)), "fast": Timing((2.0, 1.0, 9.0))}
    assert [timings["slow"].median, timings["slow"].low, timings["slow"].high] == [7.0, 4.0, 100.0]
    assert measure.ratios(timings, "slow") == {"slow": 1.0, "fast": 3.5}
    assert measure.ratios(timings, "fast") == {"slow": 2 / 7, "fast": 1.0}


def test_cases_take_turns() -> None:
    calls: list[str] = []

    def case(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    timings = measure.interleaved({"a": case("a"), "b": case("b")}, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": (3, 5), "b": (4, 6)}


def test_only_the_call_itself_is_timed_inside_its_scope_after_settling() -> None:
    calls: list[str] = []

    @contextmanager
    def slow_scope() -> Iterator[None]:
        calls.append("enter")
        time.sleep(0.05)
        yield
        time.sleep(0.05)
        calls.append("leave")

    def settle() -> None:
        calls.append("settle")
        time.sleep(0.05)

    def call() -> None:
        calls.append("call")
        time.sleep(0.01)

    assert 0.01 <= measure.clock(call, scope=slow_scope, settle=settle)() < 0.05
    assert calls == ["enter", "settle", "call", "leave"]


# FLOPs


def test_flops_are_counted_by_hand_for_a_convolution_and_a_linear_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 7))
    by_hand = 2 * (5 * 5 * 4 * 3 * 9 + 100 * 7)
    assert measure.forward_flops(model.eval(), torch.zeros(1, 3, 5, 5)) == by_hand
    assert measure.forward_flops(model, torch.zeros(2, 3, 5, 5)) == 2 * by_hand


def test_a_training_step_counts_two_passes_per_attack_step_and_three_for_the_update() -> None:
    assert measure.attack_flops(1, 10) == 20
    assert measure.training_flops(1, 10) == 23
    assert measure.training_flops(7, 0) == 21


def test_the_peak_of_the_matrix_product_is_measured_on_cuda_only() -> None:
    assert measure.matmul_peaks("cpu") == {}
    assert measure.matmul_tflops("cpu", torch.float32, size=64, repeats=2) > 0


def test_a_speed_row_follows_from_its_timing() -> None:
    row = measure.speed_row("x", Timing((0.5, 0.4, 2.0)), 3.0, images=10, flops=10**12, peak=8.0)
    assert row == {
        "case": "x",
        "median": 0.5,
        "low": 0.4,
        "high": 2.0,
        "seconds": [0.5, 0.4, 2.0],
        "ratio": 3.0,
        "images_per_second": 20.0,
        "tflops": 2.0,
        "mfu": 0.25,
    }
    unknown = measure.speed_row("x", Timing((0.5,)), 1.0, images=10)
    assert unknown["tflops"] is None
    assert unknown["mfu"] is None


# Report


def test_a_column_without_values_is_left_out_and_a_missing_value_is_a_dash() -> None:
    rows = [measure.speed_row("ours", Timing((0.5,)), 2.0, images=10), {"case": "theirs (not installed)"}]
    lines = Table("", SPEED_COLUMNS, rows).markdown().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "case",
        "seconds",
        "fastest to slowest",
        "times as fast",
        "images/s",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["theirs (not installed)", "-", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_a_report_is_printed_and_comes_back_from_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    report = measure.run(options(), some_report, ["--json", str(path), "--threads", "1", "--device", "cpu"])
    assert capsys.readouterr().out == report.text() + "\n"
    found = read_json(path, SCHEMA)
    assert found == json.loads(json.dumps(report.as_json()))
    assert found["tables"] == [{"title": "title", "rows": list(report.tables[0].rows)}]
    assert found["settings"]["model"] == "preact-resnet18"
    assert found["where"]["threads"] == 1


def test_a_report_tells_the_machine_and_not_its_name() -> None:
    known = {"cpu", "cores", "threads", "bf16_instructions", "instructions", "onednn_instructions", "python", "torch"}
    on_cuda = {"gpu", "cuda", "float32_convolutions"}
    assert known <= set(measure.machine()) <= known | on_cuda


def test_commit_is_unknown_outside_a_checkout_and_marked_where_files_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = measure.commit()
    assert clean.isalnum()
    (tmp_path / "other").write_text("untracked")
    assert measure.commit() == clean
    (tmp_path / "file").write_text("2")
    assert measure.commit() == clean + "+"


# Command line


def test_the_shared_options_are_read_with_a_scripts_own_defaults() -> None:
    args = options().parse_args([])
    assert (args.batch_size, args.precision, args.width, args.json) == ((8, 16), "fp32", None, None)
    args = options().parse_args(["--batch-size", "4", "5", "--width", "2", "--precision", "bf16"])
    assert (args.batch_size, args.precision, args.width) == ([4, 5], "bf16", 2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--json", "{taken}"], "exists: name another file, or add --force"),
        (["--json", "{folder}/none/x.json"], "is no folder"),
        (["--repeats", "0"], "must be at least 1, got 0"),
        (["--precision", "fp16"], "invalid choice"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_measured(
    given: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("kept")

    def never(args: argparse.Namespace) -> Report:
        raise AssertionError("nothing is measured")

    with pytest.raises(SystemExit) as exit_:
        measure.run(options(), never, [word.format(taken=taken, folder=tmp_path) for word in given])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
    assert taken.read_text() == "kept"


def test_force_replaces_a_report(tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("old")
    measure.run(options(), some_report, ["--json", str(taken), "--force", "--threads", "1"])
    assert read_json(taken, SCHEMA)["name"] == "some"


def test_an_error_of_the_library_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> Report:
        raise ConfigError("model", "width", allowed="at least 1", got=0)

    with pytest.raises(SystemExit) as exit_:
        measure.run(options(), fail, ["--threads", "1"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("error: model: width must be at least 1, got 0\n")


@pytest.mark.parametrize(
    "name", ["attack", "autoattack", "epoch", "equivalence", "memory", "objectives", "train_step", "tried"]
)
def test_every_script_refuses_bf16_without_its_instructions(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "has_bf16", lambda device: False)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main(["--device", "cpu", "--precision", "bf16"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --precision bf16: cpu has no bf16 instructions here: give fp32\n")


@pytest.mark.parametrize("given", [[], ["--precision", "bf16", "fp32"]], ids=["by default", "asked for"])
@pytest.mark.parametrize("there", [True, False])
def test_bf16_is_left_out_of_a_list_without_its_instructions(
    given: list[str], there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[list[str]] = []

    def note(args: argparse.Namespace) -> Report:
        measured.append(sorted(args.precision))
        return some_report(args)

    made = measure.parser("some", "What it does.", batch_size=8, precision=("fp32", "bf16"))
    monkeypatch.setattr(measure, "has_bf16", lambda device: there)
    measure.run(made, note, ["--device", "cpu", "--threads", "1", *given])
    told = "--precision: bf16 is left out, cpu has no bf16 instructions here\n"
    assert (measured, capsys.readouterr().err) == (([["bf16", "fp32"]], "") if there else ([["fp32"]], told))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the device that is missing")
def test_a_device_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        measure.run(options(), some_report, ["--device", "cuda"])
    assert stop.value.code == 2
    assert "error: --device cuda: " in capsys.readouterr().err


def test_the_library_does_not_know_its_benchmarks() -> None:
    for path in Path(robustfair.__file__).parent.rglob("*.py"):
        assert "import benchmarks" not in path.read_text()
        assert "from benchmarks" not in path.read_text()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_precision_of_products_is_set_for_old_and_new_readers(precision: str) -> None:
    def settings() -> tuple[str, str, bool]:
        matmul = torch.backends.cuda.matmul
        return torch.get_float32_matmul_precision(), matmul.fp32_precision, matmul.allow_tf32

    before = settings()
    with measure.products_in(precision):
        word = "high" if precision == "tf32" else "highest"
        assert settings() == (word, precision, precision == "tf32")
    assert settings() == before
