"""From a recipe to a run: build everything it names, then train into a folder."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from robustfair.data import ImageDataset, Splits, evaluation_batches, load_dataset, split_hash
from robustfair.data.augment.crops import Augmentation, parse_augmentation
from robustfair.data.catalog import UNLABELLED
from robustfair.data.edits import Edited, edit
from robustfair.errors import (
    DataError,
    DivergedError,
    ModelError,
    RecipeError,
    RobustFairError,
    RobustFairWarning,
)
from robustfair.execution.device import resolve_device
from robustfair.grammar import format_value, parse_composition, read_path
from robustfair.methods.base import Method
from robustfair.methods.compose import Plan
from robustfair.models.build import create_model, describe_model, require_model
from robustfair.models.head import check_outputs
from robustfair.models.weights import load_weights, read_weight_file
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.registry import METHODS, OBJECTIVES
from robustfair.runs.composition import plan_of_recipe, require_modelless
from robustfair.runs.folder import RunFolder, environment
from robustfair.runs.load import load_named
from robustfair.runs.recipe import PREVIOUS, SCRATCH, Recipe, read_recipe
from robustfair.training.engine import require_compiler
from robustfair.training.fit import Fitted, fit
from robustfair.training.schedule import Schedule
from robustfair.training.selection import SPLIT_SEED, held_out, require_every_class, require_validation
from robustfair.training.state import TrainState
from robustfair.training.way import Way
from robustfair.values import derive_seed


def training_images(recipe: Recipe) -> tuple[Splits, ImageDataset, ImageDataset | None, Tensor | None]:
    """All parts of the data; what is left to train on once the validation images are out, after the edit that comes
    before all training; the validation images, and their rows.
    """
    require_validation(recipe.validation, recipe.select)
    splits = load_dataset(recipe.data, image_size=recipe.image_size)
    train = splits.train
    if train.class_names == (UNLABELLED,):
        raise DataError(
            f"{recipe.data}: its images have no labels: train on labelled ones, and add these by a stage "
            f"'edit: pseudo-label(data={recipe.data})'"
        )
    if recipe.limit_per_class is not None:
        train = train.limit_per_class(recipe.limit_per_class)
    kept, held = (None, None) if recipe.validation == 0 else held_out(train.labels, recipe.validation)
    left = train if kept is None else train.subset(kept)
    if recipe.edit is not None:
        left = edit(left, require_modelless(recipe.edit), seed=SPLIT_SEED)
    return splits, left, None if held is None else train.subset(held), held


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything it names built and checked, nothing written.

    Attributes:
        plan: its networks are text until `load_networks`.
        train: the images to train on, edited where the recipe says so.
        validation: the images held out before any edit, None where there are none.
        held: (V,) their rows.
        notes: which networks were loaded beside the model, and how they were read.
    """

    recipe: Recipe
    plan: Plan
    splits: Splits
    train: ImageDataset
    validation: ImageDataset | None
    held: Tensor | None
    model: nn.Module
    schedule: Schedule
    augment: Augmentation
    device: str
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What a user should know before the run: what a bundle leaves out, methods that will not act, or too early."""
        found = self.plan.remarks(self.schedule.epochs)
        if self.recipe.start == SCRATCH:
            found += [
                f"{method.name} goes on from a model that is robust already, and this run starts from scratch: name a "
                "run with `start`, or let a stage train one before"
                for method in self.plan.methods
                if method.second_stage
            ]
        return found


def prepare(recipe: Recipe) -> Prepared:
    """Read data, build model, objective, methods and schedule; raises whatever is wrong with any of them."""
    plan = plan_of_recipe(recipe)
    require_model(recipe.model)
    names = {field.name for field in dataclasses.fields(Schedule)} - {"kind"}
    schedule = Schedule(kind=recipe.curve, **{name: getattr(recipe, name) for name in names})
    device = resolve_device(recipe.device)
    if recipe.compile is True:
        require_compiler(torch.device(device).type)
    splits, train, validation, held = training_images(recipe)
    require_every_class(validation, plan)
    if recipe.images is not None:
        train = Edited.read(read_path(recipe.images)).apply(train)
    plan.check_classes(train.class_counts(), train.groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        classes, channels = train.num_classes, train.images.shape[1]
        try:
            model = create_model(recipe.model, num_classes=classes, in_channels=channels, width=recipe.width)
        except (RuntimeError, MemoryError):
            raise ModelError(f"{recipe.model} of width {recipe.width} does not fit in memory: lower --width") from None
    recipe = _resolved(recipe, plan.objective, describe_model(model)["width"], train.augment)
    augment = parse_augmentation(str(recipe.augment))
    augment(train.images[:1], torch.Generator().manual_seed(0))
    schedule.trainable(model)  # before anything is written: are the parameters there that alone shall train?
    return Prepared(recipe, plan, splits, train, validation, held, model, schedule, augment, device)


Part = TypeVar("Part", Objective, Method)


def named_networks(part: Objective | Method) -> dict[str, str]:
    """The fields of an objective or a method that name a network, with the name."""
    hints = get_type_hints(type(part))
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    return {name: v for name, v in fields.items() if isinstance(v, str) and nn.Module in get_args(hints[name])}


def load_networks(ready: Prepared) -> Prepared:
    """The same with a module wherever its plan names a network.

    Raises:
        RobustFairError: a network that is not there, cannot be read, or has other classes or other images.
    """
    notes: list[str] = []

    def loaded(part: Part) -> Part:
        modules = {}
        for field, text in named_networks(part).items():
            modules[field], noted = _load_network(f"{part.name}: {field}", text, ready.train)
            notes.extend(noted)
        return dataclasses.replace(part, **modules) if modules else part  # type: ignore[type-var]

    plan = ready.plan
    methods = tuple(loaded(method) for method in plan.methods)
    plan = dataclasses.replace(plan, objective=loaded(plan.objective), methods=methods)
    return dataclasses.replace(ready, plan=plan, notes=tuple(notes))


def _load_network(owner: str, text: str, images: ImageDataset) -> tuple[nn.Module, list[str]]:
    """The network and what to say of it; `owner` is the field that names it."""
    if text == PREVIOUS:
        raise RecipeError(f"{owner} is {PREVIOUS}, which is the model before a stage: name one, or write stages")
    example = next(evaluation_batches(images, 2)).x
    shape = {"in_channels": example.shape[1], "image_size": (example.shape[2], example.shape[3])}
    try:
        found = load_named(text, num_classes=images.num_classes, **shape)
        check_outputs(found.model, images.num_classes, example)
    except RobustFairError as error:
        said = re.sub(r"`(\w+)`", r"\1", str(error))
        hint = f'. Options stand in brackets: {owner.split(": ")[1]}="weights.pt(arch=wrn-34-10)"'
        raise ModelError(f"{owner}: {said}{hint if said != str(error) else ''}") from error
    classes = found.meta.get("class_names")
    if classes is not None and list(classes) != list(images.class_names):
        raise ModelError(
            f"{owner}: {text} was trained on the classes {', '.join(classes)}, and these images have "
            f"{', '.join(images.class_names)}: name a model of the same classes in the same order"
        )
    return found.model, [f"{owner} is {found.label}", *(f"{owner}: {note}" for note in found.notes)]


def with_previous(composition: str, model: str) -> str:
    """A composition in which networks called `previous` are the model that the text `model` names.

    >>> with_previous("rslad(teacher=previous) + absld", "runs/x/stages/1-train")
    'rslad(teacher=runs/x/stages/1-train) + absld'
    """
    terms = parse_composition(composition)
    found = []
    for term in terms:
        hints = get_type_hints((OBJECTIVES if term.name in OBJECTIVES else METHODS).get(term.name))
        named = {k: v for k, v in term.args.items() if v == PREVIOUS and nn.Module in get_args(hints.get(k))}
        found.append(dataclasses.replace(term, args={**term.args, **dict.fromkeys(named, model)}))
    return composition if found == terms else " + ".join(map(str, found))


def begin_from(start: str, ready: Prepared) -> None:
    """Put the weights that the recipe starts with into the model; "scratch" leaves it as it was drawn.

    Raises:
        ModelError: they do not fit the model of the recipe.
        CheckpointError: there is nothing to read, or it is damaged.
    """
    if start == SCRATCH:
        return
    path = read_path(start)
    if path.is_dir():
        folder = RunFolder(path).model_folder()
        weights = folder.read()[0].state_dict()
        try:
            ready.model.load_state_dict(weights)
        except RuntimeError:
            raise ModelError(
                f"--start {start}: its weights do not fit {ready.recipe.model} of width {ready.recipe.width} with "
                f"{ready.train.num_classes} classes: give --model and --width as they are there"
            ) from None
        _warn_of_other_held(start, folder.manifest(), ready)
    else:
        load_weights(ready.model, read_weight_file(path))


def _warn_of_other_held(start: str, known: Mapping[str, Any], ready: Prepared) -> None:
    """Say where a run on the same images held out others: what is measured here may be what it learnt."""
    same_images = known.get("data", {}).get("fingerprint") == ready.splits.train.fingerprint
    if ready.held is None or not same_images or known.get("split_hash", "") in ("", split_hash(ready.held)):
        return
    text = (
        f"start {start} held out other validation images than this run does, and may have trained on those measured "
        "here: give both the same `validation`"
    )
    warnings.warn(text, RobustFairWarning, stacklevel=3)


RESOLVED = ("norm", "eps", "step_size", "steps", "width", "augment")
"""Keys that a user may leave open: the run's own recipe.yaml holds what they came to."""


def _resolved(recipe: Recipe, objective: Objective, width: int, augment: str) -> Recipe:
    """The recipe with every default of its objective, model and data written out, so that it repeats the run."""
    filled: dict[str, Any] = {"width": width, "augment": augment if recipe.augment is None else recipe.augment}
    if isinstance(objective, AdversarialObjective):
        filled |= {"norm": objective.norm, "eps": objective.radius, "step_size": objective.step}
        filled["steps"] = objective.steps
    return dataclasses.replace(recipe, **filled)


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    on_start: Callable[[Prepared, TrainState | None], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
) -> Fitted:
    """Run a recipe into the folder `out`, which this process owns meanwhile.

    Raises:
        CheckpointError: `out` holds something already (and `resume` is false), or no training (and it is true); or
            another process owns it.
        RecipeError: the run to be resumed was begun with another recipe.
        DivergedError: the loss is not finite; diverged.json in `out` says where.
    """
    folder = RunFolder(out)
    if resume:
        folder.require_training()
    with folder.owned():
        return _train(recipe, folder, resume, on_start, on_step, on_epoch)


def _train(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    on_start: Callable[[Prepared, TrainState | None], None] | None,
    on_step: Callable[[int, int], None] | None,
    on_epoch: Callable[[TrainState], None] | None,
) -> Fitted:
    """`train` into a folder that this process owns."""
    state = None
    if resume:
        recipe = begun_recipe(recipe, folder)
    else:
        folder.require_free()
    ready = load_networks(prepare(recipe))
    recipe = ready.recipe
    about = {
        "model": describe_model(ready.model),
        "class_names": list(ready.train.class_names),
        "data": {
            "name": _from_anywhere(recipe.data),
            "fingerprint": ready.splits.train.fingerprint,
            "image_size": recipe.image_size,
            "edit": recipe.edit,
        },
        "images_per_class": ready.train.class_counts().tolist(),
        "split_hash": None if ready.held is None else split_hash(ready.held),
        "recipe": recipe.train,
        "threat": _threat(ready.plan.objective),
    }
    if resume:
        found = folder.manifest()["data"]["fingerprint"]
        if found != ready.splits.train.fingerprint:
            raise RecipeError(
                f"--resume: the images of {recipe.data} changed since {folder.path} began: start a new run"
            )
        _require_unchanged(folder, about | {"seed": recipe.seed})
        state = folder.resume_state()
        folder.update_manifest(status="running")
    if state is None:
        begin_from(recipe.start, ready)
    if on_start is not None:
        on_start(ready, state)
    for remark in ready.remarks:
        warnings.warn(remark, RobustFairWarning, stacklevel=2)
    known = folder.manifest() if resume else {}
    started, spent = time.time(), known.get("wall_seconds", 0.0)

    def save(state: TrainState) -> None:
        folder.save(state, about)
        folder.update_manifest(wall_seconds=round(spent + time.time() - started, 1), epochs_done=state.epoch)
        if on_epoch is not None:
            on_epoch(state)

    def on_way(way: Way) -> None:
        if not resume:  # nothing is refused from here on: what was leaves no run behind
            folder.create(recipe.to_yaml(), environment() | about | {"seed": recipe.seed, "status": "running"})
        folder.update_manifest(way=dataclasses.asdict(way))

    taken = known.get("way", {})
    if taken or state is not None:
        taken = {"kernels": False} | taken  # a run that an earlier version began took none
    try:
        fitted = fit(
            ready.model,
            ready.train,
            ready.plan.objective,
            methods=ready.plan.methods,
            schedule=ready.schedule,
            seed=recipe.seed,
            validation=0 if ready.validation is None else ready.validation,
            select=recipe.select,
            augment=ready.augment,
            precision=taken.get("precision", recipe.precision),
            compile=taken.get("compile", recipe.compile),
            kernels=taken.get("kernels", recipe.kernels),
            deterministic=recipe.deterministic,
            device=ready.device,
            allow=ready.plan.allow,
            resume=state,
            on_way=None if taken else on_way,
            save=save,
            on_step=on_step,
        )
    except DivergedError as error:
        folder.record_divergence(error)
        raise
    chosen = fitted.chosen
    selected = {"candidate": chosen.candidate, "epoch": chosen.epoch, "rule": recipe.select}
    speed = [record["images_per_second"] for record in fitted.history]
    folder.update_manifest(
        status="complete",
        epochs_done=fitted.state.epoch,
        selected=selected,
        images_per_second=sorted(speed)[len(speed) // 2],
    )
    return fitted


def begun_recipe(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe that the run in `folder` was begun with; refuses a key that is given and differs."""
    begun = read_recipe(str(folder.recipe), {})
    for field in dataclasses.fields(Recipe):
        old, new = getattr(begun, field.name), getattr(recipe, field.name)
        left_open = new is None and field.name in RESOLVED
        if old != new and not left_open and field.name != "device":
            raise RecipeError(
                f"--resume: {field.name} is {format_value(new)}, but {folder.path} was begun with {format_value(old)}: "
                "leave it out to go on, or start a new run"
            )
    return dataclasses.replace(begun, device=recipe.device)


def _require_unchanged(folder: RunFolder, about: Mapping[str, Any]) -> None:
    """Refuse to go on where recipe.yaml no longer is what the run in `folder` was begun with."""
    known, now = folder.manifest(), json.loads(json.dumps(about))
    for key in ("recipe", "threat", "seed", "split_hash"):
        if key in known and known[key] != now[key]:
            raise RecipeError(
                f"--resume: {key} is {format_value(now[key])} by {folder.recipe}, but the run was begun with "
                f"{format_value(known[key])}: change the file back, or start a new run"
            )


def _from_anywhere(data: str) -> str:
    """The name of a data set, or the absolute form of a path, which holds in another working folder too."""
    path = read_path(data)
    return str(path.resolve()) if path.exists() else data


def _threat(objective: Objective) -> dict[str, Any] | None:
    if not isinstance(objective, AdversarialObjective):
        return None
    return {"norm": objective.norm, "eps": objective.radius, "step_size": objective.step}
