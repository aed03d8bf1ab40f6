from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import wat as reference
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import MaximiseKL
from robustfair.methods import CCM, CCR, WAT, Method, compose
from robustfair.methods.wat import expert_costs, expert_weights
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.training import Schedule, fit
from robustfair.values import Attack, Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

DENOMINATORS: tuple[Any, ...] = ("class", "images", "padded")
COSTS = (1.2, 2.0, 1.5, 1.566667)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def batch_of(b: int = 9) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x_adv)


# Costs and weights


def test_the_published_vector() -> None:
    weights = expert_weights(torch.tensor(COSTS, dtype=torch.float64), 0.1)
    assert weights.tolist() == pytest.approx([0.722702, 0.782894, 0.744712, 0.749693], abs=1e-6)
    assert weights.tolist() == pytest.approx(reference.weights([COSTS], 0.1))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_plain_exponentials_of_the_sum(seed: int) -> None:
    costs = 3 * torch.rand(5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = expert_weights(costs.sum(0), 0.1)
    close(weights, reference.weights(costs.tolist(), 0.1))
    assert float(weights.sum()) == pytest.approx(10)
    close(expert_weights(costs.sum(0) + 5.0, 0.1), weights.tolist())
    assert torch.equal(weights.argsort(), costs.sum(0).argsort()), "a larger cost is a larger weight"
    close(expert_weights(torch.full((11,), 7.0, dtype=torch.float64), 0.1), [10 / 11] * 11)


def test_costs_that_exponentials_cannot_hold_are_weighed() -> None:
    weights = expert_weights(torch.tensor([9e4, 9e4 + 10, 0.0], dtype=torch.float64), 0.1)
    close(weights, [2 / (1 + 2.718281828459045), 2 * 2.718281828459045 / (1 + 2.718281828459045), 0.0])


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("counts", [(8, 8, 8), (100, 3, 40)])
def test_costs_are_the_loop_over_images(denominator: Any, counts: tuple[int, ...]) -> None:
    y = [c for c, n in enumerate(counts) for _ in range(n)]
    values = torch.rand(len(y), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64).index_add_(0, torch.tensor(y), values)
    found = expert_costs(sums, torch.tensor(counts, dtype=torch.float64), denominator)
    close(found, reference.costs(values.tolist(), y, 3, denominator))
    if counts == (8, 8, 8):
        assert float(found[:3].mean()) == pytest.approx(float(found[3])), "the average's is the mean of the classes'"
        share = 24 / 128 if denominator == "padded" else 1.0
        close(found, [share * cost for cost in reference.costs(values.tolist(), y, 3, "class")])


def test_the_last_batch_of_the_code_counts_as_full() -> None:
    """Its 3,000 validation images are 24 batches of 128: a factor of 0.977."""
    count = torch.full((10,), 300.0, dtype=torch.float64)
    close(expert_costs(count, count, "padded"), [3000 / 3072] * 11)


# In a run


def test_the_first_epoch_is_twice_the_objective_or_nearly(tiny_net: Net, stand_in_run: Run) -> None:
    batch, run = batch_of(), stand_in_run(images=(batch_of().x,))
    plain = Trades()(tiny_net(dtype=torch.float64), batch)
    for init, factor in (("official", 2.0), ("normalised", 2 * 3 / 4)):
        method = WAT(init=init)  # type: ignore[arg-type]
        state = method.at_epoch({}, run)
        found = method.loss(plain, batch, state, run)
        close(found.per_example(), (factor * plain.per_example()).tolist())
        assert float(state["costs"].sum()) == 0


def test_equal_costs_leave_the_gradient_in_proportion(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64), batch_of()
    weights = expert_weights(torch.full((4,), 2.5, dtype=torch.float64), 0.1)
    totals = Trades()(model, batch), WAT().loss(Trades()(model, batch), batch, {"weights": weights}, stand_in_run())
    plain, ours = (torch.autograd.grad(loss.total(), list(model.parameters())) for loss in totals)
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(1.5 * a, b, rtol=1e-9, atol=1e-12)


def test_the_boundary_that_no_epoch_follows_measures_nothing(stand_in_run: Run) -> None:
    state = {"costs": torch.zeros(4), "weights": torch.ones(4)}
    assert WAT().at_epoch(state, stand_in_run(epoch=10)) is state


def test_costs_are_over_all_processes(stand_in_run: Run) -> None:
    """Twice the same images elsewhere change no cost; other images would."""
    x = torch.rand(7, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    run = stand_in_run(images=(x, x[:5]), epoch=1)
    begun = WAT().at_epoch({}, run)
    alone = WAT().at_epoch(begun, run)
    run.total = lambda part: 2 * part
    assert torch.equal(WAT().at_epoch(begun, run)["costs"], alone["costs"])
    run.total = lambda part: part + torch.tensor([1.0, 0.0, 0.0])
    assert not torch.equal(WAT().at_epoch(begun, run)["costs"], alone["costs"])


class Watch(Method):
    """Keeps the losses of the validation images by the formulas, and what WAT made of every step."""

    name = "watch"

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.costs: list[tuple[list[float], list[int]]] = []
        self.steps: list[tuple[int, list[int], list[float], float, float]] = []

    def at_epoch(self, state: State, run: Any) -> State:
        values, labels = [], []
        for batch in run.batches("validation"):
            eps = torch.full((len(batch.y),), 0.1, dtype=batch.x.dtype)
            attack = Attack(eps=eps, step_size=eps / 4, steps=2, goal=MaximiseKL(), start="gauss001", mode="eval")
            x_adv = pgd(run.engine.eager, batch.x, batch.y, attack, batch.rng("measure"))
            clean, adv = run.predict(batch.x).tolist(), run.predict(x_adv).tolist()
            values += reference.trades_losses(clean, adv, batch.y.tolist(), self.beta)
            labels += batch.y.tolist()
        self.costs.append((values, labels))
        return state

    def loss(self, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        plain = replace(loss, weight=torch.ones_like(loss.weight)).per_example().tolist()
        self.steps.append((run.epoch, batch.y.tolist(), loss.weight.tolist(), float(loss.total().detach()), plain))  # type: ignore[arg-type]
        return loss


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_run_is_that_of_the_reference(tiny_net: Net, tiny_data: Data, denominator: Any) -> None:
    """Weights of three epochs from the costs of the boundaries between them; the loss of every step."""
    watch = Watch(beta=6.0)
    fit(
        tiny_net(dtype=torch.float64),
        tiny_data((20, 12, 16), noise=110),
        Trades(eps=0.1, steps=2),
        methods=[WAT(eta=0.3, cost_denominator=denominator), watch],
        schedule=Schedule(epochs=3, lr=0.1, batch_size=11),
        validation=0.4,
        select="last",
    )
    history = [reference.costs(values, y, 3, denominator) for values, y in watch.costs[1:3]]
    expected = [[1.0] * 4, *(reference.weights(history[:epoch], 0.3) for epoch in (1, 2))]
    assert len(watch.steps) == 9
    for epoch, y, weight, total, plain in watch.steps:
        w = expected[epoch]
        assert weight == pytest.approx([w[c] + w[3] for c in y], rel=1e-6)
        assert total == pytest.approx(reference.loss(plain, y, w), rel=1e-6)


@pytest.mark.parametrize("objective", [PGDAT(steps=1), MART(steps=1), ARoW(steps=1), FGSMAT()], ids=lambda o: o.name)
def test_it_acts_on_every_adversarial_objective(tiny_net: Net, tiny_data: Data, objective: Objective) -> None:
    """The costs are the losses that the objective itself trains on, of its own attack."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(Method):
        name = "look"

        def at_epoch(self, state: State, run: Any) -> State:
            losses = [
                (run.objective(run.predict, b).per_example(), b.y)
                for b in run.batches("validation", run.objective.attacks)
            ]
            means = [torch.cat([loss[y == c] for loss, y in losses]).mean() for c in range(3)]
            seen.append((torch.stack(means), torch.cat([loss for loss, _ in losses]).mean()))
            return state

    state = fit(
        tiny_net(),
        tiny_data((12, 8, 8)),
        objective,
        methods=[WAT(), Look()],
        schedule=Schedule(epochs=2, lr=0.1, batch_size=9),
        validation=0.25,
        select="last",
    ).state.methods["wat"]
    classes, average = seen[1]
    assert state["costs"].tolist() == pytest.approx([*classes.tolist(), float(average)], rel=1e-6)


# Misuse


def test_a_run_of_one_epoch_is_remarked_upon() -> None:
    assert WAT().remark(2) is None
    assert "wat weighs classes from the second epoch on" in str(WAT().remark(1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"eta": -0.1}, "wat: eta must be a finite number >= 0"),
        ({"eta": float("nan")}, "wat: eta"),
        ({"init": "ones"}, "wat: init must be 'official' or 'normalised'"),
        ({"cost_denominator": "batches"}, "wat: cost_denominator must be 'class' or 'images' or 'padded'"),
    ],
)
def test_bad_settings_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WAT(**args)


def test_what_it_cannot_act_on_or_beside_is_refused() -> None:
    with pytest.raises(ConflictError, match="wat needs attacked images, and standard trains without an attack"):
        compose(Standard(), [WAT()])
    with pytest.raises(ConflictError, match="wat measures on held out images and this run has none: set validation"):
        compose(Trades(), [WAT()], validation=False)
    with pytest.raises(ConflictError, match=r"both set role\.class_weight"):
        compose(Trades(), [WAT(), CCR()])
    compose(Trades(), [WAT(), CCM()])
