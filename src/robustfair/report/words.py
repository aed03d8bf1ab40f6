"""Numbers and names in words, as every report prints them.

Rates are fractions everywhere else; here they become percent with one decimal, differences become percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustfair.evaluate.compare import Comparison, Difference
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.result import Audit
from robustfair.grammar import format_eps

NO_IMAGES = "no images"


# Numbers


def percent(value: float) -> str:
    """A fraction as percent with one decimal, without the sign.

    >>> percent(0.5234), percent(float("nan"))
    ('52.3', 'n/a')
    """
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def points(change: float) -> str:
    """A difference of two fractions in percentage points, always with its sign; rounding leaves no negative zero.

    >>> points(0.182), points(-0.031), points(-0.0001)
    ('+18.2', '-3.1', '0.0')
    """
    if math.isnan(change):
        return "n/a"
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text


def span(lower: float, upper: float) -> str:
    """An interval in percent.

    >>> span(0.481, 0.5637)
    '[48.1, 56.4]'
    """
    return f"[{percent(lower)}, {percent(upper)}]"


def points_span(difference: Difference) -> str:
    """The interval of a change in points."""
    return f"[{points(difference.lower)}, {points(difference.upper)}]"


def p_value(p: float) -> str:
    """A probability in words, nothing for nan.

    >>> p_value(0.0312), p_value(0.0004), p_value(float("nan"))
    ('0.031', '<0.001', '')
    """
    if math.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def threat_words(result: Audit | GroupRates | Comparison) -> str:
    """The adversary in words: norm and radius."""
    return f"{result.threat.norm} eps {format_eps(result.threat.eps)}"


def heading(title: str, result: Audit | GroupRates | Comparison) -> str:
    """What a table is about: models, data, threat and unit."""
    return f"{title} on {result.data}, {threat_words(result)}, percent right"


# Names


def printable(text: str) -> str:
    """Folder names are class names: a control character in one must not reach the terminal.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shorten(name: str, limit: int) -> str:
    """`name` with its middle left out where it is longer than `limit`, since long names often differ at their end.

    >>> shorten("traffic sign, speed limit 30", 15), shorten("cat", 15)
    ('traffic…imit 30', 'cat')
    """
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """Every name in at most `limit` letters; where two would look the same, all get their number in the data set.

    >>> short_names(["speed_limit_30_urban", "speed_limit_50_urban"], 12)
    ['0 speed…rban', '1 speed…rban']
    """
    short = [shorten(name, limit) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    left = limit - len(f"{len(names) - 1} ")
    return [f"{index} {shorten(name, left)}" for index, name in enumerate(names)]
