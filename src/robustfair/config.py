"""Configs: dataclasses built from plain values, strictly, and the checks that their fields share.

An unknown key is an error that shows the nearest one; nothing is coerced silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from robustfair.errors import ConfigError, RecipeError, UnknownNameError, needed
from robustfair.grammar import canonical_key, parse_eps, parse_norm
from robustfair.registry import canonical

T = TypeVar("T")
Norm = Literal["linf", "l2"]
Precision = Literal["fp32", "bf16"]
Select = Literal["last", "average", "worst", "average+worst"]
Curve = Literal["multistep", "cosine", "one-cycle", "constant"]
FAST_SCHEDULE: Mapping[str, Any] = {
    "schedule": "one-cycle",
    "epochs": 30,
    "lr": 0.3,
    "warmup": 0.4,
    "batch_size": 128,
    "weight_decay": 5e-4,
}
"""What `schedule: fast` stands for, by recipe key: adversarial training in the fewest epochs, see recipes/fast/."""


def require_at_least(least: float, owner: str, field: str, value: float) -> None:
    """Raise ConfigError unless `value` is a number, finite and not below `least`."""
    number = _is_number(value) and least <= value < float("inf")
    require(number, owner, field, allowed=f"a finite number >= {least:g}", got=value)


def require_whole(least: int, owner: str, field: str, value: float) -> None:
    """Raise ConfigError unless `value` is an int that is not below `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool) and value >= least
    require(whole, owner, field, allowed=f"a whole number >= {least}", got=value)


def require_share(owner: str, field: str, value: float) -> None:
    """Raise ConfigError unless `value` is a number in [0, 1]."""
    require(_is_number(value) and 0 <= value <= 1, owner, field, allowed="in [0, 1]", got=value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def require(condition: bool, owner: str, field: str, *, allowed: str, got: object, hint: str = "") -> None:
    """Raise ConfigError unless `condition`."""
    if not condition:
        raise ConfigError(owner, field, allowed=allowed, got=got, hint=hint)


def build(cls: type[T], args: Mapping[str, Any], *, owner: str) -> T:
    """Instantiate a config dataclass from plain values, strictly typed.

    Fields called `eps` or `step_size` also read `8/255`; `norm` any usual spelling; `alpha` stands for `step_size`.

    Raises:
        UnknownNameError: a key that is no field; shows the nearest fields.
        ConfigError: a value of the wrong type or outside the allowed set.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for given, value in args.items():
        key = canonical_key(given)
        if key == "alpha" and "alpha" not in known and "step_size" in known:
            key = "step_size"
        if key not in known:
            raise UnknownNameError(f"key of {owner}", key, known)
        if key in values:
            raise RecipeError(f"{owner}: {key} is given twice, also as {given}: give it once")
        values[key] = value
    if values.get("norm") is not None:
        values["norm"] = parse_norm(values["norm"], owner=owner)
    for key in ("eps", "step_size"):
        if values.get(key) is not None:
            norm = values.get("norm") or getattr(cls, "norm", None) or "any"
            values[key] = parse_eps(values[key], norm=norm, owner=owner, field=key)
    types = get_type_hints(cls)
    return cls(**{key: _read(value, types[key], owner, key) for key, value in values.items()})


def _read(value: Any, hint: Any, owner: str, key: str) -> Any:
    if get_origin(hint) is Literal and isinstance(value, str):
        spelled = {canonical(word): word for word in get_args(hint) if isinstance(word, str)}
        value = spelled.get(canonical(value), value)
    if _is_plainly(value, hint):
        return value
    with needed("pydantic", f"reading {owner}: {key}={value}"):
        from pydantic import ConfigDict, TypeAdapter, ValidationError
    try:
        reader = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        return reader.validate_python(tuple(value) if isinstance(value, list) else value)
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ConfigError(owner, key, allowed=allowed, got=value) from None


def _is_plainly(value: object, hint: Any) -> bool:
    """Whether `value` is of the type `hint` as it stands, so that strict reading would hand it back as it is."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_plainly(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    return type(value) is hint


def require_one_way(owner: str, *, compile: bool, deterministic: bool) -> None:
    """Refuse to compile the run that asks for the reference path."""
    hint = "A deterministic run takes the reference path, uncompiled"
    require(
        not (compile and deterministic), owner, "compile", allowed="false beside deterministic", got=True, hint=hint
    )


def require_literals(config: Any) -> None:
    """Raise ConfigError where a field of a config dataclass holds a word that its Literal type does not list, or where
    one that is true or false holds something else.

    For `__post_init__`: a config built in Python is then read as strictly as one from a recipe.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            owner = getattr(config, "name", type(config).__name__.lower())
            raise ConfigError(owner, name, allowed=" or ".join(map(repr, get_args(hint))), got=value)
        if hint is bool and not isinstance(value, bool):
            raise ConfigError(getattr(config, "name", type(config).__name__.lower()), name, allowed="a bool", got=value)
