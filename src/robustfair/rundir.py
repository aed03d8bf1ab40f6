"""A run on disk: recipe.yaml, manifest.json, history.jsonl, checkpoints/, audit/, report.html.

A folder that holds a run is never overwritten: it is resumed, or another is chosen. Every file is written whole or
not at all; history gains a flushed line an epoch, before the checkpoint of that epoch, and resuming drops what is ahead
of it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfair.checkpoint import (
    Checkpoint,
    checkpoint_names,
    has_checkpoint,
    read_checkpoint,
    read_json,
    read_state,
    write_json,
    write_state,
    write_text,
)
from robustfair.errors import CheckpointError, DivergedError, UnknownNameError
from robustfair.models.build import build_model
from robustfair.training.state import TrainState

SCHEMA = "robustfair.run/1"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def audits(self) -> Path:
        return self.path / "audit"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "manifest.json").exists()

    def require_free(self) -> None:
        """Raise CheckpointError unless the folder is absent or empty."""
        if self.path.is_file():
            raise CheckpointError(f"--out {self.path} is a file: name a folder that does not exist yet")
        if self.path.exists() and any(self.path.iterdir()):
            what = "already holds a run" if self.exists() else "is not empty"
            resume = ", or --resume to go on with it" if self.exists() else ""
            raise CheckpointError(f"--out {self.path} {what}: choose another folder{resume}")

    def require_run(self) -> None:
        """Raise CheckpointError unless a run was begun here."""
        if not self.exists():
            raise CheckpointError(f"{self.path} holds no run (no manifest.json): name the --out folder of a run")

    def create(self, recipe: str, manifest: Mapping[str, Any]) -> None:
        """Begin a run: the folder appears whole, with recipe and manifest, in place of an empty one or none."""
        if self.path.exists():
            write_text(self.recipe, recipe)
            write_json(self.path / "manifest.json", {"schema": SCHEMA, **manifest})
            return
        new = RunFolder(self.path.with_name(f".{self.path.name}.new"))
        try:
            shutil.rmtree(new.path, ignore_errors=True)
            new.path.mkdir(parents=True)
            write_text(new.recipe, recipe)
            write_json(new.path / "manifest.json", {"schema": SCHEMA, **manifest})
            new.path.rename(self.path)
        except OSError as error:
            raise CheckpointError(
                f"--out {self.path} cannot be made ({error.strerror}): choose another folder"
            ) from None

    def manifest(self) -> dict[str, Any]:
        self.require_run()
        return read_json(self.path / "manifest.json", SCHEMA)

    def update_manifest(self, **values: object) -> None:
        write_json(self.path / "manifest.json", self.manifest() | values)

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """One epoch to disk: its history line, then its checkpoints."""
        with (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
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
        path = self.path / "history.jsonl"
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
        write_text(self.path / "history.jsonl", lines)

    def resume_state(self) -> TrainState | None:
        """Where to go on: the last whole epoch, with history cut back to it; None before the first."""
        self.require_run()
        for name in ("last", "best"):
            if (self.checkpoints / name).exists() and not has_checkpoint(self.checkpoints / name):
                raise CheckpointError(f"checkpoint {self.checkpoints / name} is damaged: state.json is missing")
        if not has_checkpoint(self.checkpoints / "last"):
            if self.manifest().get("status") == "complete":
                raise CheckpointError(f"{self.path} is complete and holds no training state: nothing to go on with")
            self.set_history(())
            return None
        state = read_state(self.checkpoints, self.history())
        if len(state.history) < state.epoch:
            raise CheckpointError(f"{self.path / 'history.jsonl'} is damaged: it lacks epochs that the checkpoint has")
        self.set_history(state.history)
        return state

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
    found = {"python": platform.python_version()}
    for package in ("robustfair", "torch", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


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
