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
        Such as "trades(beta=6) + ccm + ccr", the name of a shipped recipe, or a YAML file, stage by stage. Of a row of
        a paper's table also where it comes from, and what the paper reports.
    allow
        Claims that several methods may share.
    epochs
        Length of the run, to say which methods would not act in it.
    """
    from robustfair.report.explain import explain_plan
    from robustfair.report.recipes import provenance
    from robustfair.runs.composition import plans_of
    from robustfair.runs.shipped import find_row

    row = find_row(composition)
    say(*(provenance(row) if row is not None else []))
    for stage, plan in plans_of(composition, allow or (), plugin or ()):
        say(*([stage] if stage else []), *([] if plan is None else [explain_plan(plan, epochs)]))
    return 0
