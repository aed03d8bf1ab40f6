"""What an unfinished audit knows so far, on disk: killed at any moment it goes on from the last writing.

One safetensors file beside the audit's own, replaced whole. Its header names what is being audited, so that it is never
taken for the beginning of another audit. One process at a time owns it: the same audit is not made twice at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from robustfair.errors import CheckpointError
from robustfair.files import left_beside, write_tensors
from robustfair.runs.lock import owned

SCHEMA = "robustfair.audit-journal/3"


class Journal:
    """The file of one unfinished audit.

    Args:
        path: where it is; its folder is made.
        identity: see `identify`, which has to come before the file is read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.path, self.identity = path, ""
        self._made: list[Path] = []
        if identity is not None:
            self.identify(identity)

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say which audit this is: JSON values that define it, as model, images, attacks, threat, seed, version."""
        self.identity = json.dumps({"schema": SCHEMA, **identity}, sort_keys=True)

    def begun(self) -> dict[str, Any]:
        """The identity of the audit that the file was begun for; {} where there is none that can be read."""
        try:
            with safe_open(self.path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("identity", "{}"))
        except (SafetensorError, OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def owned(self) -> AbstractContextManager[bool]:
        """Own the file, which need not exist.

        Raises:
            CheckpointError: another process makes this audit, or its folder cannot be made or written.
        """
        return owned(self.path.with_name(f".{self.path.stem}.lock"), str(self.path))

    def read(self) -> dict[str, Tensor]:
        """What was written last; {} where nothing was.

        Raises:
            CheckpointError: the file is damaged, or belongs to another audit.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, "pt") as file:
                found = (file.metadata() or {}).get("identity")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}): delete it to begin the audit anew") from None
        if found != self.identity:
            differing = _differing(found, self.identity)
            raise CheckpointError(f"{self.path} belongs to another audit ({differing}): delete it to begin anew")
        return tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is there, whole."""
        self._made += [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"identity": self.identity})

    def remove(self) -> None:
        """The audit is finished: the file goes, and the folders that were made for it if nothing else is in them."""
        for file in (self.path, *left_beside(self.path)):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers: the same for the same model, whatever device it is on."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def _differing(found: str | None, wanted: str) -> str:
    try:
        theirs = json.loads(found or "{}")
    except json.JSONDecodeError:
        theirs = None
    theirs = theirs if isinstance(theirs, dict) else {}
    names = [name for name, value in json.loads(wanted).items() if theirs.get(name) != value]
    return f"it differs in {', '.join(names)}"
