"""A run that is killed with SIGKILL at the worst moments resumes and ends bit for bit where an uninterrupted one ends.

Run as a program, this file is the process that the tests start: it forks a child per run, so that every child can be
killed for good and torch is imported once. The tests then compare what lies on disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustfair.runs import checkpoint
from robustfair.runs.checkpoint import read_checkpoint
from robustfair.runs.folder import RunFolder
from robustfair.runs.recipe import Recipe
from robustfair.runs.run import train

CLOCK = ("seconds", "images_per_second")


def recipe(select: str) -> Recipe:
    return Recipe(
        train="trades(beta=1, eps=0.04, steps=2) + ccm(begin=1) + ccr(begin=1) + ema(decay=0.9)",
        data="digits",
        limit_per_class=24,
        model="small-cnn",
        width=8,
        epochs=4,
        batch_size=24,
        lr=0.3,
        validation=0.1,
        select=select,  # type: ignore[arg-type]
        device="cpu",
    )


# Where a child dies. `second` counts the saves: the first one has no older checkpoint to replace.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_epoch_two() -> dict[str, Any]:
    return {"on_step": lambda epoch, step: die() if (epoch, step) == (1, 7) else None}


def before_the_first_checkpoint() -> dict[str, Any]:
    return {"on_step": lambda epoch, step: die() if (epoch, step) == (0, 3) else None}


def after_the_history_line() -> dict[str, Any]:
    write = checkpoint.write_state
    calls = []

    def write_state(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            die()
        write(*args)

    sys.modules["robustfair.runs.folder"].write_state = write_state  # type: ignore[attr-defined]
    return {}


def inside_a_history_line() -> dict[str, Any]:
    save = RunFolder.save

    def cut(self: RunFolder, state: Any, meta: Any) -> None:
        if state.epoch == 2:
            with (self.path / "history.jsonl").open("a") as file:
                file.write('{"epoch": 2, "st')
            die()
        save(self, state, meta)

    RunFolder.save = cut  # type: ignore[method-assign]
    return {}


def between_best_and_last() -> dict[str, Any]:
    write = checkpoint.write_checkpoint

    def write_checkpoint(folder: Path, what: Any) -> None:
        if folder.name == "last" and folder.exists():
            die()
        write(folder, what)

    checkpoint.write_checkpoint = write_checkpoint  # type: ignore[assignment]
    return {}


def while_writing_tensors() -> dict[str, Any]:
    write = checkpoint.write_bytes

    def write_and_die(path: Path, content: bytes | memoryview) -> None:
        write(path, content)
        if path.parent.name == ".last.new" and (path.parent.parent / "last").exists():
            die()

    checkpoint.write_bytes = write_and_die
    return {}


def after_the_first_rename_of(name: str) -> Callable[[], dict[str, Any]]:
    def patch() -> dict[str, Any]:
        rename = Path.rename

        def rename_and_die(self: Path, target: Path) -> Path:
            moved = rename(self, target)
            if self.name == name:
                die()
            return moved

        Path.rename = rename_and_die  # type: ignore[method-assign]
        return {}

    return patch


def after_the_last_epoch() -> dict[str, Any]:
    update = RunFolder.update_manifest

    def update_manifest(self: RunFolder, **values: object) -> None:
        if values.get("epochs_done") == 4:
            die()
        update(self, **values)

    RunFolder.update_manifest = update_manifest  # type: ignore[method-assign]
    return {}


KILLS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "step": ("average+worst", in_the_middle_of_epoch_two),
    "first epoch": ("average+worst", before_the_first_checkpoint),
    "history": ("average+worst", after_the_history_line),
    "half a line": ("average+worst", inside_a_history_line),
    "best then last": ("average+worst", between_best_and_last),
    "tensors": ("average+worst", while_writing_tensors),
    "rename last": ("average+worst", after_the_first_rename_of("last")),
    "rename best": ("average+worst", after_the_first_rename_of("best")),
    "rename ema": ("average+worst", after_the_first_rename_of("ema")),
    "end": ("average+worst", after_the_last_epoch),
    "end of an average": ("last", after_the_last_epoch),
}


def in_a_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a killed process loses nothing that it has written: only a machine would
    status = {}
    for select in ("average+worst", "last"):  # here: what it imports, and the kernels, are there for all
        train(recipe(select), root / select)
        status[select] = RunFolder(root / select).manifest()["status"]
    for name, (select, patch) in KILLS.items():
        killed = in_a_child(lambda: train(recipe(select), root / name, **patch()))  # noqa: B023
        seen = RunFolder(root / name).available()
        resumed = in_a_child(lambda: train(recipe(select), root / name, resume=True))  # noqa: B023
        status[name] = {"killed": killed, "resumed": resumed, "seen": seen}
    json.dump(status, sys.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs and the exit status of each."""
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return root, json.loads(done.stdout) | {"stderr": done.stderr}


def tensors(folder: RunFolder, name: str) -> dict[str, torch.Tensor]:
    read = read_checkpoint(folder.checkpoints / name)
    return {f"weights/{k}": v for k, v in read.weights.items()} | {f"state/{k}": v for k, v in read.tensors.items()}


def test_uninterrupted_runs_complete(runs: tuple[Path, dict[str, Any]]) -> None:
    root, status = runs
    assert (status["average+worst"], status["last"]) == ("complete", "complete"), status["stderr"]
    assert RunFolder(root / "average+worst").available() == ["best", "ema", "last"]
    assert RunFolder(root / "last").available() == ["ema", "last"]
    scale = tensors(RunFolder(root / "last"), "last")["state/method/ccm/scale"]
    assert len(scale.unique()) > 1, "no class was calibrated"
    assert RunFolder(root / "average+worst").manifest()["selected"]["epoch"] > 1, "best/ was never replaced"


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    root, status = runs
    assert status[name]["killed"] == -signal.SIGKILL, "the run was over before it could be killed"
    assert status[name]["resumed"] == 0, status["stderr"]
    whole, again = RunFolder(root / KILLS[name][0]), RunFolder(root / name)
    assert again.available() == whole.available()
    for saved in whole.available():
        one, two = tensors(whole, saved), tensors(again, saved)
        assert one.keys() == two.keys()
        assert [key for key, tensor in one.items() if not torch.equal(tensor, two[key])] == []
        metas = [read_checkpoint(folder.checkpoints / saved).meta for folder in (whole, again)]
        assert {**metas[0], "files": None} == {**metas[1], "files": None}
    records = [[{k: v for k, v in r.items() if k not in CLOCK} for r in f.history()] for f in (whole, again)]
    assert records[0] == records[1]
    assert len(records[1]) == 4
    for key in ("status", "selected", "epochs_done"):
        assert again.manifest()[key] == whole.manifest()[key]
    assert not list(again.path.rglob(".*")), "something was left beside the files"


def test_what_was_saved_before_the_kill_is_listed_after_it(runs: tuple[Path, dict[str, Any]]) -> None:
    """Between its two renames a checkpoint lies under its spare name: it is there for those who list and read."""
    status = runs[1]
    for name in ("rename last", "rename best", "rename ema"):
        assert status[name]["seen"] == ["best", "ema", "last"], name
    assert status["first epoch"]["seen"] == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
