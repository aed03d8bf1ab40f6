"""`robustfair train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from robustfair.cli.flags import NO_FLAGS, JsonSwitch, PathFlag, RecipeFlags, Switch
from robustfair.cli.output import audit_next
from robustfair.errors import RecipeError
from robustfair.report.console import say
from robustfair.runs.recipe import Recipe, read_recipe


def train(
    recipe: str | None = None,
    /,
    *,
    out: PathFlag,
    resume: Switch = False,
    quiet: Switch = False,
    json_: JsonSwitch = False,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = NO_FLAGS,  # type: ignore[valid-type]
) -> int:
    """Train a model into a run folder.

    Parameters
    ----------
    recipe
        Composition such as "trades(beta=6) + ccm + ema", the name of a shipped recipe, or a YAML file. May be left out
        with --resume.
    out
        Folder of the run; must be new, unless --resume.
    resume
        Go on with the run in --out where it stopped.
    quiet
        No progress bar.
    json_
        Print the result as JSON.
    """
    from robustfair.cli.progress import TrainingProgress
    from robustfair.runs.folder import RunFolder
    from robustfair.runs.run import train as run_recipe

    folder = RunFolder(out)
    given = {key: value for key, value in vars(flags).items() if value is not None}
    if recipe is None:
        if not resume:
            raise RecipeError('train: name a composition, such as robustfair train "trades + ccm" --data cifar10')
        folder.require_training()
        recipe = str(folder.recipe)
    resolved = read_recipe(recipe, given)
    if resolved.stages:
        return _train_stages(resolved, out, resume=resume, quiet=quiet, json_=json_)
    with TrainingProgress(quiet=quiet) as progress:
        fitted = run_recipe(
            resolved,
            out,
            resume=resume,
            on_start=progress.start,
            on_step=progress.step,
            on_epoch=progress.epoch,
        )
    chosen = fitted.chosen
    if json_:
        result = {"out": str(out), "candidate": chosen.candidate, "epoch": chosen.epoch, "epochs": fitted.state.epoch}
        say(json.dumps(result))
    else:
        say(f"{out}: {fitted.state.epoch} epochs; the model is '{chosen.candidate}' of epoch {chosen.epoch}")
        say(audit_next(out))
    return 0


def _train_stages(recipe: Recipe, out: Path, *, resume: bool, quiet: bool, json_: bool) -> int:
    """`train` a recipe of stages, with a bar for each that trains; a line for each that is over."""
    from robustfair.cli.progress import TrainingProgress
    from robustfair.runs.stages import run_stages

    with TrainingProgress(quiet=quiet) as progress:
        done = run_stages(
            recipe,
            out,
            resume=resume,
            on_stage=lambda stage: print(stage.text, file=sys.stderr) if json_ else say(stage.text),
            on_start=progress.start,
            on_step=progress.step,
            on_epoch=progress.epoch,
        )
    if json_:
        say(json.dumps({"out": str(out), "model": str(done.path)}))
    else:
        say(f"{out}: {len(recipe.stages)} stages; the model is that of {done.path}")
        say(audit_next(out))
    return 0
