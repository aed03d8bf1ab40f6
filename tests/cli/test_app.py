"""The command line as a whole: help, processes, and paths as a user writes them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reference.commands import TEN, Command, training
from reference.layouts import pixels, write_images


@pytest.mark.parametrize(
    "argv", [[], ["--help"], *([name, "--help"] for name in ["train", "audit", "repair", "explain", "list", "demo"])]
)
def test_help_goes_to_stdout_and_exits_0(command: Command, argv: list[str]) -> None:
    outcome = command(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: robustfair" in outcome.out


def test_the_version_is_that_of_the_package(command: Command) -> None:
    from importlib.metadata import version

    assert command("--version").out.strip() == version("robustfair")


def test_images_in_folders_with_odd_names_go_all_the_way(place: Path, command: Command) -> None:
    names = ("Äpfel, rot", "b c+(d)=e", "<b>&\"'")
    write_images(place / "meine Bilder", {name: pixels(8, seed=row) for row, name in enumerate(names)})
    keys = {"data": "meine Bilder", "out": "läufe/a b+c", "limit_per_class": None, "epochs": 1}
    assert command(*training("trades", **keys)).code == 0
    found = command("audit", "läufe/a b+c", "--attacks", "clean,fgsm", "--json").json()
    assert found["class_names"] == sorted(names)
    outcome = command("repair", "läufe/a b+c", "--out", "läufe/ü", "--attacks", "clean")
    assert outcome.code == 0, outcome.err
    page = (place / "läufe" / "ü" / "report.html").read_text(encoding="utf-8")
    assert "<b>&\"'" not in page


def process(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "robustfair.cli", *argv], cwd=cwd, capture_output=True, text=True)


def test_a_process_reports_wrong_use_in_one_line(tmp_path: Path) -> None:
    done = process("train", "trades + ccm", "--dta", "digits", "--out", "new", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"robustfair: .*--dta.*--data.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "robustfair.cli", "list", "models"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""


@pytest.fixture
def home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the stock as the home folder, and an empty working folder in it."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    monkeypatch.syspath_prepend(place)
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    return place


def test_a_tilde_is_the_home_folder_in_every_path(home: Path, command: Command) -> None:
    (home / "plan.yaml").write_text("train: standard\ndata: ~/good.npz\nmodel: small-cnn\nwidth: 4\nepochs: 1\n")
    (home / "groups.csv").write_text("class,group\n" + "".join(f"{name},g{int(name) % 2}\n" for name in TEN))
    few = ("--quiet", "--attacks", "clean", "--limit-per-class", "1")
    plain, small = ("--validation", "0", "--select", "last", "--quiet"), ("--arch", "small-cnn", "--width", "4")
    grouped = ("--group-by", "~/groups.csv", "--baseline", "~/baseline.json", "--limit-per-class", "2")
    for words, made in (
        (("train", "~/plan.yaml", "--out=~/plain", *plain), "plain/manifest.json"),
        (
            (
                "train",
                "standard",
                "--data=~/good.npz",
                "--model",
                "small-cnn",
                "--width",
                "4",
                "--epochs",
                "1",
                "--out=~/named",
                *plain,
            ),
            "named/manifest.json",
        ),
        (("audit", "~/run", *few, "--out=~/audits", "--report=~/page.html"), "page.html"),
        (("audit", "~/run", "--attacks", "clean", *grouped, "--out", "~/grouped", "--quiet"), "grouped"),
        (("audit", "~/good.pt", *small, "--data", "~/good.npz", *few, "--report", "~/weights.html"), "weights.html"),
        (("audit", "zoo_of_test:tiny", "--weights=~/good.pt", "--data", "digits", *few, "--out=~/zoo"), "zoo"),
        (("audit", "~/baseline.json", "--report=~/again.html"), "again.html"),
        (("compare", "~/grouped", "~/baseline.json", "--out=~/compared.txt"), "compared.txt"),
        (("repair", "~/run", "--out=~/mended"), "mended/manifest.json"),
        (("corruptions", "~/run", "--which", "fog", "--out=~/fog", "--limit-per-class", "1", "--quiet"), "fog"),
        (("data", "pack", "~/good.npz", "--out=~/packed"), "packed"),
        (("explain", "~/plan.yaml"), "plan.yaml"),
    ):
        outcome = command(*words)
        assert outcome.code == 0, (words, outcome.err)
        assert (home / made).exists(), words
        assert list((home / "here").iterdir()) == [], words


def test_the_next_command_is_one_that_a_shell_takes(place: Path, command: Command) -> None:
    for words in (training(out="a run"), ["repair", "a run", "--out", "it's mended"]):
        outcome = command(*words, "--quiet")
        assert outcome.code == 0, outcome.err
        line = outcome.out.splitlines()[-1]
        _, name, *rest = shlex.split(line)
        assert (name, rest[:2]) == ("robustfair", ["audit", words[words.index("--out") + 1]])
        assert command(*rest, "--limit-per-class", 1, "--quiet").code == 0
    (place / "no audit").mkdir()
    advice = command("compare", "no audit", "run").err.partition(": run ")[2]
    assert shlex.split(advice) == ["robustfair", "audit", "no audit"]
