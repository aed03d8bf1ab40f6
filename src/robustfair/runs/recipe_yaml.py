"""What recipes and tables of recipes are written in: YAML with numbers as people write them, and no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from robustfair.errors import RecipeError

SCHEMA = "robustfair.recipe/1"
SCRATCH, PREVIOUS = "scratch", "previous"
"""Where a stage starts: with new weights, with the model before it."""
SHARED = ("data", "image_size", "limit_per_class", "validation", "edit", "device", "plugin")
"""Keys that hold for all stages: one data set, one validation split, taken out before any edit; what can be named."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-4 as the number it is, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise RecipeError(f"recipe: key {key!r} is no word")
            if keys.count(key) > 1:
                raise RecipeError(f"recipe: {key} stands twice: keep one")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def write_yaml(values: dict[str, Any]) -> str:
    """Keys and values as YAML under the schema of recipes; `read_yaml` gives them back."""
    return yaml.dump({"schema": SCHEMA, **values}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, owner: str, schema: str = SCHEMA) -> dict[str, Any]:
    """Keys and values of a file, without its schema.

    Args:
        owner: what a message calls the file.
        schema: what it must be of, if it says so.

    Raises:
        RecipeError: no YAML, no keys, a key twice, another schema, or the file was cut.
    """
    if text.startswith("schema:") and not text.endswith("\n"):
        raise RecipeError(f"{owner} ends in the middle of a line: it is cut; write its end anew, with a line end")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        at = f" at line {place.line + 1}" if place else ""
        raise RecipeError(f"{owner} is not YAML{at}: compare it with 'robustfair list recipes'") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{owner} holds no keys: it needs at least 'train' and 'data'")
    found = values.pop("schema", schema)
    if found != schema:
        raise RecipeError(f"{owner}: schema must be {schema!r}, got {found!r}")
    return values
