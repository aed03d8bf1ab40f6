"""`robustfair repair`, and the audits before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from robustfair.cli.flags import PathFlag, PluginFlag, Switch
from robustfair.cli.output import audit_next
from robustfair.report.console import say, screen

if TYPE_CHECKING:
    from robustfair.evaluate.request import AuditRequest
    from robustfair.evaluate.result import Audit
    from robustfair.runs.load import Target


def repair(
    target: str,
    /,
    *,
    out: PathFlag,
    method: str = "hwnwb",
    checkpoint: str | None = None,
    attacks: str | None = None,
    data: str | None = None,
    eps: str | None = None,
    norm: str | None = None,
    limit_per_class: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    quiet: Switch = False,
    plugin: PluginFlag = None,
) -> int:
    """Repair a trained run into a new run folder, without touching the old one.

    Parameters
    ----------
    target
        Folder of a trained run. Plugins that its recipe names are run too.
    out
        Folder of the repaired run; must be new.
    method
        The repair, such as hwnwb or "hwnwb(target_norm=mean)".
    checkpoint
        Which weights of the run to repair; its selected ones if not given.
    attacks
        Audit before and after under these attacks and show both class by class.
    data
        Images of that audit; the run's own if not given.
    eps
        Radius of that audit; the run's own if not given.
    norm
        Norm of that audit; the run's own if not given.
    limit_per_class
        Only the first N test images of each class.
    batch_size
        Images per batch of that audit.
    device
        cpu, cuda, or auto.
    quiet
        No progress bar.
    """
    from robustfair.evaluate.request import AuditRequest
    from robustfair.report.forms import before_after_lines
    from robustfair.runs.repair import repair_run

    if attacks is None:
        say(repair_run(target, method, out, checkpoint, plugins=plugin or ())[-1])
        say(audit_next(out))
        return 0
    request = AuditRequest(
        attacks=attacks,
        data=data,
        eps=eps,
        norm=norm,
        limit_per_class=limit_per_class,
        batch_size=batch_size,
        device=device,
    )
    done = repair_with_audits(target, method, out, request, checkpoint=checkpoint, plugins=plugin or (), quiet=quiet)
    shown = before_after_lines(done.first, done.second, screen())
    say(done.text, *shown, *(f"wrote {path}" for path in done.written))
    return 0


class RepairAudits(NamedTuple):
    """The audits of a run and of its repair; a sentence on what the repair did; and the paths written."""

    first: Audit
    second: Audit
    text: str
    written: list[Path]


def repair_with_audits(
    source: str,
    method: str,
    out: Path,
    request: AuditRequest,
    *,
    checkpoint: str | None = None,
    plugins: Sequence[str] = (),
    html: bool = False,
    quiet: bool = False,
) -> RepairAudits:
    """Audit a run, repair it into `out`, audit that too, and save both audits and the report of the second.

    A request that cannot be audited leaves no folder. Killed at any moment, the same call goes on.

    Args:
        plugins: see `robustfair.runs.repair.repair_run`.
        html: write a report of the run before its repair too.
    """
    from robustfair.cli.progress import AuditProgress
    from robustfair.evaluate.request import audit_target
    from robustfair.report.files import write_outputs
    from robustfair.runs.folder import RunFolder
    from robustfair.runs.repair import repair_into, repair_of, to_repair

    def audited(target: Target) -> Audit:
        with AuditProgress(quiet=quiet) as progress:
            return audit_target(target, request, on_images=progress.images, on_progress=progress)

    fix, folder = repair_of(source, method, plugins), RunFolder(out)
    with folder.owned() as killed:
        before = to_repair(source, method, folder, checkpoint, killed)
        first = audited(before)
        after, text = repair_into(before, fix, method, folder, plugins)
        second = audited(after)
        written = write_outputs(before, first, request=request, html=html)
        written += write_outputs(after, second, baseline=first, request=request)
        folder.update_manifest(status="complete")
    return RepairAudits(first, second, text, written)
