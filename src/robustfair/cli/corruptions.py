"""`robustfair corruptions`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from robustfair.cli.flags import NO_TARGET_FLAGS, JsonSwitch, PathFlag, Switch, TargetFlags
from robustfair.grammar import read_path
from robustfair.report.console import say, screen


def corruptions(
    target: str,
    /,
    *,
    which: str = "all",
    severities: Annotated[list[int] | None, Parameter(negative=())] = None,
    frost: PathFlag | None = None,
    published: PathFlag | None = None,
    precision: str = "fp32",
    out: PathFlag | None = None,
    report: PathFlag | None = None,
    quiet: Switch = False,
    json_: JsonSwitch = False,
    flags: Annotated[TargetFlags, Parameter(name="*")] = NO_TARGET_FLAGS,
) -> int:
    """Audit a model class by class under common corruptions of the test images.

    Parameters
    ----------
    target
        As for audit.
    which
        all (19), standard (15), fair-tat (18), extra (4), or names with commas between them, such as fog,snow.
    severities
        1 to 5, all of them if not given; may be repeated.
    frost
        Folder of photographs of frost; ice crystals are synthesised if not given.
    published
        Folder of a published set such as CIFAR-10-C: <corruption>.npy and labels.npy.
    precision
        fp32 or bf16.
    out
        Folder for the JSON and npz; inside the run folder if not given.
    report
        Path of the HTML page; corruptions.html in the run folder if not given.
    quiet
        No progress bar.
    json_
        Print the audit as JSON.
    """
    from robustfair.cli.progress import AuditProgress
    from robustfair.data.corruptions.names import SEVERITIES
    from robustfair.evaluate.request import AuditRequest, corruptions_of
    from robustfair.report.corruptions import corruption_table, summary_lines
    from robustfair.report.files import require_outputs, write_corruptions
    from robustfair.report.layout import render

    request = AuditRequest(attacks="clean", precision=precision, **flags.asked())
    images = None if read_path(target).is_dir() else request.dataset()
    found = flags.load(target, images)
    require_outputs(found, out=out, report=report)
    with AuditProgress(quiet=quiet) as progress:
        result = corruptions_of(
            found,
            request,
            corruptions=which,
            severities=severities or SEVERITIES,
            frost=frost,
            published=published,
            images=images,
            on_images=progress.images,
            on_progress=progress,
        )
    written = write_corruptions(found, result, out=out, report=report)
    if json_:
        say(json.dumps(result.to_dict(), allow_nan=False))
        return 0
    shown = screen()
    say(render(corruption_table(result), shown), *map(shown.fold, summary_lines(result)))
    say(*(f"wrote {path}" for path in written))
    return 0
