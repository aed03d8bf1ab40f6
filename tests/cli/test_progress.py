"""Progress of audits: lines in a log by a clock of the test's own, a bar on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from robustfair.cli import progress
from robustfair.cli.progress import AuditProgress
from robustfair.evaluate.request import AuditRequest, audit_target
from robustfair.runs.load import load_target

Report = tuple[float, str, int, int]
"""Seconds, attack, images done, images in all."""
Lines = Callable[..., list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """A function that gives the lines which reports at given seconds leave on stderr."""

    def listen(reports: Iterable[Report], *, quiet: bool = False) -> list[str]:
        now = [0.0]
        with AuditProgress(quiet=quiet, clock=lambda: now[0]) as follow:
            for now[0], *report in reports:
                follow(*report)
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err.splitlines()

    return listen


def test_every_attack_has_a_line_when_it_is_done(lines: Lines) -> None:
    assert lines([(1.0, "clean", 250, 1000), (4.0, "clean", 1000, 1000), (8.0, "pgd-20", 1000, 1000)]) == [
        "clean: 1,000 of 1,000 images, 100%, 0:00:04 elapsed",
        "pgd-20: 1,000 of 1,000 images, 100%, 0:00:04 elapsed",
    ]


def test_a_long_attack_has_a_line_every_half_minute(lines: Lines) -> None:
    told = lines([(float(second), "autoattack", second, 7200) for second in range(1, 7201)])
    assert len(told) == 240
    assert told[0] == "autoattack: 30 of 7,200 images, 0%, 0:00:30 elapsed, 1:59:30 left"
    assert told[119] == "autoattack: 3,600 of 7,200 images, 50%, 1:00:00 elapsed, 1:00:00 left"
    assert told[-2] == "autoattack: 7,170 of 7,200 images, 99%, 1:59:30 elapsed, 0:00:30 left"
    assert told[-1] == "autoattack: 7,200 of 7,200 images, 100%, 2:00:00 elapsed"


def test_between_lines_at_least_half_a_minute_goes_by(lines: Lines) -> None:
    told = lines([(second, "pgd-20", done, 9) for done, second in enumerate((20.0, 45.0, 74.0, 75.0, 90.0), 1)])
    assert [line.split(",")[-2].split()[0] for line in told] == ["0:00:45", "0:01:15", "0:01:30"]


def test_the_time_left_follows_what_was_done_since_the_first_report(lines: Lines) -> None:
    resumed = [(10.0, "autoattack", 600, 1000), (110.0, "autoattack", 700, 1000)]
    assert lines(resumed) == ["autoattack: 700 of 1,000 images, 70%, 0:01:50 elapsed, 0:05:00 left"]


def test_the_time_left_is_left_out_while_nothing_tells_the_pace(lines: Lines) -> None:
    assert lines([(40.0, "pgd-20", 250, 1000), (80.0, "pgd-20", 250, 1000)]) == [
        "pgd-20: 250 of 1,000 images, 25%, 0:00:40 elapsed",
        "pgd-20: 250 of 1,000 images, 25%, 0:01:20 elapsed",
    ]


def test_an_attack_that_ends_early_is_told_as_it_stood(lines: Lines) -> None:
    """Its last word comes when the next attack begins, or with the end of the audit."""
    told = lines([(1.0, "pgd-2(restarts=5)", 60, 300), (2.0, "autoattack", 20, 50), (3.0, "autoattack", 30, 50)])
    assert told == [
        "pgd-2(restarts=5): 60 of 300 images, 20%, 0:00:01 elapsed",
        "autoattack: 30 of 50 images, 60%, 0:00:02 elapsed, 0:00:02 left",
    ]


def test_an_audit_that_fails_leaves_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(follow: AuditProgress) -> None:
        with follow:
            follow("autoattack", 3, 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(AuditProgress(clock=lambda: 1.0))
    assert capsys.readouterr().err == "autoattack: 3 of 8 images, 37%, 0:00:00 elapsed\n"


def test_an_end_is_told_once(lines: Lines) -> None:
    assert len(lines([(second, "autoattack", 13, 13) for second in (1.0, 2.0, 50.0)])) == 1


def test_no_image_to_attack_is_an_attack_done(lines: Lines) -> None:
    assert lines([(2.0, "autoattack", 0, 0)]) == ["autoattack: 0 of 0 images, 100%, 0:00:02 elapsed"]


def test_quiet_prints_nothing(lines: Lines) -> None:
    assert lines([(50.0, "clean", 1, 2), (99.0, "clean", 2, 2)], quiet=True) == []


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with AuditProgress() as follow:
        follow("pgd-20", 3, 10)
        follow("pgd-20", 10, 10)
    (task,) = follow.bar.tasks
    assert (task.description, task.completed, task.total) == ("pgd-20", 10, 10)
    assert "pgd-20" in terminal.getvalue()
    assert "images" not in terminal.getvalue()


def test_progress_is_a_line_an_attack_where_stderr_is_no_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = AuditRequest(attacks="clean,pgd-2", limit_per_class=3, device="cpu")
    for quiet in (False, True):
        with AuditProgress(quiet=quiet) as follow:
            found = audit_target(load_target(str(run)), request, on_images=follow.images, on_progress=follow)
        shown = capsys.readouterr()
        assert shown.out == ""
        told = [] if quiet else ["digits, test part", *found.attacks]
        assert [line.partition(":")[0] for line in shown.err.splitlines()] == told
