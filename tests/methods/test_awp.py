from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import awp as reference
from reference import training
from robustfair.data import ImageDataset, Loader
from robustfair.errors import ConfigError, ModelError
from robustfair.methods import AWP, EMA, Method
from robustfair.methods.awp import perturbation
from robustfair.models.modes import still_statistics
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.runs.checkpoint import read_state, write_state
from robustfair.runs.composition import read_composition
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Differences = Callable[[TrainState, TrainState], list[str]]

PGD, TRADES = PGDAT(eps=0.08, steps=2), Trades(eps=0.08, steps=2, beta=6)
SCHEDULE = Schedule(epochs=2, lr=0.05, milestones=(0.5,), batch_size=7, weight_decay=5e-4, momentum=0.9)
STEP = Schedule(epochs=1, lr=0.05, batch_size=24, weight_decay=5e-4)
CLASS_WEIGHT = (0.5, 3.0, 1.0)
MATRICES = ["conv.weight", "head.weight"]


class Weighs(Method):
    """A weight per class, as methods of the fairness papers set it."""

    name = "weighs"
    claims = frozenset({"loss.weight", "role.class_weight"})
    factor = torch.tensor(CLASS_WEIGHT)

    def loss(self, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        return loss.weighted(self.factor[batch.y])


class Tenfold(Weighs):
    """Ten times the loss."""

    factor = torch.full((3,), 10.0)


class Look(Method):
    """Keeps what `see` finds within the scopes of the methods before it in the list."""

    def __init__(self, name: str, see: Callable[..., Any]) -> None:
        self.name, self.see, self.found = name, see, []  # type: ignore[misc]

    @contextmanager
    def around_gradient(self, run: Any, batch: Batch, loss_at: Any, state: State) -> Iterator[None]:
        self.found.append(self.see(run.model, loss_at))
        yield


class Parts(nn.Module):
    """Convolution, batch norm, a matrix that is not called weight, a layer without effect and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.mixing = nn.Parameter(torch.randn(4, 4))
            self.silent, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            nn.init.uniform_(self.norm.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x.double()))).mean((2, 3)) @ self.mixing
        return self.head(h + 0 * self.silent(h))


class Scales(nn.Module):
    """Batch norm, a scale and a bias: every parameter has one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, -1.0, 0.5])), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).square().mean((2, 3))
        return h * self.weight + self.bias


def trained(
    model: nn.Module, data: ImageDataset, objective: Objective, *methods: Method, schedule: Schedule = STEP, **rest: Any
) -> Fitted:
    return fit(model, data, objective, methods=methods, schedule=schedule, validation=0, select="last", **rest)


def seen(
    see: Callable[..., Any],
    model: nn.Module,
    data: ImageDataset,
    objective: Objective,
    *methods: Method,
    **rest: Any,
) -> list[tuple[Any, Any]]:
    """What `see` finds outside and inside the scope of the methods, at every step of a run."""
    outside, inside = Look("outside", see), Look("inside", see)
    trained(model, data, objective, outside, *methods, inside, **rest)
    return list(zip(outside.found, inside.found, strict=True))


def weights(model: nn.Module, loss_at: object) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def entries(model: nn.Module, loss_at: object) -> dict[str, Tensor]:
    return deepcopy(dict(model.state_dict()))


def lengths(model: nn.Module, data: ImageDataset, *methods: Method, objective: Objective = PGD, **rest: Any) -> Any:
    """||v|| / ||w|| by name, at the first step."""
    w, moved = seen(weights, model, data, objective, *methods, **rest)[0]
    return {name: float((moved[name] - w[name]).norm() / w[name].norm()) for name in w}


# Against a plain loop with a proxy network


CASES: dict[str, tuple[Objective, AWP, float]] = {
    "pgd-at": (PGD, AWP(gamma=0.05), 1e-6),
    "pgd-at, rate of the proxy": (PGD, AWP(gamma=0.05, proxy_lr=0.01), 1e-9),
    "trades": (TRADES, AWP(gamma=0.05), 1e-6),
    "trades, rate of the proxy": (TRADES, AWP(gamma=0.05, proxy_lr=0.01), 1e-9),
    "from the second epoch on": (TRADES, AWP(gamma=0.05, begin=1), 1e-6),
    "three steps": (PGD, AWP(gamma=0.05, steps=3), 1e-6),
    "three steps, rate of the proxy": (TRADES, AWP(gamma=0.05, steps=3, proxy_lr=0.01), 1e-9),
    "all layers": (PGD, AWP(gamma=0.05, include_1d=True), 1e-6),
    "in place": (PGD, AWP(gamma=0.05, mode="inplace"), 1e-6),
    "in place, two steps": (TRADES, AWP(gamma=0.05, mode="inplace", steps=2), 1e-6),
}


def by_hand(model: nn.Module, data: ImageDataset, objective: Objective, method: AWP, **rest: Any) -> Any:
    """The model, its momentum and its average after the epochs of `SCHEDULE`."""
    loader = Loader(data, SCHEDULE.batch_size, augment="none", seed=0)
    buffers, average = reference.train(
        model,
        [[(b.x, b.y, b.rng("attack")) for b in loader.epoch(epoch)] for epoch in range(SCHEDULE.epochs)],
        objective=objective.name,
        eps=0.08,
        step_size=0.02,
        steps=2,
        beta=6.0,
        lr=lambda epoch, step: 0.05 if epoch == 0 else 0.005,
        momentum=SCHEDULE.momentum,
        weight_decay=SCHEDULE.weight_decay,
        begin=method.begin,
        ascents=method.steps,
        include_1d=method.include_1d,
        inplace=method.mode == "inplace",
        **{"gamma": method.gamma, **rest},
    )
    return dict(model.state_dict()), buffers, average


def furthest(found: Fitted, state: dict[str, Tensor], buffers: dict[str, Tensor]) -> float:
    """Largest difference in weights, running statistics and momentum."""
    momentum = {name.removesuffix("/momentum_buffer"): tensor for name, tensor in found.state.optimizer.items()}
    assert momentum.keys() == buffers.keys()
    pairs = [(found.state.weights[name], tensor) for name, tensor in state.items()]
    pairs += [(momentum[name], tensor) for name, tensor in buffers.items()]
    return max(float((ours - slow).abs().max()) for ours, slow in pairs)


@pytest.mark.parametrize("network", ["tiny", "parts"])
@pytest.mark.parametrize("case", CASES)
def test_two_epochs_equal_a_plain_loop_with_a_proxy(tiny_net: Net, tiny_data: Data, case: str, network: str) -> None:
    objective, method, tolerance = CASES[case]
    data = tiny_data((10, 8, 6))
    model = tiny_net(dtype=torch.float64) if network == "tiny" else Parts()
    if network == "tiny":
        nn.init.zeros_(model.conv.bias)  # before batch norm its gradient is rounding alone, and so is its direction
    twin, plain = deepcopy(model), deepcopy(model)
    found = trained(model, data, objective, method, schedule=SCHEDULE)
    assert furthest(found, *by_hand(twin, data, objective, method)[:2]) < tolerance
    assert furthest(found, *by_hand(plain, data, objective, method, gamma=0.0)[:2]) > 1e-3


@pytest.mark.parametrize(
    "kind",
    [{"nesterov": True}, {"optimizer": "adam", "lr": 0.01}, {"momentum": 0.0}, {"kind": "one-cycle"}],
    ids=["nesterov", "adam", "no momentum", "one-cycle"],
)
def test_any_optimizer_steps_from_the_perturbed_weights(tiny_net: Net, tiny_data: Data, kind: dict[str, Any]) -> None:
    """Torch's own optimizer at w + v, decay included, and v subtracted afterwards, as the codes do."""
    schedule, data = replace(SCHEDULE, weight_decay=0.05, **kind), tiny_data((10, 8, 6))
    twin = tiny_net(dtype=torch.float64)
    twin.conv.bias = None  # before batch norm its gradient is rounding alone, which Adam makes a whole step of
    model = deepcopy(twin)
    optimizer = schedule.build_optimizer(twin.parameters())
    loader = Loader(data, schedule.batch_size, augment="none", seed=0)
    for epoch in range(schedule.epochs):
        for step, b in enumerate(loader.epoch(epoch)):
            ball = {"eps": torch.full_like(b.x[:, 0, 0, 0], 0.08), "step_size": 0.02, "steps": 2, "kind": "uniform"}
            x_adv = training.attack(twin, b.x, b.y, b.rng("attack"), **ball)
            loss_of = partial(reference.loss, x=b.x, x_adv=x_adv, y=b.y, objective="pgd-at")
            v = reference.perturbation(twin, loss_of, gamma=0.05, rate=1.0)
            optimizer.param_groups[0]["lr"] = schedule.lr_at(epoch, step, loader.steps_per_epoch)
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter += v[name]
            optimizer.zero_grad()
            loss_of(twin).backward()
            optimizer.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter -= v[name]
    found = trained(model, data, PGD, AWP(gamma=0.05), schedule=schedule).state.weights
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("direction", ["objective", "edited"])
def test_the_direction_may_take_the_weights_of_classes_or_not(tiny_net: Net, tiny_data: Data, direction: Any) -> None:
    data, method = tiny_data((10, 8, 6)), AWP(gamma=0.05, direction=direction)
    found = trained(tiny_net(dtype=torch.float64), data, TRADES, Weighs(), method, schedule=SCHEDULE)
    for weighted in (False, True):
        twin = tiny_net(dtype=torch.float64)
        slow = by_hand(twin, data, TRADES, method, class_weight=CLASS_WEIGHT, weighted_ascent=weighted)
        assert (furthest(found, *slow[:2]) < 1e-6) == (weighted == (direction == "edited"))


def test_an_average_beside_it_is_of_the_restored_weights(tiny_net: Net, tiny_data: Data) -> None:
    data, method = tiny_data((10, 8, 6)), AWP(gamma=0.05)
    current, averaged = EMA(decay=0.0, buffers="copy"), EMA(decay=0.9, buffers="copy")
    found = trained(tiny_net(dtype=torch.float64), data, PGD, method, averaged, schedule=SCHEDULE)
    average = by_hand(tiny_net(dtype=torch.float64), data, PGD, method, decay=0.9)[2]
    for name, tensor in average.items():
        torch.testing.assert_close(found.state.exports["ema"][name], tensor, rtol=0, atol=1e-6)
    for methods in ((method, current), (current, method)):
        found = trained(tiny_net(), data, PGD, *methods, schedule=SCHEDULE)
        assert all(torch.equal(tensor, found.state.weights[n]) for n, tensor in found.state.exports["ema"].items())


def test_momentum_receives_gradient_and_decay_at_the_perturbed_weights(tiny_net: Net, tiny_data: Data) -> None:
    def see(model: nn.Module, loss_at: Any) -> dict[str, Tensor]:
        with still_statistics(model):
            found = torch.autograd.grad(loss_at(model).total(), list(model.parameters()))
        pairs = zip(model.named_parameters(), found, strict=True)
        return {name: gradient + 0.1 * weight.detach() for (name, weight), gradient in pairs}

    schedule, model = replace(STEP, weight_decay=0.1), tiny_net(dtype=torch.float64)
    outside, inside = Look("outside", see), Look("inside", see)
    data = tiny_data((8, 8, 8))
    state = trained(model, data, TRADES, outside, AWP(gamma=0.05), inside, schedule=schedule).state
    for name, expected in inside.found[0].items():
        received = state.optimizer[f"{name}/momentum_buffer"]
        torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)
        if name in MATRICES:
            assert not torch.allclose(received, outside.found[0][name], rtol=1e-3, atol=1e-3)


# What is perturbed


def test_nothing_is_perturbed_with_gamma_zero(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    for objective in (PGD, TRADES, Standard()):
        plain = trained(tiny_net(dropout=0.2), tiny_data(), objective, schedule=SCHEDULE).state
        zero = trained(tiny_net(dropout=0.2), tiny_data(), objective, AWP(gamma=0), schedule=SCHEDULE).state
        assert differences(plain, zero) == []


ALL_WITH_EFFECT = ["conv.weight", "head.bias", "head.weight", "mixing", "norm.bias", "norm.weight"]


@pytest.mark.parametrize("objective", [PGD, TRADES], ids=["pgd-at", "trades"])
@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, MATRICES),
        ({"proxy_lr": 0.1}, MATRICES),
        ({"mode": "inplace"}, [*MATRICES, "mixing"]),
        ({"include_1d": True}, ALL_WITH_EFFECT),
        ({"include_1d": True, "mode": "inplace"}, ALL_WITH_EFFECT),
    ],
    ids=str,
)
def test_v_is_gamma_long_on_matrices_called_weight_and_zero_elsewhere(
    tiny_data: Data, objective: Objective, options: dict[str, Any], moved: list[str]
) -> None:
    """Zero also where the loss does not depend on a parameter, or only through a factor of zero."""
    found = lengths(Parts(), tiny_data((8, 8, 8)), AWP(gamma=0.02, **options), objective=objective)
    assert sorted(name for name, ratio in found.items() if ratio != 0) == sorted(moved)
    assert [found[name] for name in moved] == pytest.approx([0.02] * len(moved), rel=1e-6)


def test_a_parameter_without_gradient_stays_as_it_is(tiny_data: Data) -> None:
    model = Parts()
    before = deepcopy(model.unused.state_dict())
    found = trained(model, tiny_data((8, 8, 8)), TRADES, AWP(gamma=0.02, include_1d=True), schedule=SCHEDULE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unused.state_dict().items())
    assert all(bool(tensor.isfinite().all()) for tensor in found.state.weights.values())


def test_a_tensor_of_zeros_is_not_perturbed() -> None:
    for weight, direction in ((torch.zeros(2, 3), torch.ones(2, 3)), (torch.ones(2, 3), torch.zeros(2, 3))):
        assert torch.equal(perturbation(weight, direction, 0.1), torch.zeros(2, 3))


def test_the_rate_of_a_proxy_rounds_in_single_precision(tiny_net: Net, tiny_data: Data) -> None:
    """The smaller it is the more: what the official codes see as a direction is a difference of two weights."""

    def v(dtype: torch.dtype, rate: float | None) -> Tensor:
        method = AWP(gamma=0.05, proxy_lr=rate)
        w, moved = seen(weights, tiny_net(dtype=dtype), tiny_data((8, 8, 8)), TRADES, method)[0]
        return (moved["conv.weight"] - w["conv.weight"]).double()

    def error(dtype: torch.dtype, rate: float) -> float:
        exact = v(dtype, None)
        return float((v(dtype, rate) - exact).norm() / exact.norm())

    assert error(torch.float32, 0.1) < 1e-5
    assert 1e-5 < error(torch.float32, 1e-4) < 1e-2
    assert 0 < error(torch.float64, 1e-4) < 1e-9


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"proxy_lr": 0.01}, {"mode": "inplace"}], ids=str)
def test_v_does_not_depend_on_the_scale_of_the_loss(tiny_net: Net, tiny_data: Data, options: dict[str, Any]) -> None:
    method = AWP(gamma=0.02, direction="edited", **options)
    data = tiny_data((8, 8, 8))
    once = seen(weights, tiny_net(dtype=torch.float64), data, TRADES, method)
    tenfold = seen(weights, tiny_net(dtype=torch.float64), data, TRADES, Tenfold(), method)
    for name, tensor in once[0][1].items():
        torch.testing.assert_close(tensor, tenfold[0][1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [PGD, TRADES], ids=["pgd-at", "trades"])
@pytest.mark.parametrize("gamma", [1e-4, 1e-3, 1e-2])
def test_the_loss_is_larger_at_the_perturbed_weights(
    tiny_net: Net, tiny_data: Data, objective: Objective, gamma: float
) -> None:
    def see(model: nn.Module, loss_at: Any) -> float:
        with still_statistics(model), torch.no_grad():
            return float(loss_at(model).total())

    for seed in range(4):
        model = tiny_net(seed=seed, dtype=torch.float64)
        pairs = seen(see, model, tiny_data(seed=seed), objective, AWP(gamma=gamma), schedule=SCHEDULE)
        assert all(inside > outside for outside, inside in pairs)


@pytest.mark.parametrize(
    ("objective", "gamma"),
    [(PGD, 0.01), (TRADES, 0.005), (MART(steps=1), 0.005), (ARoW(steps=1), 0.005), (FGSMAT(), 0.005)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_default_gamma_is_that_of_the_codes(
    tiny_net: Net, tiny_data: Data, objective: Objective, gamma: float
) -> None:
    found = lengths(tiny_net(dtype=torch.float64), tiny_data(), AWP(), objective=objective)
    assert found["conv.weight"] == pytest.approx(gamma, rel=1e-6)


def test_only_what_is_trained_is_perturbed(tiny_net: Net, tiny_data: Data) -> None:
    schedule = replace(STEP, only=("head.weight",))
    for options in ({}, {"include_1d": True}, {"mode": "inplace"}):
        model = tiny_net(dtype=torch.float64)
        before = deepcopy(model.state_dict())
        found = lengths(model, tiny_data(), AWP(gamma=0.02, **options), schedule=schedule)
        assert {name: ratio for name, ratio in found.items() if ratio} == {"head.weight": pytest.approx(0.02)}
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == ["head.weight"]


# What comes back


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"include_1d": True}, {"mode": "inplace"}], ids=str)
def test_weights_come_back_bit_for_bit(tiny_net: Net, tiny_data: Data, options: dict[str, Any], precision: Any) -> None:
    model = tiny_net()
    before = weights(model, None)
    schedule = replace(SCHEDULE, lr=0.0)
    trained(model, tiny_data(), TRADES, AWP(gamma=0.3, **options), schedule=schedule, precision=precision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model, None).items())


@pytest.mark.parametrize("where", ["inside", "in the pass that finds v"])
def test_weights_and_statistics_come_back_after_an_error(tiny_net: Net, tiny_data: Data, where: str) -> None:
    model = tiny_net()
    before = weights(model, None)

    def see(model: nn.Module, loss_at: object) -> None:
        assert not torch.equal(model.conv.weight, before["conv.weight"])
        raise RuntimeError("stop")

    def fail(module: nn.Module, inputs: object) -> None:
        if not torch.equal(model.conv.weight, before["conv.weight"]):
            raise RuntimeError("stop")

    if where == "inside":
        method: list[Method] = [AWP(gamma=0.1), Look("look", see)]
    else:
        model.register_forward_pre_hook(fail)
        method = [AWP(gamma=0.1, steps=2)]
    with pytest.raises(RuntimeError, match="stop"):
        trained(model, tiny_data(), PGD, *method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model, None).items())
    assert model.norm.track_running_stats


@pytest.mark.parametrize(
    ("mode", "steps", "passes"), [("proxy", 1, 0), ("proxy", 3, 0), ("inplace", 1, 1), ("inplace", 2, 2)]
)
def test_running_statistics_stay_still_in_the_extra_pass_of_a_proxy_alone(
    tiny_net: Net, tiny_data: Data, mode: Any, steps: int, passes: int
) -> None:
    for objective, per_pass in ((PGD, 1), (TRADES, 2)):
        method = AWP(gamma=0.02, mode=mode, steps=steps)
        ((outside, inside),) = seen(entries, tiny_net(), tiny_data((8, 8, 8)), objective, method)
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.equal(outside[name], inside[name]) == (mode == "proxy")
        counter = "norm.num_batches_tracked"
        assert int(inside[counter] - outside[counter]) == passes * per_pass


def test_a_clean_pass_of_the_attack_is_not_taken_for_one_at_other_weights(tiny_net: Net, tiny_data: Data) -> None:
    """Without AWP an attack on frozen batch statistics and the loss share their pass on clean images."""
    objective = replace(TRADES, attack_mode="train_frozen")
    found = {}
    for gamma in (0.0, 1e-12, 0.05):
        model = tiny_net(dtype=torch.float64)
        found[gamma] = trained(model, tiny_data(), objective, AWP(gamma=gamma), schedule=SCHEDULE).state
        assert int(found[gamma].weights["norm.num_batches_tracked"]) == 2 * found[gamma].step
    for name, tensor in found[0.0].weights.items():
        torch.testing.assert_close(found[1e-12].weights[name], tensor, rtol=0, atol=1e-9)
    assert not torch.allclose(found[0.05].weights["conv.weight"], found[0.0].weights["conv.weight"], atol=1e-3)


# Runs


def test_the_first_epochs_may_go_without(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    def run(*methods: Method) -> list[TrainState]:
        states: list[TrainState] = []
        trained(tiny_net(), tiny_data(), TRADES, *methods, schedule=replace(SCHEDULE, epochs=3), save=states.append)
        return states

    plain, late = run(), run(AWP(begin=2))
    assert [differences(*pair) == [] for pair in zip(plain, late, strict=True)] == [True, True, False]
    assert AWP(begin=2).remark(3) is None
    assert "never act" in str(AWP(begin=2).remark(2))


@pytest.mark.parametrize("options", [{}, {"steps": 2, "mode": "inplace"}, {"begin": 1}], ids=str)
def test_a_run_goes_on_exactly_from_files(
    tiny_net: Net, tiny_data: Data, differences: Differences, tmp_path: Path, options: dict[str, Any]
) -> None:
    def run(**rest: Any) -> TrainState:
        return trained(tiny_net(dropout=0.2), tiny_data(), TRADES, AWP(**options), schedule=SCHEDULE, **rest).state

    states: list[TrainState] = []
    whole = run(save=states.append)
    write_state(tmp_path, states[0], {})
    assert differences(whole, run(resume=read_state(tmp_path, states[0].history))) == []


def test_bf16_is_perturbed_as_much_and_close_to_float32(tiny_net: Net, tiny_data: Data) -> None:
    found = lengths(tiny_net(), tiny_data(), AWP(gamma=0.02), objective=TRADES, precision="bf16")
    assert {name: ratio for name, ratio in found.items() if ratio} == {
        "conv.weight": pytest.approx(0.02, rel=1e-5),
        "head.weight": pytest.approx(0.02, rel=1e-5),
    }
    ends = {}
    for gamma, precision in ((0.2, "fp32"), (0.2, "bf16"), (0.0, "bf16")):
        model = tiny_net()
        options: dict[str, Any] = {"schedule": replace(SCHEDULE, lr=0.02), "precision": precision}
        ends[gamma, precision] = trained(model, tiny_data(), TRADES, AWP(gamma=gamma), **options).history[-1]["loss"]
    assert ends[0.2, "bf16"] == pytest.approx(ends[0.2, "fp32"], rel=0.05)
    assert ends[0.2, "bf16"] > 1.2 * ends[0.0, "bf16"]


def test_a_model_with_nothing_to_perturb_is_refused_before_any_step(
    tiny_net: Net, tiny_data: Data, stand_in_run: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=r"awp: the model has no trained tensor .*include_1d=true"):
        AWP().at_epoch({}, stand_in_run(model=Scales()))
    model = Scales()
    before = deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="awp"):
        trained(model, tiny_data(), PGD, AWP())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = lengths(model, tiny_data(), AWP(gamma=0.02, include_1d=True))
    assert [found["weight"], found["norm.weight"]] == pytest.approx([0.02, 0.02], rel=1e-5)
    with pytest.raises(ModelError, match="awp"):
        trained(tiny_net(), tiny_data(), PGD, AWP(), schedule=replace(STEP, only=("head.bias",)))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("gamma", -0.01),
        ("gamma", float("nan")),
        ("gamma", float("inf")),
        ("begin", -1),
        ("steps", 0),
        ("proxy_lr", 0.0),
        ("proxy_lr", -0.1),
        ("proxy_lr", float("inf")),
        ("direction", "uphill"),
        ("mode", "copy"),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^awp: {field} must be"):
        AWP(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^awp: {field} must be"):
        read_composition(f"pgd-at + awp({field}={wrong})")
