"""The only training loop: data -> attack -> loss -> step, with every method acting through its hooks.

A run is a function of its arguments and seed: every draw is keyed by (seed, epoch, step, purpose), and the library's
own generators are the only ones it reads, save for layers such as dropout that use the global one, which is seeded
anew at each epoch. So a run that stops at an epoch boundary goes on exactly, from the boundary's `TrainState` alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robustfair.config import Auto, Precision, Select, require, require_one_way
from robustfair.data import ImageDataset
from robustfair.data.augment.crops import Augmentation, parse_augmentation
from robustfair.data.load.parts import listed
from robustfair.data.loader import Loader, evaluation_batches
from robustfair.errors import ConfigError, DataError, DivergedError, ModelError, RobustFairWarning
from robustfair.execution.device import warn_of_slow_bf16
from robustfair.execution.live import live_program
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import allow_deterministic_products, numerics
from robustfair.methods.base import Method
from robustfair.methods.compose import Plan, compose
from robustfair.models.head import OnCopies, check_gradient, check_outputs, check_training_outputs, head_norms, laid_out
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.training.engine import Engine, require_pure
from robustfair.training.run import EpochStatistics, TrainingRun, finite_or_none
from robustfair.training.schedule import Schedule
from robustfair.training.selection import (
    better,
    few_validation_images,
    require_validation,
    score,
    with_validation,
)
from robustfair.training.state import ScoredWeights, TrainState
from robustfair.training.way import Way, choose_way
from robustfair.values import Batch, ClassTally, Loss, Model, State, StateDict, derive_seed


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
    methods: Sequence[Method] = (),
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
        on_way: called before the first step with the precision and the compilation that were chosen, and whether
            attacks run on kernels; a run that goes on with `resume` takes these, as it cannot choose anew.
        save: called with the state after every epoch.
        on_step: called with (epoch, step) after every step; must not wait for the device.

    Raises:
        ConflictError: methods that cannot act together, before any step.
        ConfigError: `resume` was left by other methods, or another objective, network or optimizer; or a run that goes
            on shall choose its way.
        ModelError: the model's output does not fit the classes, in eval or in train mode; the gradient of the images
            cannot be taken, and an attack needs it; or it cannot be compiled, and shall be.
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
    device = torch.device(device)
    if precision != "auto":
        warn_of_slow_bf16(precision, device)
    if deterministic:
        allow_deterministic_products()
    require_validation(validation, select)
    train, held = with_validation(train, validation)
    few = "" if held is None else few_validation_images(train.labels, held.labels, select)
    if few:
        text = f"{few}: give `validation` a larger share, or take `select=last`"
        warnings.warn(text, RobustFairWarning, stacklevel=2)
    train, held = train.to(device), None if held is None else held.to(device)
    model.to(device)
    first = next(evaluation_batches(train, 2)).x
    called = laid_out(model, first)
    check_outputs(called, train.num_classes, first)
    trained_only = schedule.trainable(model) if schedule.only else None
    examples = (next(evaluation_batches(train, size)).x for size in (2, schedule.batch_size))
    check_training_outputs(called, train.num_classes, examples, lambda called: _train_mode(called, trained_only))
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
    if on_way is not None:
        on_way(way)
    training = _Training(
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
        while training.run.epoch < schedule.epochs:
            record = training.epoch(on_step)
            training.boundary(record)
            if save is not None:
                save(training.state)
    state = training.state
    chosen = state.best or _last(state)
    model.load_state_dict(dict(chosen.weights))
    return Fitted(model.eval(), state, chosen)


class _Training:
    """One run of `fit`: what does not change, and `run`, `states`, `state`, which advance.

    `engine` calls `model`, through `OnCopies` where it must. `networks` are those of the methods, as "method/name".
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        engine: Engine,
        plan: Plan,
        schedule: Schedule,
        loader: Loader,
        held: ImageDataset | None,
        select: Select,
        seed: int,
    ) -> None:
        self.engine, self.plan, self.schedule, self.loader = engine, plan, schedule, loader
        self.select, self.seed = select, seed
        self.model = model
        self.device = loader.dataset.images.device
        self.shares_clean = plan.objective.clean_pass and not plan.moves_weights
        self.networks = {name: network.to(self.device) for name, network in plan.networks(model).items()}
        self.trainable = schedule.trainable(self.model)
        for name, network in self.networks.items():
            own = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
            self.trainable |= {f"{name}//{key}": parameter for key, parameter in own.items()}
        self.optimizer = schedule.build_optimizer(self.trainable.values())
        self.run = TrainingRun(
            model=self.model,
            engine=engine,
            networks={name: engine.beside(network) for name, network in self.networks.items()},
            trainable=self.trainable,
            objective=plan.objective,
            loader=loader,
            held=held,
            epochs=schedule.epochs,
            weight_decay=schedule.weight_decay,
            seed=seed,
        )
        self.states: dict[str, State] = {}
        self.state = TrainState(epoch=0, step=0, weights={}, optimizer={}, methods={})

    def begin(self, resume: TrainState | None) -> None:
        """First boundary of a new run, or the one where an earlier run stopped."""
        if resume is None:
            self.states = self.plan.at_epoch({}, self.run)
            return
        self._require_own(resume)
        self.model.load_state_dict(dict(resume.weights))
        for name, weights in {**resume.networks, **resume.frozen}.items():
            self.networks[name].load_state_dict(dict(weights))
        for name, tensor in resume.optimizer.items():
            name, key = name.rsplit("/", 1)
            parameter = self.trainable[name]
            whole = tensor.shape == parameter.shape  # laid out as its parameter is, which fused kernels rely on
            buffer = torch.empty_like(parameter).copy_(tensor) if whole else tensor.clone()
            self.optimizer.state[parameter][key] = buffer
        self.states = {name: _copied(state, self.device) for name, state in resume.methods.items()}
        self.run.epoch, self.run.step, self.run.train = resume.epoch, resume.step, resume.train
        self.state = resume

    def _require_own(self, resume: TrainState) -> None:
        """Refuse a state that a run of another network, objective or optimizer, or of other methods, left."""
        got = type(resume).__name__
        require(isinstance(resume, TrainState), "fit", "resume", allowed="a TrainState, as save is given", got=got)
        kept = [name.rsplit("/", 1) for name in resume.optimizer]
        objective = self.plan.objective.name
        compared: dict[str, tuple[Iterable[str], Iterable[str]]] = {
            "methods": ([method.name for method in self.plan.methods], resume.methods),
            "objective": ([objective], [resume.objective or objective]),
            "weights": (_shapes(self.model.state_dict()), _shapes(resume.weights)),
            "networks": (self.networks, {**resume.networks, **resume.frozen}),
            "trained weights": (self.trainable, [*self.trainable, *(name for name, _ in kept)]),
            "values of the optimizer": (_kept_by(self.schedule), [key for _, key in kept]),
        }
        for what, (here, there) in compared.items():
            differ = [f"{name} only in this run" for name in sorted({*here} - {*there})]
            differ += [f"{name} only in that one" for name in sorted({*there} - {*here})]
            if differ:
                allowed = f"the state of a run with the same {what}"
                hint = "Go on with what that run was made of, or start a new one"
                raise ConfigError("fit", "resume", allowed=allowed, got=", ".join(differ[:4]), hint=hint)

    def epoch(self, on_step: Callable[[int, int], None] | None) -> dict[str, Any]:
        """One pass over the training images; returns its record.

        Raises:
            DivergedError: at the first loss that is not finite: at once on a CPU, at the end of the epoch on a device
                that would have to be waited for.
        """
        run, schedule = self.run, self.schedule
        torch.manual_seed(derive_seed(self.seed, run.epoch, "layers"))
        _train_mode(self.engine.model, self.trainable if schedule.only else None)
        for network in self.networks.values():
            network.train(_trains(network))
        statistics = EpochStatistics(run.num_classes, self.device)
        started, steps = time.perf_counter(), self.loader.steps_per_epoch
        for step, batch in enumerate(self.loader.epoch(run.epoch)):
            lr = schedule.lr_at(run.epoch, step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
                if schedule.cycle_momentum:
                    group["momentum"] = schedule.momentum_at(run.epoch, step, steps)
            self._step(batch, statistics, step)
            if self.device.type == "cpu" and statistics.first_bad_step() is not None:
                break
            if on_step is not None:
                on_step(run.epoch, step)
        bad = statistics.first_bad_step()
        written = [t for module in (self.model, *self.networks.values()) for t in module.state_dict().values()]
        if bad is None and not all(bool(torch.isfinite(tensor).all()) for tensor in written):
            bad = step
        if bad is not None:
            report = {"epoch": run.epoch, "step": bad, "lr": lr, "per_class": statistics.per_class()}
            raise DivergedError(report | {"train": counts(statistics.tally), "class_state": self._class_state()})
        run.epoch += 1
        run.train = statistics.tally.over(run.total)
        seconds = time.perf_counter() - started
        return {
            "epoch": run.epoch,
            "step": run.step,
            "lr": lr,
            "loss": statistics.loss(),
            "seconds": round(seconds, 3),
            "images_per_second": round(len(self.loader.dataset) / seconds, 1),
            "train": counts(statistics.tally),
            "per_class": statistics.per_class(),
        }

    def _step(self, batch: Batch, statistics: EpochStatistics, step: int) -> None:
        """Attack, loss, gradient, update, ticks: the order in which every method finds its hook."""
        plan, states, run = self.plan, self.states, self.run
        batch = plan.prepare(batch, states, run)
        attacks = plan.attacks(batch, states, run)
        x, clean = batch.x, None
        for name, attack in attacks.items():
            if name == "x_adv":
                if self.shares_clean and len(attacks) == 1 and self.engine.shares_clean_pass(attack):
                    clean = self.engine(x)
                batch = replace(batch, x_adv=self.engine.attack(batch, attack, clean=clean))
            else:
                batch = replace(batch, views={**batch.views, name: run.attacked(batch, attack, name)})
        batch = plan.examples(batch, states, run)

        def forward(images: Tensor) -> Tensor:
            """The engine, save that the first pass over the clean images may be one that was made for the attack."""
            nonlocal clean
            if clean is None or images is not x:
                return self.engine(images)
            logits, clean = clean, None
            return logits

        def loss_at(model: Model, *, edited: bool = True) -> Loss:
            called = forward if model is self.model else model
            with run.forwarding(called):
                return plan.loss(called, batch, states, run) if edited else plan.objective(called, batch)

        self.optimizer.zero_grad()
        with plan.around_gradient(run, batch, loss_at, states):
            loss = loss_at(self.model)
            total = loss.total()
            total.backward()
        self.optimizer.step()
        run.step += 1
        self.states = plan.after_step(states, batch, loss, run)
        statistics.add(batch, attacks.get("x_adv"), loss, total, step)

    def boundary(self, record: dict[str, Any]) -> None:
        """Between two epochs: the methods' ticks, validation of every candidate, selection, and the new `state`."""
        run = self.run
        self.states = self.plan.at_epoch(self.states, run)
        weights = _copied(self.model.state_dict(), self.device)
        exports = self.plan.export(self.states, run)
        measured = {}
        if run.held is not None:
            measured["model"] = run.validate()
            for name, candidate in exports.items():
                measured[name] = self._measure_at(candidate, weights)
        record["validation"] = {name: counts(tallied) for name, tallied in measured.items()}
        record["head_norms"] = _head_norms(self.model)
        best = self.state.best
        for name, tallied in measured.items() if self.select != "last" else ():
            reached, clean = score(tallied, self.select), score(replace(tallied, robust_pred_true=None), self.select)
            found = ScoredWeights(name, run.epoch, reached, ({"model": weights} | exports)[name], clean)
            if best is None or better(found, best):
                best = found
        self.state = TrainState(
            epoch=run.epoch,
            step=run.step,
            weights=weights,
            optimizer=self._optimizer_state(),
            methods={name: _copied(state, self.device) for name, state in self.states.items()},
            networks={n: _copied(net.state_dict(), self.device) for n, net in self.networks.items() if _trains(net)},
            frozen={n: net.state_dict() for n, net in self.networks.items() if not _trains(net)},
            objective=self.plan.objective.name,
            exports=exports,
            best=best,
            train=run.train,
            history=(*self.state.history, record),
        )

    def _measure_at(self, candidate: StateDict, current: StateDict) -> ClassTally:
        self.model.load_state_dict(dict(candidate))
        try:
            return self.run.measure()
        finally:
            self.model.load_state_dict(dict(current))

    def _optimizer_state(self) -> dict[str, Tensor]:
        """Copies of momentum buffers and moments, as `parameter/key`."""
        return {
            f"{name}/{key}": value.clone()
            for name, parameter in self.trainable.items()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def _class_state(self) -> dict[str, dict[str, list[float | None]]]:
        """The per-class part of every method's state, for a report."""
        return {
            name: {key: finite_or_none(v) for key, v in state.items() if v.shape == (self.run.num_classes,)}
            for name, state in self.states.items()
        }

    @contextmanager
    def frozen_rest(self) -> Iterator[None]:
        """Let gradients reach exactly the parameters that the schedule trains; restore every flag on leaving."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def counts(tallied: ClassTally) -> dict[str, list[int] | None]:
    """A tally as JSON values per class: images, correct clean, correct attacked; None for a pass that was not made."""

    def hits(counts_pred_true: Tensor | None) -> list[int] | None:
        return None if counts_pred_true is None else counts_pred_true.diagonal().tolist()

    return {
        "count": tallied.count.tolist(),
        "clean": hits(tallied.clean_pred_true),
        "robust": hits(tallied.robust_pred_true),
    }


def _shapes(weights: StateDict) -> list[str]:
    return [f"{name} {tuple(tensor.shape)}" for name, tensor in weights.items()]


def _kept_by(schedule: Schedule) -> list[str]:
    """Names of the tensors that the optimizer keeps for a parameter."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = schedule.build_optimizer([parameter])
    optimizer.step()
    return [key for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)]


def _train_mode(model: nn.Module, trained_only: Mapping[str, nn.Parameter] | None) -> None:
    """Train mode; where only some parameters are trained, modules without any of them stay in eval mode."""
    model.train()
    if trained_only is not None:
        trained = {id(parameter) for parameter in trained_only.values()}
        for module in model.modules():
            module.training = any(id(parameter) in trained for parameter in module.parameters())


def _attacks_in_eval(objective: Objective) -> bool:
    return isinstance(objective, AdversarialObjective) and objective.attack_mode == "eval"


def _trains(network: nn.Module) -> bool:
    """Whether a network beside the model trains with it."""
    return any(parameter.requires_grad for parameter in network.parameters())


def _last(state: TrainState) -> ScoredWeights:
    """Without selection: the last weights, as the last method that exports any leaves them (an average), else raw."""
    name, weights = [("model", state.weights), *state.exports.items()][-1]
    return ScoredWeights(name, state.epoch, float("nan"), weights)


def _copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}


def _head_norms(model: nn.Module) -> list[float | None] | None:
    """Row norms of the head, None for a model without a linear one."""
    try:
        return finite_or_none(head_norms(model))
    except ModelError:
        return None
