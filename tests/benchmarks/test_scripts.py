"""Every script on the smallest work that goes through all of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import attack, autoattack, epoch, memory, train_step
from benchmarks.external import external_attackers
from benchmarks.measure import ROOT, SCHEMA, Report
from benchmarks.naive import EPS, STEP_SIZE
from benchmarks.workload import build, one_batch, synthetic
from robustfair.errors import ConfigError
from robustfair.evaluate.run import audit
from robustfair.execution.device import has_bf16
from robustfair.files import read_json
from robustfair.objectives import PGDAT
from robustfair.values import Threat

TINY = [
    "--device",
    "cpu",
    "--model",
    "small-cnn",
    "--width",
    "2",
    "--batch-size",
    "8",
    "--repeats",
    "1",
    "--threads",
    "1",
]
SCRIPTS = ("attack", "epoch", "memory", "train_step")


def rows_of(report: Report, table: int = 0) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in report.tables[table].rows}


def no_module(*missing: str) -> Any:
    def find(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing[0]!r}", name=missing[0] if missing[0] != "*" else name)

    return find


# train_step


def test_train_step_compares_every_precision_with_the_naive_loop(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = train_step.main([*TINY, "--no-compile", "--json", str(path)])
    rows = rows_of(report)
    assert list(rows) == ["naive", "ours fp32", "ours bf16"]
    assert rows["naive"]["ratio"] == 1
    assert rows["ours fp32"]["ratio"] == pytest.approx(rows["naive"]["median"] / rows["ours fp32"]["median"])
    assert abs(rows["ours fp32"]["own_difference"]) < 1e-5
    assert abs(rows["ours fp32"]["same_difference"]) < 1e-5
    assert 0 < abs(rows["ours bf16"]["same_difference"]) < 0.1
    assert abs(rows_of(report, 1)["ours"]["own_difference"]) < 1e-12
    assert read_json(path, SCHEMA)["tables"][0]["rows"] == list(report.tables[0].rows)


def test_the_loss_at_given_images_leaves_weights_and_statistics() -> None:
    model = build("preact-resnet18", 2)
    step = train_step._step(model, 4, "cpu", "fp32", False)
    batch = one_batch(4, "cpu")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    given = replace(batch, x_adv=batch.x)
    assert train_step._loss_before(step, given) == train_step._loss_before(step, given)
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


# attack


def test_attack_shows_what_is_missing_and_how_strong_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.external.importlib.import_module", no_module("*"))
    given = ["--no-compile", "--steps", "1", "2", "--precision", "fp32", "--data", "synthetic", "--images", "12"]
    report = attack.main([*TINY, *given])
    assert [table.title for table in report.tables] == ["PGD-1 on 8 images", "PGD-2 on 8 images"]
    rows = rows_of(report)
    assert list(rows) == ["naive", "torchattacks (not installed)", "foolbox (not installed)", "ours fp32"]
    for case in ("naive", "ours fp32"):
        assert rows[case]["robust"] * 12 == pytest.approx(round(rows[case]["robust"] * 12))
        assert rows[case]["images_per_second"] == pytest.approx(8 / rows[case]["median"])
    assert rows["foolbox (not installed)"]["robust"] is None
    assert "untrained" in report.notes[0]
    assert "torchattacks (not installed)" in report.text()


def test_attack_trains_a_narrow_network_where_there_are_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.external.importlib.import_module", no_module("*"))
    monkeypatch.setattr(attack, "load", lambda data, part, count: synthetic(16))
    given = ["--no-compile", "--steps", "1", "--precision", "fp32", "--data", "some"]
    report = attack.main([*TINY, *given])
    assert "a small-cnn of width 2, trained with FGSM on 16 images" in report.notes[0]
    assert rows_of(report)["ours fp32"]["robust"] is not None


def test_a_library_that_lacks_a_dependency_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.external.importlib.import_module", no_module("git"))
    found = external_attackers(build("small-cnn", 2), "cpu")
    assert found == dict.fromkeys(("torchattacks", "foolbox"), "does not import: no git")


def test_libraries_are_called_with_our_threat_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("small-cnn", 2), one_batch(4, "cpu")
    called: dict[str, Any] = {}

    class PGD:
        def __init__(self, model: Any, **settings: Any) -> None:
            called["torchattacks"] = settings

        def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + 1

    class LinfPGD:
        def __init__(self, **settings: Any) -> None:
            called["foolbox"] = settings

        def run(self, model: Any, x: torch.Tensor, y: torch.Tensor, *, epsilon: float) -> torch.Tensor:
            called["foolbox"] |= {"epsilon": epsilon, "bounds": model["bounds"]}
            return x + 2

    libraries = {
        "torchattacks": SimpleNamespace(PGD=PGD),
        "foolbox": SimpleNamespace(
            PyTorchModel=lambda model, **settings: settings, attacks=SimpleNamespace(LinfPGD=LinfPGD)
        ),
    }
    monkeypatch.setattr("benchmarks.external.importlib.import_module", libraries.__getitem__)
    found = external_attackers(model, "cpu")
    for by, (name, attacker) in enumerate(found.items(), 1):
        assert not isinstance(attacker, str), name
        assert torch.equal(attacker(batch, 7), batch.x + by)
    assert called["torchattacks"] == {"eps": EPS, "alpha": STEP_SIZE, "steps": 7, "random_start": True}
    told = {"abs_stepsize": STEP_SIZE, "steps": 7, "random_start": True, "epsilon": EPS, "bounds": (0, 1)}
    assert called["foolbox"] == told


@pytest.mark.parametrize("name", ["torchattacks", "foolbox"])
def test_the_libraries_themselves_stay_in_the_ball(name: str) -> None:
    pytest.importorskip(name)
    batch = one_batch(4, "cpu")
    attacker = external_attackers(build("small-cnn", 2).eval(), "cpu")[name]
    assert not isinstance(attacker, str)
    moved = (attacker(batch, 3) - batch.x).abs().max()
    assert 0 < moved <= EPS + 1e-6


# epoch


def test_epoch_measures_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "CALLS", 2)
    report = epoch.main([*TINY, "--batches", "2", "--sizes", "8", "24", "--workers", "0"])
    overhead, share, linear, naive = report.tables
    assert [row["case"] for row in overhead.rows] == ["bare kernels", "fit"]
    assert overhead.rows[1]["overhead"] == pytest.approx(overhead.rows[1]["median"] / overhead.rows[0]["median"] - 1)
    assert overhead.rows[1]["overhead_low"] == overhead.rows[1]["overhead_high"] == overhead.rows[1]["overhead"]
    assert overhead.rows[0]["images_per_second"] == pytest.approx(16 / overhead.rows[0]["median"])
    parts = [row["share"] for row in share.rows[:-1]]
    assert len(parts) == 5
    assert share.rows[-1]["share"] == pytest.approx(sum(parts))
    assert [row["images"] for row in linear.rows] == [8, 24]
    assert linear.rows[1]["per_image"] == pytest.approx(1e6 * linear.rows[1]["median"] / 24)
    assert linear.rows[1]["against_first"] == pytest.approx(
        linear.rows[1]["per_image"] / linear.rows[0]["per_image"] - 1
    )
    assert [row["case"] for row in naive.rows] == ["naive", "fit"]
    assert all(len(row["seconds"]) == 1 for row in [*overhead.rows, *linear.rows, *naive.rows])


def test_epochs_are_timed_from_the_second_on_and_without_what_lies_between() -> None:
    args = epoch.measure.parser("epoch", "", batch_size=8, precision="fp32").parse_args(["--device", "cpu"])
    args.compile = False
    pauses: list[object] = []

    def pause(step: int | str = "epoch") -> None:
        pauses.append(step)
        time.sleep(0.3)

    taken = epoch.fit_epochs(
        build("small-cnn", 2),
        synthetic(16),
        PGDAT(steps=1),
        args,
        epochs=3,
        after_step=pause,
        after_epoch=pause,
    )
    assert pauses == [0, 1, "epoch"] * 3
    assert len(taken) == 2
    assert 0 < min(taken) < 0.3


def test_without_the_command_lines_packages_progress_is_reported_as_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "robustfair.cli.progress", None)
    monkeypatch.setattr(epoch, "CALLS", 2)
    report = epoch.main([*TINY, "--parts", "share", "--batches", "2"])
    assert any(str(row["case"]).startswith("progress (not measured") for row in report.tables[0].rows)
    assert report.tables[0].rows[-1]["share"] > 0


# memory


def test_memory_is_told_after_every_epoch_of_a_process_of_its_own() -> None:
    args = SimpleNamespace(device="cpu", precision="fp32", compile=False, batch_size=8, threads=1)
    rows = memory.run_apart(args, "small-cnn", 2, 8, 2)  # type: ignore[arg-type]
    assert len(rows) == 2
    if Path("/proc/self/status").exists():
        assert all(50 < row["resident"] <= row["peak"] for row in rows)
    assert all(row["device"] is None for row in rows)


def test_memory_reports_medians_over_repeats_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def apart(args: Any, model: str, width: int | None, images: int, epochs: int) -> list[dict[str, Any]]:
        seen.append((model, width, images, epochs))
        return [{"resident": 100.0 + e + len(seen), "peak": 200.0, "device": None} for e in range(epochs)]

    monkeypatch.setattr(memory, "run_apart", apart)
    report = memory.main([*TINY[:-4], "--repeats", "3", "--threads", "1", "--epochs", "4", "--sizes", "9"])
    assert seen == [("small-cnn", 2, 640, 4)] * 3 + [("small-cnn", 8, 9, 1)] * 3
    assert [row["resident"] for row in report.tables[0].rows] == [102, 103, 104, 105]
    assert report.tables[1].rows[0]["resident"] == 105
    assert report.tables[1].rows[0]["pixels"] == pytest.approx(9 * 3072 / 2**20)
    assert report.notes == ["Resident memory from epoch 2 to epoch 4: +2.0 MiB."]


# autoattack


def test_verdicts_of_both_engines_are_counted_image_by_image() -> None:
    model, data = build("small-cnn", 2).eval(), synthetic(30)
    data = replace(data, labels=model(data.images.float() / 255).argmax(1))
    found = [audit(model, data, attacks="apgd-ce(steps=2)", eps=0.01, seed=seed) for seed in (0, 1)]
    attack = "apgd-ce(steps=2)"
    ours = found[0].hits(attack)
    reference = ours.clone()
    reference[ours.nonzero()[0]] = False
    row = autoattack.compared(found, reference)
    assert row["ours"] - row["reference"] == pytest.approx(1 / 30)
    assert row["difference"] == pytest.approx(100 / 30)
    assert (row["reference_alone"], row["ours_alone"]) == (1, 0)
    assert row["agree"] == pytest.approx(29 / 30)
    assert row["fell_to"] == {attack: 30 - int(ours.sum())}


def test_both_engines_give_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's part agreement on a small network: robust accuracy within an image, and so the verdicts."""
    usual = autoattack.VICTIMS["digits, small-cnn, PGD-AT"]
    schedule = replace(usual.schedule, epochs=15, lr=0.004)
    objective = PGDAT(eps=0.15, step_size=0.05, steps=2)
    quick = replace(usual, width=8, images=700, objective=objective, threat=Threat(eps=0.15), schedule=schedule)
    monkeypatch.setitem(autoattack.VICTIMS, "digits", quick)
    argv = ["--device", "cpu", "--threads", "1", "--parts", "agreement", "--victims", "digits", "--images", "100"]
    (row,) = autoattack.main(argv).tables[0].rows
    assert row["images"] == 100
    assert 0.2 < row["reference"] < row["clean"] - 0.1
    assert abs(row["difference"]) <= 1
    assert row["agree"] >= 0.99


def test_without_the_reference_its_cells_are_empty_and_the_table_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(autoattack, "trained", lambda name, device, keep: build("small-cnn", 2).eval())
    monkeypatch.setattr(autoattack, "images_of", lambda victim, count: synthetic(count))
    argv = ["--parts", "speed", "--attack", "apgd-ce(steps=1)", "--timed-images", "9", "--precision", "fp32", "bf16"]
    table, *members = autoattack.main([*TINY, *argv, "--timed", autoattack.TIMED]).tables
    assert [one.title for one in members] == ["Members of ours fp32", "Members of ours bf16"]
    theirs, *ours = table.rows
    assert theirs == {"case": "reference (pyautoattack not installed)"}
    assert [row["case"] for row in ours] == ["ours fp32", "ours bf16"]
    assert all(row["ratio"] is None and row["agree"] is None and row["median"] > 0 for row in ours)
    assert "| times as fast |" in table.markdown()
    assert table.markdown().splitlines()[2].count(" - |") == len(table.columns) - 1


def test_victims_are_kept_for_the_next_time_and_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(autoattack.VICTIMS["digits, small-cnn, PGD-AT"], width=2, images=64)
    quick = replace(quick, schedule=replace(quick.schedule, epochs=1))
    monkeypatch.setitem(autoattack.VICTIMS, "digits", quick)
    first = autoattack.trained("digits", "cpu", tmp_path)
    again = autoattack.trained("digits", "cpu", tmp_path)
    assert "as it was trained" in capsys.readouterr().err
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    monkeypatch.setitem(autoattack.VICTIMS, "digits", replace(quick, images=65))
    with pytest.raises(ConfigError, match="a folder of this version"):
        autoattack.trained("digits", "cpu", tmp_path)


@pytest.mark.parametrize(
    ("attack", "hint"), [("pgd-20", "must be autoattack or one"), ("sqare", "did you mean square")]
)
def test_an_attack_that_is_none_of_the_family_is_refused(
    attack: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        autoattack.main([*TINY, "--attack", attack])
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


# All


@pytest.mark.parametrize("name", [*SCRIPTS, "autoattack"])
def test_every_script_explains_its_options_in_the_same_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    for option in ("device", "precision", "model", "width", "batch-size", "repeats", "threads", "json", "force"):
        assert f"--{option} " in told or f"[--{option}]" in told


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_network_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Sequence[str] = ["--device", "cpu", "--model", "small-cmm", "--threads", "1"]
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    assert exit_.value.code == 2
    assert "unknown model 'small-cmm': did you mean small-cnn" in capsys.readouterr().err


def test_torch_numpy_safetensors_and_pillow_are_all_that_is_needed() -> None:
    others = (
        "cyclopts",
        "datasets",
        "jinja2",
        "pandas",
        "pyarrow",
        "pyautoattack",
        "rich",
        "scipy",
        "sklearn",
        "yaml",
    )
    block = f"import sys; sys.modules.update(dict.fromkeys({others!r}))"
    small = "['--model', 'small-cnn', '--width', '2', '--batch-size', '4', '--repeats', '1', '--threads', '1']"
    code = "; ".join(
        [
            block,
            *(f"import benchmarks.{name}" for name in (*SCRIPTS, "autoattack", "gpu_suite")),
            f"benchmarks.train_step.main({small} + ['--no-compile'])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours fp32" in done.stdout
    assert ("ours bf16" in done.stdout) == has_bf16(torch.device("cpu"))
