"""Configs: frozen dataclasses whose annotations hold the bounds, checked in one place and built from plain values.

An unknown key is an error that shows the nearest one; nothing is coerced silently.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from robustfair.errors import ConfigError, RecipeError, UnknownNameError
from robustfair.grammar import canonical_key, parse_eps, parse_norm
from robustfair.registry import canonical

T = TypeVar("T")
LARGEST, LONGEST = (2 - 2**-23) * 2.0**127, 2**63 - 1
"""Numbers beyond these have no place in a tensor of float32, or of int64 where they are whole."""
Norm = Literal["linf", "l2"]
Precision = Literal["fp32", "bf16"]
Auto = Literal["auto"]
"""In place of a value: what is fastest on this machine, by a few timed passes."""
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


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that a field of a config may hold, as part of its annotation: `Annotated[float, Bounds(ge=0)]`.

    The bounds of the package annotated-types have these attributes too and may be used in its place.

    Attributes:
        ge, gt, le, lt: at least, above, at most, below; None leaves that side open.
        allowed: what a message says in place of the bounds.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    allowed: str = ""


NonNegative = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
Whole = Annotated[int, Bounds(ge=0)]
Count = Annotated[int, Bounds(ge=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Decorator: a frozen, keyword-only dataclass that checks every field against its annotation when it is made.

    Numbers must fit float32, whole ones int64, and lie within their bounds, words listed by their Literal, anything
    else of the type named, and so must the entries of a tuple; a list is read as one. `eps`, `step_size` and `norm`
    are read as `build` reads them.
    A `__post_init__` of the class runs after that: for what depends on more than one field.

    Raises:
        ConfigError: when the config is made; it names the owner, the field, what is allowed and what it got.

    >>> @config
    ... class Smoothing:
    ...     amount: Share = 0.1
    >>> Smoothing(amount=2)
    Traceback (most recent call last):
        ...
    robustfair.errors.ConfigError: smoothing: amount must be in [0, 1], got 2
    """
    own = getattr(cls, "__post_init__", None)

    def checked(self: Any) -> None:
        _check(self)
        if own is not None:
            own(self)

    cls.__post_init__ = checked  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def _check(made: Any) -> None:
    """Raise ConfigError where a field is not what its annotation allows; lengths, norm and lists are read first."""
    owner = getattr(made, "name", type(made).__name__.lower())
    hints = _hints(type(made))
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    read = _read_threat(values, None, owner)
    read |= {name: _read(value, hints[name]) for name, value in values.items() if isinstance(value, list)}
    for name, value in read.items():
        object.__setattr__(made, name, value)
    for name, value in {**values, **read}.items():
        require(_fits(value, hints[name]), owner, name, allowed=_allowed(hints[name]), got=value, hint=_too_long(value))


def build(cls: type[T], args: Mapping[str, Any], *, owner: str) -> T:
    """Instantiate a config dataclass from plain values. Text is never read as a number, nor a number as true or false.

    A whole number is read as a float where one is asked for, a list as a tuple, and a word in any spelling. Fields
    called `eps` or `step_size` also read `8/255`; `norm` any usual spelling; `alpha` stands for `step_size`.

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
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        needless = optional or not field.init or field.name in values
        require(needless, owner, field.name, allowed="given", got="nothing")
    values |= _read_threat(values, getattr(cls, "norm", None), owner)
    hints = _hints(cls)
    for key, value in values.items():
        values[key] = _read(value, hints[key])
        fits, allowed = _fits(values[key], hints[key]), _allowed(hints[key])
        require(fits, owner, key, allowed=allowed, got=value, hint=_too_long(value))
    return cls(**values)


_HINTS: dict[type, Mapping[str, Any]] = {}


def _hints(cls: type) -> Mapping[str, Any]:
    """Annotations of a config by field, read once a class: that takes longer than all the rest."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls, include_extras=True)
    return _HINTS[cls]


def _read_threat(values: Mapping[str, Any], norm: str | None, owner: str) -> dict[str, Any]:
    """Norm and lengths among `values`, as far as they are given; `norm` holds where the values name none."""
    read: dict[str, Any] = {}
    if values.get("norm") is not None:
        read["norm"] = norm = parse_norm(values["norm"], owner=owner)
    for key in ("eps", "step_size"):
        if values.get(key) is not None:
            read[key] = parse_eps(values[key], norm=norm or "any", owner=owner, field=key)
    return read


def _read(value: Any, hint: Any) -> Any:
    """A plain value converted to the type `hint`, or unchanged where it cannot be."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _read(value, inside[0])
    if kind in (Union, UnionType):
        return next((read for option in inside if _fits(read := _read(value, option), option)), value)
    if kind is Literal and isinstance(value, str):
        return {canonical(word): word for word in inside if isinstance(word, str)}.get(canonical(value), value)
    if kind is tuple and isinstance(value, list):
        hints = _entries(hint, len(value))
        return tuple(_read(*pair) for pair in zip(value, hints, strict=True)) if len(hints) == len(value) else value
    return float(value) if hint is float and type(value) is int and _is_finite(value) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` and within its bounds. A type that cannot be checked accepts all."""
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        kept = not _is_number(value) or all(_SIDES[side][0](value, end) for side, end in _ends(hint).items())
        return _fits(value, inside[0]) and kept
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in inside)
    if kind is Literal:
        return any(type(value) is type(word) and value == word for word in inside)
    if kind is tuple and isinstance(value, tuple):
        hints = _entries(hint, len(value))
        return len(hints) == len(value) and all(map(_fits, value, hints))
    if kind in (int, float):
        whole = isinstance(value, Integral) and abs(int(value)) <= LONGEST
        return _is_number(value) and (_is_finite(value) if kind is float else whole)
    plain = isinstance(kind, type) and kind is not Any and not getattr(kind, "_is_protocol", False)
    return isinstance(value, kind) if plain else True


def _entries(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the entries of a tuple, of `count` where it takes any number."""
    inside = get_args(hint) or (Any, ...)
    return inside[:1] * count if inside[-1] is ... else inside


def _allowed(hint: Any) -> str:
    """What `_fits` asks for, in words."""
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        said = [mark.allowed for mark in inside[1:] if getattr(mark, "allowed", "")]
        return said[0] if said else _range(hint)
    if kind in (Union, UnionType):
        options = " or ".join(_allowed(option) for option in inside if option is not NoneType)
        return options + (", or none" if NoneType in inside else "")
    if kind is Literal:
        return " or ".join(map(repr, inside))
    if kind is tuple and inside:
        return f"a list{'' if inside[-1] is ... else f' of {len(inside)}'}, each entry {_allowed(inside[0])}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a valid string",
        NoneType: "none",
    }
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


_SIDES: Mapping[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "ge": (operator.ge, ">=", "["),
    "gt": (operator.gt, "above", "("),
    "le": (operator.le, "<=", "]"),
    "lt": (operator.lt, "below", ")"),
}
"""Side of a bound -> how to compare, and its sign in a message, alone and as an end of an interval."""


def _ends(hint: Any) -> dict[str, float]:
    """The bounds of an annotation by side."""
    marks = get_args(hint)[1:]
    return {side: getattr(mark, side) for side in _SIDES for mark in marks if getattr(mark, side, None) is not None}


def _range(hint: Any) -> str:
    """The bounds of an annotation in words."""
    kind, ends = get_args(hint)[0], [(side, f"{end:g}") for side, end in _ends(hint).items()]
    if len(ends) == 2:
        (low, least), (high, most) = ends
        return f"{'' if kind is float else _allowed(kind) + ' '}in {_SIDES[low][2]}{least}, {most}{_SIDES[high][2]}"
    return " ".join([_allowed(kind), *(f"{_SIDES[side][1]} {end}" for side, end in ends)])


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return abs(value) <= LARGEST


def _too_long(value: object) -> str:
    """What to say of a number that is refused for its length alone, "" of any other value."""
    long = _is_number(value) and value not in (math.inf, -math.inf) and value == value
    limit = LONGEST if isinstance(value, Integral) else LARGEST
    return "Numbers are held in float32, whole ones in 64 bits" if long and abs(value) > limit else ""  # type: ignore


def require(condition: bool, owner: str, field: str, *, allowed: str, got: object, hint: str = "") -> None:
    """Raise ConfigError unless `condition`."""
    if not condition:
        raise ConfigError(owner, field, allowed=allowed, got=got, hint=hint)


def require_one_way(owner: str, *, precision: Precision | Auto, compile: bool | Auto, deterministic: bool) -> None:
    """Refuse to compile the run that asks for the reference path, or to choose its precision by the clock."""
    hint = "A deterministic run takes the reference path, uncompiled"
    require(
        not (compile and deterministic), owner, "compile", allowed="false beside deterministic", got=compile, hint=hint
    )
    chosen = precision == "auto" and deterministic
    hint = "What is fastest may differ from run to run"
    require(not chosen, owner, "precision", allowed="'fp32' or 'bf16' beside deterministic", got=precision, hint=hint)
