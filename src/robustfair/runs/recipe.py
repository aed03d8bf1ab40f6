"""Recipes: everything a training run depends on, as data. A flag of the command line is a key of the recipe.

A recipe is a composition string plus keys, or a YAML file with the same keys (`recipes/` ships some, and tables of
papers with a recipe for each row, see `shipped.py`). In place of `train` a file may have `stages`, a list of things to
do one after another, each with keys of its own:

    data: cifar10
    epochs: 100
    stages:
    - train: trades(beta=6)
    - edit: upweight(times=5)
    - train: trades(beta=6) + ccr
      start: scratch
    - train: pgd-at
      only: [head]
      epochs: 2
    - repair: hwnwb

A stage that trains starts from the model before it unless it says otherwise. Reading is strict: an unknown key shows
the nearest one, and everything is checked and built before a folder or a step is made.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from robustfair.config import FAST_SCHEDULE, Auto, Curve, Norm, Precision, Select, build, require, require_one_way
from robustfair.errors import ConfigError, RecipeError, RobustFairWarning, UnknownNameError
from robustfair.grammar import canonical_key, format_value, read_path
from robustfair.runs.recipe_yaml import PREVIOUS, SCRATCH, SHARED, read_yaml, write_yaml
from robustfair.runs.shipped import shipped_recipes, shipped_values, tables

Does = Literal["train", "repair", "edit"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing of several that a recipe does.

    Attributes:
        does: "train", "repair" or "edit".
        what: a composition, a repair such as hwnwb(target_norm=mean), or an edit such as long-tail(factor=100).
        keys: of the recipe, where a stage that trains has other values; a repair takes `start` alone, an edit `seed`.
    """

    does: Does
    what: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(entry: object, number: int) -> Stage:
        """A stage from the entry of a YAML file; `number` counts from 1, for messages.

        Raises:
            RecipeError: it does nothing, or two things, or has a key that stages cannot have.
        """
        if not isinstance(entry, Mapping):
            raise RecipeError(f"recipe: stage {number} is {entry!r}: write train, repair or edit and what, as keys")
        keys = {canonical_key(str(key)): value for key, value in entry.items()}
        does = [kind for kind in get_args(Does) if kind in keys]
        if len(does) != 1 or not isinstance(keys[does[0]], str):
            found = " and ".join(does) or "none of them"
            raise RecipeError(f"recipe: stage {number} needs one of train, repair and edit, as text; it has {found}")
        what = keys.pop(does[0])
        refused = set(keys) & {*REFUSED} if does == ["train"] else set(keys) - OWN[does[0]]
        if refused:
            named = ", ".join(sorted(refused))
            allowed = f"only {', '.join(OWN[does[0]])}" if does != ["train"] else f"no {', '.join(REFUSED)}"
            raise RecipeError(f"recipe: stage {number} ({does[0]}) has {named}: it takes {allowed}")
        owner = f"stage {number}"
        require(isinstance(keys.get("start", ""), str), owner, "start", allowed="text", got=keys.get("start"))
        seed = keys.get("seed", 0)
        whole = isinstance(seed, int) and not isinstance(seed, bool)
        require(whole, owner, "seed", allowed="a whole number", got=seed)
        return Stage(does=does[0], what=what, keys=keys)

    def entry(self) -> dict[str, Any]:
        """As a YAML file has it."""
        return {self.does: self.what, **self.keys}


OWN = {"repair": {"start"}, "edit": {"seed"}}
REFUSED = (*SHARED, "images", "stages")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, resolved: reading its YAML back repeats it. `robustfair train --help` tells each key.

    Paths of plugins are made absolute, so that they hold in another working folder too; reading a recipe runs none.
    """

    train: Annotated[str, "Composition of an objective and methods."] = ""
    data: Annotated[str, "Name of a data set, or a path to images."]
    image_size: Annotated[int | None, "Resize images to squares of this side."] = None
    limit_per_class: Annotated[int | None, "Train on the first N images of each class only."] = None
    edit: Annotated[str | None, "Edit of the training images before all training, such as 'long-tail(factor=100)'."] = (
        None
    )
    model: Annotated[str, "Architecture by name."] = "preact-resnet18"
    width: Annotated[int | None, "Width of the architecture; its own if not given."] = None
    norm: Annotated[Norm | None, "Norm of the attack: linf or l2 (the objective's default)."] = None
    eps: Annotated[float | None, "Radius of the attack in pixel units, like 8/255 (the objective's default)."] = None
    step_size: Annotated[float | None, "Length of one attack step; eps/4 under linf if not given. Alias: --alpha."] = (
        None
    )
    steps: Annotated[int | None, "Steps of the training attack; 10 if not given."] = None
    epochs: Annotated[int, "Passes over the training images."] = 200
    batch_size: Annotated[int, "Images per step."] = 128
    lr: Annotated[float, "Largest learning rate."] = 0.1
    schedule: Annotated[
        Literal["fast", Curve],
        "Learning rate over time; fast also sets epochs, lr, warmup, batch and weight decay; flags beside it win.",
    ] = "multistep"
    milestones: Annotated[tuple[float, ...], "Parts of the run after which a multistep rate drops."] = (0.5, 0.75)
    gamma: Annotated[float, "Factor of a multistep drop."] = 0.1
    warmup: Annotated[float, "Part of the run on which a one-cycle rate rises."] = 0.4
    optimizer: Annotated[Literal["sgd", "adam"], "sgd or adam."] = "sgd"
    momentum: Annotated[float, "Momentum of SGD."] = 0.9
    nesterov: Annotated[bool, "Nesterov momentum of SGD."] = False
    cycle_momentum: Annotated[bool, "Let SGD's momentum fall by 0.1 where a one-cycle rate rises."] = False
    weight_decay: Annotated[float, "Weight decay of every parameter."] = 5e-4
    seed: Annotated[int, "Seed of everything random but the validation split, which all runs share."] = 0
    validation: Annotated[float, "Share of each class held out of training for validation; 0 for none."] = 0.02
    select: Annotated[Select, "Final weights: last, or best validation average, worst, average+worst."] = (
        "average+worst"
    )
    augment: Annotated[str | None, "By name, see 'list augmentations'; the data set's own if not given."] = None
    precision: Annotated[
        Precision | Auto, "Of forward and backward passes: fp32, bf16, or auto, the faster by a few timed passes."
    ] = "fp32"
    compile: Annotated[
        bool | Auto,
        "Compile attack and training pass: faster after a minute's start; auto where timed passes say it pays back.",
    ] = False
    kernels: Annotated[
        bool, "Attack on kernels of our own where they can be had: float32 on a CPU, batch norm in eval mode."
    ] = True
    deterministic: Annotated[
        bool, "The reference path: uncompiled, no kernels of our own, no TF32, every algorithm repeats exactly."
    ] = False
    device: Annotated[str, "cpu, cuda, or auto."] = "auto"
    allow: Annotated[tuple[str, ...], "Claims that several methods may share, such as attack.eps."] = ()
    start: Annotated[str, "Weights to begin with: scratch, a run folder, or a weight file."] = SCRATCH
    only: Annotated[tuple[str, ...], "Train these parameters alone: head, head.weight, head.bias, or their names."] = ()
    images: Annotated[str | None, "Edit of the training images, as a stage wrote it: its images.safetensors."] = None
    plugin: Annotated[tuple[str, ...], "Python files of your own that register what you add."] = ()
    stages: Annotated[tuple[Stage, ...], "Things to do one after another; in a file."] = ()

    def __post_init__(self) -> None:
        plugins = (str(read_path(path).resolve()) for path in self.plugin)
        object.__setattr__(self, "plugin", tuple(dict.fromkeys(plugins)))
        if not self.train and not self.stages:
            raise RecipeError("recipe: train is missing: add a composition such as 'trades + ccm'")
        beside = "left out beside stages, which have their own"
        require(not (self.train and self.stages), "recipe", "train", allowed=beside, got=self.train)
        require(self.start != PREVIOUS, "recipe", "start", allowed="previous in a stage only", got=PREVIOUS)
        hint = "read_recipe turns it into the keys it stands for"
        require(self.schedule != "fast", "recipe", "schedule", allowed="a curve", got=self.schedule, hint=hint)
        require_one_way("recipe", precision=self.precision, compile=self.compile, deterministic=self.deterministic)
        if self.limit_per_class is not None and self.limit_per_class < 1:
            raise ConfigError("recipe", "limit_per_class", allowed=">= 1", got=self.limit_per_class)

    @property
    def curve(self) -> Curve:
        """The learning-rate curve by name."""
        assert self.schedule != "fast", "refused when the recipe was made"
        return self.schedule

    def values(self) -> dict[str, Any]:
        """Keys and values, as a YAML file has them: lists for tuples, radii as fractions of 255 where they are."""
        values = dataclasses.asdict(self)
        values["stages"] = [stage.entry() for stage in self.stages]
        for name in ("train", "stages"):
            if not values[name]:
                del values[name]
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
            elif name in ("eps", "step_size") and value is not None:
                values[name] = format_value(value)
        return values

    def to_yaml(self) -> str:
        """YAML that reads back as this recipe."""
        return write_yaml(self.values())

    def of_stage(self, number: int, **resolved: Any) -> Recipe:
        """The recipe of the 0-based stage that trains: the common keys, its own, and those that a run resolved."""
        stage = self.stages[number]
        assert stage.does == "train", "only a stage that trains has a recipe of its own"
        common = {key: value for key, value in self.values().items() if key != "stages"}
        own = _with_fast(stage.keys)
        replaced = {canonical_key(key) for key in own} | ({"step_size"} if "alpha" in own else set())
        values = {key: value for key, value in common.items() if key not in replaced} | own
        return build(Recipe, {**values, "train": stage.what, **resolved}, owner=f"stage {number + 1}")

    def then(self, stage: Stage) -> Recipe:
        """This recipe with one stage more."""
        stages = self.stages or (Stage(does="train", what=self.train),)
        return dataclasses.replace(self, train="", stages=(*stages, stage))

    def up_to(self, number: int) -> Recipe:
        """The recipe that ends with the 0-based stage."""
        return dataclasses.replace(self, stages=self.stages[: number + 1])


def read_recipe(what: str, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe from a composition string, a shipped recipe's name or a YAML file, with keys overridden.

    Raises:
        RecipeError: the file is not a recipe, no data set is named, or the shipped one cannot run.
        UnknownNameError: an unknown key or name; shows the nearest.
        ConfigError: a value that is not allowed.
    """
    return recipe_of(values_of(what), overrides, what)


def values_of(what: str) -> Mapping[str, Any]:
    """Keys and values that a composition string, a shipped recipe's name or a YAML file stands for.

    Raises:
        RecipeError, UnknownNameError: as `read_recipe`.
    """
    if what.endswith((".yaml", ".yml")):
        path = read_path(what)
        if not path.is_file():
            raise RecipeError(f"recipe {what} does not exist: give a YAML file or a composition such as 'trades + ccm'")
        try:
            return read_yaml(path.read_text(encoding="utf-8"), f"recipe {what}")
        except UnicodeDecodeError:
            raise RecipeError(f"recipe {what} is not text in UTF-8") from None
    if (shipped := shipped_values(what)) is not None:
        return shipped
    if "/" in what.split("(")[0]:
        raise UnknownNameError("recipe", what, [*shipped_recipes(), *tables()])
    return {"train": what}


def recipe_of(values: Mapping[str, Any], overrides: Mapping[str, Any], what: str) -> Recipe:
    """The recipe of keys and values, with keys overridden; `what` is what messages call it.

    Raises:
        RecipeError, UnknownNameError, ConfigError: as `read_recipe`.
    """
    values, overrides = _with_fast(values), _with_fast(overrides)
    replaced = {canonical_key(key) for key in overrides} | ({"alpha"} if "step_size" in overrides else set())
    values = {key: value for key, value in values.items() if canonical_key(key) not in replaced} | dict(overrides)
    values = _with_stages(values)
    for number, stage in enumerate(values.get("stages", ()), 1):
        for key in {canonical_key(key) for key in overrides} & stage.keys.keys():
            text = f"recipe: stage {number} keeps its own {key}, {format_value(stage.keys[key])}"
            warnings.warn(text, RobustFairWarning, stacklevel=3)
    if "train" not in values and "stages" not in values:
        raise RecipeError(f"recipe {what}: train is missing: add a composition such as 'trades + ccm'")
    if "data" not in values:
        raise RecipeError("recipe: data is missing: add --data with a name (cifar10, digits, ...) or a path")
    return build(Recipe, values, owner="recipe")


def _with_stages(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with stages read, and the key `repair` of earlier recipes as the stage that it was."""
    read = dict(values)
    repair, entries = read.pop("repair", None), read.get("stages")
    if repair is not None:
        require("train" in read and not entries, "recipe", "repair", allowed="a stage beside others", got=repair)
        entries = [{"train": read.pop("train")}, {"repair": repair}]
    if entries is None:
        return read
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise RecipeError(f"recipe: stages is {entries!r}: write a list of stages")
    return {**read, "stages": tuple(Stage.read(entry, number) for number, entry in enumerate(entries, 1))}


def _with_fast(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with `schedule: fast` replaced by the keys it stands for, save for those given beside it."""
    if values.get("schedule") != "fast":
        return dict(values)
    given = {canonical_key(key) for key in values}
    left = {key: value for key, value in FAST_SCHEDULE.items() if key not in given}
    return {**values, **left, "schedule": FAST_SCHEDULE["schedule"]}
