"""`robustfair explain`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from robustfair.cli.flags import PluginFlag
from robustfair.report.console import say


def explain(
    composition: str,
    /,
    *,
    allow: Annotated[list[str] | None, Parameter(negative=())] = None,
    epochs: int | None = None,
    plugin: PluginFlag = None,
) -> int:
    """Say what a composition computes and which method edits what; runs nothing, exits 2 on a clash.

    Parameters
    ----------
    composition
        Such as "trades(beta=6) + ccm + ccr", or the name of a shipped recipe or a YAML file, stage by stage with data,
        model and schedule. Of a row of a paper's table also where it comes from, what the paper reports, and what it
        leaves open.
    allow
        Claims that several methods may share.
    epochs
        Length of the run, to say which methods would not act in it.
    """
    from robustfair.report.explain import explain_plan, explain_run
    from robustfair.report.recipes import provenance
    from robustfair.runs.composition import steps_of
    from robustfair.runs.shipped import find_row

    row = find_row(composition)
    say(*(provenance(row) if row is not None else []))
    for step in steps_of(composition, allow or (), plugin or ()):
        say(*([step.said] if step.said else []))
        say(*([] if step.recipe is None else explain_run(step.recipe, step.start)))
        say(*([] if step.plan is None else [explain_plan(step.plan, epochs)]))
    return 0
