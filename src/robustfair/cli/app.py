"""The command line: thin commands over the library. Results on stdout, progress on stderr; exit 0, 1 failed, 2 misuse.

torch is imported inside the commands, so that `--help` and mistyped commands answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

from robustfair.errors import DivergedError, RecipeError, RobustFairError, as_flags
from robustfair.grammar import read_path
from robustfair.report.console import PipedConsole, Screen, results, results_apart, say, screen
from robustfair.runs.recipe import Recipe, read_recipe

app = App(
    name="robustfair",
    help="Train, audit and repair image classifiers that stay robust in every class.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)


def _recipe_flags() -> type:
    """A dataclass with one optional flag per recipe key: only what the user gives overrides a recipe."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    fields = []
    for field in dataclasses.fields(Recipe):
        if field.name in ("train", "stages"):
            continue
        hint, about = typing.get_args(hints[field.name])
        if field.default not in (None, dataclasses.MISSING, ()):
            about += f" Default: {field.default}."
        names = ("--step-size", "--alpha") if field.name == "step_size" else None
        many = typing.get_origin(hint) is tuple
        negative = None if hint is bool else ()
        flag = Parameter(name=names, help=about, negative=negative, consume_multiple=many)
        text_first = str if field.name in ("norm", "eps", "step_size") else hint
        fields.append((field.name, Annotated[text_first | None, flag], dataclasses.field(default=None)))
    # cyclopts reads no fields of a class that claims to come from the standard library, as a made one does.
    return dataclasses.make_dataclass("RecipeFlags", fields, kw_only=True, namespace={"__module__": __name__})


RecipeFlags = _recipe_flags()
NO_FLAGS = RecipeFlags()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Which model and which images: shared by the commands that measure a model."""

    data: Annotated[str | None, Parameter(help="Name or path of the images; a run's own if not given.")] = None
    checkpoint: Annotated[str | None, Parameter(help="Of a run: best, last, ema, ...")] = None
    arch: Annotated[str | None, Parameter(help="Architecture of a weight file, or timm:NAME.")] = None
    weights: Annotated[str | None, Parameter(help="Weight file for a factory's or timm's model.")] = None
    select_weights: Annotated[
        str | None, Parameter(help="Which set of weights of a weight file that holds several, such as ema.")
    ] = None
    width: Annotated[int | None, Parameter(help="Width of the architecture of a weight file.")] = None
    normalise: Annotated[
        str,
        Parameter(help="Input statistics of a model without: auto, none, half, cifar10, cifar100, imagenet or mnist."),
    ] = "auto"
    image_size: Annotated[int | None, Parameter(help="Resize images to squares of this side.")] = None
    limit_per_class: Annotated[int | None, Parameter(help="Only the first N test images of each class.")] = None
    batch_size: Annotated[int | None, Parameter(help="Images per batch.")] = None
    seed: Annotated[int, Parameter(help="Of everything random.")] = 0
    device: Annotated[str, Parameter(help="cpu, cuda, or auto.")] = "auto"

    def load(self, target: str, images: tuple[Any, str] | None) -> Any:
        """The target, ready for these images; says on stderr what was done to read it."""
        from robustfair.runs.load import load_target

        shape = images[0].images.shape if images else None
        found = load_target(
            target,
            checkpoint=self.checkpoint,
            arch=self.arch,
            weights=self.weights,
            select_weights=self.select_weights,
            width=self.width,
            normalise=self.normalise,
            num_classes=images[0].num_classes if images else None,
            in_channels=shape[1] if shape else None,
            image_size=(shape[2], shape[3]) if shape else None,
        )
        for note in found.notes:
            print(f"note: {as_flags(note)}", file=sys.stderr)
        return found

    def asked(self) -> dict[str, Any]:
        """What of it an `AuditRequest` holds."""
        names = ("data", "image_size", "limit_per_class", "batch_size", "seed", "device")
        return {name: getattr(self, name) for name in names}


NO_TARGET_FLAGS = TargetFlags()
PathFlag = Annotated[Path, Parameter(converter=lambda hint, tokens: read_path(tokens[0].value))]
ATTACKS = "clean,pgd-20"


@app.command
def train(
    recipe: str | None = None,
    /,
    *,
    out: PathFlag,
    resume: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
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
        say(_audit_next(out))
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
        say(_audit_next(out))
    return 0


@app.command
def audit(
    target: str,
    /,
    *,
    attacks: str = ATTACKS,
    eps: str | None = None,
    norm: str | None = None,
    step_size: Annotated[str | None, Parameter(name=["--step-size", "--alpha"])] = None,
    precision: str = "auto",
    engine: str = "native",
    max_minutes: float | None = None,
    points: Annotated[bool, Parameter(negative=())] = False,
    checks: Annotated[bool, Parameter(negative=())] = False,
    fail_under: Annotated[list[str] | None, Parameter(negative=())] = None,
    group_by: str | None = None,
    baseline: PathFlag | None = None,
    out: PathFlag | None = None,
    report: PathFlag | None = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    format_: Annotated[Literal["table", "json", "markdown", "latex"], Parameter(name="--format")] = "table",
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
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
    precision
        In which attacks search: fp32, bf16, or auto, which is bf16 for the AutoAttack family where the hardware has
        it. Predictions are always the model's own.
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
        Rates of groups too: superclass, or a CSV file of class,group or index,group.
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
    from robustfair.cli.workflows import (
        AuditRequest,
        audit_target,
        require_outputs,
        write_outputs,
    )
    from robustfair.config import require
    from robustfair.evaluate.audit import load_audit
    from robustfair.evaluate.gates import parse_gate, require_known
    from robustfair.evaluate.groups import read_groups

    gates = [parse_gate(text) for text in fail_under or ()]
    form = "json" if json_ else format_
    request = AuditRequest(
        attacks=attacks,
        eps=eps,
        norm=norm,
        step_size=step_size,
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
        rates, checked = _judged(stored, gates, read_groups(group_by, stored) if group_by else None)
        return _show(stored, form, rates, checked, baseline=before, report=report)
    images = None if read_path(target).is_dir() else request.images()
    found = flags.load(target, images)
    require_outputs(found, out=out, report=report, points=points)
    if images is None and (gates or group_by):
        images = request.images(found.meta.get("data"))
    groups = read_groups(group_by, images[0]) if group_by and images else None
    if gates and images:
        names = [attack.name for attack in parse_attacks(attacks)]
        known = None if groups is None else groups.names
        require_known(gates, attacks=names, classes=images[0].class_names, groups=known)
    result = audit_target(found, request, images=images, out=out, baseline=before, quiet=quiet)
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
    from robustfair.cli.workflows import audit_text
    from robustfair.report.html import write_report

    text = audit_text(result, form, baseline=baseline, rates=rates, checked=checked, screen=screen())
    if report is not None:
        written = [*written, write_report(report, result, baseline=baseline, rates=rates, gates=checked)]
    say(text)
    lines = [gate.line for gate in checked]
    if form == "table":
        say(*(f"wrote {path}" for path in written), *lines)
    elif lines:
        print(*lines, sep="\n", file=sys.stderr)
    return 0 if all(gate.passed for gate in checked) else 1


@app.command
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
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
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
    from robustfair.cli.workflows import AuditRequest, corruptions_of, require_outputs, write_corruptions
    from robustfair.data.corruptions.generate import SEVERITIES
    from robustfair.report.corruptions import corruption_table, summary_lines
    from robustfair.report.layout import render

    request = AuditRequest(attacks="clean", precision=precision, **flags.asked())
    images = None if read_path(target).is_dir() else request.images()
    found = flags.load(target, images)
    require_outputs(found, out=out, report=report)
    result = corruptions_of(
        found,
        request,
        corruptions=which,
        severities=severities or SEVERITIES,
        frost=frost,
        published=published,
        images=images,
        quiet=quiet,
    )
    written = write_corruptions(found, result, out=out, report=report)
    if json_:
        say(json.dumps(result.to_dict(), allow_nan=False))
        return 0
    shown = screen()
    say(render(corruption_table(result), shown), *map(shown.fold, summary_lines(result)))
    say(*(f"wrote {path}" for path in written))
    return 0


@app.command
def compare(
    *targets: str,
    attacks: str | None = None,
    paired: Annotated[bool, Parameter(negative=())] = False,
    format_: Annotated[Literal["table", "json", "markdown", "latex"], Parameter(name="--format")] = "table",
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    out: PathFlag | None = None,
) -> int:
    """Compare stored audits on the same images, class by class; attacks nothing.

    Parameters
    ----------
    targets
        Two or more run folders, whose newest audits that fit each other are taken, or audit files. Every later one is
        compared with the first.
    attacks
        Only these attacks of the audits, comma-separated.
    paired
        Exact McNemar tests per class with Holm's correction, and paired intervals for the average, the worst class and
        the range.
    format_
        Of what is printed.
    json_
        The same as --format json.
    out
        Write it into this file instead.
    """
    from robustfair.attacks.named import parse_attacks
    from robustfair.cli.workflows import before_after_lines, comparison_text
    from robustfair.config import require
    from robustfair.evaluate.audit import ROBUST
    from robustfair.evaluate.compare import _OUTER_COMMA, compare_many
    from robustfair.evaluate.find import comparable_audits
    from robustfair.files import write_text
    from robustfair.registry import canonical

    require(len(targets) >= 2, "compare", "targets", allowed="at least two runs or audits", got=len(targets))
    hint = f"Try {out}/comparison.txt"
    require(out is None or not out.is_dir(), "compare", "out", allowed="a file name", got=str(out), hint=hint)
    form = "json" if json_ else format_
    named = [name for name in _OUTER_COMMA.split(attacks) if canonical(name) != ROBUST] if attacks else []
    wanted = [attack.name for attack in parse_attacks(named)] if named else []
    stored = comparable_audits(targets, wanted)
    audits, shown = [audit for _, audit in stored], Screen() if out else screen()
    compared = compare_many(audits, attacks=attacks)
    for path, _ in stored:
        print(f"note: {path}", file=sys.stderr)
    if paired or attacks or form != "table":
        text = comparison_text(compared, form, shown)
    else:
        text = "\n".join(line for later in audits[1:] for line in before_after_lines(audits[0], later, shown))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text + "\n")
    say(text if out is None else f"wrote {out}")
    return 0


@app.command
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
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Repair a trained run into a new run folder, without touching the old one.

    Parameters
    ----------
    target
        Folder of a trained run.
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
    from robustfair.cli.workflows import AuditRequest, before_after_lines, repair_with_audits
    from robustfair.runs.repair import repair_run

    if attacks is None:
        say(repair_run(target, method, out, checkpoint)[-1])
        say(_audit_next(out))
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
    done = repair_with_audits(target, method, out, request, checkpoint=checkpoint, quiet=quiet)
    shown = before_after_lines(done.first, done.second, screen())
    say(done.text, *shown, *(f"wrote {path}" for path in done.written))
    return 0


@app.command
def explain(
    composition: str,
    /,
    *,
    allow: Annotated[list[str] | None, Parameter(negative=())] = None,
    epochs: int | None = None,
) -> int:
    """Say what a composition computes and which method edits what; runs nothing, exits 2 on a clash.

    Parameters
    ----------
    composition
        Such as "trades(beta=6) + ccm + ccr", or the name of a shipped recipe.
    allow
        Claims that several methods may share.
    epochs
        Length of the run, to say which methods would not act in it.
    """
    from robustfair.report.explain import explain_plan
    from robustfair.runs.run import plan_of

    say(explain_plan(plan_of(composition, allow or ()), epochs))
    return 0


@app.command(name="list")
def list_(kind: str, /, *, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """List what can be named: recipes, objectives, methods, augmentations, models, datasets, attacks or repairs.

    Parameters
    ----------
    kind
        One of these words.
    json_
        Print JSON.
    """
    from robustfair.report.listing import listing

    entries = listing(kind)
    if json_:
        say(json.dumps(dict(entries)))
        return 0
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        say(screen().fold(f"{name:<{width}}  {text}"))
    return 0


@app.command
def demo(
    *,
    out: PathFlag | None = None,
    seed: int = 0,
    epochs: int | None = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
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
    from robustfair.cli.workflows import run_demo

    for line in run_demo(out, seed, epochs, quiet=quiet, screen=screen()):
        say(line)
    return 0


data_commands = App(name="data", help="Prepare data sets.", help_format="plaintext")
app.command(data_commands)


@data_commands.command
def pack(name: str, /, *, out: PathFlag, parts: int = 2) -> int:
    """Pack a data set losslessly into a few small .npz files, which load where only torch and numpy are installed.

    Parameters
    ----------
    name
        Name or path of the data set.
    out
        Folder of the files; --data reads it back.
    parts
        Number of files.
    """
    from robustfair.data import load_dataset
    from robustfair.data.pack import write_pack

    for file in write_pack(load_dataset(name), out, parts=parts):
        say(f"wrote {file} ({file.stat().st_size / 1e3:,.0f} kB)")
    return 0


def _audit_next(run: Path) -> str:
    """The command that audits a run, as a shell takes it."""
    return f'next: robustfair audit {shlex.quote(str(run))} --attacks "clean,pgd-20,cw-50(restarts=5)"'


def main(argv: list[str] | None = None) -> int:
    """Entry point: run a command and turn every error that a user caused into one line and an exit code."""
    with warnings.catch_warnings(), results_apart(for_good=argv is None):
        _show_warnings_as_lines()
        try:
            help_console = PipedConsole(file=results())
            result = app(
                argv, console=help_console, exit_on_error=False, print_error=False, result_action="return_value"
            )
        except cyclopts.CycloptsError as error:
            return _fail(_one_line(str(error)), 2)
        except DivergedError as error:
            return _fail(str(error), 1)
        except RobustFairError as error:
            return _fail(_one_line(as_flags(str(error))), 2)
        except KeyboardInterrupt:
            return _fail("interrupted; training goes on with --resume, a saved audit with the same command", 130)
        except BrokenPipeError:
            return 141
        except OSError as error:
            return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    return result if isinstance(result, int) else 0


def _show_warnings_as_lines() -> None:
    """Our warnings as one line each on stderr, at every place once; others as Python has them."""
    from robustfair.errors import RobustFairWarning

    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, RobustFairWarning):
            print(f"warning: {as_flags(str(message))}", file=sys.stderr)
        else:
            plain(message, category, *rest)

    warnings.showwarning = show  # type: ignore[assignment]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(text: str, code: int) -> int:
    print(f"robustfair: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
