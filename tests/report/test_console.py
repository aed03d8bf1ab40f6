"""Where results go and what they may hold, in processes of their own: streams, encodings and readers that leave."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from robustfair.report.console import IN_ASCII, Screen, encodable, results, results_apart, say, screen

NOISE = """
import atexit, ctypes, os, sys
print('at import')
atexit.register(print, 'at exit')
def noise(kind):
    print(kind, 'print')
    sys.__stdout__.write(kind + ' own stream\\n')
    os.write(1, (kind + ' descriptor\\n').encode())
    os.system('echo ' + kind + ' child')
    libc = ctypes.CDLL(None)
    libc.printf(b'from C\\n')
"""
FACTORY = (
    NOISE
    + """
from torch import nn
class Loud(nn.Sequential):
    def forward(self, x):
        noise('forward')
        return super().forward(x)
def net():
    noise('factory')
    return Loud(nn.Flatten(), nn.Linear(64, 10)).eval()
"""
)
QUIET = """
from torch import nn
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
"""
AUDIT = ("audit", "loud:net", "--data", "digits", "--attacks", "clean", "--limit-per-class", "2", "--quiet")


def command(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own, in a folder with a loud factory."""
    (place / "loud.py").write_text(FACTORY)
    env = {**os.environ, "ROBUSTFAIR_CACHE": str(place / "cache"), **environment}
    words = (sys.executable, "-m", "robustfair.cli", *words)
    return subprocess.run(words, cwd=place, env=env, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("form", [("--json",), ("--format", "markdown")])
def test_only_the_result_is_on_stdout_whatever_a_factory_prints(tmp_path: Path, form: tuple[str, ...]) -> None:
    done = command(tmp_path, *AUDIT, *form)
    assert done.returncode == 0, done.stderr
    if form == ("--json",):
        assert done.stdout.count(b"\n") == 1
        assert json.loads(done.stdout)["model"] == "loud:net"
    else:
        assert done.stdout.startswith(b"**loud:net on digits")
    for noise in ("at import", "factory print", "factory own stream", "factory descriptor", "factory child", "from C"):
        assert noise.encode() not in done.stdout
        assert noise.encode() in done.stderr
    assert b"forward print" in done.stderr
    assert b"at exit" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1:strict", "utf-16"])
def test_a_gate_that_passes_is_exit_0_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    done = command(tmp_path, *AUDIT, "--fail-under", "average.clean>=0", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding.partition(":")[0])
    assert "class     images " in text
    assert "passed: average.clean is" in text


def test_the_locale_c_is_an_encoding_like_others(tmp_path: Path) -> None:
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command(tmp_path, *AUDIT, **poor)
    assert done.returncode == 0, done.stderr
    assert b" ------" in done.stdout
    assert command(tmp_path, "--help", **poor).returncode == 0


def test_help_and_version_are_results(tmp_path: Path) -> None:
    for words, start in ((("--version",), b"0."), (("--help",), b"Usage"), (("audit", "--help"), b"Usage")):
        done = command(tmp_path, *words)
        assert done.stdout.strip().startswith(start)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(FACTORY)
    env = {**os.environ, "ROBUSTFAIR_CACHE": str(tmp_path / "cache")}
    for words in (("list", "recipes"), (*AUDIT, "--json"), ("--help",)):
        running = subprocess.Popen(
            [sys.executable, "-m", "robustfair.cli", *words],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert running.stdout is not None
        running.stdout.close()
        err = running.communicate(timeout=120)[1]
        assert b"Traceback" not in err
        assert b"Exception ignored" not in err
        assert b"BrokenPipe" not in err
        assert running.returncode == 141, (words, err)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_without_a_stream_does_its_work(tmp_path: Path, closed: str) -> None:
    (tmp_path / "loud.py").write_text(QUIET)
    env = {**os.environ, "ROBUSTFAIR_CACHE": str(tmp_path / "cache")}
    words = " ".join([sys.executable, "-m", "robustfair.cli", *AUDIT, "--out", "audits", closed])
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "audits").glob("*.json"))) == 1
    assert closed != "2>&-" or done.stdout.startswith(b"loud:net on digits")


def test_within_a_process_stdout_is_as_before_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    stream = sys.stdout
    with results_apart():
        assert sys.stdout is sys.stderr
        print("noise")
        os.write(stream.fileno(), b"from a descriptor\n")
        say("result", 1)
    assert sys.stdout is stream is results()
    os.write(stream.fileno(), b"after\n")
    found = capfd.readouterr()
    assert found.out.splitlines() == ["result", "1", "after"]
    assert sorted(found.err.splitlines()) == ["from a descriptor", "noise"]


def test_every_letter_has_a_form_in_every_encoding() -> None:
    text = "─━…† Zürich 東京 🚗 \udcff"
    for encoding in ("ascii", "cp1252", "utf-8", "cp437", "shift_jis"):
        assert encodable(text, encoding).encode(encoding).decode(encoding) == encodable(text, encoding)
    assert encodable(text, "ascii") == r"--~! Z\xfcrich \u6771\u4eac \U0001f697 \udcff"
    assert encodable(text[:-1], "utf-8") == text[:-1]
    assert len("─ … †".encode("ascii", IN_ASCII)) == 5


def test_the_width_is_that_of_columns_and_else_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert (screen().width, screen().terminal) == (None, False)
    monkeypatch.setenv("COLUMNS", "72")
    assert (screen().width, screen().terminal) == (72, False)
    for none in ("", "wide", "0", "-3"):
        monkeypatch.setenv("COLUMNS", none)
        assert screen().width is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (screen().width, screen().terminal) == (80, True)


def test_a_table_fits_the_terminal_that_shows_it(tmp_path: Path) -> None:
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    (tmp_path / "loud.py").write_text(QUIET)
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    words = [sys.executable, "-m", "robustfair.cli", *AUDIT[:4], "--attacks", "clean,fgsm", *AUDIT[6:]]
    with subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**env, "ROBUSTFAIR_CACHE": str(tmp_path / "cache")},
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as running:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # the end of a terminal is an error on Linux
            while part := os.read(ours, 65536):
                text += part
        err = running.communicate(timeout=120)[1]
    os.close(ours)
    assert running.returncode == 0, err
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith(" ───") for line in lines) == 2


def test_words_are_folded_between_words_and_never_within_an_interval() -> None:
    line = "pgd-20  average 66.7 [30.0, 90.3]    worst class 50.0 [9.5, 90.5], a"
    folded = Screen(width=40).fold(line)
    assert max(map(len, folded.splitlines())) <= 40
    assert folded.split() == line.split()
    assert all(text.count("[") == text.count("]") for text in folded.splitlines())
    assert Screen().fold(line) == line == Screen(width=200).fold(line)
