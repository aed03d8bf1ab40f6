"""The only training loop: data -> attack -> loss -> step, with every method acting through its hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.config import Select, require
from robustfair.data import ImageDataset
from robustfair.data.loader import Loader
from robustfair.errors import ConfigError, DivergedError, ModelError
from robustfair.methods.compose import Plan
from robustfair.models.head import head_norms
from robustfair.training.engine import Engine
from robustfair.training.run import EpochStatistics, TrainingRun, finite_or_none
from robustfair.training.schedule import Schedule
from robustfair.training.selection import better, score
from robustfair.training.state import ScoredWeights, TrainState
from robustfair.values import Batch, ClassTally, Loss, Model, State, StateDict, derive_seed


class Training:
    """One run of `fit`: what does not change, and `run`, `states`, `state`, which advance.

    `engine` calls `model`, through `OnCopies` where it must. `networks` are those of objective and methods, as
    "method/name".
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
        self.networks = {name: network.to(self.device) for name, network in plan.networks(model, seed).items()}
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
            methods=tuple(method.name for method in plan.methods),
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
            "networks": (_parts(self.networks), _parts({**resume.networks, **resume.frozen})),
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
        train_mode(self.engine.model, self.trainable if schedule.only else None)
        for network in self.networks.values():
            network.train(_trains(network))
        statistics = EpochStatistics(run.num_classes, self.device)
        started, steps = time.perf_counter(), self.loader.steps_per_epoch
        for step, batch in enumerate(self.loader.epoch(run.epoch)):
            lr = schedule.lr_at(run.epoch, step, steps)
            run.lr_share = lr / schedule.lr if schedule.lr else 1.0
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
                x_adv, watched = self.engine.watched_attack(batch, attack, clean=clean)
                batch = replace(batch, x_adv=x_adv, watched=watched)
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


def _parts(networks: Mapping[str, nn.Module | StateDict]) -> list[str]:
    states = {n: net.state_dict() if isinstance(net, nn.Module) else net for n, net in networks.items()}
    return [f"{name}/{part}" for name, weights in states.items() for part in _shapes(weights)]


def _kept_by(schedule: Schedule) -> list[str]:
    """Names of the tensors that the optimizer keeps for a parameter."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = schedule.build_optimizer([parameter])
    optimizer.step()
    return [key for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)]


def train_mode(model: nn.Module, trained_only: Mapping[str, nn.Parameter] | None) -> None:
    """Train mode; where only some parameters are trained, modules without any of them stay in eval mode."""
    model.train()
    if trained_only is not None:
        trained = {id(parameter) for parameter in trained_only.values()}
        for module in model.modules():
            module.training = any(id(parameter) in trained for parameter in module.parameters())


def _trains(network: nn.Module) -> bool:
    """Whether a network beside the model trains with it."""
    return any(parameter.requires_grad for parameter in network.parameters())


def _copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}


def _head_norms(model: nn.Module) -> list[float | None] | None:
    """Row norms of the head, None for a model without a linear one."""
    try:
        return finite_or_none(head_norms(model))
    except ModelError:
        return None
