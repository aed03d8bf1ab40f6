"""The command line in tests: the words of commands, and what one left behind."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from reference.runs import TINY

TEN = tuple("0123456789")
INTERRUPTED = "robustfair: interrupted; training goes on with --resume, a saved audit with the same command"
AUDIT = ("--attacks", "clean", "--limit-per-class", "1")
WEIGHTS = ("--arch", "small-cnn", "--width", "4", "--data", "digits", *AUDIT)
FAST = "clean,apgd-ce(steps=5),square(queries=20)"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one line of JSON on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=pytest.fail)


Command = Callable[..., Outcome]
Refuses = Callable[[list[str], tuple[str, ...]], None]


def training(composition: str = "pgd-at", **keys: Any) -> list[str]:
    """The words that train a tiny run into the folder `new`; None leaves a key out."""
    given = {key: value for key, value in ({"out": "new"} | TINY | keys).items() if value is not None}
    return ["train", composition, *(word for key, value in given.items() for word in (flag(key), str(value)))]


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def case(argv: list[str] | str, *fragments: str) -> Any:
    words = shlex.split(argv) if isinstance(argv, str) else argv
    return pytest.param(words, fragments, id=label(words))


def label(words: list[str]) -> str:
    """A command without the words that most commands here have."""
    text = " ".join(words)
    for key, value in ({"out": "new"} | TINY).items():
        text = text.replace(f" {flag(key)} {value}", "")
    return text.replace(" ".join(AUDIT), "").strip()
