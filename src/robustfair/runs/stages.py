"""Recipes of stages: they train, repair, or edit the training images in turn, each in a run folder of its own.

    out/recipe.yaml, manifest.json      the whole; names its stages
    out/stages/1-train/                 a run like any other
    out/stages/2-edit/                  images.safetensors: rows and labels to train on from here on
    out/stages/3-repair/                as `robustfair repair` writes it

The validation images are taken out once, before all stages, from the images as they are: every stage computes the same
split, and edits act on the rest. What an edit decided is kept, so that a run that goes on trains on the same images. A
stage that is complete is never run again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustfair.data import ImageDataset
from robustfair.data.edits import ChecksImages, Edited, Predict, read_edit
from robustfair.data.loader import evaluation_batches
from robustfair.errors import RecipeError, RobustFairWarning
from robustfair.execution.device import resolve_device
from robustfair.files import write_text
from robustfair.grammar import read_path
from robustfair.models.build import require_model
from robustfair.models.modes import attacking
from robustfair.registry import load_plugin
from robustfair.repairs import ChecksClasses
from robustfair.runs.composition import read_repair
from robustfair.runs.folder import RunFolder, environment
from robustfair.runs.recipe import PREVIOUS, SCRATCH, Recipe
from robustfair.runs.repair import repair_run
from robustfair.runs.run import (
    begun_recipe,
    load_networks,
    named_networks,
    prepare,
    train,
    training_images,
    with_previous,
)
from robustfair.training.teachers import check_teachers

PREDICTION_BATCH = 500


@dataclass(frozen=True)
class StageDone:
    """A stage that is over: its folder, and a sentence for the user."""

    folder: RunFolder
    text: str


def run_stages(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    on_stage: Callable[[StageDone], None] | None = None,
    **on: Any,
) -> RunFolder:
    """Run all stages of a recipe into the folder `out`, which this process owns meanwhile.

    Args:
        on_stage: called after each stage.
        on: what `train` calls while a stage trains.

    Returns:
        The folder of the last stage that leaves a model.

    Raises:
        RecipeError: a stage needs a model, and none comes before it; or `resume` with another recipe.
        CheckpointError: `out` holds something already (and `resume` is false), or no run of stages (and it is true).
    """
    names = require_runnable(recipe)
    folder = RunFolder(out)
    if resume:
        folder.require_training()
    with folder.owned():
        if resume:
            recipe = begun_recipe(recipe, folder)
            folder.update_manifest(status="running")
        else:
            folder.require_free()
            about = {"stages": names, "seed": recipe.seed, "status": "running"}
            folder.create(recipe.to_yaml(), environment() | about)
        model, images = _first_model(recipe), recipe.images
        for number, stage in enumerate(recipe.stages):
            place = folder.stage(names[number])
            done = _run_stage(recipe, number, place, model, images, on)
            if stage.does == "edit":
                images = str(place.images.resolve())
            else:
                model = place
            if on_stage is not None:
                on_stage(StageDone(place, f"stage {names[number]}: {done}"))
        folder.update_manifest(status="complete")
    assert model is not None, "a recipe without a stage that leaves a model is refused"
    return model


def require_runnable(recipe: Recipe) -> list[str]:
    """Build everything that the stages name, so that the last one's mistake shows before the first one runs.

    Returns:
        Names of the stages, which are those of their folders.

    Raises:
        RecipeError: a stage needs a model, and none comes before it; no stage leaves one.
    """
    for path in recipe.plugin:
        load_plugin(path)
    for number, stage in enumerate(recipe.stages):
        if stage.does == "train":
            require_model(recipe.of_stage(number, start=SCRATCH).model)
    images = functools.cache(lambda: _images_of(recipe))  # many, and most stages do not ask
    left = recipe.start != SCRATCH
    if left and not read_path(recipe.start).exists():
        raise RecipeError(
            f"recipe: start is {recipe.start}, which does not exist: put that weight file there, or name another or a "
            "run folder with `start`"
        )
    repaired = False
    for number, stage in enumerate(recipe.stages):
        start = stage.keys.get("start", PREVIOUS if left else SCRATCH)
        if start not in (PREVIOUS, SCRATCH) and not read_path(start).exists():
            raise RecipeError(f"recipe: stage {number + 1} ({stage.does}) starts from {start}, which does not exist")
        if stage.does == "repair" and repaired and start == PREVIOUS:
            raise RecipeError(
                f"recipe: stage {number + 1} repairs what a repair left: one repair a model, let the stage start from "
                "the model before"
            )
        taught = False
        if stage.does == "train":
            ready = prepare(recipe.of_stage(number, start=SCRATCH))
            taught = any(PREVIOUS in named_networks(part).values() for part in ready.plan.parts)
            if not taught:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RobustFairWarning)  # the stage itself says it
                    check_teachers(load_networks(ready).plan.objective, ready.model, ready.train, torch.device("cpu"))
        elif stage.does == "repair":
            fix = read_repair(stage.what)
            if isinstance(fix, ChecksClasses):
                fix.check_classes(images().num_classes)
        else:
            edit = read_edit(stage.what)
            if isinstance(edit, ChecksImages):
                edit.check(images())
        wants = start == PREVIOUS or taught if stage.does == "train" else start in (PREVIOUS, SCRATCH)
        wants = read_edit(stage.what).needs_model if stage.does == "edit" else wants
        if wants and not left:
            raise RecipeError(
                f"recipe: stage {number + 1} ({stage.does}: {stage.what}) works on the model before it and there is "
                "none: let a stage train before it, or name one with start, beside the stages"
            )
        left = left or stage.does != "edit"
        repaired = stage.does == "repair" or (repaired and stage.does == "edit")
    if not left:
        raise RecipeError("recipe: no stage trains or repairs, so that no model comes of it: add one that does")
    return [f"{number}-{stage.does}" for number, stage in enumerate(recipe.stages, 1)]


def _run_stage(
    recipe: Recipe,
    number: int,
    place: RunFolder,
    model: RunFolder | None,
    images: str | None,
    on: Mapping[str, Any],
) -> str:
    """One stage into its folder, unless it is there; what came of it.

    Raises:
        RecipeError: the folder holds a stage that does something else.
    """
    stage = recipe.stages[number]
    before = recipe.start if model is None else str(model.path.resolve())
    start = stage.keys.get("start", PREVIOUS)
    start = before if start == PREVIOUS else start
    there = place.exists() and place.manifest().get("status") == "complete"
    if there and stage.does != "train" and place.manifest().get(stage.does) != stage.what:
        raise RecipeError(
            f"--resume: stage {number + 1} is {stage.does}: {stage.what}, but {place.path} was made by "
            f"{place.manifest().get(stage.does)}: change the recipe back, or start a new run"
        )
    if stage.does == "train":
        own = recipe.of_stage(number, start=start, images=images, train=with_previous(stage.what, before))
        if there:
            begun_recipe(own, place)
            return "was there already"
        fitted = train(own, place.path, resume=place.exists(), **on)
        return f"{fitted.state.epoch} epochs; the model is '{fitted.chosen.candidate}' of epoch {fitted.chosen.epoch}"
    if there:
        return "was there already"
    if stage.does == "repair":
        return repair_run(start, stage.what, place.path, plugins=recipe.plugin)[1]
    return _edit(recipe, number, place, model, images)


def _first_model(recipe: Recipe) -> RunFolder | None:
    """The run that the recipe starts from, for a first stage that asks a model; None for none, or a weight file."""
    start = read_path(recipe.start)
    return RunFolder(start).model_folder() if recipe.start != SCRATCH and start.is_dir() else None


def _edit(recipe: Recipe, number: int, place: RunFolder, model: RunFolder | None, images: str | None) -> str:
    """Edit the training images as the stages before left them, and write down what was decided."""
    stage = recipe.stages[number]
    edit = read_edit(stage.what)
    kept = _images_of(recipe)
    before = None if images is None else Edited.read(read_path(images))
    given = kept if before is None else before.apply(kept)
    found = edit(given, _asks(model, recipe.device), int(stage.keys.get("seed", recipe.seed)))
    whole = found if before is None else found.after(before)
    after = torch.bincount(found.labels, minlength=given.num_classes)
    counts = {"before": given.class_counts().tolist(), "after": after.tolist()}
    about = {"edit": stage.what, "images_per_class": counts}
    with place.owned(), place.filling(environment() | about | {"status": "complete"}) as new:
        write_text(new.recipe, recipe.up_to(number).to_yaml())
        whole.save(new.images)
    return f"{stage.what}: {len(given):,} images became {len(found.labels):,}, by class {counts['after']}"


def _images_of(recipe: Recipe) -> ImageDataset:
    """What the first stage trains on; what selects weights is a stage's own matter."""
    return training_images(replace(recipe, select="last"))[1]


def _asks(model: RunFolder | None, device: str) -> Predict:
    """Probabilities (N, C) that the model of a stage gives, on the CPU."""

    @torch.no_grad()
    def predict(images: ImageDataset) -> Tensor:
        assert model is not None, "refused before the first stage"
        network = model.read()[0].to(resolve_device(device))
        found = []
        with attacking(network, "eval"):
            for batch in evaluation_batches(images.to(resolve_device(device)), PREDICTION_BATCH):
                found.append(torch.softmax(network(batch.x).float(), 1).cpu())
        return torch.cat(found)

    return predict
