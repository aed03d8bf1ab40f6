"""The lock: one owner at a time, whoever starts when, however the one before ended, with flock and without."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from robustfair.errors import CheckpointError
from robustfair.runs import lock
from robustfair.runs.lock import Owner, owned


def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


@pytest.fixture(params=["flock", "no flock"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":
        no_flock(monkeypatch)
    return request.param


@contextlib.contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def write(path: Path, **changes: Any) -> Owner:
    """A lock file as another owner leaves it."""
    owner = replace(Owner.here(), **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(owner)))
    return owner


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, owned(path, "the folder"):
        pytest.fail("it was taken")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_names_its_owner_and_goes_at_the_end(tmp_path: Path, way: str) -> None:
    path = tmp_path / "run" / ".lock"
    with owned(path, "the folder") as left:
        assert not left
        found = Owner.read(path)
        assert found is not None
        assert (found.pid, found.host) == (os.getpid(), platform.node())
        assert not found.elsewhere
        assert not found.over
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["run/file", "run/.hidden", "a/file"])
def test_folders_go_where_nothing_is_in_them(tmp_path: Path, way: str, kept: str) -> None:
    path = tmp_path / "a" / "run" / ".lock"
    with owned(path, "the folder"):
        file = tmp_path / kept if kept.startswith("a") else path.parent / kept.removeprefix("run/")
        file.touch()
    assert [file] == [left for left in tmp_path.rglob("*") if left.is_file()]
    (tmp_path / "there").mkdir()
    with owned(tmp_path / "there" / ".lock", "the folder"):
        pass
    assert (tmp_path / "there").is_dir()


def test_an_error_inside_gives_it_back(tmp_path: Path, way: str) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "run" / ".lock", "the folder"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_owner_is_refused_and_told_who_holds_it(tmp_path: Path, way: str) -> None:
    path = tmp_path / ".lock"
    with owned(path, "the folder"):
        text = refusal(path)
        assert text.startswith(f"the folder is in use by process {os.getpid()} on {platform.node()} since 2")
        assert "wait for its end or stop it" in text
        assert path.exists()
    with owned(path, "the folder"):
        pass


def test_a_killed_owner_leaves_it_free(tmp_path: Path, way: str) -> None:
    path = tmp_path / ".lock"
    pid = os.fork()
    if pid == 0:
        with owned(path, "the folder"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.exists()
    with owned(path, "the folder") as left:
        assert left
        found = Owner.read(path)
        assert found is not None
        assert found.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_bears_now_is_not_its_owner(tmp_path: Path, way: str) -> None:
    path = tmp_path / ".lock"
    with sleeping() as other:
        write(path, pid=other.pid, started="1")
        with owned(path, "the folder"):
            pass


def test_what_was_taken_before_the_machine_started_anew_is_free(tmp_path: Path, way: str) -> None:
    path = tmp_path / ".lock"
    write(path, boot="another")
    with owned(path, "the folder"):
        pass


def test_a_process_that_only_waits_to_be_noticed_is_over(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    started = lock._started(pid)
    while started is not None and started != lock.OVER:
        time.sleep(0.01)
        started = lock._started(pid)
    assert write(tmp_path / ".lock", pid=pid, started="5").over == (started == lock.OVER)
    os.waitpid(pid, 0)


def test_the_file_of_another_machine_is_refused_with_how_to_remove_it(tmp_path: Path, way: str) -> None:
    path = tmp_path / ".lock"
    write(path, host="node7", boot="another", command="robustfair train")
    before = path.read_bytes()
    text = refusal(path)
    assert re.match(rf"the folder was taken by process {os.getpid()} on node7 since .* \(robustfair train\)", text)
    assert f"on another machine, and not given back: if that is over, delete {path} and repeat the command" in text
    assert path.read_bytes() == before
    path.unlink()
    with owned(path, "the folder"):
        pass


def test_a_container_of_this_machine_is_not_another_machine(tmp_path: Path) -> None:
    write(tmp_path / ".lock", host="f00dcafe1234", pid=1)
    with owned(tmp_path / ".lock", "the folder"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_without_flock_a_file_that_names_nobody_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / ".lock"
    path.write_text(content)
    with owned(path, "the folder"):
        pass
    no_flock(monkeypatch)
    monkeypatch.setattr(lock, "TRIES", 2)
    path.write_text(content)
    assert refusal(path) == (
        "the folder is in use by another process: wait for its end or stop it, "
        f"or delete {path} if no such process runs"
    )
    assert path.read_text() == content


def test_without_flock_a_living_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_flock(monkeypatch)
    with sleeping() as other:
        write(tmp_path / ".lock", pid=other.pid, started=lock._started(other.pid))
        assert f"in use by process {other.pid} " in refusal(tmp_path / ".lock")
    with owned(tmp_path / ".lock", "the folder"):
        pass


@pytest.mark.parametrize("where", ["file/run/.lock", "file/.lock"])
def test_what_cannot_be_made_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    assert re.fullmatch(
        r"the folder: cannot be made or written \(.*\): choose another folder", refusal(tmp_path / where)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def contend(path: Path, log: Path, start: int, *, dies: bool) -> None:
    """Take the lock as often as it can be had in a while, and write down when it was held."""
    os.read(start, 1)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        with contextlib.suppress(CheckpointError), owned(path, "the folder"):
            with log.open("a") as file:
                file.write(f"+{os.getpid()}\n")
            time.sleep(0.001)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            with log.open("a") as file:
                file.write(f"-{os.getpid()}\n")


@pytest.mark.parametrize("left", ["nothing", "a dead owner's file"])
def test_of_many_processes_one_owns_it_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, left: str
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0005)
    path, log = tmp_path / "runs" / "run" / ".lock", tmp_path / "log"
    if left != "nothing":
        write(path, boot="another")
    reading, writing = os.pipe()
    children = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            try:
                contend(path, log, reading, dies=number < 3)
            finally:
                os._exit(1)
        children.append(pid)
    os.close(writing)
    os.close(reading)
    for pid in children:
        os.waitpid(pid, 0)
    holder = None
    dead = set()
    lines = log.read_text().splitlines()
    for line in lines:
        sign, pid = line[0], line[1:]
        if sign == "+":
            if holder is not None:
                dead.add(holder)
            holder = pid
        else:
            assert pid == holder, "two owned it at once"
            holder = None
    assert dead.isdisjoint({line[1:] for line in lines if line[0] == "-"}), "two owned it at once"
    assert len({line[1:] for line in lines}) > 3
