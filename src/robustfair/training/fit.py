"""Train a model: what is asked for is checked, a way to execute it is chosen, and the loop runs to its end.

A run is a function of its arguments and seed: every draw is keyed by (seed, epoch, step, purpose), and the library's
own generators are the only ones it reads, save for layers such as dropout that use the global one, which is seeded
anew at each epoch. So a run that stops at an epoch boundary goes on exactly, from the boundary's `TrainState` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from robustfair.config import Auto, Precision, Select, require, require_one_way
from robustfair.data import ImageDataset
from robustfair.data.augment.crops import Augmentation, parse_augmentation
from robustfair.data.load.parts import listed
from robustfair.data.loader import Loader, evaluation_batches
from robustfair.errors import ConfigError, DataError, RobustFairWarning
from robustfair.execution.device import warn_of_slow_bf16
from robustfair.execution.live import live_program
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import allow_deterministic_products, numerics
from robustfair.methods.base import Bundle, Method
from robustfair.methods.compose import compose
from robustfair.models.head import OnCopies, check_gradient, check_outputs, check_training_outputs, laid_out
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.training.engine import Engine, require_pure
from robustfair.training.loop import Training, train_mode
from robustfair.training.schedule import Schedule
from robustfair.training.selection import (
    few_validation_images,
    require_every_class,
    require_validation,
    with_validation,
)
from robustfair.training.state import ScoredWeights, TrainState
from robustfair.training.teachers import check_teachers
from robustfair.training.way import Way, choose_way


@dataclass(frozen=True)
class Fitted:
    """A finished run.

    Attributes:
        model: the given module, now with the selected weights (the last ones under `select="last"`), in eval mode.
        state: the run at its end: last weights, exports, history.
        chosen: which candidate of which epoch `model` is.
    """

    model: nn.Module
    state: TrainState
    chosen: ScoredWeights

    @property
    def history(self) -> tuple[Mapping[str, Any], ...]:
        """One record per epoch."""
        return self.state.history


def fit(
    model: nn.Module,
    train: ImageDataset,
    objective: Objective,
    *,
    methods: Sequence[Method | Bundle] = (),
    schedule: Schedule | None = None,
    seed: int = 0,
    validation: float | ImageDataset = 0.02,
    select: Select = "average+worst",
    augment: Augmentation | None = None,
    precision: Precision | Auto = "fp32",
    compile: bool | Auto = False,
    kernels: bool = True,
    deterministic: bool = False,
    device: str | torch.device = "cpu",
    allow: frozenset[str] = frozenset(),
    resume: TrainState | None = None,
    on_way: Callable[[Way], None] | None = None,
    save: Callable[[TrainState], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train `model` in place.

    Args:
        train: training images; the validation split is taken out of them.
        validation: share of each class held out (the same images for every method and seed), a data set of its own,
            or 0. Never the test set: selection does not see it.
        select: which weights end up in the model: the last, or the candidate (raw weights or an export such as "ema")
            and epoch of best validation average, worst class, or their sum; robust accuracy, clean for `standard`. Of
            equal ones the better on clean images is taken, then the later epoch, see `better`.
        augment: None takes the data set's own.
        precision: of forward and backward passes; weights and losses are float32 either way. "auto" is bf16 where it
            is clearly faster, by a few timed passes.
        compile: compile attack and training pass for batches of `schedule.batch_size`; the same mathematics with other
            rounding, and other draws in layers such as dropout. The first steps take a minute longer. "auto" compiles
            where the steps ahead pay it back, by a few timed passes.
        kernels: run the passes of attacks on kernels of our own where they can be had: in float32 on a CPU, with batch
            norm in eval mode, see `live_program`; the same mathematics with other rounding, twice as fast.
        deterministic: the reference path: uncompiled, no kernels of our own, no TF32, only algorithms that repeat bit
            for bit. On a CPU in float32 it is the path without `kernels`.
        allow: claims that several methods may share.
        resume: state of an earlier run with the same arguments; goes on from there.
        on_way: called before the first step, when nothing of what was asked for can be refused any more, with the
            precision and the compilation that were chosen, and whether attacks run on kernels; a run that goes on with
            `resume` takes these, as it cannot choose anew.
        save: called with the state after every epoch.
        on_step: called with (epoch, step) after every step; must not wait for the device.

    Raises:
        ConflictError: methods that cannot act together, before any step.
        ConfigError: a method cannot act on images of these classes; `resume` was left by other methods, or another
            objective, network or optimizer; or a run that goes on shall choose its way.
        DataError: no images to train on, or none held out of a class that a method measures.
        ModelError: the model's output does not fit the classes, in eval or in train mode; the gradient of the images
            cannot be taken, and an attack needs it; it cannot be compiled, and shall be; or a teacher does not fit.
        DivergedError: a loss that is not finite; carries epoch, step and class state.
    """
    schedule = schedule or Schedule()
    if not isinstance(objective, Objective):
        raise ConfigError("fit", "objective", allowed="an objective such as Trades()", got=objective)
    require(select in get_args(Select), "fit", "select", allowed=f"one of {', '.join(get_args(Select))}", got=select)
    require_one_way("fit", precision=precision, compile=compile, deterministic=deterministic)
    for field, asked in (("precision", precision), ("compile", compile)):
        goes_on = resume is not None and asked == "auto"
        hint = "Give what the run began with, as on_way was told"
        require(not goes_on, "fit", field, allowed="a value of its own beside resume", got=asked, hint=hint)
    if len(train) == 0:
        raise DataError(f"{train.name}: no images to train on")
    absent = [name for name, count in zip(train.class_names, train.class_counts().tolist(), strict=True) if count == 0]
    if absent:
        text = f"{train.name}: no training image of class {listed(absent)}: the model cannot learn what is not shown"
        warnings.warn(text, RobustFairWarning, stacklevel=2)
    plan = compose(objective, methods, allow=allow, validation=validation != 0)
    for remark in filter(None, (bundle.remark() for bundle in plan.bundles)):
        warnings.warn(remark, RobustFairWarning, stacklevel=2)
    device = torch.device(device)
    if precision != "auto":
        warn_of_slow_bf16(precision, device)
    if deterministic:
        allow_deterministic_products()
    require_validation(validation, select)
    train, held = with_validation(train, validation)
    require_every_class(held, plan)
    plan.check_classes(train.class_counts().cpu(), train.groups)
    few = "" if held is None else few_validation_images(train.labels, held.labels, select)
    if few:
        text = f"{few}: give `validation` a larger share, or take `select=last`"
        warnings.warn(text, RobustFairWarning, stacklevel=2)
    train, held = train.to(device), None if held is None else held.to(device)
    model.to(device)
    first = next(evaluation_batches(train, 2)).x
    called = laid_out(model, first)
    check_outputs(called, train.num_classes, first)
    check_teachers(objective, model, train, device)
    trained_only = schedule.trainable(model) if schedule.only else None
    examples = (next(evaluation_batches(train, size)).x for size in (2, schedule.batch_size))
    check_training_outputs(called, train.num_classes, examples, lambda called: train_mode(called, trained_only))
    if compile is True:
        require_pure(called, first)
    elif isinstance(objective, AdversarialObjective):
        check_gradient(called, first)
    layout = torch.contiguous_format if isinstance(called, OnCopies) else None
    augmentation = parse_augmentation(train.augment) if augment is None else augment
    loader = Loader(train, schedule.batch_size, augment=augmentation, seed=seed, memory_format=layout)
    program, lacks = None, ""
    if kernels and not deterministic and precision != "bf16" and device.type == "cpu" and _attacks_in_eval(objective):
        program, lacks = live_program(called, first)

    def engine(precision: Precision, compile: bool) -> Engine:
        given: dict[str, Any] = {"precision": precision, "compile": compile, "program": program}
        return Engine(called, device=device, batch_size=schedule.batch_size, **given)

    timed = next(evaluation_batches(train, schedule.batch_size, memory_format=layout))
    steps = schedule.epochs * loader.steps_per_epoch
    way, chosen_engine = choose_way(engine, timed, objective, precision=precision, compile=compile, steps=steps)
    if lacks and way.precision == "fp32":
        way = replace(way, why="; ".join(filter(None, [way.why, f"attacks run without kernels: {lacks}"])))
    if way.why:
        warnings.warn(way.why, RobustFairWarning, stacklevel=2)
    training = Training(
        model=model,
        engine=chosen_engine,
        plan=plan,
        schedule=schedule,
        loader=loader,
        held=held,
        select=select,
        seed=seed,
    )
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        kept_memory(device),
        numerics(deterministic),
        training.frozen_rest(),
    ):
        training.begin(resume)
        if on_way is not None:
            on_way(way)
        while training.run.epoch < schedule.epochs:
            record = training.epoch(on_step)
            training.boundary(record)
            if save is not None:
                save(training.state)
    state = training.state
    chosen = state.best or _last(state)
    model.load_state_dict(dict(chosen.weights))
    return Fitted(model.eval(), state, chosen)


def _attacks_in_eval(objective: Objective) -> bool:
    return isinstance(objective, AdversarialObjective) and objective.attack_mode == "eval"


def _last(state: TrainState) -> ScoredWeights:
    """Without selection: the last weights, as the last method that exports any leaves them (an average), else raw."""
    name, weights = [("model", state.weights), *state.exports.items()][-1]
    return ScoredWeights(name, state.epoch, float("nan"), weights)
