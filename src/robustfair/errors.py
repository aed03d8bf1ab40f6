"""Every error a user can cause: one sentence with the owner, the field, what is allowed, what came and the next step.

The command line prints the message of a `RobustFairError` as one line and exits 2; anything else is a defect of ours
and keeps its traceback. A message names an option as `name` or `name=value` in backquotes: so the argument is called in
Python, and `as_flags` makes the flag of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def as_flags(text: str) -> str:
    """A message as the command line says it.

    >>> as_flags("add `image_size`, or pass `select='last'` and `allow={'attack.eps'}`")
    'add --image-size, or pass --select last and --allow attack.eps'
    """

    def flag(option: re.Match[str]) -> str:
        value = re.sub(r"[{}'\"]", "", option[2] or "")
        return f"--{option[1].replace('_', '-')}{' ' if value else ''}{value}"

    return _OPTION.sub(flag, text)


class RobustFairError(Exception):
    """Base of all errors that are caused by input, never by a defect of the library."""


class RobustFairWarning(UserWarning):
    """Something that is allowed and probably not meant."""


class ConfigError(RobustFairError):
    """A field holds a value that its owner does not allow."""

    def __init__(self, owner: str, field: str, *, allowed: str, got: object, hint: str = "") -> None:
        self.owner, self.field = owner, field
        super().__init__(f"{owner}: {field} must be {allowed}, got {got!r}{'. ' + hint if hint else ''}")


class UnknownNameError(RobustFairError):
    """A name that no registry entry, key or flag bears; the message shows the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")


class RecipeError(RobustFairError):
    """A composition string or a recipe file that cannot be read."""


class ConflictError(RobustFairError):
    """Methods that cannot act together, or on this objective."""


class DataError(RobustFairError):
    """A data set that is missing, empty, corrupt, or does not fit the model."""


class ModelError(RobustFairError):
    """A model that cannot be built, loaded, or does not fit the data."""


class CheckpointError(RobustFairError):
    """A run folder or checkpoint that is missing, cut, foreign, or would be overwritten."""


class DivergedError(RobustFairError):
    """Training met a loss that is not finite. The run keeps its last whole checkpoint.

    Attributes:
        report: what was known at that step, as JSON values: epoch, step, learning rate, per-class means, class state.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = dict(report)
        super().__init__(
            f"the loss is not finite at epoch {report['epoch']}, step {report['step']}, counted from 0 "
            f"(lr {report['lr']:.3g}): lower the learning rate or the radius"
            f"{'; the last checkpoint is whole' if report['epoch'] else ''}"
        )


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
