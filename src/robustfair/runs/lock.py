"""One owner at a time: a lock file that a process holds for as long as it writes into a folder.

- `train` and `repair` own their run folder from before anything is prepared until all is written: `.lock` inside it, so
  that every path to the folder meets the same lock. Who only reads a run, as an audit or a repair of it does, owns
  nothing there.
- An audit owns its journal, by a lock file beside it. So the same audit runs once at a time, and others of the same run
  go on beside it, each with files of its own.
- Corruption audits, comparisons and reports own nothing: they keep no journal, and write each file whole.

The file is held by flock, which ends with its process however that dies: on one machine nothing is guessed, and what a
killed owner left is taken over at once. What stands in the file tells others who holds it, and one thing that flock
cannot: some cluster file systems keep flock to one machine, so the file of another machine is never taken over, but
refused with how to remove it. Where there is no flock at all the file itself is the lock, and its owner is over if its
process is gone, or began at another time than the file says.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from robustfair.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

TRIES = 50
"""Of a step that another process may undo at that moment; and of reading who holds a lock."""
PATIENCE = 0.02
"""Seconds between two of them."""
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What flock says of a file that another holds; every other error means that there is no flock."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file says.

    Attributes:
        pid, started: its number, and when it began in the system's own clock, since numbers come back; None where the
            system does not tell.
        host, boot: its machine, and which start of it; None where the system does not tell.
        since: date and time of the lock.
        command: how it was called.
    """

    pid: int
    started: str | None
    host: str
    boot: str | None
    since: str
    command: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(
            pid=os.getpid(),
            started=_started(os.getpid()),
            host=platform.node(),
            boot=_boot(),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Who stands in the file `path`; None where nothing whole does."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def elsewhere(self) -> bool:
        """Whether it runs on another machine: neither name nor start are ours. A container shares our start."""
        return self.host != platform.node() and (self.boot is None or self.boot != _boot())

    @property
    def over(self) -> bool:
        """Whether its process is known to be over: never of one on another machine, or in another container."""
        if self.host != platform.node() or os.name != "posix":
            return False
        if self.boot != _boot():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # somebody else's
        started = _started(self.pid)
        return started == OVER or (None not in (started, self.started) and started != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({' '.join(self.command.split())})"


@contextmanager
def owned(path: Path, what: str) -> Iterator[bool]:
    """Hold the lock file `path`; its folder is made, and goes again if nothing is in it at the end.

    Args:
        what: the thing that is owned, for messages.

    Yields:
        Whether the owner before was killed, or for another reason left its file.

    Raises:
        CheckpointError: another holds it, or the file cannot be made.
    """
    above: list[Path] = []
    try:
        handle, left = _take(path, what, above)
        try:
            yield left
        finally:
            if fcntl is None:  # such systems remove no open file
                os.close(handle)
            path.unlink(missing_ok=True)
            if fcntl is not None:  # before it is unlocked: afterwards it may be another's
                os.close(handle)
    finally:
        with suppress(OSError):
            for folder in above:
                folder.rmdir()


def _take(path: Path, what: str, above: list[Path]) -> tuple[int, bool]:
    """The open lock file, now ours, and whether one was left there; adds to `above` the folders that were not there."""
    buried = False
    for again in reversed(range(TRIES)):
        above += [folder for folder in path.parents if folder not in above and not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, fresh = _open(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and again:  # an owner ended and took its empty folder away
                time.sleep(PATIENCE)
                continue
            text = f"{what}: cannot be made or written ({error.strerror}): choose another folder"
            raise CheckpointError(text) from None
        try:
            found = _hold(path, handle, fresh, what)
        except BaseException:
            os.close(handle)
            raise
        if found in ("new", "left"):
            return handle, buried or found == "left"
        os.close(handle)
        buried = buried or found == "buried"
    raise CheckpointError(f"{what} cannot be owned: {path} comes and goes: try again")


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether it was not there before."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False


def _hold(path: Path, handle: int, fresh: bool, what: str) -> Literal["new", "left", "gone", "buried"]:
    """Make the opened lock file ours, a new one or what an owner left; or say why it no longer is the one at `path`.

    Raises:
        CheckpointError: it is another's.
    """
    held = _flock(handle)
    if held is False:
        raise _in_use(path, what)
    if not _is_at(handle, path):
        return "gone"
    owner = Owner.read(path)
    if owner is not None and owner.elsewhere:
        raise CheckpointError(
            f"{what} was taken by {owner}, on another machine, and not given back: if that is over, delete {path} and "
            "repeat the command"
        )
    if held is None and not fresh:
        if owner is None or not owner.over:
            raise _in_use(path, what, f", or delete {path} if no such process runs")
        _bury(path, owner, what)
        return "buried"
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(asdict(Owner.here())).encode())
    return "new" if owner is None else "left"


def _flock(handle: int) -> bool | None:
    """Whether the file is now held by this handle; None where there is no flock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _bury(path: Path, owner: Owner, what: str) -> None:
    """Remove the file of an owner that is over, where there is no flock: one process at a time, and no other's file."""
    claim = path.with_name(f"{path.name}.over")
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise _in_use(path, what, f", or delete {claim} if no such process runs") from None
    try:
        if Owner.read(path) == owner:
            path.unlink()
    finally:
        claim.unlink()


def _in_use(path: Path, what: str, otherwise: str = "") -> CheckpointError:
    """The refusal of a lock that another holds. A new owner needs a moment to write its name over an old one's."""
    owner = None
    for _ in range(TRIES):
        owner = Owner.read(path)
        if owner is not None and not owner.over:
            break
        time.sleep(PATIENCE)
    who = "another process" if owner is None else owner
    return CheckpointError(f"{what} is in use by {who}: wait for its end or stop it{otherwise}")


OVER = "over"
"""In place of the start of a process that has ended and only waits to be noticed."""


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did, where the system tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return OVER if fields[0] in "ZX" else fields[19]


def _boot() -> str | None:
    """Which start of the machine this is, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
