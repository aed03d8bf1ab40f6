"""From text to values and back: composition strings, numbers, radii, norms and paths as users write them.

A string is parsed, never evaluated.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from robustfair.errors import ConfigError, RecipeError, RobustFairWarning
from robustfair.registry import canonical

Value = int | float | str | bool | None
LARGEST_WHOLE_L2 = 5
"""The largest radius that a whole number means under l2: 2 and 3 are usual for images of 224 pixels, 8 is 8/255."""


@dataclass(frozen=True)
class Term:
    """One `name(key=value, ...)` of a composition string."""

    name: str
    args: Mapping[str, Value]

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={format_value(value)}" for key, value in self.args.items())
        return f"{self.name}({inside})" if inside else self.name


_TOKEN = re.compile(r"\s*(?:(?P<text>\"[^\"]*\"|'[^']*')|(?P<word>[^\s()+,=\"']+)|(?P<mark>[()+,=]))")


def parse_term(text: str, what: str, *, example: str, hint: str = "give one") -> Term:
    """Read text that is one term alone, such as an edit, a repair or an attack.

    Args:
        what: it names, for the message.
        hint: what to write where several were meant.

    >>> str(parse_term("Long-Tail(factor=100)", "edit", example="long-tail"))
    'long-tail(factor=100)'

    Raises:
        RecipeError: the text does not follow the grammar, or holds several terms.
    """
    terms = parse_composition(text, example=example)
    if len(terms) != 1:
        raise RecipeError(f"{what} {text!r} names {len(terms)} {what}s: {hint}")
    return terms[0]


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


def canonical_key(key: str) -> str:
    """`Batch-Size` is `batch_size`."""
    return key.lower().replace("-", "_")
