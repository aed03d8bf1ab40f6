"""`robustfair audit`, of a model or of the files of a stored audit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from robustfair.cli.flags import NO_TARGET_FLAGS, FormatFlag, JsonSwitch, PathFlag, Switch, TargetFlags
from robustfair.grammar import read_path
from robustfair.report.console import say, screen

ATTACKS = "clean,pgd-20"


def audit(
    target: str,
    /,
    *,
    attacks: str = ATTACKS,
    eps: str | None = None,
    norm: str | None = None,
    step_size: Annotated[str | None, Parameter(name=["--step-size", "--alpha"])] = None,
    images: int | None = None,
    stratified: Switch = False,
    until: str | None = None,
    precision: str = "auto",
    engine: str = "native",
    max_minutes: float | None = None,
    points: Switch = False,
    checks: Switch = False,
    fail_under: Annotated[list[str] | None, Parameter(negative=())] = None,
    group_by: str | None = None,
    baseline: PathFlag | None = None,
    out: PathFlag | None = None,
    report: PathFlag | None = None,
    quiet: Switch = False,
    format_: FormatFlag = "table",
    json_: JsonSwitch = False,
    flags: Annotated[TargetFlags, Parameter(name="*")] = NO_TARGET_FLAGS,
) -> int:
    """Audit a model class by class under attacks, on the test images.

    Parameters
    ----------
    target
        A run folder; a weight file with --arch; package.module:factory; timm:NAME with --weights; robustbench:NAME; or
        the JSON of a stored audit, which is read again for groups, gates, a baseline, formats and --report without
        attacking, and takes no other flags.
    attacks
        Comma-separated: clean, fgsm, pgd-K, cw-K, autoattack, apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, each with
        options, such as cw-50(restarts=5) or autoattack(version=plus).
    eps
        Radius in pixel units, like 8/255; a run's own if not given, else 8/255.
    norm
        linf or l2; a run's own if not given.
    step_size
        Length of an attack step; eps/4 under linf if not given.
    images
        Audit so many of the test images, drawn at random with --seed.
    stratified
        With --images: as many of each class. The average weighs every class by its share of all test images.
    until
        Stop as soon as a number is known so well: worst.robust=+-2 attacks images until the 95 % interval of the worst
        class is at most 2 percentage points to either side, in the mean of the two. Rounds leave out classes that can
        no longer be the worst. Also average.robust=+-1.5, class.cat.robust=+-3 and what --fail-under names but groups.
    precision
        In which attacks search: fp32, bf16, or auto, which is bf16 for the AutoAttack family where the hardware has
        it and a few timed passes are faster so. Predictions are always the model's own.
    engine
        Of the AutoAttack family: native, or reference for pyautoattack.
    max_minutes
        Stop then, and say what ran. The same command goes on where it stopped.
    points
        Save the attacked images of the AutoAttack family too.
    checks
        Look for masked gradients: attack a sample with more steps, restarts, by queries and at a large radius, after
        the audit and in what --max-minutes leaves.
    fail_under
        A gate, such as worst.robust=0.30, average.clean=80%, interval.worst.robust.lower=0.25 or "range.robust<=0.5";
        may be repeated. Exit code 1 if one fails.
    group_by
        Rates of groups too: superclass, shot (many, medium and few training images), difficulty (thirds of the classes
        by accuracy of --baseline), or a CSV file of class,group or index,group. With settings in quotes, such as
        "shot(many=50, few=10)" or "difficulty(attack=pgd-20)".
    baseline
        Audit JSON of another model on the same images, shown side by side; in JSON as "comparison".
    out
        Folder for the audit's JSON and npz; inside the run folder if not given.
    report
        Path of the HTML report; report.html in the run folder if not given.
    quiet
        No progress bar.
    format_
        Of what is printed.
    json_
        The same as --format json.
    """
    from robustfair.attacks.named import parse_attacks
    from robustfair.cli.progress import AuditProgress
    from robustfair.config import require
    from robustfair.evaluate.gates import parse_gate, require_known
    from robustfair.evaluate.groups import read_groups
    from robustfair.evaluate.request import AuditRequest, audit_target
    from robustfair.evaluate.result import load_audit
    from robustfair.evaluate.sequential import parse_until
    from robustfair.report.files import require_outputs, write_outputs

    gates = [parse_gate(text) for text in fail_under or ()]
    if until is not None:
        parse_until(until)
        allowed = "left out beside --until, which attacks another share of some classes than of others"
        require(group_by is None, "audit", "group-by", allowed=allowed, got=group_by)
    form = "json" if json_ else format_
    request = AuditRequest(
        attacks=attacks,
        eps=eps,
        norm=norm,
        step_size=step_size,
        images=images,
        stratified=stratified,
        until=until,
        precision=precision,
        engine=engine,
        max_minutes=max_minutes,
        points=points,
        checks=checks,
        **flags.asked(),
    )
    before = None if baseline is None else load_audit(baseline)
    if target.endswith(".json"):
        asked = vars(request) | vars(flags) | {"out": out}
        usual = vars(AuditRequest(attacks=ATTACKS)) | vars(NO_TARGET_FLAGS) | {"out": None}
        given = ", ".join(f"--{name.replace('_', '-')}" for name, value in asked.items() if value != usual[name])
        allowed = "--report, --baseline, --fail-under, --group-by, --format or --json"
        hint = "It is only read: name the run or the weights to audit them anew"
        require(not given, "audit", "flags of a stored audit", allowed=allowed, got=given, hint=hint)
        stored = load_audit(target)
        stored_groups = None if group_by is None else read_groups(group_by, stored, baseline=before)
        rates, checked = _judged(stored, gates, stored_groups)
        return _show(stored, form, rates, checked, baseline=before, report=report)
    loaded = None if read_path(target).is_dir() else request.dataset()
    found = flags.load(target, loaded)
    require_outputs(found, out=out, report=report, points=points)
    if loaded is None and (gates or group_by is not None):
        loaded = request.dataset(found.meta.get("data"))
    counts = found.meta.get("images_per_class")
    named = {"trained_on": counts, "baseline": before}
    groups = read_groups(group_by, loaded[0], **named) if group_by is not None and loaded else None
    if gates and loaded:
        names = [attack.name for attack in parse_attacks(attacks)]
        known = None if groups is None else groups.names
        require_known(gates, attacks=names, classes=loaded[0].class_names, groups=known)
    with AuditProgress(quiet=quiet) as progress:
        follow: dict[str, Any] = {"on_images": progress.images, "on_progress": progress, "on_round": progress.say}
        result = audit_target(found, request, images=loaded, out=out, baseline=before, **follow)
    rates, checked = _judged(result, gates, groups)
    page: dict[str, Any] = {"report": report, "rates": rates, "gates": checked}
    written = write_outputs(found, result, baseline=before, request=request, out=out, **page)
    return _show(result, form, rates, checked, baseline=before, written=written)


def _judged(result: Any, gates: Sequence[Any], groups: Any) -> tuple[Any, tuple[Any, ...]]:
    """The rates of an audit by group, None without groups, and what its gates come to."""
    from robustfair.evaluate.gates import check
    from robustfair.evaluate.groups import regroup

    rates = None if groups is None else regroup(result, groups)
    return rates, tuple(check(gates, result, rates))


def _show(
    result: Any,
    form: str,
    rates: Any,
    checked: Sequence[Any],
    *,
    baseline: Any = None,
    written: Sequence[Path] = (),
    report: PathFlag | None = None,
) -> int:
    """Print an audit, its groups and its gates, and write a report that is not `written` yet; the exit code."""
    from robustfair.report.forms import audit_text
    from robustfair.report.html import write_report

    text = audit_text(result, form, baseline=baseline, rates=rates, checked=checked, screen=screen())
    if report is not None:
        written = [*written, write_report(report, result, baseline=baseline, rates=rates, gates=checked)]
    say(text)
    lines = [gate.line for gate in checked]
    if form == "table":
        how = [f"{name}: {text}" for name, text in result.provenance.get("searches", {}).items()]
        say(*how, *(f"wrote {path}" for path in written), *lines)
    elif lines:
        print(*lines, sep="\n", file=sys.stderr)
    return 0 if all(gate.passed for gate in checked) else 1
