"""`robustfair demo`: train, audit, repair, audit again and report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from robustfair.cli.flags import PathFlag, Switch
from robustfair.cli.repair import repair_with_audits
from robustfair.report.console import ALL_ROWS, Screen, say, screen
from robustfair.runs.recipe import read_recipe

DEMO_ATTACKS = "clean,pgd-20,cw-50(restarts=5)"


def demo(
    *,
    out: PathFlag | None = None,
    seed: int = 0,
    epochs: int | None = None,
    quiet: Switch = False,
) -> int:
    """Train, audit, repair and report on embedded images, in about a minute on a CPU.

    Parameters
    ----------
    out
        Folder for the two runs; the first free one of runs/demo, runs/demo-2, ... if not given.
    seed
        Of the run.
    epochs
        Shorter or longer than the recipe's.
    quiet
        No progress bar.
    """
    for line in run_demo(out, seed, epochs, quiet=quiet, screen=screen()):
        say(line)
    return 0


def run_demo(
    out: Path | None, seed: int, epochs: int | None, *, quiet: bool = False, screen: Screen = ALL_ROWS
) -> Iterator[str]:
    """Train, audit, repair, audit again and report; yields what to print, as it is measured."""
    from robustfair.cli.progress import TrainingProgress
    from robustfair.evaluate.request import AuditRequest
    from robustfair.report.forms import before_after_lines
    from robustfair.runs.folder import RunFolder
    from robustfair.runs.run import train

    base = out or _free(Path("runs/demo"))
    recipe = read_recipe("demo", {"seed": seed} | ({} if epochs is None else {"epochs": epochs}))
    trained, repaired = base / "trained", base / "repaired"
    RunFolder(base).require_free()
    with TrainingProgress(quiet=quiet) as progress:
        train(recipe, trained, on_start=progress.start, on_step=progress.step, on_epoch=progress.epoch)
    request = AuditRequest(attacks=DEMO_ATTACKS)
    done = repair_with_audits(str(trained), "hwnwb", repaired, request, html=True, quiet=quiet)
    yield done.text
    yield ""
    yield from before_after_lines(done.first, done.second, screen)
    yield ""
    yield from (f"wrote {path}" for path in done.written)


def _free(path: Path) -> Path:
    """`path`, or path-2, path-3, ...: the first that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
