"""Checkpoints: a training state on disk, written whole or not at all, read without running anything.

A checkpoint is a folder of `weights.safetensors`, `state.safetensors` (momentum, method states) and `state.json`. The
JSON is written last and lists size and SHA-256 of the other two, so a cut or mixed folder is noticed on reading. A new
folder is written beside the old one, flushed to disk, and swapped in by two renames; between those the old one still
exists under its spare name, where reading finds it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustfair.errors import CheckpointError
from robustfair.files import flush, read_json, write_bytes, write_json
from robustfair.training.state import ScoredWeights, TrainState
from robustfair.values import ClassTally, StateDict

SCHEMA = "robustfair.checkpoint/1"
WEIGHTS, STATE, META = "weights.safetensors", "state.safetensors", "state.json"
FROZEN = "frozen"
"""Folder of the networks beside a model that do not train; no model of its own."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint folder holds.

    Attributes:
        weights: state dict of a model.
        tensors: everything else that is a tensor, by "/"-separated name.
        meta: JSON values: epoch, step, candidate, model, class names.
    """

    weights: StateDict
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder` whole: readers see the old checkpoint or the new one, whenever the process dies."""
    new, spare = _beside(folder, "new"), _beside(folder, "old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    files = {}
    for name, tensors in ((WEIGHTS, checkpoint.weights), (STATE, checkpoint.tensors)):
        own = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        write_bytes(new / name, save(own))
        files[name] = _fingerprint(new / name)
    write_json(new / META, {"schema": SCHEMA, "files": files, **checkpoint.meta})
    flush(new)
    if folder.exists():
        shutil.rmtree(spare, ignore_errors=True)
        folder.rename(spare)
    new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(spare, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        CheckpointError: missing, cut, changed or of another schema; names the file.
    """
    spare = _beside(folder, "old")
    if not (folder / META).exists() and spare.exists():
        folder = spare
    if not folder.exists():
        raise CheckpointError(f"checkpoint {folder} does not exist: has the run finished its first epoch?")
    meta = read_json(folder / META, SCHEMA)
    files = meta.get("files")
    if not isinstance(files, dict) or set(files) != {WEIGHTS, STATE}:
        raise CheckpointError(f"{folder / META} does not say what {WEIGHTS} and {STATE} must be: it is damaged")
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"checkpoint {folder}: {name} is missing; use another checkpoint of the run")
        found = _fingerprint(path)
        if found != expected:
            raise CheckpointError(
                f"checkpoint {path} is damaged: it holds {found['bytes']} bytes and not what was written; use another "
                "checkpoint of the run"
            )
    return Checkpoint(_load(folder / WEIGHTS), _load(folder / STATE), meta)


def write_state(checkpoints: Path, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Save a training state under `checkpoints`: best/ if it is new, a folder per export, and last/ after them.

    last/ comes last, so that it never speaks of a best epoch that is not on disk. Networks that do not train are
    written once, into frozen/.
    """
    best = state.best
    if best is not None and best.epoch == state.epoch:
        about = {"epoch": best.epoch, "candidate": best.candidate, "score": best.score}
        about |= {} if math.isnan(best.clean) else {"clean_score": best.clean}
        write_checkpoint(checkpoints / "best", Checkpoint(best.weights, {}, {**meta, **about}))
    for name, weights in state.exports.items():
        about = {"epoch": state.epoch, "candidate": name}
        write_checkpoint(checkpoints / name, Checkpoint(weights, {}, {**meta, **about}))
    if state.frozen and not has_checkpoint(checkpoints / FROZEN):
        frozen = {f"{name}/{key}": tensor for name, values in state.frozen.items() for key, tensor in values.items()}
        write_checkpoint(checkpoints / FROZEN, Checkpoint({}, frozen, {"networks": sorted(state.frozen)}))
    tensors = {f"optimizer/{name}": buffer for name, buffer in state.optimizer.items()}
    for method, values in state.methods.items():
        tensors |= {f"method/{method}/{key}": value for key, value in values.items()}
    for network, weights in state.networks.items():
        tensors |= {f"network/{network}/{key}": tensor for key, tensor in weights.items()}
    if state.train is not None:
        tensors |= {f"train/{part}": value for part, value in vars(state.train).items() if value is not None}
    about = {
        "epoch": state.epoch,
        "step": state.step,
        "candidate": "model",
        "objective": state.objective,
        "methods": sorted(state.methods),
        "exports": list(state.exports),
    }
    write_checkpoint(checkpoints / "last", Checkpoint(state.weights, tensors, {**meta, **about}))


def read_state(checkpoints: Path, history: Sequence[Mapping[str, Any]] = ()) -> TrainState:
    """The state that `write_state` saved last, with the records of its epochs out of `history`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    last = read_checkpoint(checkpoints / "last")
    methods: dict[str, dict[str, Tensor]] = {name: {} for name in last.meta["methods"]}
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "train": {}, "method": {}, "network": {}}
    for name, tensor in last.tensors.items():
        kind, rest = name.split("/", 1)
        parts[kind][rest] = tensor
    for name, tensor in parts["method"].items():
        method, key = name.split("/", 1)
        methods[method][key] = tensor
    frozen = read_checkpoint(checkpoints / FROZEN).tensors if has_checkpoint(checkpoints / FROZEN) else {}
    best = None
    if has_checkpoint(checkpoints / "best"):
        found = read_checkpoint(checkpoints / "best")
        meta = found.meta
        clean = meta.get("clean_score", math.nan)
        best = ScoredWeights(meta["candidate"], meta["epoch"], meta["score"], found.weights, clean)
    return TrainState(
        epoch=last.meta["epoch"],
        step=last.meta["step"],
        weights=last.weights,
        optimizer=parts["optimizer"],
        methods=methods,
        networks=_by_network(parts["network"]),
        frozen=_by_network(frozen),
        objective=last.meta.get("objective"),
        exports={name: read_checkpoint(checkpoints / name).weights for name in last.meta["exports"]},
        train=ClassTally(**parts["train"]) if parts["train"] else None,
        best=best,
        history=tuple(record for record in history if record["epoch"] <= last.meta["epoch"]),
    )


def _by_network(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors called `method/network/key`, by `method/network`; no tensor of a network has a slash in its name."""
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, key = name.rsplit("/", 1)
        networks.setdefault(network, {})[key] = tensor
    return networks


def checkpoint_names(checkpoints: Path) -> list[str]:
    """Names of the models in a folder that can be read, also between the two renames of one being replaced."""
    found = checkpoints.glob("*") if checkpoints.exists() else ()
    names = {path.name.removeprefix(".").removesuffix(".old") for path in found}
    return sorted(name for name in names - {FROZEN} if has_checkpoint(checkpoints / name))


def has_checkpoint(folder: Path) -> bool:
    """Whether a whole checkpoint can be read under this name."""
    return (folder / META).exists() or (_beside(folder, "old") / META).exists()


def clear_writings(checkpoints: Path) -> None:
    """Remove what killed writings left among checkpoints; an old one stays where its new one is missing."""
    for path in checkpoints.glob(".*.new"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob(".*.old"):
        if (path.with_name(path.name[1:].removesuffix(".old")) / META).exists():
            shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint of the run") from None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
