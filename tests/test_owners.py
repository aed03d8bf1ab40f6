"""Commands that are started together, or killed at every moment: one owner per folder, and the next call simply works.

Run as a program, this file is the process that the tests start: it forks a child per command, so that every child can
be killed for good and torch is imported once. The tests then read what the children said and left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.runs import TINY, history, tensors, tree
from robustfair.cli import app as cli
from robustfair.cli import progress
from robustfair.evaluate import journal

PAIR = {"ema": "trades + ema", "plain": "standard"}
AUDIT = ["--attacks", "clean,pgd-2", "--limit-per-class", "2", "--device", "cpu", "--quiet"]
OUT = {"absent": "absent", "deeper": "made/deeper/run", "empty": "empty"}


def training(name: str, out: Path, **keys: Any) -> list[str]:
    """The words that train one of the pair; without an attack the keys of one are left out."""
    given = {**TINY, "epochs": 1, **keys}
    if name == "plain":
        given = {key: value for key, value in given.items() if key not in ("eps", "steps")}
    flags = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["train", PAIR[name], *flags, "--out", str(out), "--quiet"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(call: int, folder: Path) -> None:
    """Be killed right before the `call`-th time that Python opens, moves, makes or removes something in `folder`."""
    calls = 0

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and given:
            path = given[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder)):
                calls += 1
                if calls == call:
                    die()

    sys.addaudithook(watch)


class Children:
    """Forked processes, each with its own stderr."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def start(self, argv: list[str], before: Callable[[], object] | None = None) -> tuple[int, Path]:
        """A command in a child, which calls `before` first; its number and the file of what it says."""
        self.count += 1
        said = self.root / f"said-{self.count}"
        pid = os.fork()
        if pid == 0:
            code = 1
            with said.open("w") as sys.stderr:
                try:
                    if before is not None:
                        before()
                    code = cli.main(argv)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(code)
        return pid, said

    @staticmethod
    def end(child: tuple[int, Path]) -> tuple[int, str]:
        """Exit status, negative for the signal that ended it, and what it said."""
        code = os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1])
        return code, child[1].read_text()

    def run(self, argv: list[str], before: Callable[[], object] | None = None) -> tuple[int, str]:
        return self.end(self.start(argv, before))

    def together(self, *argvs: list[str]) -> list[tuple[int, str]]:
        """Several commands that begin at the same moment."""
        reading, writing = os.pipe()

        def wait() -> None:
            os.close(writing)
            os.read(reading, 1)

        children = [self.start(argv, wait) for argv in argvs]
        os.close(reading)
        os.close(writing)
        return [self.end(child) for child in children]

    def beside(self, argv: list[str], place: Any, name: str, other: list[str]) -> list[tuple[int, str]]:
        """`argv`, held where it calls `name` of `place` for the second time until `other` has ended; how both ended."""
        there, here = os.pipe(), os.pipe()

        def hold() -> None:
            usual, calls = getattr(place, name), []

            def held(*given: Any, **keys: Any) -> Any:
                calls.append(1)
                if len(calls) == 2:
                    os.write(there[1], b"!")
                    os.close(here[1])
                    os.read(here[0], 1)
                return usual(*given, **keys)

            setattr(place, name, held)

        first = self.start(argv, hold)
        os.close(there[1])
        os.read(there[0], 1)
        second = self.run(other)
        for handle in (there[0], *here):
            os.close(handle)
        return [self.end(first), second]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a killed process loses nothing that it has written: only a machine would
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    warm = str(root / "warm")  # in this process: what commands import, and the kernels, are there for all children
    for words in (training("ema", root / "warm"), ["repair", warm, *AUDIT, "--out", f"{warm}-repaired"]):
        assert cli.main(words) == 0
    children = Children(root)
    ends: dict[str, Any] = {name: children.run(training(name, root / name)) for name in PAIR}
    ends |= {"two epochs": children.run(training("ema", root / "two", epochs=2))}
    (root / "pair-empty").mkdir()
    for number in range(8):
        out = root / f"pair-{number}" / list(OUT.values())[number % 3]
        if number % 3 == 2:
            out.mkdir(parents=True)
        ends[f"pair {number}"] = children.together(*(training(name, out) for name in PAIR))
    _resumed(root, children, ends)
    _audited(root, children, ends)
    _killed(root, children, ends)
    print(json.dumps(ends), file=sys.__stdout__)


def _resumed(root: Path, children: Children, ends: dict[str, Any]) -> None:
    words = training("ema", root / "resumed", epochs=2)
    bar = progress.TrainingProgress
    ends["second"] = children.beside(words, bar, "step", training("plain", root / "resumed"))
    for number in range(3):
        words = training("ema", root / f"twice-{number}", epochs=2)
        usual = bar.step

        def killed(self: Any, epoch: int, step: int) -> None:
            die() if (epoch, step) == (1, 1) else usual(self, epoch, step)  # noqa: B023

        def in_epoch_two() -> None:
            bar.step = killed  # type: ignore[method-assign]

        ends[f"killed {number}"] = children.run(words, in_epoch_two)
        resume = ["train", "--out", str(root / f"twice-{number}"), "--resume", "--quiet"]
        if number == 0:
            ends["resume beside"] = children.beside(resume, bar, "step", resume)
        else:
            ends[f"resumed {number}"] = children.together(resume, resume)


def _audited(root: Path, children: Children, ends: dict[str, Any]) -> None:
    same = ["audit", str(root / "ema"), *AUDIT]
    other = ["audit", str(root / "ema"), "--attacks", "clean,fgsm", "--limit-per-class", "2", "--quiet"]
    ends["same audit"] = children.beside(same, journal.Journal, "write", same)
    ends["other audit"] = children.beside([*same, "--seed", "1"], journal.Journal, "write", other)
    ends["audit in training"] = children.beside(
        ["train", "--out", str(root / "two"), "--resume", "--quiet"],
        sys.modules["robustfair.runs.folder"].RunFolder,
        "update_manifest",
        ["audit", str(root / "two"), *AUDIT],
    )


def _killed(root: Path, children: Children, ends: dict[str, Any]) -> None:
    """Each command killed at every moment, and given again."""
    commands = {
        "repair": ["repair", str(root / "ema"), "--out"],
        "repair into an empty folder": ["repair", str(root / "ema"), "--out"],
        "repair and audit": ["repair", str(root / "ema"), *AUDIT, "--out"],
        "train": [*(word for word in training("ema", root) if word not in ("--out", str(root))), "--out"],
    }
    for name, words in commands.items():
        whole = root / name / "whole"
        ends[name] = {"whole": children.run([*words, str(whole)])}
        step = {"repair": 1, "repair and audit": 11}.get(name, 7)
        for call in range(1, 400, step):
            out = root / name / str(call)
            if "empty" in name:
                out.mkdir(parents=True)
            first = children.run([*words, str(out)], lambda: die_at(call, out))  # noqa: B023
            if (out / "manifest.json").exists() and not (out / ".lock").exists():
                break  # all was done and given back
            resume = ["--resume"] if name == "train" and (out / "manifest.json").exists() else []
            ends[name][call] = [first, children.run([*words, str(out), *resume])]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and how each command ended."""
    root = tmp_path_factory.mktemp("owners")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__, str(root)],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def in_use(text: str) -> bool:
    """Whether a command said in one line who holds what it wanted."""
    pattern = r"robustfair: \S.* is in use by process \d+ on \S+ since .+ \(.*\): wait for its end or stop it\n"
    return re.fullmatch(pattern, text) is not None


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


@pytest.mark.parametrize("number", range(8))
def test_of_two_that_start_together_one_wins_and_the_other_is_refused(
    ends: tuple[Path, dict[str, Any]], number: int
) -> None:
    root, found = ends[0], ends[1][f"pair {number}"]
    assert sorted(code for code, _ in found) == [0, 2], found
    winner = list(PAIR)[[code for code, _ in found].index(0)]
    (said,) = (text for code, text in found if code == 2)
    assert in_use(said) or "already holds a run" in said
    assert said.count("\n") == 1
    out = root / f"pair-{number}" / list(OUT.values())[number % 3]
    assert f"\ntrain: {PAIR[winner]}\n" in (out / "recipe.yaml").read_text()
    assert tensors(out) == tensors(root / winner)
    assert history(out) == history(root / winner)
    assert hidden(root / f"pair-{number}") == []


def test_a_run_that_trains_is_refused_to_another(ends: tuple[Path, dict[str, Any]]) -> None:
    root, found = ends
    (first, _), (second, said) = found["second"]
    assert (first, second) == (0, 2), found["second"]
    assert in_use(said)
    assert tensors(root / "resumed") == tensors(root / "two")


@pytest.mark.parametrize("number", range(3))
def test_two_resumes_at_once_leave_one_history(ends: tuple[Path, dict[str, Any]], number: int) -> None:
    root, found = ends
    assert found[f"killed {number}"][0] == -signal.SIGKILL
    both = found["resume beside" if number == 0 else f"resumed {number}"]
    codes = [code for code, _ in both]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    assert codes == [0, 2] or number > 0
    assert all(in_use(said) for code, said in both if code == 2), both
    assert [record["epoch"] for record in history(root / f"twice-{number}")] == [1, 2]
    assert tensors(root / f"twice-{number}") == tensors(root / "two")
    assert hidden(root / f"twice-{number}") == []


def test_the_same_audit_is_made_once_at_a_time_and_others_beside_it(ends: tuple[Path, dict[str, Any]]) -> None:
    root, found = ends
    assert [code for code, _ in found["same audit"]] == [0, 2]
    assert in_use(found["same audit"][1][1])
    assert [code for code, _ in found["other audit"]] == [0, 0], found["other audit"]
    assert [code for code, _ in found["audit in training"]] == [0, 0], found["audit in training"]
    assert len(list((root / "ema" / "audit").glob("*.json"))) >= 3
    assert hidden(root / "ema") == []


NAMES = ("repair", "repair into an empty folder", "repair and audit", "train")


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_the_next_call_simply_works(ends: tuple[Path, dict[str, Any]], name: str) -> None:
    root, found = ends[0], ends[1][name]
    assert found.pop("whole")[0] == 0
    assert len(found) > 5
    whole, cut = root / name / "whole", re.compile(r"(audit/)?\.[^/]+\.(json|npz|html)\.\d+\.tmp")
    for call, (first, again) in found.items():
        assert first[0] == -signal.SIGKILL, (call, first)
        assert again[0] == 0, (call, again)
        out = root / name / call
        assert tensors(out) == tensors(whole), call
        assert history(out) == history(whole), call
        assert (out / "recipe.yaml").read_bytes() == (whole / "recipe.yaml").read_bytes()
        assert json.loads((out / "manifest.json").read_text())["status"] == "complete"
        assert [path for path in tree(out).keys() ^ tree(whole).keys() if not cut.fullmatch(path)] == [], call


if __name__ == "__main__":
    main(Path(sys.argv[1]))
