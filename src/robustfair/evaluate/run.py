"""Run an audit: attack a model, and keep what it predicts for every image.

A robust hit requires a clean hit: an image that is misclassified as it is counts as lost under every attack, with its
clean prediction, and is not attacked. Each attack runs on all other images, so its column stands alone: adding an
attack to an audit never changes another's numbers. Every prediction is that of the model as given, a lower precision
only searches; where the logits are no finite numbers it is the class after the label, a wrong one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.named import AutoAttack
from robustfair.attacks.named import AnyAttack
from robustfair.config import require
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import DataError, ModelError, RobustFairWarning, UnknownNameError
from robustfair.evaluate.autoattack import require_reference
from robustfair.evaluate.diagnostics.inputs import diagnose_model
from robustfair.evaluate.journal import Journal, weights_fingerprint
from robustfair.evaluate.plan import AuditPlan, plan_audit
from robustfair.evaluate.result import Audit, shortfall
from robustfair.evaluate.runner import TIMED_IMAGES, AttackRunner, Precisions, Progress, search_precisions
from robustfair.execution.capacity import images_that_fit
from robustfair.execution.device import resolve_device, warn_of_slow_bf16
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import full_float32
from robustfair.grammar import read_path
from robustfair.models.head import check_outputs, head_norms, in_float32, prepared, unwrap
from robustfair.models.modes import attacking
from robustfair.runs.folder import versions

MOST_SEARCHES = 1000
"""Searches at a time by default for the AutoAttack family, at most: nothing depends on it."""


def audit(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    device: str | torch.device = "cpu",
    max_minutes: float | None = None,
    journal: Path | str | None = None,
    keep_journal: bool = False,
    checks: bool = True,
    label: str = "",
    split: str = "test",
    on_progress: Progress | None = None,
    **settings: Any,
) -> Audit:
    """Attack `model` on every image of `dataset` and keep what it predicts.

    The model is moved to `device`, runs in eval mode, and leaves with the modes and flags it came with. Random starts
    of pgd-K and cw-K are keyed by (seed, attack, restart, position of the batch): they depend on `batch_size` and on
    which images are right when clean, never on the other attacks. The AutoAttack family's are keyed by the image.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images; never those that a checkpoint was selected on.
        device: where to run; "auto" is a GPU where there is one.
        max_minutes: stop then, counted from the call; what ran is in the audit, and `settings[attack]["ran"]` says how
            much of it.
        journal: file that keeps what is known while the audit runs; where it exists the audit goes on from it.
        keep_journal: leave the journal of a finished audit, for a caller who has yet to save it.
        checks: look first, on some clean images, whether the model is fed as it was trained and gives the same logits
            twice, see `diagnostics.inputs.diagnose_model`; what is found is among the diagnostics of the audit.
        label: what reports call the model; its class name if empty.
        split: which part of the data this is, for the record.
        on_progress: called with (attack, images done, images in all) as work goes on; restarts count anew.
        **settings: what the audit is to do, read by `robustfair.evaluate.plan.plan_audit`:

            attacks: names, see `robustfair.attacks.named`; `clean` is always part of an audit and comes first. Without
                it, clean and pgd-20.
            eps: radius in pixel units, also as "8/255"; None is 8/255 under linf and 128/255 under l2.
            norm: "linf" or "l2".
            step_size: of pgd-K and cw-K; None follows the radius, see `robustfair.evaluate.plan.threat`.
            batch_size: images at a time; None is 250, and 1,000 for the AutoAttack family on a GPU. Fewer where so
                many would not fit, see `capacity`.
            seed: of the random starts.
            precision: in which attacks search, "fp32" or "bf16"; "auto" is fp32 for fgsm, pgd-K and cw-K, and for the
                AutoAttack family, but for FAB by itself, bf16 where the hardware has instructions for it and timed
                passes are faster so. Predictions are the model's own always.
            engine: of the AutoAttack family: "native", or "reference" for pyautoattack.
            keep_points: keep where the model fails, per AutoAttack.

    Raises:
        UnknownNameError, ConfigError: attacks or radii that cannot be read, or that the engine cannot run; a device
            that is not there; another value that makes no sense.
        DataError: no images.
        ModelError: outputs that do not fit the classes, or are no numbers; gradients that an attack needs and that
            cannot be taken.
        CheckpointError: a journal of another audit.
    """
    began = time.monotonic()
    plan = read_settings(dataset, settings)
    suite = plan.suite
    if max_minutes is not None:
        number = isinstance(max_minutes, Real) and not isinstance(max_minutes, bool)
        require(number, "audit", "max_minutes", allowed="a number", got=max_minutes)
        require(max_minutes > 0, "audit", "max_minutes", allowed="> 0", got=max_minutes)
    device = torch.device(resolve_device(device))
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to audit on")
    data = dataset.to(device)
    example = next(evaluation_batches(data, 2)).x
    model = prepared(in_float32(model.to(device), example), example)
    check_outputs(model, data.num_classes, example)
    if plan.engine == "reference":
        for attack in _autoattacks(suite):
            require_reference(attack, data.num_classes)
    _warn_of_few_classes(suite, data.num_classes)
    chosen = plan.batch_size is not None or plan.engine == "reference"
    at_once = plan.at_a_time if chosen else MOST_SEARCHES
    gradient = any(attack.needs_gradient for attack in suite)
    fit = images_that_fit(model, example, gradient=gradient) if len(suite) > 1 else at_once
    size = min(plan.at_a_time, fit)
    suspected = diagnose_model(model, dataset, device, batch_size=size) if checks else []
    kept = None if journal is None else Journal(read_path(journal))
    precisions, timed = _precisions(plan, model, data, kept)
    warn_of_slow_bf16("bf16" if "bf16" in precisions.values() else "fp32", device)
    runner = AttackRunner(
        model=model,
        data=data,
        threat=plan.threat,
        batch_size=size,
        autoattack_batch_size=min(at_once, fit),
        exactly=chosen,
        seed=plan.seed,
        precisions=precisions,
        engine=plan.engine,
        deadline=None if max_minutes is None else began + 60 * max_minutes,
        keep_points=plan.points,
        on_progress=on_progress,
    )
    if kept is not None:
        about = {"version": versions()["robustfair"], "model": weights_fingerprint(unwrap(model))}
        kept.identify({**about, "precisions": precisions, **plan.identity(data.num_classes)})
    owning = nullcontext() if kept is None else kept.owned()
    with owning, kept_memory(device), full_float32(), attacking(model, "eval"):
        found = runner.run(suite, kept, keep_journal=keep_journal)
    drawn = dataset.drawn
    ran = {attack.name: attack.settings(plan.threat, data.num_classes) for attack in suite}
    result = Audit(
        model=label or type(unwrap(model)).__name__,
        data=dataset.name,
        class_names=dataset.class_names,
        index=torch.arange(len(dataset)) if drawn is None else drawn.places,
        labels=dataset.labels.cpu(),
        predictions=found.predictions,
        settings={name: {**ran[name], **found.about(name)} for name in found.predictions},
        threat=plan.threat,
        fingerprint=dataset.fingerprint,
        split=split,
        head_norms=_head_norms(model, example),
        groups=dataset.groups,
        group_names=dataset.group_names,
        drawn_from=None if drawn is None else drawn.class_counts,
        broken_by=found.broken_by,
        points=found.points,
        provenance={
            "versions": versions(),
            "seed": plan.seed,
            "precision": plan.precision,
            "search_precision": precisions,
            "searches": found.searches if timed is None else {**found.searches, "precision": timed},
            "engine": plan.engine,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "batch_size": size,
            "seconds": found.seconds,
            "spent": found.spent,
            "not_run": found.not_run,
            "begun": found.begun,
            "input_gradients": found.gradients,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "checks": [asdict(diagnostic) for diagnostic in suspected],
            **({} if drawn is None else {"sample": drawn.words}),
        },
    )
    if not result.complete:
        again = " The same command goes on from what is finished." if journal else ""
        text = f"audit: {max_minutes:g} minutes are over: {shortfall(result.unfinished())}. Robust accuracies are "
        warnings.warn(f"{text}upper bounds.{again}", RobustFairWarning, stacklevel=2)
    return result


def _precisions(plan: AuditPlan, model: nn.Module, data: ImageDataset, journal: Journal | None) -> Precisions:
    """In which the attacks search, and what was timed to choose; as in the journal where one was begun."""
    asked = plan.precision if plan.engine == "native" else "fp32"
    begun = journal.begun().get("precisions") if journal is not None and asked == "auto" else None
    if begun is not None:
        return begun, None
    images = next(evaluation_batches(data, TIMED_IMAGES)).x
    return search_precisions(asked, model, images, _autoattacks(plan.suite))


def read_settings(dataset: ImageDataset, settings: Mapping[str, Any]) -> AuditPlan:
    """What an audit is to do, from the `settings` of `audit`.

    Raises:
        UnknownNameError, ConfigError: a setting of another name, and as `plan_audit`.
    """
    for name in settings:
        if name not in _keywords(plan_audit):
            raise UnknownNameError("argument of audit", name, _keywords(plan_audit) + _keywords(audit))
    return plan_audit(dataset, **settings)


def _keywords(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that it takes by name only."""
    return [name for name, one in signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]


def _autoattacks(suite: Sequence[AnyAttack]) -> list[AutoAttack]:
    return [attack for attack in suite if isinstance(attack, AutoAttack)]


def _warn_of_few_classes(suite: Sequence[AnyAttack], classes: int) -> None:
    members = [member for attack in _autoattacks(suite) for member in attack.members]
    for text in dict.fromkeys(member.warning(classes) for member in members):
        if text:
            warnings.warn(text, RobustFairWarning, stacklevel=3)


def _head_norms(model: nn.Module, example: Tensor) -> list[float] | None:
    try:
        return head_norms(model, example).tolist()
    except ModelError:
        return None
