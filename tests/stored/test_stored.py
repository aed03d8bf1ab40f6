"""What an earlier version (ccd4808) wrote still loads, and the same commands still give the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustfair.cli.app import main
from stored.record import RUNS, hashes, probe, robustfair, train

HERE = Path(__file__).parent
RESULTS = json.loads((HERE / "results.json").read_text())


@pytest.fixture(scope="module")
def same_rounding() -> None:
    if probe() != RESULTS["probe"]:
        pytest.skip("this processor rounds otherwise than the one that the stored results are from")


@pytest.mark.usefixtures("same_rounding")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_stored_bits(name: str, tmp_path: Path) -> None:
    train(name, tmp_path / name)
    found = hashes(tmp_path / name)
    assert {key: found[key] for key in RESULTS["runs"][name]} == RESULTS["runs"][name]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("trades", "repaired"):
        shutil.copytree(HERE / name, tmp_path / name)
    return tmp_path


def stored_audit(run: Path, attacks: str) -> Path:
    (found,) = (run / "audit").glob(f"{attacks}_*.json")
    return found


@pytest.mark.usefixtures("same_rounding")
def test_a_stored_run_audited_again_gives_the_stored_verdicts(runs: Path) -> None:
    attacks = "clean,pgd-5,cw-5"
    robustfair("audit", "trades", "--attacks", attacks, "--quiet", "--out", "again", cwd=runs)
    (again,) = (runs / "again").glob("*.npz")
    with np.load(stored_audit(runs / "trades", attacks).with_suffix(".npz")) as old, np.load(again) as new:
        for key in old:
            np.testing.assert_array_equal(new[key], old[key], err_msg=key)


@pytest.mark.parametrize("attacks", ["clean,pgd-5,cw-5", "clean,autoattack"])
def test_a_stored_audit_is_read(attacks: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(stored_audit(runs / "trades", attacks))]) == 0
    assert "worst" in capsys.readouterr().out


def test_a_stored_repair_is_compared_with_its_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "trades"), str(runs / "repaired"), "--paired"]) == 0
    assert "worst" in capsys.readouterr().out
