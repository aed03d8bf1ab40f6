"""A run on disk: recipe.yaml, manifest.json, history.jsonl, checkpoints/, audit/, report.html.

A folder that holds a run is never overwritten: it is resumed, or another is chosen. One process at a time owns it, see
`lock`. A run appears in it whole, with its manifest at the end, and what a killed beginning left counts for nothing.
Every file is written whole or not at all; history gains a flushed line an epoch, before the checkpoint of that epoch,
and resuming drops what is ahead of it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfair.errors import CheckpointError, DivergedError, UnknownNameError
from robustfair.files import read_json, write_json, write_text
from robustfair.grammar import read_path
from robustfair.models.build import build_model
from robustfair.runs.checkpoint import (
    Checkpoint,
    checkpoint_names,
    clear_writings,
    has_checkpoint,
    read_checkpoint,
    read_state,
    write_state,
)
from robustfair.runs.lock import owned
from robustfair.training.state import TrainState

SCHEMA = "robustfair.run/1"
RECIPE, MANIFEST, HISTORY, CHECKPOINTS = "recipe.yaml", "manifest.json", "history.jsonl", "checkpoints"
LOCK, NEW = ".lock", ".new"
"""What a process that is killed leaves in the folder: its lock, and the run that it was putting together."""
IMAGES, STAGES = "images.safetensors", "stages"
FILLED = (RECIPE, HISTORY, CHECKPOINTS, IMAGES)
"""What is brought into the folder before the manifest."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", read_path(self.path))

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def audits(self) -> Path:
        return self.path / "audit"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def images(self) -> Path:
        """Of a stage that edited the training images: what it decided."""
        return self.path / IMAGES

    def stage(self, name: str) -> RunFolder:
        """The folder of one of the stages of this run."""
        return RunFolder(self.path / STAGES / name)

    def model_folder(self) -> RunFolder:
        """Where the model of this run is: here, or in its last stage that left one.

        Raises:
            CheckpointError: no stage has left one yet.
        """
        known = self.manifest() if self.exists() else {}
        if "edit" in known:
            raise CheckpointError(f"{self.path} holds an edit of training images ({known['edit']}), and no model")
        names = known.get("stages")
        if names is None:
            return self
        left = [stage for stage in map(self.stage, names) if stage.exists() and stage.available()]
        if not left:
            raise CheckpointError(f"{self.path}: no stage has left a model yet; go on with it by train --resume")
        return left[-1]

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / MANIFEST).exists()

    @contextmanager
    def owned(self) -> Iterator[bool]:
        """Own the folder; it is made where there is none, and goes again if nothing is put into it.

        Yields:
            Whether the owner before was killed.

        Raises:
            CheckpointError: another process owns it, or it cannot be made or written.
        """
        self._require_no_file()
        with owned(self.path / LOCK, f"--out {self.path}") as killed:
            yield killed

    def require_free(self) -> None:
        """Raise CheckpointError unless the folder is absent, empty, or holds no more than a killed beginning left."""
        self._require_no_file()
        if self.exists():
            raise CheckpointError(f"--out {self.path} already holds a run: choose another folder{self._or_go_on()}")
        if self.path.exists() and set(self.path.iterdir()) - {self.path / LOCK, *self._left()}:
            raise CheckpointError(f"--out {self.path} is not empty: choose another folder")

    def require_run(self) -> None:
        """Raise CheckpointError unless a run was begun here."""
        if not self.exists():
            raise CheckpointError(f"{self.path} holds no run (no manifest.json): name the --out folder of a run")

    def require_training(self) -> None:
        """Raise CheckpointError unless training was begun here."""
        if not self.exists():
            raise CheckpointError(
                f"--resume: {self.path} holds no run to go on with: name the --out folder of one, or leave --resume "
                "out to begin one there"
            )
        known = self.manifest()
        if "edit" in known:
            raise CheckpointError(
                f"--resume: {self.path} holds an edit of training images ({known['edit']}), which no training began: "
                "name the folder of all stages"
            )
        origin = known.get("repaired_from")
        if origin is not None:
            raise CheckpointError(
                f"--resume: {self.path} holds a repair of {origin['run']}, which no training began: train that one, "
                "and repair it into a new folder"
            )

    def _require_no_file(self) -> None:
        if self.path.is_file():
            raise CheckpointError(f"--out {self.path} is a file: name a folder that does not exist yet")

    def _or_go_on(self) -> str:
        """How to go on with the run that is here, after "choose another folder"."""
        known = self.manifest()
        if "edit" not in known and "repaired_from" not in known:
            return ", or --resume to go on with it"
        return "" if known.get("status") == "complete" else ", or repeat the repair that was begun here"

    def create(self, recipe: str, manifest: Mapping[str, Any]) -> None:
        """Begin a run: recipe and manifest appear together, in a folder that is free."""
        with self.filling(manifest) as new:
            write_text(new.recipe, recipe)

    @contextmanager
    def filling(self, manifest: Mapping[str, Any]) -> Iterator[RunFolder]:
        """A folder whose files are this one's when the block ends, `manifest` last: before, there is no run here."""
        new = RunFolder(self.path / NEW)
        try:
            self._clear()
            new.path.mkdir(parents=True)
            yield new
            write_json(new.path / MANIFEST, {"schema": SCHEMA, **manifest})
            for name in (*FILLED, MANIFEST):
                if (new.path / name).exists():
                    (new.path / name).rename(self.path / name)
        except OSError as error:
            raise CheckpointError(
                f"--out {self.path} cannot be made ({error.strerror}): choose another folder"
            ) from None
        finally:
            self._clear()

    def _left(self) -> list[Path]:
        """What a filling that was killed left: what it had brought here already, and its folder."""
        new = self.path / NEW
        whole = (new / MANIFEST).exists() and not self.exists()
        brought = [self.path / name for name in FILLED if whole and not (new / name).exists()]
        return [path for path in (*brought, new) if path.exists()]

    def _clear(self) -> None:
        for path in self._left():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def manifest(self) -> dict[str, Any]:
        self.require_run()
        return read_json(self.path / MANIFEST, SCHEMA)

    def update_manifest(self, **values: object) -> None:
        write_json(self.path / MANIFEST, self.manifest() | values)

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """One epoch to disk: its history line, then its checkpoints."""
        with (self.path / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.history[-1], allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        write_state(self.checkpoints, state, meta)

    def record_divergence(self, error: DivergedError) -> None:
        """Keep what was known when the loss stopped being finite, in diverged.json."""
        write_json(self.path / "diverged.json", error.report)
        self.update_manifest(status="diverged")

    def history(self) -> list[dict[str, Any]]:
        """The records of all epochs; a line that was cut by a kill is not one."""
        path = self.path / HISTORY
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def set_history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace all records, atomically."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_text(self.path / HISTORY, lines)

    def resume_state(self) -> TrainState | None:
        """Where to go on: the last whole epoch, with history cut back to it; None before the first.

        What killed writings left beside the files of the run is removed.
        """
        self.require_run()
        for name in ("last", "best"):
            if (self.checkpoints / name).exists() and not has_checkpoint(self.checkpoints / name):
                raise CheckpointError(f"checkpoint {self.checkpoints / name} is damaged: state.json is missing")
        if not has_checkpoint(self.checkpoints / "last"):
            if self.manifest().get("status") == "complete":
                raise CheckpointError(f"{self.path} is complete and holds no training state: nothing to go on with")
            self.clear_writings()
            self.set_history(())
            return None
        state = read_state(self.checkpoints, self.history())
        if len(state.history) < state.epoch:
            raise CheckpointError(f"{self.path / 'history.jsonl'} is damaged: it lacks epochs that the checkpoint has")
        self.clear_writings()
        self.set_history(state.history)
        return state

    def clear_writings(self) -> None:
        """Remove what killed writings left beside the files of the run; only its owner may."""
        self._clear()
        clear_writings(self.checkpoints)
        for name in (RECIPE, MANIFEST, HISTORY):
            for file in self.path.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)

    def available(self) -> list[str]:
        """Names of the checkpoints that can be read."""
        return checkpoint_names(self.checkpoints)

    def read(self, name: str | None = None) -> tuple[nn.Module, Checkpoint, str]:
        """Rebuild a model of this run: "repaired" or "best" where there is one, else what the last epoch left.

        Returns:
            The model in eval mode, its checkpoint, and the checkpoint's name.

        Raises:
            UnknownNameError: no checkpoint of that name.
            CheckpointError: no run here, or the checkpoint is damaged.
        """
        self.require_run()
        known = self.available()
        if name is None:
            name = next((found for found in ("repaired", "best") if found in known), None) or self._as_left()
        elif name not in known:
            raise UnknownNameError(f"checkpoint of {self.path}", name, known)
        checkpoint = read_checkpoint(self.checkpoints / name)
        model = build_model(checkpoint.meta["model"])
        try:
            model.load_state_dict(dict(checkpoint.weights))
        except RuntimeError:
            raise CheckpointError(
                f"checkpoint {self.checkpoints / name}: the weights do not fit the model it describes"
            ) from None
        return model.eval(), checkpoint, name

    def _as_left(self) -> str:
        """Without selection: the last method's export (an average), else the raw weights; as `fit` leaves the model."""
        exports = read_checkpoint(self.checkpoints / "last").meta.get("exports") or ["last"]
        return str(exports[-1])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = ("robustfair", "torch", "numpy", "safetensors")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    """Of what is installed, read once: it takes milliseconds, and every audit asks."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Date, versions, hardware and command, as JSON values."""
    hardware = {"system": platform.platform(), "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "date": date,
        "versions": versions(),
        "hardware": hardware,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
