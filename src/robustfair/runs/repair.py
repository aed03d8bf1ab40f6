"""A repair of a run, in a run folder of its own that says where it came from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from robustfair.data import ImageDataset
from robustfair.errors import CheckpointError, DataError, ModelError, RobustFairWarning
from robustfair.files import write_text
from robustfair.grammar import read_path
from robustfair.models.head import head_norms
from robustfair.registry import load_plugin
from robustfair.repairs import ReadsRun, Repair
from robustfair.runs.checkpoint import Checkpoint, write_checkpoint
from robustfair.runs.composition import read_repair
from robustfair.runs.folder import RunFolder, environment
from robustfair.runs.load import Target, load_target
from robustfair.runs.recipe import Recipe, Stage, read_recipe
from robustfair.runs.run import training_images

COPIED = ("model", "class_names", "data", "images_per_class", "recipe", "threat", "seed")
"""What a repaired run's manifest takes over from that of the run it came from."""


def repair_run(
    source: str, method: str, out: Path, checkpoint: str | None = None, *, plugins: Sequence[str] = ()
) -> tuple[Target, str]:
    """Repair a run's weights into the new run folder `out`, or end a repair that was begun there and killed.

    Args:
        plugins: files to load beside those that the recipe of the run names; the new run's recipe names them all.

    Returns:
        The repaired model, and a sentence for the user.

    Raises:
        CheckpointError: `source` is no run, `out` holds something already, or another process owns it.
    """
    fix, folder = repair_of(source, method, plugins), RunFolder(out)
    with folder.owned() as killed:
        before = to_repair(source, method, folder, checkpoint, killed)
        after, text = repair_into(before, fix, method, folder, plugins)
        folder.update_manifest(status="complete")
    return after, text


def repair_of(source: str, method: str, plugins: Sequence[str] = ()) -> Repair:
    """The repair that `method` names, once `plugins` and those that the recipe of the run names are loaded.

    A plugin of the run that is gone is said: what it registered may not be needed here.
    """
    for path in plugins:
        load_plugin(path)
    recipe = RunFolder(Path(source)).recipe
    for path in read_recipe(str(recipe), {}).plugin if recipe.is_file() else ():
        if Path(path).is_file():
            load_plugin(path)
        else:
            text = f"{source} names the plugin {path}, which is gone: what it registers cannot be named"
            warnings.warn(text, RobustFairWarning, stacklevel=3)
    return read_repair(method)


def to_repair(source: str, method: str, folder: RunFolder, checkpoint: str | None, killed: bool) -> Target:
    """The model that a repair into `folder` starts from; refuses a folder that is not free.

    Free is one too that holds this very repair, if it did not come to its end or was `killed` there.
    """
    if not folder.exists():
        folder.require_free()
    before = _run_to_repair(source, checkpoint)
    assert before.folder is not None
    if folder.exists():
        known = folder.manifest()
        begun = known.get("repaired_from", {})
        same = known.get("repair") == method and begun.get("checkpoint") == before.checkpoint
        same = same and read_path(begun["run"]).resolve() == read_path(source).resolve()
        if not same or (known.get("status") == "complete" and not killed):
            folder.require_free()
    if before.checkpoint == "repaired":
        raise ModelError(f"{source} is repaired already: repair the run it came from, {_origin(before.folder)}")
    return before


def repair_into(
    before: Target, fix: Repair, method: str, folder: RunFolder, plugins: Sequence[str] = ()
) -> tuple[Target, str]:
    """Repair `before` into `folder`, where a call of the same repair may have come before and not to its end."""
    assert before.folder is not None
    source = before.folder
    begun = read_recipe(str(source.recipe), {})
    if isinstance(fix, ReadsRun):
        fix = fix.of_run(before.meta.get("images_per_class"), partial(_held_out, begun, before))
    repaired = fix(before.model)
    named = {"plugin": (*begun.plugin, *plugins)} if plugins else {}
    recipe = read_recipe(str(source.recipe), named).then(Stage(does="repair", what=method))
    about = {key: value for key, value in before.meta.items() if key not in ("schema", "files", "methods")}
    made = {"repair": method, "repaired_from": {"run": str(source.path), "checkpoint": before.checkpoint}}
    known = source.manifest()
    kept = {key: known[key] for key in COPIED if key in known}

    def write(folder: RunFolder) -> None:
        write_text(folder.recipe, recipe.to_yaml())
        folder.set_history(source.history())
        write_checkpoint(folder.checkpoints / "repaired", Checkpoint(repaired.state_dict(), {}, about | made))

    if folder.exists():
        folder.clear_writings()
        write(folder)
    else:
        with folder.filling(environment() | kept | made | {"status": "running"}) as new:
            write(new)
    old, new_norms = head_norms(before.model), head_norms(repaired)
    what = f"head norms {old.min():.3f} to {old.max():.3f} (ratio {old.max() / old.min():.2f}) became "
    what += f"{new_norms.min():.3f} to {new_norms.max():.3f}"
    if torch.equal(old, new_norms):
        what = fix.describe()
    text = f"{method}: {what}; {source.path} is unchanged, the repaired run is {folder.path}"
    return load_target(str(folder.path)), text


def _held_out(recipe: Recipe, before: Target) -> ImageDataset | None:
    """The validation images of the run that trained a model by `recipe`.

    Raises:
        DataError: the images of its data set changed since.
    """
    splits, _, held, _ = training_images(recipe)
    if splits.train.fingerprint != before.meta["data"]["fingerprint"]:
        raise DataError(f"repair: the images of {recipe.data} changed since the run {before.label}")
    return held


def _run_to_repair(source: str, checkpoint: str | None) -> Target:
    """The run whose weights are to be repaired.

    Raises:
        CheckpointError: `source` is no run.
    """
    if not read_path(source).is_dir():
        raise CheckpointError(
            f"{source} is no run folder, and the command repairs what robustfair train wrote. "
            "In Python, rf.repair(model) repairs any model"
        )
    return load_target(source, checkpoint=checkpoint)


def _origin(folder: RunFolder) -> str:
    return str(folder.manifest().get("repaired_from", {}).get("run", "see its manifest.json"))
