"""The demo in every way, on a tiny run; and what the documentation says of it, on the report that is kept."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo
from benchmarks.measure import ROOT, SCHEMA
from robustfair.files import read_json

KEPT = ROOT / "results" / "demo.json"


def rows(path: Path) -> list[list[dict[str, Any]]]:
    return [table["rows"] for table in read_json(path, SCHEMA)["tables"]]


def test_every_run_is_a_process_of_its_own_with_its_processor_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, str]] = []
    run = demo.subprocess.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        if "benchmarks.demo" in args[0]:
            seen.append({key: kwargs["env"].get(key, "") for key in ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")})
        return run(*args, **kwargs)

    monkeypatch.setattr(demo.subprocess, "run", watched)
    out = tmp_path / "demo.md"
    given = ["--processors", "AVX2", "--threads", "1", "--seeds", "3", "--epochs", "1", "--out", str(out)]
    report = demo.main(given)
    assert report is not None
    assert seen == [{"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}]
    assert out.read_text() == capsys.readouterr().out == report.text() + "\n"
    found = [row for (row,) in rows(out.with_suffix(".json"))]
    assert [row["attack"] for row in found] == ["clean", "pgd-20", "cw-50(restarts=5)", "robust"]
    assert {(row["processor"], row["threads"], row["seed"]) for row in found} == {("AVX2", 1, 3)}


def test_titles_count_what_goes_up_and_down() -> None:
    def line(worst: float, average: float) -> dict[str, Any]:
        return {
            "attack": "pgd-20", "worst_before": 10, "worst_after": 10 + worst,
            "average_before": 50, "average_after": 50 + average,
        }  # fmt: skip

    (table,) = demo.report([line(3, -1), line(-2, -1), line(0, -4)]).tables
    assert table.title == "pgd-20: of 3 runs worst up in 1, down in 1; average up in 0, down in 3"


def test_what_is_said_of_the_demo_holds_in_every_run() -> None:
    tables = {table[0]["attack"]: table for table in rows(KEPT)}
    for attack, table in tables.items():
        ways = [(row["processor"], row["threads"], row["seed"]) for row in table]
        assert sorted(ways) == sorted(product(demo.PROCESSORS, (1, 2), range(5)))
        if attack == "clean":
            continue
        for row in table:
            assert row["class_before"] == "8"
            assert row["average_after"] < row["average_before"]
            gains = row["worst_after"] > row["worst_before"]
            assert gains or attack == "pgd-20", "under the margin attack and under all together it always does"
    margin = tables["cw-50(restarts=5)"]
    gains = [row["worst_after"] - row["worst_before"] for row in margin]
    losses = [row["average_before"] - row["average_after"] for row in margin]
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    text = " ".join(text.partition("## Digits")[2].partition("\n## ")[0].split())
    average = [row["average_before"] for row in margin]
    ratio = [row["ratio"] for row in margin]
    up, down = (
        sum(sign * (row["worst_after"] - row["worst_before"]) > 0 for row in tables[attack])
        for attack, sign in (("pgd-20", 1), ("clean", -1))
    )
    for said in (
        f"of 8 at most {max(row['worst_before'] for row in margin):.0f} % withstand the margin attack",
        f"of all digits {min(average):.0f} to {max(average):.0f} %",
        f"is {min(ratio):.1f} to {max(ratio):.1f}".removesuffix(".0") + " times as long as the shortest",
        f"the worst class gains {min(gains):.0f} to {max(gains):.0f} points",
        f"the average pays {min(losses):.0f} to {max(losses):.0f}, in each of {len(margin)} runs",
        f"the loss of the average more than chance in {sum(bool(row['average_mark']) for row in margin)} of them",
        f"the gain of the worst class in {sum(bool(row['worst_mark']) for row in margin)}.",
        f"Under PGD-20 the worst class gains in {up} of {len(margin)}, and on clean images it loses in {down}.",
    ):
        assert said in text
