"""Where the result of a command goes, and what it may hold: stdout is the result and nothing else.

While a command runs, whatever else prints to stdout (a factory, a loader of data, a library in C) reaches stderr. What
the encoding of stdout lacks is drawn or escaped in ASCII, so that no letter ends a command.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, TextIO

from robustfair.errors import needed

with needed("rich", "a table, a report or a command"):
    from rich.console import Console

IN_ASCII = "robustfair.in-ascii"
"""Name of the error handler that draws or escapes what an encoding lacks."""
_DRAWN = str.maketrans({"─": "-", "━": "-", "…": "~", "†": "!", "±": "+/-"})
_USUAL_WIDTH = 80

_streams: list[TextIO | None] = []
"""Where results go, of the innermost `results_apart` last; None where the process has no stdout."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end].translate(_DRAWN)
    return letters.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(IN_ASCII, _in_ascii)


def encodable(text: str, encoding: str) -> str:
    """`text` as a stream of this encoding shows it.

    >>> print(encodable("── Zürich, 東京…", "cp1252"), encodable("Zürich…", "ascii"))
    -- Zürich, \\u6771\\u4eac… Z\\xfcrich~
    """
    return text.encode(encoding, IN_ASCII).decode(encoding)


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What results are laid out for.

    Attributes:
        width: columns; None where lines may be as long as they want to be.
        terminal: whether it is one, where a table of many rows shows the first and the last of them only.
        encoding: of the stream.
    """

    width: int | None = None
    terminal: bool = False
    encoding: str = "utf-8"

    def fold(self, line: str) -> str:
        """A line of words, broken where it is too long, an interval never.

        >>> print(Screen(width=24).fold("clean  average 66.7 [30.0, 90.3]"))
        clean  average 66.7
            [30.0, 90.3]
        """
        if self.width is None:
            return line
        whole = re.sub(r"\[[^][]*\]", lambda interval: interval[0].replace(" ", "\0"), line)
        lines = textwrap.wrap(
            whole,
            self.width,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
        return "\n".join(lines).replace("\0", " ")


@contextmanager
def results_apart(*, for_good: bool = False) -> Iterator[None]:
    """Within it only `say` prints to stdout: what is printed otherwise, from Python or to the descriptor, is on stderr.

    Args:
        for_good: leave it so at the end, for a process that ends then: what is printed at its exit is no result.
    """
    usual, descriptor = sys.stdout, None
    with suppress(AttributeError, OSError, ValueError):  # no stdout, a closed one, or one in memory
        usual.flush()
        descriptor = usual.fileno()
    if descriptor is None:
        _streams.append(usual)
    else:
        kept = os.dup(descriptor)
        _streams.append(open(kept, "w", encoding=usual.encoding, errors=IN_ASCII))  # noqa: SIM115
        _point(descriptor, at=sys.stderr)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if not for_good:
            stream = _streams.pop()
            sys.stdout = usual
            if descriptor is not None and stream is not None:
                with suppress(OSError):
                    usual.flush()
                os.dup2(kept, descriptor)
                stream.close()


def results() -> TextIO | None:
    """The stream of results; None where the process has no stdout."""
    return _streams[-1] if _streams else sys.stdout


def say(*lines: object) -> None:
    """Print lines of the result.

    Raises:
        OSError: it cannot be written, as where a reader left; nothing is tried again at the end.
    """
    stream = results()
    if stream is None or not lines:
        return
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError:
        _point(stream.fileno(), at=None)
        raise


class PipedConsole(Console):
    """A console whose reader may leave, which ends the command as it does in `say`: rich would exit with 1."""

    def on_broken_pipe(self) -> NoReturn:
        _point(self.file.fileno(), at=None)
        raise BrokenPipeError


ALL_ROWS = Screen()
"""What is no terminal: as wide as the text, every row, any letter."""


def screen() -> Screen:
    """What the results of this command are laid out for: the terminal that shows them, or COLUMNS where that is set."""
    stream = results()
    terminal = stream is not None and stream.isatty()
    width = 0
    with suppress(ValueError):
        width = int(os.environ.get("COLUMNS", ""))
    if width <= 0 and stream is not None and terminal:
        with suppress(OSError, ValueError):
            width = os.get_terminal_size(stream.fileno()).columns
        width = width if width > 0 else _USUAL_WIDTH
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return Screen(width=width if width > 0 else None, terminal=terminal, encoding=encoding)


def _point(descriptor: int, *, at: TextIO | None) -> None:
    """Let a descriptor lead where a stream does; nowhere for None, or where the stream has no descriptor."""
    try:
        os.dup2(at.fileno(), descriptor)  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
