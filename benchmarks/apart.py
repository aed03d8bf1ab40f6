"""A process for what we are compared with, so that it runs as its users run it and not under our settings.

Inside `kept_memory` ours tells the C library to keep freed memory, and glibc cannot be brought back to the thresholds
that it adapts in a process which never did so. The baselines therefore live in a process of their own, which waits
while ours is timed and is timed while ours waits.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

Calls = Mapping[str, Callable[..., Any]]
"""Name -> what the other process does when it is asked to; what it returns is pickled."""


class Apart:
    """A process that holds the calls which `make(*args)` returns there, and makes one when it is asked.

    Use as a context manager: leaving it ends the process.

    Args:
        make: a function of a module, found there by its name.
        args: pickled.

    Raises:
        RuntimeError: the other process failed; it has printed its traceback.
    """

    def __init__(self, make: Callable[..., Calls], *args: Any) -> None:
        context = get_context("spawn")  # a fork would inherit our handling of memory, and a CUDA context
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), make, *args))
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self, name: str, *args: Any) -> Any:
        """What the call of this name returns there."""
        self.pipe.send((name, args))
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            done, value = self.pipe.recv()
        except EOFError:
            done, value = False, "it ended without a word"
        if not done:
            raise RuntimeError(f"the process of the baselines failed: {value}")
        return value


def _serve(pipe: Connection, threads: int, make: Callable[..., Calls], *args: Any) -> None:
    torch.set_num_threads(threads)
    try:
        calls = make(*args)
        pipe.send((True, None))
        while True:
            name, given = pipe.recv()
            pipe.send((True, calls[name](*given)))
    except (EOFError, BrokenPipeError):
        return  # the other side has all it wants
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        pipe.send((False, f"{type(error).__name__}: {error}"))
