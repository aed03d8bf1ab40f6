"""From words to configs: composition strings, attack names, radii and recipe values are read here, strictly.

A string is parsed, never evaluated. An unknown key is an error that shows the nearest one; nothing is coerced silently.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from robustfair.errors import ConfigError, RecipeError, RobustFairError, UnknownNameError
from robustfair.registry import canonical

T = TypeVar("T")
Value = int | float | str | bool | None
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
LARGEST_WHOLE_L2 = 5
"""The largest radius that a whole number means under l2: 2 and 3 are usual for images of 224 pixels, 8 is 8/255."""


class RobustFairWarning(UserWarning):
    """Something that is allowed and probably not meant."""


@dataclass(frozen=True)
class Term:
    """One `name(key=value, ...)` of a composition string."""

    name: str
    args: Mapping[str, Value]

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={format_value(value)}" for key, value in self.args.items())
        return f"{self.name}({inside})" if inside else self.name


_TOKEN = re.compile(r"\s*(?:(?P<text>\"[^\"]*\"|'[^']*')|(?P<word>[^\s()+,=\"']+)|(?P<mark>[()+,=]))")


def parse_composition(text: str, example: str = "trades(beta=6) + ccm") -> list[Term]:
    """Read `"trades(beta=6) + ccm(lam=0.3) + ema"` into its terms.

    >>> [str(term) for term in parse_composition("TRADES(beta=6, eps=8/255) + ccm")]
    ['trades(beta=6, eps=8/255)', 'ccm']

    Raises:
        RecipeError: the text does not follow the grammar; the message marks the place.
    """
    tokens = _tokens(text)
    terms, at = [], 0

    def fail(expected: str) -> RecipeError:
        place = tokens[at][1] if at < len(tokens) else len(text)
        return RecipeError(f"cannot read {text!r} at position {place + 1}: expected {expected}, like {example!r}")

    def take(kinds: str, expected: str) -> str:
        nonlocal at
        if at >= len(tokens) or tokens[at][0][0] not in kinds:
            raise fail(expected)
        at += 1
        return tokens[at - 1][0][1:]

    def peek(mark: str) -> bool:
        return at < len(tokens) and tokens[at][0] == "m" + mark

    while True:
        name = canonical(take("w", "a name"))
        args: dict[str, Value] = {}
        if peek("("):
            at += 1
            while not peek(")"):
                key = canonical_key(take("w", "a key or ')'"))
                if not peek("="):
                    raise fail("'='")
                at += 1
                quoted = at < len(tokens) and tokens[at][0][0] == "t"
                value = take("wt", "a value")
                if key in args:
                    raise RecipeError(f"{name}: {key} is given twice in {text!r}")
                args[key] = value if quoted else read_value(value)
                if peek(","):
                    at += 1
                elif not peek(")"):
                    raise fail("',' or ')'")
            at += 1
        terms.append(Term(name, args))
        if at == len(tokens):
            return terms
        if not peek("+"):
            raise fail("'+'")
        at += 1


def _tokens(text: str) -> list[tuple[str, int]]:
    """(kind letter + text, position): kind t quoted text, w word, m mark."""
    tokens, at = [], 0
    stripped = text.rstrip()
    while at < len(stripped):
        found = _TOKEN.match(stripped, at)
        if not found:
            raise RecipeError(f"cannot read {text!r} at position {at + 1}: a quotation mark is not closed")
        kind = found.lastgroup or ""
        word = found[kind][1:-1] if kind == "text" else found[kind]
        tokens.append((kind[0] + word, found.start(kind)))
        at = found.end()
    return tokens


def read_value(word: str) -> Value:
    """A bare word of a composition string: number, true/false, none, else the word itself. Fractions stay text.

    >>> [read_value(word) for word in ("6", "0.3", "1e-3", "true", "none", "8/255", "uniform")]
    [6, 0.3, 0.001, True, None, '8/255', 'uniform']
    """
    literals: dict[str, Value] = {"true": True, "false": False, "none": None}
    if word.lower() in literals:
        return literals[word.lower()]
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            continue
    return word


def format_value(value: object) -> str:
    """The text that reads back as `value`; radii that are a multiple of 1/255 print as such.

    >>> [format_value(value) for value in (8 / 255, 0.3, 6, None, True, "uniform", "6")]
    ['8/255', '0.3', '6', 'none', 'true', 'uniform', '"6"']
    """
    if value is None or isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return format_eps(value)
    text = str(value)
    return text if re.fullmatch(r"[^\s()+,=\"']+", text) and read_value(text) == text else f'"{text}"'


def format_eps(eps: float) -> str:
    """`8/255` where `eps` is a whole number of grey levels and not a short decimal, else the shortest decimal.

    >>> format_eps(8 / 255), format_eps(0.2), format_eps(0.5)
    ('8/255', '0.2', '0.5')
    """
    levels = round(eps * 255) if 0 < eps < 1 else 0
    if levels / 255 == eps and len(repr(eps)) > 6:
        return f"{levels}/255"
    return repr(eps).replace("e+", "e")


def parse_eps(value: str | float, *, norm: str = "linf", owner: str = "attack", field: str = "eps") -> float:
    """A radius in pixel units ([0, 1] images) from `8/255`, `0.2` or a number.

    Args:
        norm: "linf" or "l2"; "any" where it is not known yet: then a length above one must be written as a decimal.

    >>> parse_eps("8/255") == 8 / 255, parse_eps("3", norm="l2")
    (True, 3.0)

    Raises:
        ConfigError: not a number, negative, above one under linf, or a whole number that is almost always meant in
            grey levels (`8` for `8/255`): above one, under l2 above five.
    """
    usual = "128/255" if norm == "l2" else "8/255"
    allowed = f"a fraction like {usual} or a decimal, in units of pixels scaled to [0, 1]"
    text = str(value).strip()
    try:
        eps = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(owner, field, allowed=allowed, got=value) from None
    inside = 0 <= eps <= 1 if norm == "linf" else 0 <= eps < float("inf")
    whole = re.fullmatch(r"\d+", text) is not None
    if not inside or (whole and eps > (LARGEST_WHOLE_L2 if norm == "l2" else 1)):
        raise ConfigError(owner, field, allowed=allowed, got=value, hint=_eps_hint(eps, norm))
    close = norm != "l2" and field == "eps" and text in ("0.031", "0.0314", "0.03", "0.0313")
    if close and isinstance(value, str):
        warnings.warn(
            f"{owner}: {field} {text} is {eps * 255:.2f}/255, not 8/255; numbers at the two are not comparable",
            RobustFairWarning,
            stacklevel=2,
        )
    return eps


def _eps_hint(eps: float, norm: str) -> str:
    """What a length that was refused may have meant."""
    if not (1 < eps < float("inf") and eps.is_integer()):
        return ""
    grey_levels = f"Did you mean {eps:.0f}/255? " if eps <= 255 else ""
    return grey_levels + ("Lengths above 1 are for norm l2" if norm == "linf" else f"Under l2, {eps} is taken as it is")


def read_path(path: str | Path) -> Path:
    """A path as a user wrote it, with a leading `~` or `~name` as the home folder it stands for.

    A shell leaves the tilde of `--out=~/runs` alone, and so do YAML and a program that starts another. As in a shell,
    the name of no user stays as it is.

    >>> read_path("runs/x").as_posix(), read_path("~") == Path.home()
    ('runs/x', True)
    """
    return Path(os.path.expanduser(path))


def parse_norm(value: str, *, owner: str = "attack") -> str:
    """`linf` or `l2` from any usual spelling.

    >>> parse_norm("Linf"), parse_norm("L_2")
    ('linf', 'l2')
    """
    name = str(value).lower().replace("_", "").replace("-", "")
    if name not in ("linf", "l2"):
        raise ConfigError(owner, "norm", allowed="linf or l2", got=value)
    return name


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


@contextmanager
def needed(package: str, purpose: str) -> Iterator[None]:
    """Around the import of a package that not every machine has: one line says what it is for.

    >>> with needed("nosuchpackage", "this example"):  # doctest: +ELLIPSIS
    ...     import nosuchpackage
    Traceback (most recent call last):
        ...
    robustfair.errors.RobustFairError: this example needs nosuchpackage, and there is no module nosuchpackage: pip ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RobustFairError(
            f"{purpose} needs {package}, and there is no module {error.name}: pip install {package}"
        ) from error


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


def canonical_key(key: str) -> str:
    """`Batch-Size` is `batch_size`."""
    return key.lower().replace("-", "_")
