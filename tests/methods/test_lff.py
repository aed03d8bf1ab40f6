from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import lff as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import AWP, CCR, EMA, LabelSmoothing, LfF, Method, compose
from robustfair.methods.lff import average_loss, generalised_cross_entropy, relative_difficulty
from robustfair.objectives import BAT, MART, PGDAT, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Differences = Callable[[TrainState, TrainState], list[str]]

N = 12
LABELS = torch.arange(N) % 3


def batches(seed: int, size: int = 5) -> list[Batch]:
    """One epoch over all images, in an order of its own."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(N, 1, 5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    order = torch.randperm(N, generator=rng)
    return [
        Batch(x=x[rows], y=LABELS[rows], index=rows, seed=0, x_adv=(x[rows] + 0.1).clamp(0, 1))
        for rows in order.split(size)
    ]


def stand_in(run: Run, objective: Objective, biased: nn.Module) -> Any:
    images = (torch.rand(N, 1, 5, 5),)  # whose classes come in turn, as LABELS
    return run(objective=objective, images=images, networks={"lff/biased": biased}, model=biased)


def train(net: nn.Module, data: ImageDataset, *methods: Method, objective: Any = None, **rest: Any) -> Fitted:
    options: dict[str, Any] = {"schedule": Schedule(epochs=2, lr=0.1, batch_size=7), "validation": 0.25} | rest
    return fit(net, data, objective or Standard(), methods=methods, **options)


# The loss and the averages


@pytest.mark.parametrize("objective", [Standard(), PGDAT(eps=0.1), Trades(eps=0.1)], ids=lambda o: o.name)
@pytest.mark.parametrize("gce", ["official", "paper"])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_three_epochs_are_those_of_plain_loops(
    tiny_net: Net, stand_in_run: Run, objective: Objective, gce: Any, decay: float
) -> None:
    """Losses, weights and averages; networks move between the epochs."""
    method, q = LfF(decay=decay, gce=gce), 0.7
    slow = {name: reference.Averages(LABELS.tolist(), decay) for name in ("biased", "debiased")}
    state: State = {}
    for epoch in range(3):
        model, biased = (tiny_net(seed=seed + epoch, dtype=torch.float64).eval() for seed in (0, 50))
        run = stand_in(stand_in_run, objective, biased)
        state = method.at_epoch(state, run)
        for batch in batches(epoch):
            batch = method.examples(batch, state, run)
            plain = objective(model, batch)
            loss = method.loss(plain, batch, state, run)
            images = batch.x_adv if objective.name == "pgd-at" else batch.x
            with torch.no_grad():
                logits = {"biased": biased(images).tolist(), "debiased": model(images).tolist()}
            y, index = batch.y.tolist(), batch.index.tolist()
            for name, averages in slow.items():
                averages.visit(index, reference.cross_entropies(logits[name], y))
            weights = reference.weights(slow["biased"], slow["debiased"], index)
            assert loss.coef["label"].tolist() == pytest.approx(weights, rel=1e-9)
            assert all(0 <= weight <= 1 for weight in weights)
            own = reference.official if gce == "official" else reference.generalised
            expected = [own(row, label, q) for row, label in zip(logits["biased"], y, strict=True)]
            assert (loss.coef["biased"] * loss.terms["biased"]).tolist() == pytest.approx(expected, rel=1e-9)
            state = method.after_step(state, batch, loss, run)
        for name, averages in slow.items():
            assert state[name].tolist() == pytest.approx(averages.values, rel=1e-9)


def test_the_first_visit_stores_the_loss_and_later_ones_move_it() -> None:
    zero, one = torch.tensor([0.0]), torch.tensor([1.0])
    first = average_loss(zero, torch.tensor([2.0]), zero, 0.7)
    assert first.item() == 2.0
    assert average_loss(first, torch.tensor([1.0]), one, 0.7).item() == pytest.approx(0.7 * 2 + 0.3)


def test_the_largest_loss_of_a_class_is_over_all_training_images(tiny_net: Net, stand_in_run: Run) -> None:
    """Also over images of other batches, and never over those of other classes."""
    method, biased = LfF(), tiny_net(dtype=torch.float64).eval()
    run = stand_in(stand_in_run, Standard(), biased)
    state = dict(method.at_epoch({}, run))
    state["biased"] = torch.zeros(N, dtype=torch.float64).index_fill(0, torch.tensor([0, 3]), 100.0)
    state["seen"] = torch.zeros(N, dtype=torch.float64).index_fill(0, torch.tensor([0, 3]), 1.0)
    batch = next(each for each in batches(0) if 6 in each.index.tolist() or 9 in each.index.tolist())
    batch = method.examples(batch, state, run)
    model = tiny_net(seed=3, dtype=torch.float64).eval()
    weights = method.loss(Standard()(model, batch), batch, state, run).coef["label"]
    for row, index in enumerate(batch.index.tolist()):
        if LABELS[index] == 0 and index not in (0, 3):
            assert weights[row] < 0.2
    assert float(weights[batch.y != 0].max()) > 0.3


def test_a_class_whose_losses_are_all_zero_gives_no_nan() -> None:
    assert relative_difficulty(torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_gradients_reach_each_network_from_its_own_term_alone(tiny_net: Net, stand_in_run: Run) -> None:
    """That of the model is W times the gradient of CE, W being held constant; that of the other does not know W."""
    q = 0.7
    for gce, factor in (("official", q), ("paper", 1.0)):
        model, biased = (tiny_net(seed=seed, dtype=torch.float64).eval() for seed in (0, 50))
        method, run = LfF(gce=gce), stand_in(stand_in_run, Standard(), biased)  # type: ignore[arg-type]
        state = method.at_epoch({}, run)
        batch = method.examples(batches(0)[0], state, run)
        loss = method.loss(Standard()(model, batch), batch, state, run)
        loss.total().backward()
        logits, other = model(batch.x), biased(batch.x)
        ce = nn.functional.cross_entropy(logits, batch.y, reduction="none")
        plain = torch.autograd.grad((loss.coef["label"] * ce).mean(), list(model.parameters()))
        for parameter, expected in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
        rows = [
            reference.generalised_gradient(row, y, q) for row, y in zip(other.tolist(), batch.y.tolist(), strict=True)
        ]
        by_logits = factor * torch.tensor(rows, dtype=torch.float64) / len(rows)
        slow = torch.autograd.grad(other, list(biased.parameters()), by_logits)
        for parameter, expected in zip(biased.parameters(), slow, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("q", [1e-6, 0.5, 1.0])
def test_the_generalised_cross_entropy_lies_between_ce_and_one_minus_p(q: float) -> None:
    ce = torch.tensor([0.0, 1e-7, 0.3, 5.0, 200.0], dtype=torch.float64, requires_grad=True)
    value = generalised_cross_entropy(ce, q)
    (slope,) = torch.autograd.grad(value.sum(), ce)
    torch.testing.assert_close(slope, torch.exp(-q * ce))
    if q == 1:
        torch.testing.assert_close(value, 1 - torch.exp(-ce))
    if q == 1e-6:
        torch.testing.assert_close(value, ce, rtol=2e-4, atol=0)


def test_on_bat_both_networks_see_the_last_clean_point(tiny_net: Net, stand_in_run: Run) -> None:
    method, biased = LfF(), tiny_net(seed=50, dtype=torch.float64).eval()
    run = stand_in(stand_in_run, BAT(eps=0.1), biased)
    batch = batches(0)[0]
    batch = replace(batch, views={"last-clean": (batch.x + 0.3).clamp(0, 1)})
    seen = method.examples(batch, method.at_epoch({}, run), run).extra["lff"]
    assert torch.equal(seen, biased(batch.views["last-clean"]))
    assert not torch.allclose(seen, biased(batch.x))


# In a run


def test_the_model_of_the_run_is_the_debiased_network(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    states: list[TrainState] = []
    model = tiny_net()
    whole = train(model, tiny_data((10, 6, 8)), LfF(), save=states.append, select="last")
    assert whole.model is model
    assert list(whole.state.exports) == []
    assert list(whole.state.networks) == ["lff/biased"]
    other = whole.state.networks["lff/biased"]
    assert any(not torch.equal(other[name], tensor) for name, tensor in whole.state.weights.items())
    seen = whole.state.methods["lff"]
    assert seen["seen"].tolist() == [1.0] * len(seen["seen"])
    assert bool((seen["biased"] > 0).all())
    resumed = train(tiny_net(), tiny_data((10, 6, 8)), LfF(), resume=states[0], select="last")
    assert differences(whole.state, resumed.state) == []


def test_the_biased_network_is_drawn_by_the_seed_of_the_run_alone(tiny_net: Net, tiny_data: Data) -> None:
    def begun(seed: int, *beside: Method) -> dict[str, Tensor]:
        torch.manual_seed(len(beside))  # the stream of the user is not read, and not moved
        before = torch.random.get_rng_state()
        schedule = Schedule(epochs=1, lr=0.0, batch_size=7)
        state = train(tiny_net(), tiny_data(), LfF(), *beside, schedule=schedule, seed=seed, select="last").state
        assert torch.equal(before, torch.random.get_rng_state())
        return {name: tensor for name, tensor in state.networks["lff/biased"].items() if "weight" in name}

    one, again, other = begun(0), begun(0, EMA(init="random")), begun(1)
    weight = "conv.weight"
    assert torch.equal(one[weight], again[weight])
    assert not torch.equal(one[weight], other[weight])
    assert not torch.equal(one[weight], tiny_net().state_dict()[weight])


def test_the_biased_network_trains_by_its_own_loss_whatever_the_model_is(tiny_net: Net, tiny_data: Data) -> None:
    trained = [
        train(tiny_net(seed=seed), tiny_data(), LfF(), select="last").state.networks["lff/biased"] for seed in (0, 1)
    ]
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in trained[0].items())


def test_an_image_that_comes_twice_has_two_averages(tiny_net: Net, tiny_data: Data) -> None:
    data = tiny_data((4, 4, 4)).subset([0, 0, 0, *range(12)])
    state = train(tiny_net(), data, LfF(), validation=0, select="last").state.methods["lff"]
    assert len(state["seen"]) == 15


def test_weights_of_other_processes_are_known_to_this_one(tiny_net: Net, stand_in_run: Run) -> None:
    """With another process that sees the images of the other batch, both tables are those of both batches."""
    method, biased = LfF(), tiny_net(dtype=torch.float64).eval()
    model, (mine, theirs) = tiny_net(seed=1, dtype=torch.float64).eval(), batches(0, size=6)

    def after(batch: Batch, total: Callable[[Tensor], Tensor]) -> State:
        run = stand_in(stand_in_run, Standard(), biased)
        run.total = total
        state = method.at_epoch({}, run)
        batch = method.examples(batch, state, run)
        return method.after_step(state, batch, Standard()(model, batch), run)

    parts: list[Tensor] = []

    def kept(part: Tensor) -> Tensor:
        parts.append(part)
        return part

    alone = [after(batch, kept) for batch in (mine, theirs)]
    both = after(mine, lambda part: part + parts[1])
    for name in ("biased", "debiased", "seen"):
        torch.testing.assert_close(both[name], alone[0][name] + alone[1][name], rtol=0, atol=0)


# Beside others


@pytest.mark.parametrize("beside", [AWP(gamma=0.01), LabelSmoothing(), EMA(decay=0.5)], ids=lambda m: m.name)
def test_it_trains_beside_others_in_either_order(
    tiny_net: Net, tiny_data: Data, differences: Differences, beside: Method
) -> None:
    one = train(tiny_net(), tiny_data(), LfF(), beside)
    two = train(tiny_net(), tiny_data(), beside, LfF())
    assert differences(one.state, two.state) == []


def test_conflicts_and_wrong_values_are_refused() -> None:
    with pytest.raises(ConflictError, match=r"ccr and lff both set loss\.label"):
        compose(Trades(), [CCR(), LfF()])
    compose(MART(), [LfF()])
    for field, wrong in (("q", 0.0), ("q", 1.5), ("decay", -0.1), ("decay", 1.1), ("gce", "true")):
        with pytest.raises(ConfigError, match=f"^lff: {field} must be"):
            LfF(**{field: wrong})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"^lff: {field} must be"):
            read_composition(f"standard + lff({field}={wrong})")


def test_it_sets_what_it_claims(tiny_net: Net, stand_in_run: Run) -> None:
    method, biased = LfF(), tiny_net(dtype=torch.float64)
    run = stand_in(stand_in_run, Standard(), biased)
    state = method.at_epoch({}, run)
    given = batches(0)[0]
    batch = method.examples(given, state, run)
    assert replace(batch, extra={}) == given
    plain = Standard()(biased, batch)
    loss = method.loss(plain, batch, state, run)
    assert loss.weight is plain.weight
    assert isinstance(loss, Loss)
    assert not any(value.requires_grad for value in method.after_step(state, batch, loss, run).values())
