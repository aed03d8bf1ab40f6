from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference import training as reference
from reference.public_networks import Plain, Reentrant, Viewing, WritingOnImages
from robustfair.data import ImageDataset, Loader, evaluation_batches
from robustfair.errors import ConfigError, ConflictError, DivergedError, ModelError, RobustFairWarning
from robustfair.execution import bundle
from robustfair.methods import AWP, CCM, CCR, EMA, Method
from robustfair.objectives import PGDAT, Objective, Standard, Trades
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.run import TrainingRun
from robustfair.training.selection import few_validation_images
from robustfair.training.state import TrainState
from robustfair.values import ClassTally, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Differences = Callable[[TrainState, TrainState], list[str]]

SHORT = Schedule(epochs=2, lr=0.1, batch_size=7)
CFA = (CCM(lam=0.3, begin=1), CCR(begin=1), EMA(decay=0.9))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of_class(cls_name: str, **body: Any) -> Method:
    """A method of a class of its own."""
    return type(cls_name, (Method,), {"name": cls_name, **body})()


# Against an independent loop


@pytest.mark.parametrize(
    ("objective", "methods"),
    [
        (Standard(), ()),
        (PGDAT(eps=0.08, steps=3), ()),
        (PGDAT(eps=0.08, steps=3), (CCM(begin=1),)),
        (Trades(eps=0.08, steps=3, beta=6), ()),
        (Trades(eps=0.08, steps=3, beta=6), CFA),
    ],
    ids=["standard", "pgd-at", "pgd-at + ccm", "trades", "trades + ccm + ccr + ema"],
)
def test_two_epochs_equal_a_plain_loop(
    tiny_net: Net, tiny_data: Data, objective: Objective, methods: tuple[Method, ...]
) -> None:
    data = tiny_data((10, 8, 6))
    schedule = Schedule(epochs=2, lr=0.05, milestones=(0.5,), batch_size=7, weight_decay=1e-2)
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    found = fit(model, data, objective, methods=methods, schedule=schedule, seed=3, validation=0, select="last")
    loader = Loader(data, 7, augment="none", seed=3)
    names = {method.name for method in methods}
    attacks = objective.attack(next(loader.epoch(0))) is not None
    losses, robust, average = reference.train(
        twin,
        [[(b.x, b.y, b.rng("attack")) for b in loader.epoch(epoch)] for epoch in range(2)],
        objective=objective.name,
        num_classes=3,
        eps=0.08,
        step_size=0.02,
        steps=3,
        beta=6.0,
        lr=lambda epoch, step: 0.05 if epoch == 0 else 0.005,
        momentum=0.9,
        weight_decay=1e-2,
        ccm=(0.3 if objective.name == "trades" else 0.5) if "ccm" in names else None,
        ccr=0.5 if "ccr" in names else None,
        decay=0.9 if "ema" in names else None,
    )
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(found.state.weights[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    for name, tensor in average.items():
        torch.testing.assert_close(found.state.exports["ema"][name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert [record["loss"] for record in found.history] == pytest.approx(losses, rel=1e-5)
    for record, rates in zip(found.history, robust, strict=True):
        counted = record["train"]
        assert counted["count"] == [10, 8, 6]
        if attacks:
            assert [h / n for h, n in zip(counted["robust"], counted["count"], strict=True)] == pytest.approx(rates)
        else:
            assert counted["robust"] is None


def test_single_precision_equals_a_plain_loop_too(tiny_net: Net, tiny_data: Data) -> None:
    data, model, twin = tiny_data(), tiny_net(), tiny_net()
    found = fit(model, data, Standard(), schedule=SHORT, validation=0, select="last")
    loader = Loader(data, 7, augment="none", seed=0)
    reference.train(
        twin,
        [[(b.x, b.y, None) for b in loader.epoch(epoch)] for epoch in range(2)],
        objective="standard",
        num_classes=3,
        lr=lambda epoch, step: 0.1 * 0.1**epoch,
        momentum=0.9,
        weight_decay=5e-4,
    )
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(found.state.weights[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


# Determinism and resuming


def test_the_same_seed_repeats_and_another_does_not(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    def run(seed: int) -> TrainState:
        return fit(tiny_net(dropout=0.3), tiny_data(), PGDAT(), schedule=SHORT, seed=seed, validation=0.25).state

    torch.manual_seed(1)
    one = run(0)
    torch.manual_seed(2)
    assert differences(one, run(0)) == []
    assert differences(one, run(1)) != []


@pytest.mark.parametrize(
    ("channels", "curve"),
    [
        (1, {"lr": 0.1}),
        (3, {"lr": 0.1, "kind": "one-cycle", "nesterov": True}),
        (1, {"lr": 0.1, "kind": "one-cycle", "cycle_momentum": True}),
        (3, {"lr": 0.01, "kind": "cosine", "optimizer": "adam"}),
        (1, {"lr": 0.1, "kind": "constant", "momentum": 0.0, "only": ("head.weight", "norm.bias")}),
    ],
    ids=["sgd", "nesterov", "cyclic", "adam", "head"],
)
@pytest.mark.parametrize("select", ["last", "average+worst"])
def test_every_boundary_resumes_bit_for_bit(
    tiny_net: Net, tiny_data: Data, differences: Differences, select: Any, channels: int, curve: dict[str, Any]
) -> None:
    def run(**rest: Any) -> Fitted:
        return fit(
            tiny_net(channels=channels, dropout=0.3),
            tiny_data((9, 7, 8), channels=channels),
            Trades(eps=0.1, steps=2),
            methods=CFA,
            schedule=Schedule(epochs=4, batch_size=7, **curve),
            validation=0.25,
            select=select,
            **rest,
        )

    states: list[TrainState] = []
    whole = run(save=states.append)
    assert [state.epoch for state in states] == [1, 2, 3, 4]
    for state in states:
        torch.manual_seed(99)
        resumed = run(resume=state)
        assert differences(whole.state, resumed.state) == []
        assert (resumed.chosen.candidate, resumed.chosen.epoch) == (whole.chosen.candidate, whole.chosen.epoch)
        weights = resumed.model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.model.state_dict().items())


def test_cyclic_momentum_is_that_of_the_schedule_at_every_step(
    monkeypatch: pytest.MonkeyPatch, tiny_net: Net, tiny_data: Data
) -> None:
    schedule = Schedule(epochs=3, batch_size=9, lr=0.1, kind="one-cycle", cycle_momentum=True)
    used: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            used.extend(group["momentum"] for group in self.param_groups)
            return super().step(closure)

    monkeypatch.setattr(Schedule, "build_optimizer", lambda self, parameters: Watched(parameters, lr=0.1, momentum=0.9))
    fit(tiny_net(), tiny_data(), Standard(), schedule=schedule, validation=0, select="last")
    assert used == [schedule.momentum_at(epoch, step, 4) for epoch in range(3) for step in range(4)]
    assert min(used) < 0.82 < 0.88 < max(used)


def test_momentum_comes_back_in_the_layout_of_its_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_net: Net, tiny_data: Data
) -> None:
    """Files hold contiguous tensors; a fused update would read the momentum of channels-last weights in wrong order."""
    states: list[TrainState] = []
    fit(tiny_net(channels=3), tiny_data(channels=3), PGDAT(steps=1), schedule=SHORT, save=states.append)
    stored = {name: buffer.contiguous() for name, buffer in states[0].optimizer.items()}
    assert any(not buffer.is_contiguous() for buffer in states[0].optimizer.values())
    made: list[torch.optim.Optimizer] = []
    build = Schedule.build_optimizer
    monkeypatch.setattr(Schedule, "build_optimizer", lambda *args: made.append(build(*args)) or made[-1])
    strides: list[tuple[Any, Any]] = []

    class Look(Method):
        name = "look"

        def at_epoch(self, state: State, run: Any) -> State:
            strides.extend((p.stride(), made[0].state[p]["momentum_buffer"].stride()) for p in run.model.parameters())
            return state

    resume = replace(states[0], optimizer=stored, methods={"look": {}})
    fit(tiny_net(channels=3), tiny_data(channels=3), PGDAT(steps=1), schedule=SHORT, methods=[Look()], resume=resume)
    assert strides
    assert all(weight == momentum for weight, momentum in strides)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "one method more": ({"methods": [CCM(), EMA(), AWP()]}, "same methods, got 'awp only in this run'"),
    "one method fewer": ({"methods": [CCM()]}, "same methods, got 'ema only in that one'"),
    "another method": (
        {"methods": [CCM(), AWP()]},
        "same methods, got 'awp only in this run, ema only in that one'",
    ),
    "another objective": (
        {"objective": Trades(steps=1)},
        "same objective, got 'trades only in this run, pgd-at only in",
    ),
    "another width": ({"channels": 3}, r"same weights, got 'conv.weight \(4, 3, 3, 3\) only in this run"),
    "another optimizer": ({"schedule": replace(SHORT, optimizer="adam")}, "same values of the optimizer, got 'exp_avg"),
    "no momentum": ({"schedule": replace(SHORT, momentum=0.0)}, "optimizer, got 'momentum_buffer only in that one'"),
    "some weights": ({"schedule": replace(SHORT, only=("head.bias",))}, "same trained weights, got 'conv.bias only in"),
}
"""What a run is resumed with in place of its own, and how it is refused."""


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_run_is_refused_in_one_line(tiny_net: Net, tiny_data: Data, name: str) -> None:
    def run(channels: int = 1, **changes: Any) -> TrainState:
        arguments: dict[str, Any] = {"objective": PGDAT(steps=1), "methods": [CCM(), EMA()], "schedule": SHORT}
        net, data = tiny_net(channels=channels), tiny_data(channels=channels)
        return fit(net, data, **arguments | changes, validation=0, select="last").state

    other, message = OTHERS[name]
    states: list[TrainState] = []
    run(save=states.append)
    with pytest.raises(ConfigError, match=f"^fit: resume must be the state of a run with the .*{message}") as caught:
        run(**other, resume=states[0])
    assert "\n" not in str(caught.value)


def test_what_is_no_state_cannot_be_resumed(tiny_net: Net, tiny_data: Data) -> None:
    fitted = fit(tiny_net(), tiny_data(), PGDAT(steps=1), schedule=SHORT, validation=0, select="last")
    with pytest.raises(ConfigError, match="fit: resume must be a TrainState, as save is given, got 'Fitted'"):
        fit(tiny_net(), tiny_data(), PGDAT(steps=1), schedule=SHORT, validation=0, select="last", resume=fitted)  # type: ignore[arg-type]


def test_a_state_of_an_earlier_version_names_no_objective_and_goes_on(tiny_net: Net, tiny_data: Data) -> None:
    states: list[TrainState] = []
    arguments: dict[str, Any] = {"schedule": SHORT, "validation": 0, "select": "last"}
    whole = fit(tiny_net(), tiny_data(), PGDAT(steps=1), save=states.append, **arguments)
    resumed = fit(tiny_net(), tiny_data(), PGDAT(steps=1), resume=replace(states[0], objective=None), **arguments)
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)


def test_resuming_leaves_the_given_state_alone(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    def run(**rest: Any) -> TrainState:
        arguments: dict[str, Any] = {"methods": CFA, "schedule": SHORT, "validation": 0.25}
        return fit(tiny_net(), tiny_data(), Trades(eps=0.1, steps=2), **arguments, **rest).state

    states: list[TrainState] = []
    run(save=states.append)
    first: list[TrainState] = []
    run(save=first.append)
    run(resume=states[0])
    assert differences(states[0], first[0]) == []


def test_a_saved_state_does_not_move_with_the_training_after_it(tiny_net: Net, tiny_data: Data) -> None:
    kept: list[tuple[TrainState, dict[str, Tensor]]] = []

    def flat(state: TrainState) -> dict[str, Tensor]:
        groups = {"w": state.weights, "o": state.optimizer, **state.methods, **state.exports}
        return {f"{g}/{name}": tensor for g, values in groups.items() for name, tensor in values.items()}

    def save(state: TrainState) -> None:
        kept.append((state, {name: tensor.clone() for name, tensor in flat(state).items()}))

    fit(tiny_net(), tiny_data(), Trades(eps=0.1), methods=CFA, schedule=SHORT, save=save, validation=0.25)
    state, then = kept[0]
    assert all(torch.equal(tensor, then[name]) for name, tensor in flat(state).items())


def test_methods_see_the_same_run_after_resuming(tiny_net: Net, tiny_data: Data) -> None:
    """Epoch, step and the counts of the last epoch, in the hooks of a step as well as at a boundary."""

    def probe(trace: list[Any]) -> Method:
        def note(where: str, run: Any) -> None:
            counted = None if run.train is None else run.train.robust_pred_true.tolist()
            trace.append((where, run.epoch, run.step, counted, run.epochs, run.num_classes))

        @contextmanager
        def around_gradient(self: Method, run: Any, batch: Any, loss_at: Any, state: State) -> Iterator[None]:
            note("gradient", run)
            yield

        def after_step(self: Method, state: State, batch: Any, loss: Any, run: Any) -> State:
            note("step", run)
            return state

        def at_epoch(self: Method, state: State, run: Any) -> State:
            note("epoch", run)
            return state

        return of_class("probe", around_gradient=around_gradient, after_step=after_step, at_epoch=at_epoch)

    def run(**rest: Any) -> tuple[list[Any], list[TrainState]]:
        trace: list[Any] = []
        states: list[TrainState] = []
        fit(
            tiny_net(),
            tiny_data(),
            PGDAT(eps=0.1, steps=1),
            methods=[probe(trace)],
            schedule=Schedule(epochs=3, lr=0.1, batch_size=12),
            validation=0.25,
            save=states.append,
            **rest,
        )
        return trace, states

    whole, states = run()
    resumed, _ = run(resume=states[0])
    assert resumed == whole[-len(resumed) :]


def test_nothing_is_drawn_from_global_streams(tiny_net: Net, tiny_data: Data) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fit(tiny_net(dropout=0.5), tiny_data(), Trades(eps=0.1), methods=CFA, schedule=SHORT, validation=0.25)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_global_stream_comes_back_after_an_error(tiny_net: Net, tiny_data: Data) -> None:
    def stop(epoch: int, step: int) -> None:
        raise KeyboardInterrupt

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(dropout=0.5), tiny_data(), Standard(), schedule=SHORT, validation=0.25, on_step=stop)
    assert torch.equal(torch.get_rng_state(), before)


# What is trained


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen"])
@pytest.mark.parametrize("objective", [PGDAT, Trades])
def test_only_the_named_parameters_move(tiny_net: Net, tiny_data: Data, objective: Any, mode: str) -> None:
    model = tiny_net(dropout=0.3)
    before = snapshot(model)
    chosen = objective(eps=0.1, steps=2, attack_mode=mode)
    schedule = Schedule(epochs=2, lr=0.1, batch_size=7, only=("head.weight",))
    found = fit(model, tiny_data(), chosen, methods=[EMA(decay=0.5)], schedule=schedule, validation=0.25, select="last")
    for weights in (found.state.weights, found.state.exports["ema"]):
        assert [name for name, tensor in weights.items() if not torch.equal(tensor, before[name])] == ["head.weight"]
    assert {name.split("/")[0] for name in found.state.optimizer} == {"head.weight"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_named_parameter_that_was_frozen_is_trained(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = snapshot(model)
    schedule = Schedule(epochs=1, lr=0.1, batch_size=7, only=("head.weight",))
    found = fit(model, tiny_data(), PGDAT(), schedule=schedule, validation=0, select="last")
    assert [n for n, t in found.state.weights.items() if not torch.equal(t, before[n])] == ["head.weight"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_frozen_parameters_stay_and_flags_come_back(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net()
    model.conv.weight.requires_grad_(False)
    kept = model.conv.weight.clone()
    fit(model, tiny_data(), PGDAT(eps=0.1), schedule=SHORT, validation=0, select="last")
    assert torch.equal(model.conv.weight, kept)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert not model.training
    assert all(module.training is False for module in model.modules())


def test_flags_come_back_after_an_error(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net()

    def stop(epoch: int, step: int) -> None:
        raise KeyboardInterrupt

    schedule = Schedule(epochs=1, batch_size=7, only=("head.bias",))
    with pytest.raises(KeyboardInterrupt):
        fit(model, tiny_data(), PGDAT(), schedule=schedule, validation=0, select="last", on_step=stop)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norm_moves_once_per_forward_of_the_loss_alone(tiny_net: Net, tiny_data: Data) -> None:
    for objective, per_step in ((Standard(), 1), (PGDAT(), 1), (Trades(), 2)):
        found = fit(tiny_net(), tiny_data(), objective, schedule=SHORT, validation=0.25, select="last")
        assert int(found.state.weights["norm.num_batches_tracked"]) == per_step * found.state.step


def test_the_output_must_fit_the_classes_before_any_step(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net(classes=5)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"5.*3|3.*5"):
        fit(model, tiny_data(), PGDAT(), schedule=SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Auxiliary(nn.Module):
    """Gives two outputs in train mode; its steps forward in train mode and on many images are counted."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.head, self.drop, self.alone, self.steps = nn.Linear(64, 3), nn.Dropout(), alone, 0

    def forward(self, x: Tensor) -> Any:
        self.steps += self.training
        logits = self.head(self.drop(x.flatten(1)))
        return (logits, logits) if self.training and not self.alone else logits


@pytest.mark.parametrize("only", [(), ("head.weight",)])
def test_outputs_in_train_mode_are_met_before_any_step(tiny_data: Data, only: tuple[str, ...]) -> None:
    data, schedule = tiny_data(size=8), Schedule(epochs=1, batch_size=8, only=only)
    model = Auxiliary(alone=False)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"Auxiliary must return logits .* got a tuple of 2 in train mode"):
        fit(model, data, PGDAT(steps=1), schedule=schedule)
    assert model.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fit(Auxiliary(alone=True), data, PGDAT(steps=1), schedule=schedule)


def test_a_class_without_training_images_is_named_before_any_step(tiny_net: Net, tiny_data: Data) -> None:
    steps: list[tuple[int, int]] = []
    with pytest.warns(RobustFairWarning, match="tiny: no training image of class class 1: the model cannot learn"):
        fit(tiny_net(), tiny_data((8, 0, 8)), Standard(), schedule=SHORT, on_step=lambda *step: steps.append(step))
    assert steps
    with pytest.warns(RobustFairWarning, match="class class 1"), pytest.raises(ModelError):
        fit(tiny_net(classes=5), tiny_data((8, 0, 8)), Standard(), schedule=SHORT)


def test_conflicts_come_before_any_step(tiny_net: Net, tiny_data: Data) -> None:
    with pytest.raises(ConflictError):
        fit(tiny_net(), tiny_data(), PGDAT(), methods=[CCR()], schedule=SHORT)


def test_steps_are_reported_in_order_and_history_counts(tiny_net: Net, tiny_data: Data) -> None:
    seen: list[tuple[int, int]] = []
    found = fit(
        tiny_net(),
        tiny_data((10, 8, 6)),
        Trades(eps=0.1),
        methods=CFA,
        schedule=SHORT,
        validation=0.25,
        on_step=lambda epoch, step: seen.append((epoch, step)),
    )
    per_epoch = len(seen) // 2
    assert seen == [(epoch, step) for epoch in range(2) for step in range(per_epoch)]
    first, second = found.history
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["step"] == found.state.step == len(seen)
    assert first["train"]["count"] == [8, 6, 4]
    assert first["validation"]["model"]["count"] == first["validation"]["ema"]["count"] == [2, 2, 2]
    assert json.loads(json.dumps(found.history, allow_nan=False)) == list(found.history)
    robust = [h / n for h, n in zip(first["train"]["robust"], first["train"]["count"], strict=True)]
    assert first["per_class"]["eps"] == pytest.approx([0.1] * 3)
    assert second["per_class"]["eps"] == pytest.approx([0.1 * (0.3 + t) for t in robust])
    beta = [6 * (0.5 + t) for t in robust]
    assert second["per_class"]["coef.consistency"] == pytest.approx([b / (1 + b) for b in beta])
    assert second["per_class"]["coef.label"] == pytest.approx([1 / (1 + b) for b in beta])


# Validation and selection


def test_validation_images_are_never_trained_on_and_the_same_for_all_seeds() -> None:
    codes = torch.arange(60, dtype=torch.uint8)
    data = ImageDataset(
        images=(4 * codes).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(),
        labels=torch.arange(60) % 3,
        class_names=("a", "b", "c"),
    )
    held = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        seen: dict[bool, set[int]] = {True: set(), False: set()}

        def watch(module: nn.Module, inputs: tuple[Tensor], _: Tensor, seen: dict[bool, set[int]] = seen) -> None:
            seen[module.training].update((inputs[0][:, 0, 0, 0] * 255 / 4).round().int().tolist())

        model.register_forward_hook(watch)
        fit(model, data, Standard(), schedule=SHORT, seed=seed, validation=0.2)
        held.append(set(range(60)) - seen[True])
        assert len(held[-1]) == 12
        assert held[-1] <= seen[False]
        assert [sum(code % 3 == c for code in held[-1]) for c in range(3)] == [4, 4, 4]
    assert held[0] == held[1]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the measurements on the validation split those given: hits of three classes of ten images, in turn.

    All are right on clean images, unless these are given too.
    """

    def counted(hits: list[int]) -> Tensor:
        right = torch.tensor(hits)
        return torch.diag(right) + torch.diag(10 - right).roll(1, 0)

    def plan(hits: list[list[int]], clean: list[list[int]] | None = None) -> None:
        turns = zip(hits, clean or [[10, 10, 10]] * len(hits), strict=True)

        def measure(self: object, steps: int = 10) -> ClassTally:
            robust, right = next(turns)
            return ClassTally(clean_pred_true=counted(right), robust_pred_true=counted(robust))

        monkeypatch.setattr(TrainingRun, "measure", measure)

    return plan


@pytest.mark.parametrize(
    ("select", "epoch", "score"),
    [("average", 2, 0.7), ("worst", 4, 0.5), ("average+worst", 3, 19 / 30 + 0.4), ("last", 5, None)],
)
def test_the_best_epoch_is_chosen(
    tiny_net: Net, tiny_data: Data, planned: Any, select: Any, epoch: int, score: float | None
) -> None:
    planned([[3, 3, 3], [10, 10, 1], [9, 6, 4], [5, 5, 5], [0, 0, 0]])
    states: list[TrainState] = []
    schedule = Schedule(epochs=5, lr=0.05, batch_size=12)
    found = fit(tiny_net(), tiny_data(), PGDAT(), schedule=schedule, validation=0.25, select=select, save=states.append)
    assert (found.chosen.candidate, found.chosen.epoch) == ("model", epoch)
    assert score is None or found.chosen.score == pytest.approx(score)
    chosen = states[epoch - 1].weights
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in found.model.state_dict().items())
    assert not torch.equal(found.model.head.weight, states[epoch - 2].weights["head.weight"])


def test_an_average_wins_only_where_it_is_better(tiny_net: Net, tiny_data: Data, planned: Any) -> None:
    planned([[5, 5, 5], [5, 5, 5], [5, 5, 5], [6, 6, 6], [7, 7, 7], [6, 6, 6]])
    schedule = Schedule(epochs=3, lr=0.05, batch_size=12)
    states: list[TrainState] = []
    arguments: dict[str, Any] = {"methods": [EMA(decay=0.9)], "schedule": schedule, "validation": 0.25}
    found = fit(tiny_net(), tiny_data(), PGDAT(), save=states.append, **arguments)
    picks = [(state.best.candidate, state.best.epoch) for state in states if state.best]
    assert picks == [("model", 1), ("ema", 2), ("model", 3)]
    assert found.chosen is found.state.best
    best = states[1].best
    assert best is not None
    assert all(torch.equal(tensor, states[1].exports["ema"][name]) for name, tensor in best.weights.items())


@pytest.mark.parametrize(
    ("robust", "clean", "epoch"),
    [
        ([[5, 5, 5]] * 3, [[9, 9, 9]] * 3, 3),
        ([[5, 5, 5]] * 3, [[8, 8, 8], [9, 9, 9], [8, 8, 8]], 2),
        ([[5, 5, 5]] * 3, [[9, 9, 9], [9, 9, 9], [10, 10, 8]], 2),
        ([[5, 5, 5], [4, 5, 6], [6, 6, 3]], [[9, 9, 9], [9, 9, 9], [10, 10, 10]], 1),
        ([[3, 6, 6], [4, 4, 4], [4, 4, 4]], [[9, 9, 9]] * 3, 3),
    ],
)
def test_of_equals_the_better_on_clean_images_and_then_the_later_is_chosen(
    tiny_net: Net, tiny_data: Data, planned: Any, robust: list[list[int]], clean: list[list[int]], epoch: int
) -> None:
    planned(robust, clean)
    schedule = Schedule(epochs=3, lr=0.05, batch_size=12)
    states: list[TrainState] = []
    found = fit(tiny_net(), tiny_data(), PGDAT(), schedule=schedule, validation=0.25, save=states.append)
    assert (found.chosen.candidate, found.chosen.epoch) == ("model", epoch)
    chosen = states[epoch - 1].weights
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in found.model.state_dict().items())


def test_what_tells_equals_apart_is_still_known_after_a_resume(tiny_net: Net, tiny_data: Data, planned: Any) -> None:
    schedule = Schedule(epochs=3, lr=0.05, batch_size=12)
    arguments: dict[str, Any] = {"schedule": schedule, "validation": 0.25}
    states: list[TrainState] = []
    planned([[5, 5, 5]] * 3, [[9, 9, 9], [8, 8, 8], [8, 8, 8]])
    fit(tiny_net(), tiny_data(), PGDAT(), save=states.append, **arguments)
    planned([[5, 5, 5]] * 2, [[8, 8, 8]] * 2)
    assert fit(tiny_net(), tiny_data(), PGDAT(), resume=states[0], **arguments).chosen.epoch == 1


@pytest.mark.parametrize("number", [1, 4, 29, 30])
def test_a_selection_on_few_images_is_warned_of_before_the_first_step(tiny_net: Net, number: int) -> None:
    labels = torch.arange(2 * number + 40) % 2
    data = ImageDataset(images=torch.zeros(len(labels), 1, 8, 8).byte(), labels=labels, class_names=("a", "b"))
    held = ImageDataset(images=data.images[: 2 * number], labels=labels[: 2 * number], class_names=("a", "b"))

    def run(**arguments: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            begun: list[int] = []

            def step(epoch: int, step: int) -> None:
                begun.append(len(caught))

            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
            fit(model, data, Standard(), schedule=Schedule(epochs=1, lr=0.01), on_step=step, **arguments)
            assert begun[0] == len(caught), "said before training"
        return [str(warning.message) for warning in caught]

    few = f"weights are selected on {number} validation image{'s' if number > 1 else ''} of a class, and fewer than 30"
    said = run(validation=held)
    assert len(said) == (number < 30)
    assert all(text.startswith(few) and "`select=last`" in text for text in said)
    assert run(validation=held, select="last") == []
    assert run(validation=0, select="last") == []


def test_a_class_that_validation_lacks_is_warned_of(tiny_data: Data) -> None:
    assert "no validation image of a class" in few_validation_images(
        torch.tensor([0, 1, 1]), torch.tensor([1] * 40), "worst"
    )
    assert few_validation_images(torch.tensor([1, 1]), torch.tensor([1] * 40), "worst") == ""


def test_last_with_an_average_is_the_average(tiny_net: Net, tiny_data: Data) -> None:
    found = fit(tiny_net(), tiny_data(), PGDAT(), methods=[EMA(decay=0.5)], schedule=SHORT, validation=0, select="last")
    assert (found.chosen.candidate, found.chosen.epoch) == ("ema", 2)
    average = found.state.exports["ema"]
    assert all(torch.equal(tensor, average[name]) for name, tensor in found.model.state_dict().items())
    assert not torch.equal(found.state.weights["head.weight"], average["head.weight"])


def test_what_was_measured_is_what_the_weights_do(tiny_net: Net, tiny_data: Data) -> None:
    """The counts beside the chosen weights are those of an attack on them, on the same images."""
    from robustfair.attacks.predict import tally_batches

    data, held = tiny_data((10, 8, 6)), tiny_data((5, 5, 5), seed=4)
    objective = Trades(eps=0.1, steps=2)
    found = fit(tiny_net(), data, objective, methods=CFA, schedule=SHORT, validation=held, select="worst")
    again = tally_batches(found.model, evaluation_batches(held, 500), 3, objective.evaluation_attack)
    record = found.history[found.chosen.epoch - 1]["validation"][found.chosen.candidate]
    assert record["robust"] == again.robust_pred_true.diagonal().tolist()
    assert record["clean"] == again.clean_pred_true.diagonal().tolist()
    assert found.chosen.score == pytest.approx(float(again.robust.min()))
    assert found.history[0]["train"]["count"] == [10, 8, 6], "a data set of its own takes nothing out of training"


def test_standard_training_is_selected_by_clean_accuracy(tiny_net: Net, tiny_data: Data) -> None:
    found = fit(tiny_net(), tiny_data(), Standard(), schedule=SHORT, validation=0.25, select="average")
    record = found.history[found.chosen.epoch - 1]["validation"]["model"]
    assert record["robust"] is None
    assert found.chosen.score == pytest.approx(sum(record["clean"]) / sum(record["count"]))


def test_selection_without_validation_is_refused(tiny_net: Net, tiny_data: Data) -> None:
    with pytest.raises(ConfigError, match="`select='last'`"):
        fit(tiny_net(), tiny_data(), PGDAT(), schedule=SHORT, validation=0)
    with pytest.raises(ConfigError):
        fit(tiny_net(), tiny_data(), PGDAT(), schedule=SHORT, validation=1.5)


def test_a_method_that_measures_is_refused_without_validation(tiny_net: Net, tiny_data: Data) -> None:
    def at_epoch(self: Method, state: State, run: Any) -> State:
        run.validate()
        return state

    method = of_class("measures", at_epoch=at_epoch)
    with pytest.raises(ConfigError, match="a method measures on it"):
        fit(tiny_net(), tiny_data(), PGDAT(), methods=[method], schedule=SHORT, validation=0, select="last")


def test_measuring_twice_at_a_boundary_costs_one_pass(tiny_net: Net, tiny_data: Data) -> None:
    calls = []

    def at_epoch(self: Method, state: State, run: Any) -> State:
        calls.append((run.validate(), run.validate()))
        return state

    found = fit(
        tiny_net(),
        tiny_data(),
        PGDAT(eps=0.1),
        methods=[of_class("measures", at_epoch=at_epoch)],
        schedule=SHORT,
        validation=0.25,
    )
    assert len(calls) == 3
    assert all(one is two for one, two in calls)
    assert found.history[0]["validation"]["model"]["robust"] == calls[1][0].robust_pred_true.diagonal().tolist()


def test_weights_changed_at_a_boundary_are_measured_anew(tiny_net: Net, tiny_data: Data) -> None:
    """A method with the claim "model" may first measure, then change the weights: the record is of what it leaves."""

    def at_epoch(self: Method, state: State, run: Any) -> State:
        run.validate()
        with torch.no_grad():
            run.model.head.weight.zero_()
            run.model.head.bias.zero_()[run.epoch] = 9
        return state

    method = of_class("flattens", claims=frozenset({"model"}), at_epoch=at_epoch)
    schedule = Schedule(epochs=2, lr=1e-4, batch_size=7)
    found = fit(tiny_net(), tiny_data(), PGDAT(eps=0.1), methods=[method], schedule=schedule, validation=0.25)
    assert [record["validation"]["model"]["clean"] for record in found.history] == [[0, 3, 0], [0, 0, 3]]


# Divergence


class BreaksAt(nn.Module):
    """The network behind it, but NaN from its n-th training pass on."""

    def __init__(self, inner: nn.Module, passes: int) -> None:
        super().__init__()
        self.inner, self.left = inner, passes

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        if self.training and torch.is_grad_enabled():
            self.left -= 1
        return logits * torch.nan if self.left < 0 else logits


def test_a_loss_that_is_not_a_number_stops_with_epoch_step_and_class_state(tiny_net: Net, tiny_data: Data) -> None:
    saved: list[TrainState] = []
    schedule = Schedule(epochs=3, lr=0.01, batch_size=9)
    with pytest.raises(DivergedError, match="epoch 1, step 2") as caught:
        fit(
            BreaksAt(tiny_net(), 4 + 2),
            tiny_data(),
            PGDAT(eps=0.1, steps=1),
            methods=[CCM(begin=1), EMA()],
            schedule=schedule,
            validation=0,
            select="last",
            save=saved.append,
        )
    report = caught.value.report
    assert (report["epoch"], report["step"], report["lr"]) == (1, 2, 0.01)
    robust = saved[0].history[0]["train"]
    scale = [0.5 + h / n for h, n in zip(robust["robust"], robust["count"], strict=True)]
    assert report["class_state"]["ccm"]["scale"] == pytest.approx(scale)
    assert sum(report["train"]["count"]) == 3 * 9
    assert report["per_class"]["eps"] == pytest.approx([0.1 * s for s in scale], rel=1e-5)
    json.dumps(report, allow_nan=False)
    assert [state.epoch for state in saved] == [1]


@pytest.mark.parametrize("batch_size", [9, 1000])
@pytest.mark.parametrize("lr", [1e9, 1e25, 1e38])
def test_a_learning_rate_far_too_large_diverges_and_every_record_until_then_is_json(
    tiny_net: Net, tiny_data: Data, lr: float, batch_size: int
) -> None:
    def save(state: TrainState) -> None:
        json.dumps(state.history[-1], allow_nan=False)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.weights.values()), "saved what cannot go on"

    schedule = Schedule(epochs=12, lr=lr, kind="constant", batch_size=batch_size)
    with pytest.raises(DivergedError) as caught:
        fit(
            tiny_net(),
            tiny_data(),
            Trades(eps=0.1, steps=2),
            methods=CFA,
            schedule=schedule,
            validation=0.25,
            save=save,
        )
    json.dumps(caught.value.report, allow_nan=False)


# Precision


def test_bf16_runs_close_to_fp32_with_float32_weights(tiny_net: Net, tiny_data: Data) -> None:
    def run(precision: Any) -> Fitted:
        return fit(
            tiny_net(),
            tiny_data(),
            Trades(eps=0.05, steps=2),
            methods=CFA,
            schedule=Schedule(epochs=2, lr=0.01, batch_size=9),
            validation=0.25,
            precision=precision,
            select="last",
        )

    fp32, bf16 = run("fp32"), run("bf16")
    assert all(tensor.dtype != torch.bfloat16 for tensor in bf16.state.weights.values())
    assert bf16.history[-1]["loss"] == pytest.approx(fp32.history[-1]["loss"], rel=0.05)
    assert bf16.history[-1]["loss"] != fp32.history[-1]["loss"]
    for name, tensor in fp32.state.weights.items():
        torch.testing.assert_close(bf16.state.weights[name], tensor, rtol=0.05, atol=0.05)


def test_colour_images_train_too(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    def run() -> TrainState:
        return fit(tiny_net(channels=3), tiny_data(channels=3), PGDAT(), schedule=SHORT, validation=0.25).state

    assert differences(run(), run()) == []


@pytest.mark.parametrize("network", [Viewing, WritingOnImages])
@pytest.mark.parametrize(
    ("objective", "channels"),
    [
        (Standard(), 3),
        (PGDAT(norm="l2", start="zero", steps=2), 3),
        (PGDAT(steps=2), 1),
        (Trades(steps=2), 1),
    ],
    ids=["standard", "pgd-at", "pgd-at, grey", "trades, grey"],
)
def test_a_network_that_needs_copies_is_trained_as_one_that_does_not(
    tiny_data: Data, network: type[Plain], channels: int, objective: Objective
) -> None:
    """Attack and loss see the same images, so what is written on must be a copy.

    Random starts follow the layout of colour images, and a sign would magnify its roundings.
    """
    data = tiny_data((9,) * 4, channels=channels, size=8)

    def run(model: nn.Module) -> Fitted:
        ema = EMA(decay=0.5, buffers="reestimate")
        return fit(model, data, objective, methods=(ema,), schedule=SHORT, validation=0.25, select="last")

    model, twin = network(channels), Plain(channels)
    found, wanted = run(model), run(twin)
    assert found.model is model
    assert not any(module.training for module in model.modules())
    assert list(found.state.weights) == list(wanted.state.weights)
    for name, tensor in wanted.state.weights.items():
        torch.testing.assert_close(found.state.weights[name], tensor, rtol=1e-3, atol=1e-4)
    assert model.conv.weight.is_contiguous()
    assert channels == 1 or not twin.conv.weight.is_contiguous()


def test_a_network_trains_in_part_too_where_it_needs_copies(tiny_data: Data) -> None:
    model, data = Viewing(), tiny_data((9,) * 4, channels=3, size=8)
    before = snapshot(model)
    fit(model, data, PGDAT(steps=1), schedule=replace(SHORT, only=("head.weight",)), validation=0.25)
    assert [name for name, tensor in snapshot(model).items() if not torch.equal(before[name], tensor)] == [
        "head.weight"
    ]


def test_a_network_without_gradients_of_its_images_trains_on_clean_ones_alone(tiny_data: Data) -> None:
    data = tiny_data((9,) * 4, channels=3, size=8)
    with pytest.raises(ModelError, match="the gradient of the images cannot be taken through Reentrant"):
        fit(Reentrant(), data, PGDAT(), schedule=SHORT, validation=0.25)
    fit(Reentrant(), data, Standard(), schedule=SHORT, validation=0.25)


class WritingInTraining(Plain):
    """Darkens the images where they lie, as long as it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x *= 0.5
        return super().forward(x)


class DarkeningInTraining(Plain):
    """The same on copies."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5 if self.training else x)


def test_a_network_that_writes_on_images_in_training_alone_is_trained_as_one_that_does_not(tiny_data: Data) -> None:
    data = tiny_data((9,) * 4, channels=1, size=8)
    writing, twin = WritingInTraining(1), DarkeningInTraining(1)
    for model in (writing, twin):
        objective = Trades(steps=2, attack_mode="train_frozen")
        fit(model, data, objective, schedule=SHORT, validation=0, select="last")
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(writing.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


class Checkpointing(Plain):
    """Computes its features anew in the backward pass."""

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=False)


def test_a_network_that_checkpoints_trains_in_bf16_as_without_bundles(
    tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data((9,) * 4, channels=3, size=8)

    def weights() -> dict[str, Tensor]:
        fitted = fit(Checkpointing(), data, PGDAT(steps=2), schedule=SHORT, validation=0.25, precision="bf16")
        return dict(fitted.state.weights)

    wanted = weights()
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(bundle, "WIDEST", 8)
    found = weights()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
