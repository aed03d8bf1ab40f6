"""Flags that several commands share."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from robustfair.errors import as_flags
from robustfair.grammar import read_path
from robustfair.registry import load_plugin
from robustfair.runs.recipe import Recipe

PathFlag = Annotated[Path, Parameter(converter=lambda hint, tokens: read_path(tokens[0].value))]
Switch = Annotated[bool, Parameter(negative=())]
JsonSwitch = Annotated[bool, Parameter(name="--json", negative=())]
PluginFlag = Annotated[
    list[str] | None,
    Parameter(negative=(), help="Python file of your own, run to register what it adds; may be repeated."),
]
FormatFlag = Annotated[Literal["table", "json", "markdown", "latex"], Parameter(name="--format")]


def _recipe_flags() -> type:
    """A dataclass with one optional flag per recipe key: only what the user gives overrides a recipe."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    fields = []
    for field in dataclasses.fields(Recipe):
        if field.name in ("train", "stages"):
            continue
        hint, about = typing.get_args(hints[field.name])
        if field.default not in (None, dataclasses.MISSING, ()):
            about += f" Default: {field.default}."
        names = ("--step-size", "--alpha") if field.name == "step_size" else None
        many = typing.get_origin(hint) is tuple and field.name != "plugin"  # a composition may follow a file
        negative = None if hint is bool or bool in typing.get_args(hint) else ()
        flag = Parameter(name=names, help=about, negative=negative, consume_multiple=many)
        text_first = str if field.name in ("norm", "eps", "step_size") else hint
        fields.append((field.name, Annotated[text_first | None, flag], dataclasses.field(default=None)))
    # cyclopts reads no fields of a class that claims to come from the standard library, as a made one does.
    return dataclasses.make_dataclass("RecipeFlags", fields, kw_only=True, namespace={"__module__": __name__})


RecipeFlags = _recipe_flags()
NO_FLAGS = RecipeFlags()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Which model and which images: shared by the commands that measure a model."""

    data: Annotated[str | None, Parameter(help="Name or path of the images; a run's own if not given.")] = None
    checkpoint: Annotated[str | None, Parameter(help="Of a run: best, last, ema, ...")] = None
    arch: Annotated[str | None, Parameter(help="Architecture of a weight file, or timm:NAME.")] = None
    weights: Annotated[str | None, Parameter(help="Weight file for a factory's or timm's model.")] = None
    select_weights: Annotated[
        str | None, Parameter(help="Which set of weights of a weight file that holds several, such as ema.")
    ] = None
    width: Annotated[int | None, Parameter(help="Width of the architecture of a weight file.")] = None
    normalise: Annotated[
        str,
        Parameter(help="Input statistics of a model without: auto, none, half, cifar10, cifar100, imagenet or mnist."),
    ] = "auto"
    image_size: Annotated[int | None, Parameter(help="Resize images to squares of this side.")] = None
    limit_per_class: Annotated[int | None, Parameter(help="Only the first N test images of each class.")] = None
    batch_size: Annotated[int | None, Parameter(help="Images per batch.")] = None
    seed: Annotated[int, Parameter(help="Random seed.")] = 0
    device: Annotated[str, Parameter(help="cpu, cuda, or auto.")] = "auto"
    plugin: PluginFlag = None

    def load(self, target: str, images: tuple[Any, str] | None) -> Any:
        """The target, ready for these images; says on stderr what was done to read it."""
        from robustfair.runs.load import load_target

        for path in self.plugin or ():
            load_plugin(path)
        shape = images[0].images.shape if images else None
        found = load_target(
            target,
            checkpoint=self.checkpoint,
            arch=self.arch,
            weights=self.weights,
            select_weights=self.select_weights,
            width=self.width,
            normalise=self.normalise,
            num_classes=images[0].num_classes if images else None,
            in_channels=shape[1] if shape else None,
            image_size=(shape[2], shape[3]) if shape else None,
        )
        for note in found.notes:
            print(f"note: {as_flags(note)}", file=sys.stderr)
        return found

    def asked(self) -> dict[str, Any]:
        """What of it an `AuditRequest` holds."""
        names = ("data", "image_size", "limit_per_class", "batch_size", "seed", "device")
        return {name: getattr(self, name) for name in names}


NO_TARGET_FLAGS = TargetFlags()
