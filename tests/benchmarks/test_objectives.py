"""Every row on a tiny network and images without content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import objectives
from benchmarks.measure import SCHEMA
from benchmarks.objectives import ROWS, Case
from benchmarks.workload import initialised, synthetic
from robustfair.data import ImageDataset
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.files import read_json
from robustfair.methods import EMA
from robustfair.objectives import PGDAT
from robustfair.training.fit import fit
from robustfair.training.schedule import Schedule

FEW = (Case("standard"), Case("pgd-at(steps=1) + ema(decay=0.5)"), Case("trades(steps=1)", norm="l2"))
AVERAGED = FEW[1].key


def images() -> ImageDataset:
    return synthetic(400)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "ROWS", FEW)
    monkeypatch.setattr(objectives, "load", lambda data, part: images())


def run(path: Path | None, *more: str) -> Any:
    tiny = {"device": "cpu", "model": "small-cnn", "width": 2, "batch-size": 8, "images": 20, "test-images": 50}
    given = {**tiny, "epochs": 1, "jobs": 1, **({} if path is None else {"json": path})}
    return objectives.main([*(word for key, value in given.items() for word in (f"--{key}", str(value))), *more])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [row for table in read_json(path, SCHEMA)["tables"] for row in table["rows"]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all rows, made once."""
    path = tmp_path_factory.mktemp("report") / "objectives.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "ROWS", FEW)
        patch.setattr(objectives, "load", lambda data, part: images())
        run(path)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    path = tmp_path / "objectives.json"
    path.write_bytes(written.read_bytes())
    return path


def by_hand() -> dict[str, Audit]:
    """The averaged row without the benchmark."""
    data = images()
    train, test = data.limit_per_class(2), data.limit_per_class(5)
    schedule = Schedule(epochs=1, kind="one-cycle", lr=0.2, batch_size=8)
    model = initialised("small-cnn", 2, train, 0)
    options: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    state = fit(model, train, PGDAT(steps=1), methods=[EMA(decay=0.5)], **options).state
    found = {}
    for name, weights in {"model": state.weights, "ema": state.exports["ema"]}.items():
        model.load_state_dict(dict(weights))
        found[name] = audit(model, test, attacks=["clean", "pgd-20"])
    assert any(not torch.equal(state.weights[key], state.exports["ema"][key]) for key in state.weights)
    return found


# Rows


def test_keys_are_unique() -> None:
    assert len({case.key for case in ROWS}) == len(ROWS)
    assert [case.key for case in ROWS if case.train == "trades"] == ["trades", "trades, l2"]


def test_raw_weights_and_every_average_are_lines_that_agree_with_a_direct_audit(written: Path) -> None:
    lines = lines_of(written)
    assert [(line["what"], line["weights"], line["norm"], line["eps"]) for line in lines] == [
        ("standard", "model", "linf", "8/255"),
        ("pgd-at(steps=1)", "model", "linf", "8/255"),
        ("pgd-at(steps=1) + ema(decay=0.5)", "ema", "linf", "8/255"),
        ("trades(steps=1)", "model", "l2", "128/255"),
    ]
    assert [line["names"] for line in lines] == [["standard"], ["pgd-at"], ["pgd-at", "ema"], ["trades"]]
    for line, found in zip(lines[1:3], by_hand().values(), strict=True):
        for attack, name in (("clean", "clean"), ("pgd-20", "pgd20")):
            worst = found.worst(attack)
            assert line[name] == 100 * found.average(attack)
            assert (line[f"{name}_low"], line[f"{name}_high"]) == tuple(100 * e for e in found.average_interval(attack))
            assert (line[f"{name}_worst"], line[f"{name}_worst_class"]) == (100 * worst.value, worst.words)
            ends = (line[f"{name}_worst_low"], line[f"{name}_worst_high"])
            assert ends == tuple(100 * end for end in found.worst_interval(attack))
            assert line[f"{name}_correct"] == found.correct(attack).tolist()
        assert line["count"] == [5] * 10
        assert line["images_per_second"] == pytest.approx(20 / line["seconds"])
    assert lines[1]["settings"]["train"]["ema"]["decay"] == "0.5"
    assert lines[1]["settings"]["train"]["pgd-at"]["eps"] == "8/255"
    assert lines[3]["settings"]["train"]["trades"]["norm"] == "l2"


def test_the_text_beside_the_report_has_a_table_per_norm(written: Path) -> None:
    text = written.with_suffix(".md").read_text()
    line = lines_of(written)[1]
    assert text.index("## linf, radius 8/255") < text.index("| standard") < text.index("## l2, radius 128/255")
    (row,) = [row for row in text.splitlines() if row.startswith("| pgd-at(steps=1)  ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["20 x 1", f"{line['clean']:.1f} ({line['clean_low']:.1f} to {line['clean_high']:.1f})"]
    interval = f"({line['pgd20_worst_low']:.1f} to {line['pgd20_worst_high']:.1f})"
    assert cells[5] == f"{line['pgd20_worst']:.1f} {interval} {line['pgd20_worst_class']}"
    assert cells[-1] == line["commit"]
    assert "not which is best" in text
    assert "not over seeds" in text


def test_an_augmentation_acts_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path) -> None:
    monkeypatch.setattr(objectives, "ROWS", (Case("standard", augment="none"),))
    path = tmp_path / "objectives.json"
    run(path)
    (line,) = lines_of(path)
    assert (line["what"], line["names"], line["settings"]["augment"]) == (
        "standard, none",
        ["standard", "none"],
        "none",
    )
    assert lines_of(written)[0]["settings"]["augment"] == "crop-flip"


def test_a_row_in_a_process_of_its_own_is_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    paths = {jobs: tmp_path / f"{jobs}.json" for jobs in (1, 2)}
    for jobs, path in paths.items():
        run(path, "--only", "standard", "--data", "synthetic", "--jobs", str(jobs), "--threads", "1")
    (here,), (apart,) = (lines_of(path) for path in paths.values())
    timed = {"seconds", "images_per_second", "date"}
    assert {k: v for k, v in here.items() if k not in timed} == {k: v for k, v in apart.items() if k not in timed}


# Keeping what is there


def test_without_keep_a_report_is_not_touched(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(copy)
    assert stop.value.code == 2
    assert "exists: name another file, or add --force" in capsys.readouterr().err
    assert copy.read_bytes() == before


def test_keep_trains_what_lacks_and_what_has_other_settings(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = lines_of(copy)
    changed = read_json(copy)
    rows = changed["tables"][0]["rows"]
    rows[0]["settings"]["train"]["standard"]["since"] = "1"
    changed["tables"].pop(1)
    copy.write_text(json.dumps(changed))
    done = []
    trained = objectives.trained

    def watched(case: Case, *rest: Any) -> Any:
        done.append(case.key)
        monkeypatch.setattr(objectives, "_commit", lambda: "later")
        return trained(case, *rest)

    monkeypatch.setattr(objectives, "trained", watched)
    run(copy, "--keep")
    assert done == ["standard", "trades(steps=1), l2"]
    after = lines_of(copy)
    assert after[1:3] == before[1:3]
    assert [line["commit"] for line in after] == ["later", before[1]["commit"], before[2]["commit"], "later"]
    assert after[0]["settings"] == before[0]["settings"]
    assert f"{AVERAGED}: kept" in capsys.readouterr().err


def test_every_row_is_on_disk_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "objectives.json"
    trained = objectives.trained

    def killed(case: Case, *rest: Any) -> Any:
        if case == FEW[2]:
            raise KeyboardInterrupt
        return trained(case, *rest)

    monkeypatch.setattr(objectives, "trained", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert [line["weights"] for line in lines_of(path)] == ["model", "model", "ema"]
    assert path.with_suffix(".md").exists()


def test_only_leaves_the_other_rows_and_refuses_to_mix_settings(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines_of(copy)
    run(copy, "--keep", "--only", "standard")
    assert lines_of(copy) == before
    with pytest.raises(SystemExit) as stop:
        run(copy, "--keep", "--only", "standard", "--seed", "1")
    assert stop.value.code == 2
    assert "--keep: seed must be 0 as in the file, got 1" in capsys.readouterr().err
    assert lines_of(copy) == before


def test_only_picks_by_composition_or_key() -> None:
    both = objectives.picked(["trades(steps=1)", "standard"])
    assert both == (FEW[0], FEW[2])
    assert objectives.picked([FEW[2].key]) == (FEW[2],)
    assert objectives.picked(None) == FEW


# Errors


@pytest.mark.parametrize("broken", [Case("mart-of-tomorrow"), Case("pgd-at(steps=0) + ccr")])
def test_a_failing_row_leaves_the_others_and_ends_with_one(
    broken: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(objectives, "ROWS", (broken, FEW[0]))
    path = tmp_path / "objectives.json"
    with pytest.raises(SystemExit) as stop:
        run(path)
    assert stop.value.code == 1
    assert [line["key"] for line in lines_of(path)] == ["standard"]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert told.startswith(f"{broken.key}: failed, ")


def test_a_report_survives_where_every_row_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.read_bytes()
    monkeypatch.setattr(objectives, "ROWS", (Case("mart-of-tomorrow"),))
    with pytest.raises(SystemExit) as stop:
        run(copy, "--force")
    assert stop.value.code == 1
    assert copy.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--only", "standart"], "unknown row 'standart': did you mean standard"),
        (["--keep"], "--keep needs --json"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--images", "9"], "limit_per_class must be at least 1"),
        (["--keep", "--force", "--json", "x.json"], "one goes on with the file, the other replaces it"),
    ],
)
def test_wrong_use_is_one_line(more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(None, *more)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_report_of_another_script_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attack.json"
    path.write_text(json.dumps({"schema": SCHEMA, "name": "attack", "tables": []}))
    with pytest.raises(SystemExit) as stop:
        run(path, "--keep")
    assert stop.value.code == 2
    assert "attack.json is a report of benchmarks.attack, not of" in capsys.readouterr().err.splitlines()[-1]
