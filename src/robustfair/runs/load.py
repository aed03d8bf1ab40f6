"""What a user may name as a model: a run folder, a weight file with its architecture, a network of another package, or
a factory in a module.

Whatever comes from elsewhere leaves here in eval mode and in float32, and every change made to it is a note.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from robustfair.errors import ModelError, RecipeError, RobustFairError, RobustFairWarning, UnknownNameError
from robustfair.grammar import parse_composition, read_path
from robustfair.models.build import create_model
from robustfair.models.head import other_dtypes
from robustfair.models.normalise import Normalise, Normalised, named_statistics
from robustfair.models.weight_file import read_weight_file, require_weight_file
from robustfair.models.weights import LoadReport, load_weights
from robustfair.models.zoo import Found, robustbench_model, timm_model
from robustfair.runs.folder import RunFolder
from robustfair.runs.recipe import read_recipe

TIMM, ROBUSTBENCH = "timm:", "robustbench:"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to audit or repair, with what is known about it.

    Attributes:
        model: in eval mode.
        label: for reports.
        folder: its run, None for a model from elsewhere.
        checkpoint: name of the run's checkpoint.
        meta: of the checkpoint: class names, data, threat, epoch; {} from elsewhere.
        notes: what was done to read the weights, and to the model.
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
    select_weights: str | None = None,
    width: int | None = None,
    normalise: str = "auto",
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Target:
    """Find and load the model that `what` names.

    Args:
        what: `runs/x`; a weight file of any name (with `arch`); `timm:NAME` (with `weights`); `robustbench:NAME`; or
            `package.module:factory`.
        checkpoint: of a run: best, last, ema, ...
        arch, width: architecture of a bare weight file, a name of ours or `timm:NAME`.
        weights: weight file for timm's network or a factory's model.
        select_weights: of a weight file with several sets of weights, see `load_weights`.
        normalise: input statistics, see `named_statistics`. Of a bare weight file and of timm's network: those where
            the file has none. In front of any other model: what it is put behind; "auto" leaves it as it is.
        num_classes, in_channels, image_size: of the data, the last as (H, W).

    Raises:
        RobustFairError: nothing of that name, or it does not fit; says what was looked for.
    """
    path = read_path(what)
    if path.is_dir():
        if arch or weights or width or select_weights:
            given = "`arch`, `weights`, `select_weights` and `width`"
            raise ModelError(f"{what} is a run, which knows its own network: leave {given} out; `checkpoint` chooses")
        return _from_run(path, checkpoint)
    if checkpoint is not None:
        raise ModelError(f"`checkpoint` picks a checkpoint of a run folder, and {what} is none: leave it out")
    images = _Images(num_classes, in_channels or 3, image_size)
    is_named = what.startswith((TIMM, ROBUSTBENCH))
    chosen = () if select_weights is None else (select_weights,)
    if path.is_file() and not is_named:
        require_weight_file(path)
        if arch is None:
            raise ModelError(f"{what} holds weights only: add `arch` with its architecture, such as preact-resnet18")
        if weights is not None:
            raise ModelError(f"{what} is itself a weight file: leave `weights` out")
        label = " ".join((what, *(f"({name})" for name in chosen)))
        return _from_weights(label, what, select_weights, _network(arch, width, normalise, images))
    if ":" not in what:
        raise ModelError(
            f"{what}: no such file or folder. A model is named by a run folder, a weight file with `arch`, "
            "timm:NAME, robustbench:NAME or package.module:factory"
        )
    if arch or width:
        raise ModelError(f"`arch` and `width` are for a bare weight file, and {what} is none: leave them out")
    if select_weights is not None and weights is None:
        raise ModelError("`select_weights` chooses in a weight file, and none is named: add `weights`, or leave it out")
    label = what if weights is None else f"{what} ({', '.join((weights, *chosen))})"
    if what.startswith(TIMM):
        if weights is None:
            raise ModelError(f"{what}: nothing is downloaded here, add `weights` with its weight file")
        return _from_weights(label, weights, select_weights, _network(what, None, normalise, images))
    return _from_elsewhere(label, what, weights, select_weights, normalise, images)


def load_named(text: str, **images: Any) -> Target:
    """The model that one text names, options of `load_target` in brackets behind the name.

    Args:
        text: "runs/x", "runs/x(checkpoint=ema)", "weights.pt(arch=wrn-34-10, normalise=cifar10)",
            "timm:resnet18(weights=r18.safetensors)", "robustbench:NAME", "package.module:factory".
        images: of the data, as `load_target` has them.

    Raises:
        RobustFairError: as `load_target`; or an option that is none of its own.
    """
    if not text.strip():
        raise ModelError("no model is named: give a run folder, a weight file with `arch`, or a name such as timm:NAME")
    name, bracket, options = text.partition("(")
    if not bracket or read_path(text).exists():
        return load_target(text, **images)
    try:
        (term,) = parse_composition(f"model({options}")
    except (RecipeError, ValueError):  # unreadable, or more than one term
        raise RecipeError(
            f"cannot read {text!r}: options stand in brackets behind the name of a model, as in "
            "weights.pt(arch=wrn-34-10)"
        ) from None
    known = set(inspect.signature(load_target).parameters) - {"what", *images}
    for key in term.args:
        if key not in known:
            raise UnknownNameError(f"option of {name}", key, known)
    given: dict[str, Any] = {key: value if key == "width" else str(value) for key, value in term.args.items()}
    return load_target(name.strip(), **given, **images)


def load_model(text: str, *, num_classes: int | None = None, in_channels: int | None = None) -> nn.Module:
    """The model that a text names, in eval mode, see `load_named`. A warning says what was done to read it.

    Args:
        num_classes, in_channels: of the data, for a network that is built here: a weight file's, timm's.
    """
    found = load_named(text, num_classes=num_classes, in_channels=in_channels)
    if found.notes:
        warnings.warn(f"{found.label}: {'; '.join(found.notes)}", RobustFairWarning, stacklevel=2)
    return found.model


class _Images(NamedTuple):
    """What a network is built for."""

    num_classes: int | None
    in_channels: int
    size: tuple[int, int] | None


def _from_run(path: Path, checkpoint: str | None) -> Target:
    folder = RunFolder(path).model_folder()
    try:
        model, found, name = folder.read(checkpoint)
    except UnknownNameError as error:
        plugins = read_recipe(str(folder.recipe), {}).plugin if folder.recipe.is_file() else ()
        if not plugins or checkpoint not in (None, *folder.available()):
            raise
        hint = f"its recipe names {' and '.join(plugins)}, which reading a run does not run: name it with `plugin`"
        raise ModelError(f"{path}: {error}; {hint}") from None
    about = f"{found.meta['candidate']}, epoch {found.meta['epoch']}"
    return Target(
        model=model, label=f"{folder.path} ({name}: {about})", folder=folder, checkpoint=name, meta=dict(found.meta)
    )


def _network(arch: str, width: int | None, normalise: str, images: _Images) -> Found:
    """The network of a bare weight file: one of ours, or timm's."""
    if not arch.startswith(TIMM):
        classes = images.num_classes or 10
        model = create_model(
            arch, num_classes=classes, in_channels=images.in_channels, width=width, normalise=normalise
        )
        return Found(model, ())
    if width is not None:
        raise ModelError(f"`width` is for architectures of ours, and {arch} has its own: leave it out")
    return timm_model(
        arch.removeprefix(TIMM),
        num_classes=images.num_classes,
        in_channels=images.in_channels,
        normalise=normalise,
        image_size=images.size,
    )


def _from_weights(label: str, path: str, select_weights: str | None, found: Found) -> Target:
    report = load_weights(found.model, read_weight_file(path), select_weights=select_weights)
    notes = (*found.notes, str(report), *_kept_statistics(found.model, report))
    return Target(model=found.model.eval(), label=label, meta={}, notes=notes)


def _from_elsewhere(
    label: str, what: str, weights: str | None, select_weights: str | None, normalise: str, images: _Images
) -> Target:
    """A model that comes whole: from a factory, or from RobustBench's loader."""
    if not what.startswith(ROBUSTBENCH):
        model = _from_factory(what)
    elif weights is None:
        model = robustbench_model(what.removeprefix(ROBUSTBENCH), num_classes=images.num_classes)
    else:
        raise ModelError(f"{what} comes with its own weights: leave `weights` out, or name its file and `arch`")
    _require_values(what, model)
    notes = _in_float32(model)
    if weights is not None:
        notes.append(str(load_weights(model, read_weight_file(weights), select_weights=select_weights)))
    statistics = None if normalise == "none" else named_statistics(normalise, images.in_channels)
    if statistics is not None:
        model = Normalised(model, images.in_channels, *statistics)
        notes.append(f"`normalise={normalise}` puts it behind {_described(model.normalise)}")
    return Target(model=model.eval(), label=label, meta={}, notes=tuple(notes))


def _kept_statistics(model: nn.Module, report: LoadReport) -> list[str]:
    """Which statistics images are normalised by, where the file leaves that open: a wrong choice costs accuracy."""
    normalise = getattr(model, "normalise", None)
    if "normalise.mean" not in report.missing or not isinstance(normalise, Normalise):
        return []
    return [f"the file has no input statistics: {_described(normalise)} (`normalise` sets another)"]


def _described(normalise: Normalise) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in normalise.statistics())
    return f"an input normalisation of mean {mean} and std {std}"


def _require_values(what: str, model: nn.Module) -> None:
    """Refuse a model that has shapes only, as a factory under `torch.device("meta")` gives."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{what}: its tensors are on the meta device, which holds no values: build it on the CPU")


def _in_float32(model: nn.Module) -> list[str]:
    """Bring a model to float32, in which attacks compute, and say so."""
    others = other_dtypes(model)
    if not others:
        return []
    model.float()
    return [f"its {' and '.join(others)} weights are computed in float32, as attacks need"]


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
    if isinstance(factory, nn.Module):
        return factory
    _require_no_arguments(what, factory)
    try:
        model = factory()
    except RobustFairError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{what}: the factory failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{what}: the factory must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _require_no_arguments(what: str, factory: Any) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of a builtin: calling it tells
        return
    except TypeError as error:
        raise ModelError(
            f"{what}: not a factory (TypeError: {error}); name a function that returns the model"
        ) from None
    try:
        signature.bind()
    except TypeError as error:
        raise ModelError(
            f"{what}: a factory is called without arguments (TypeError: {error}). Give all of them defaults"
        ) from None
