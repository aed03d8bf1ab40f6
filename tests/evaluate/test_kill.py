"""An audit that is killed with SIGKILL at the worst moments goes on with the same command and ends with the same files.

Run as a program, this file is the process that the tests start: it forks a child per audit, so that every child can be
killed for good and torch is imported once. The tests then compare what lies on disk.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robustfair.attacks.autoattack import named as family
from robustfair.attacks.autoattack.named import AutoAttack, cheaper
from robustfair.cli import app as cli
from robustfair.data import load_dataset
from robustfair.evaluate import autoattack as strong
from robustfair.evaluate import journal, request, runner
from robustfair.evaluate.result import Audit
from robustfair.evaluate.runner import AttackRunner
from robustfair.models import create_model
from robustfair.objectives import Standard
from robustfair.report import files
from robustfair.training import Schedule, fit

ATTACKS = "pgd-2,autoattack,fab(steps=3)"


def command(root: Path, name: str) -> list[str]:
    weights = ["--arch", "small-cnn", "--width", "4", "--data", "digits", "--limit-per-class", "2"]
    how = ["--attacks", ATTACKS, "--eps", "0.08", "--points", "--checks", "--batch-size", "7", "--quiet", "--json"]
    where = ["--out", str(root / name), "--report", str(root / f"{name}.html")]
    return ["audit", str(root / "weights.safetensors"), *weights, *how, *where]


# Where a child dies


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(place: Any, name: str, *, call: int = 1) -> Callable[[], None]:
    """Die where `name` of `place` is called for the `call`-th time."""

    def patch() -> None:
        usual, calls = getattr(place, name), []

        def dying(*args: Any, **keys: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                die()
            return usual(*args, **keys)

        setattr(place, name, dying)

    return patch


def after_writing(call: int) -> Callable[[], None]:
    """Die when the journal was written for the `call`-th time."""

    def patch() -> None:
        usual, calls = journal.Journal.write, []

        def dying(self: journal.Journal, tensors: Any) -> None:
            usual(self, tensors)
            calls.append(1)
            if len(calls) == call:
                die()

        journal.Journal.write = dying  # type: ignore[method-assign]

    return patch


def half_a_writing() -> None:
    """Die by the system's own hand in the sixth writing of the journal, where its file has come to 300 bytes."""
    usual, calls = journal.Journal.write, []

    def dying(self: journal.Journal, tensors: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        usual(self, tensors)

    journal.Journal.write = dying  # type: ignore[method-assign]


def note_attacks(file: Path) -> Callable[[], None]:
    """Write into `file` which attacks run."""

    def patch() -> None:
        usual = AttackRunner._attack
        file.touch()

        def noted(self: AttackRunner, attack: Any, *rest: Any) -> bool:
            with file.open("a") as notes:
                notes.write(f"{attack.name}\n")
            return usual(self, attack, *rest)

        AttackRunner._attack = noted  # type: ignore[method-assign]

    return patch


KILLS: dict[str, Callable[[], None]] = {
    "clean": before(AttackRunner, "_run_clean"),
    "clean is known": after_writing(1),
    "pgd is half way": after_writing(2),
    "pgd is known": after_writing(5),
    "targeted": after_writing(24),
    "square": after_writing(64),
    "half a writing": half_a_writing,
    "before a rename": before(os, "fsync", call=9),
    "in the checks": before(request, "diagnose_gradients"),
    "before the files": before(files, "write_outputs"),
    "between the files": before(Audit, "to_dict"),
    "before the points": before(Audit, "_save_points"),
    "before the report": before(files, "write_report"),
    "before the journal goes": before(journal.Journal, "remove"),
}
ATTACKED = [name for name in KILLS if name.startswith(("in the", "before the", "between the"))]
"""Kills after the last attack."""
ENDS = {"half a writing": -signal.SIGXFSZ, "twice": [-signal.SIGKILL] * 2}
"""Exit status of what does not end by one SIGKILL."""
TWICE = (after_writing(9), after_writing(12))


def in_a_child(action: Callable[[], int]) -> int:
    """Run `action` in a forked process; its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = action()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a killed process loses nothing that it has written: only a machine would
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    data = load_dataset("digits").train.limit_per_class(40)
    torch.manual_seed(0)
    model = create_model("small-cnn", in_channels=1, width=4)
    schedule = Schedule(epochs=8, lr=0.01, kind="constant", batch_size=16, optimizer="adam", weight_decay=0.0)
    save_file(fit(model, data, Standard(), schedule=schedule).model.state_dict(), root / "weights.safetensors")
    strong.SAVE_EVERY = runner.SAVE_EVERY = 0.0
    request.diagnose_gradients = lambda *given, **keys: ()
    standard = AutoAttack(name="standard", members=family.VERSIONS["standard"])
    family.VERSIONS["standard"] = cheaper(standard, steps=5, targets=2, queries=30).members  # type: ignore[index]

    def run(name: str, patch: Callable[[], None] = lambda: None) -> int:
        def audit_once() -> int:
            patch()
            return cli.main(command(root, name))

        return in_a_child(audit_once)

    status: dict[str, Any] = {"whole": cli.main(command(root, "whole"))}  # here: what it imports is there for all
    for name, patch in KILLS.items():
        killed = run(name, patch)
        left = sorted(path.name for path in (root / name).glob("*"))
        status[name] = {"killed": killed, "left": left, "resumed": run(name, note_attacks(root / f"{name}.txt"))}
    status["twice"] = {"killed": [run("twice", patch) for patch in TWICE], "resumed": run("twice")}
    json.dump(status, sys.__stdout__)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all audits and the exit status of each."""
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return root, json.loads(done.stdout) | {"stderr": done.stderr}


def contents(folder: Path) -> dict[str, Any]:
    """What the files of an audit hold, without what tells the time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            about = json.loads(path.read_text())
            found[path.name] = about | {
                "provenance": about["provenance"] | {"date": "", "seconds": {}, "spent": {}, "searches": {}}
            }
        elif path.suffix == ".npz":
            found[path.name] = {name: column.tolist() for name, column in np.load(path).items()}
        else:
            found[path.name] = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    return found


def test_the_uninterrupted_audit_breaks_some_and_not_all(audits: tuple[Path, dict[str, Any]]) -> None:
    root, status = audits
    assert status["whole"] == 0, status["stderr"]
    files = contents(root / "whole")
    assert [Path(name).suffix for name in files] == [".json", ".npz", ".safetensors"]
    (about,) = (found for name, found in files.items() if name.endswith(".json"))
    assert list(about["attacks"]) == ["clean", "pgd-2", "autoattack", "fab(steps=3)"]
    fell = {member: sum(by_class) for member, by_class in about["attacks"]["autoattack"]["fell_to"].items()}
    assert len(fell) == 4
    assert 2 < sum(fell.values()) < sum(about["attacks"]["clean"]["correct"])


@pytest.mark.parametrize("name", [*KILLS, "twice"])
def test_a_killed_audit_ends_with_the_files_of_the_uninterrupted_one(
    audits: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, status = audits
    assert status[name]["killed"] == ENDS.get(name, -signal.SIGKILL), "it was over before it could be killed"
    assert status[name]["resumed"] == 0, status["stderr"]
    assert contents(root / name) == contents(root / "whole")


@pytest.mark.parametrize("name", ATTACKED)
def test_a_finished_audit_that_is_killed_before_it_is_saved_attacks_nothing_again(
    audits: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, status = audits
    assert any(left.startswith("unfinished-") for left in status[name]["left"])
    assert (root / f"{name}.txt").read_text() == ""
    assert (root / "square.txt").read_text().splitlines() == ["autoattack", "fab(steps=3)"]
    assert (root / f"{name}.html").is_file()
    assert not list((root / name).glob("*unfinished-*"))


@pytest.mark.parametrize(
    "name",
    ["clean is known", "pgd is half way", "pgd is known", "targeted", "square", "in the checks", "before the files"],
)
def test_a_killed_audit_leaves_its_journal_and_its_lock(audits: tuple[Path, dict[str, Any]], name: str) -> None:
    *locks, left = audits[1][name]["left"]
    assert left.startswith("unfinished-")
    assert left.endswith(".safetensors")
    assert locks == ([] if name in ATTACKED else [f".{Path(left).stem}.lock"])


def test_a_writing_that_is_killed_leaves_only_what_bears_the_name_of_the_journal(
    audits: tuple[Path, dict[str, Any]],
) -> None:
    _, temporary, written = audits[1]["half a writing"]["left"]
    assert re.fullmatch(rf"\.{re.escape(written)}\.\d+\.tmp", temporary)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
