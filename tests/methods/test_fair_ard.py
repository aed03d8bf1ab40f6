from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import attacks, losses
from reference import distillation as reference
from robustfair.attacks.pgd import watched_pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import CCR, FairARD, FriendlyAT, compose
from robustfair.methods.fair_ard import StillRight, class_weights
from robustfair.objectives import ARD, PGDAT, RSLAD, Standard, Trades
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Differences = Callable[[TrainState, TrainState], list[str]]

NO_RUN: Any = None


def weights(kappa: list[float], beta: float = 2.0, **rest: Any) -> list[float]:
    given = {"lowest": 5 / 6, "highest": 5 / 2} | rest
    return class_weights(torch.tensor(kappa, dtype=torch.float64), beta, **given).tolist()


def batch_of(b: int = 9, watched: list[int] | None = None) -> Batch:
    x = torch.rand(b, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.randn(b, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seen = None if watched is None else torch.tensor(watched)
    teacher = {"distil": logits, "distil_clean": logits}
    index = torch.arange(b)
    return Batch(x=x, y=index % 3, index=index, seed=1, x_adv=x.flip(0), watched=seen, teacher=teacher)


def test_the_published_vector() -> None:
    unclipped = weights([8, 4, 2], lowest=0, highest=1e9)
    assert unclipped == pytest.approx([0.142858, 0.571431, 2.285711], abs=1e-6)
    assert weights([8, 4, 2]) == pytest.approx([0.833333, 0.833333, 2.285711], abs=1e-6)
    before, after = reference.fair_weights([8, 4, 2])
    assert unclipped == pytest.approx(before, abs=1e-12)
    assert weights([8, 4, 2]) == pytest.approx(after, abs=1e-12)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.sampled_from([0.0, 0.5, 2.0, 4.0]))
def test_the_weights_are_the_loop_over_classes(kappa: list[float], beta: float) -> None:
    before, after = reference.fair_weights(kappa, beta)
    assert weights(kappa, beta, lowest=0, highest=1e9) == pytest.approx(before, rel=1e-9)
    assert weights(kappa, beta) == pytest.approx(after, rel=1e-9)
    assert sum(before) == pytest.approx(len(kappa))


def test_equal_steps_are_no_weights_and_fewer_steps_weigh_more() -> None:
    for kappa in ([3.0] * 4, [0.0] * 4, [10.0] * 4):
        assert weights(kappa) == pytest.approx([1.0] * 4, abs=1e-12)
    assert weights([1, 5, 9], beta=0.0) == [1, 1, 1]
    falling = weights([1, 2, 3, 4, 5], lowest=0, highest=1e9)
    assert sorted(falling, reverse=True) == falling
    assert len(set(falling)) == 5


def test_no_power_is_too_large() -> None:
    """1e-5 to the power -100 is no float64: the class that withstands nothing would end up without a weight."""
    assert weights([0.0, 5.0, 10.0], 100.0) == weights([0.0, 5.0, 10.0], 50.0) == [5 / 2, 5 / 6, 5 / 6]
    assert weights([4.0, 5.0, torch.nan], 1e6) == [2.0, 5 / 6, 1.0]


def test_clipped_weights_do_not_sum_to_the_number_of_classes_unless_asked_to() -> None:
    assert sum(weights([8, 4, 2])) == pytest.approx(3.952378, abs=1e-6)
    again = weights([8, 4, 2], renormalise=True)
    assert sum(again) == pytest.approx(3)
    assert again[2] / again[0] == pytest.approx(2.285711 / 0.833333, rel=1e-5)


def test_a_class_without_images_has_the_weight_one_and_no_share() -> None:
    nan = float("nan")
    assert weights([8, nan, 4, 2], lowest=0, highest=1e9) == pytest.approx([0.142858, 1, 0.571431, 2.285711], abs=1e-6)
    assert weights([nan, nan]) == [1, 1]


@pytest.mark.parametrize("objective", [ARD, RSLAD], ids=lambda cls: cls.name)
def test_kappa_is_the_number_of_steps_that_leave_a_right_point(tiny_net: Net, objective: Any) -> None:
    """Against the loop over pixels; labels are the predictions at x, so that images cross at different steps."""
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of(24)
    with torch.no_grad():
        model.head.bias -= model(batch.x).mean(0)
        y = model(batch.x).argmax(1)
    steps, size = 8, {"eps": 0.2, "step_size": 0.02}
    attack = FairARD().attack(objective(steps=steps, **size).attack(batch), batch, {}, NO_RUN)
    start = batch.x + 0.001
    _, seen = watched_pgd(model, batch.x, y, attack, torch.Generator(), x_init=start)
    goal, target = ("ce", None) if objective is ARD else ("soft", attack.target)
    each = {name: [value] * len(y) for name, value in size.items()}
    paths = attacks.pgd(model, batch.x, y, start, steps=steps, goal=goal, geometry="linf", target=target, **each)

    def is_right(label: int) -> Callable[[list[float]], bool]:
        return lambda point: losses.margin(attacks.logits_of(model, point, batch.x.shape[1:]), label) < 0

    expected = [reference.steps_survived(path, is_right(label)) for path, label in zip(paths, y.tolist(), strict=True)]
    assert seen is not None
    assert seen.tolist() == expected
    assert len(set(expected)) > 3


def test_an_epoch_is_the_mean_over_the_images_of_a_class(stand_in_run: Run) -> None:
    method, run = FairARD(), stand_in_run()
    state = method.at_epoch({}, run)
    assert state["weight"].tolist() == [1, 1, 1]
    seen = ([10, 2, 0, 8, 4, 1], [9, 3, 5])
    for watched in seen:
        state = method.after_step(state, batch_of(len(watched), watched), NO_RUN, run)
    assert state["weight"].tolist() == [1, 1, 1], "the first epoch is not weighted"
    state = method.at_epoch(state, run)
    _, expected = reference.fair_weights([(10 + 8 + 9) / 3, (2 + 4 + 3) / 3, (0 + 1 + 5) / 3])
    assert state["weight"].tolist() == pytest.approx(expected, abs=1e-12)
    assert state["weight"].dtype == torch.float64
    assert state["steps"].tolist() == state["count"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("objective", [ARD(alpha=0.5), RSLAD(), Trades()], ids=lambda objective: objective.name)
def test_the_loss_is_weighted_as_a_whole(tiny_net: Net, objective: Any) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    weight = torch.tensor([0.8, 1.0, 2.0], dtype=torch.float64)
    plain = objective(model, batch)
    weighted = FairARD().loss(plain, batch, {"weight": weight}, NO_RUN)
    expected = [value * [0.8, 1.0, 2.0][c] for value, c in zip(plain.per_example().tolist(), batch.y, strict=True)]
    assert weighted.total().item() == pytest.approx(sum(expected) / 9, rel=1e-12)
    assert weighted.coef is plain.coef


def trained(tiny_net: Net, tiny_data: Data, *methods: Any, objective: Any = None, **rest: Any) -> TrainState:
    objective = objective or ARD(teacher=tiny_net(seed=5), eps=0.1, steps=3)
    options = {"schedule": Schedule(epochs=3, batch_size=7), "validation": 0, "select": "last"} | rest
    return fit(tiny_net(), tiny_data((10, 6, 8)), objective, methods=methods, **options).state


def test_weights_of_one_are_the_objective_alone(tiny_net: Net, tiny_data: Data) -> None:
    plain = trained(tiny_net, tiny_data)
    counted = trained(tiny_net, tiny_data, FairARD(beta=0.0))
    assert all(torch.equal(tensor, counted.weights[name]) for name, tensor in plain.weights.items())
    weighted = trained(tiny_net, tiny_data, FairARD())
    assert not all(torch.equal(tensor, weighted.weights[name]) for name, tensor in plain.weights.items())
    assert weighted.methods["fair-ard"]["weight"].tolist() != [1, 1, 1]


def test_a_run_sees_the_steps_of_its_own_attack(tiny_net: Net, tiny_data: Data) -> None:
    """kappa of the first epoch, counted again from the same batches on weights that do not move."""
    kept: list[Batch] = []

    class Keep(FairARD):
        name = "keep"
        claims = frozenset()

        def attack(self, attack: Any, *rest: Any) -> Any:
            return attack

        def loss(self, loss: Any, *rest: Any) -> Any:
            return loss

        def after_step(self, state: Any, batch: Batch, *rest: Any) -> Any:
            kept.append(batch)
            return state

    objective = PGDAT(eps=0.1, steps=3)
    schedule = Schedule(epochs=1, batch_size=7, lr=0.0)
    state = trained(tiny_net, tiny_data, FairARD(), Keep(), objective=objective, schedule=schedule)
    model = tiny_net().eval()
    steps, count = torch.zeros(3), torch.zeros(3)
    for batch in kept:
        # batch norm's statistics move while training, so the count is that of the model of the first step alone
        attack = replace(objective.attack(batch), watch=StillRight())
        _, seen = watched_pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
        assert batch.watched is not None
        if batch is kept[0]:
            assert seen is not None
            assert torch.equal(seen, batch.watched)
        steps.index_add_(0, batch.y, batch.watched.float())
        count.index_add_(0, batch.y, torch.ones(len(batch.y)))
    expected = weights((steps / count).tolist())
    assert state.methods["fair-ard"]["weight"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    saved: list[TrainState] = []
    whole = trained(tiny_net, tiny_data, FairARD(), save=saved.append)
    for state in saved[:2]:
        assert differences(whole, trained(tiny_net, tiny_data, FairARD(), resume=state)) == []


def test_it_counts_beside_a_stop_rule(tiny_net: Net, tiny_data: Data) -> None:
    state = trained(tiny_net, tiny_data, FairARD(), FriendlyAT(tau=1), objective=PGDAT(eps=0.1, steps=3))
    assert float(state.methods["fair-ard"]["weight"].min()) >= 5 / 6


def test_who_may_not_act_beside_it() -> None:
    with pytest.raises(ConflictError, match="fair-ard needs attacked images, and standard trains without an attack"):
        compose(Standard(), [FairARD()])
    with pytest.raises(ConflictError, match=r"ccr and fair-ard both set role\.class_weight"):
        compose(Trades(), [CCR(), FairARD()])


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", -1), ("beta", float("nan")), ("lowest", 1.1), ("lowest", -0.1), ("highest", 0.9), ("renormalise", 1)],
)
def test_a_bad_value_is_an_error_with_owner_and_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^fair-ard: {field} must be .*got"):
        FairARD(**{field: value})


def test_the_watch_is_what_a_recorded_attack_may_have() -> None:
    from robustfair.training.capture import replayable

    batch = batch_of()
    for objective in (ARD(), RSLAD(), Trades()):
        attack: Any = objective.attack(batch)
        assert replayable(replace(attack, watch=StillRight()))
    assert StillRight() == StillRight()
    assert isinstance(StillRight().start(batch.y), Tensor)
