"""What a user may name as a model: a run folder, a weight file with its architecture, or a factory in a module."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robustfair.errors import ModelError, RobustFairError
from robustfair.models.build import create_model
from robustfair.models.weights import load_weights, read_weight_file
from robustfair.rundir import RunFolder


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to audit or repair, with what is known about it.

    Attributes:
        model: in eval mode.
        label: for reports.
        folder: its run, None for a model from elsewhere.
        checkpoint: name of the run's checkpoint.
        meta: of the checkpoint: class names, data, threat, epoch; {} from elsewhere.
        notes: what was done to read the weights.
    """

    model: nn.Module
    label: str
    folder: RunFolder | None = None
    checkpoint: str | None = None
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_target(
    what: str,
    *,
    checkpoint: str | None = None,
    arch: str | None = None,
    weights: str | None = None,
    width: int | None = None,
    normalise: str = "auto",
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Target:
    """Find and load the model that `what` names.

    Args:
        what: `runs/x`; a `.safetensors`, `.pt` or `.pth` file (with `arch`); or `package.module:factory`.
        checkpoint: of a run: best, last, ema, ...
        arch, width, normalise: architecture of a bare weight file, and its input statistics where the file has none.
        weights: weight file for a factory's model.
        num_classes, in_channels: of the data, for a bare weight file.

    Raises:
        RobustFairError: nothing of that name, or it does not fit; says what was looked for.
    """
    path = Path(what)
    if path.is_dir():
        if arch or weights or width:
            raise ModelError(f"{what} is a run, which knows its own architecture: leave --arch, --weights, --width out")
        folder = RunFolder(path)
        model, found, name = folder.read(checkpoint)
        about = f"{found.meta['candidate']}, epoch {found.meta['epoch']}"
        return Target(
            model=model, label=f"{path} ({name}: {about})", folder=folder, checkpoint=name, meta=dict(found.meta)
        )
    if checkpoint is not None:
        raise ModelError(f"--checkpoint picks a checkpoint of a run folder, and {what} is none: leave it out")
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        if arch is None:
            raise ModelError(f"{what} holds weights only: add --arch with its architecture, such as preact-resnet18")
        state = read_weight_file(path)
        model = create_model(
            arch, num_classes=num_classes or 10, in_channels=in_channels or 3, width=width, normalise=normalise
        )
        return Target(model=model.eval(), label=what, meta={}, notes=(str(load_weights(model, state)),))
    if ":" in what:
        model = _from_factory(what)
        notes = (str(load_weights(model, read_weight_file(weights))),) if weights else ()
        return Target(model=model.eval(), label=what, meta={}, notes=notes)
    raise ModelError(f"{what} is no run folder, weight file (.safetensors, .pt) or package.module:factory")


def _from_factory(what: str) -> nn.Module:
    """Call the factory `package.module:name` of the user's own code, found from the working folder too."""
    module_name, _, name = what.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{what}: cannot import it ({reason}); the form is package.module:factory") from None
    try:
        model = factory()
    except RobustFairError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{what}: the factory failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{what}: the factory must return a torch.nn.Module, got {type(model).__name__}")
    return model
