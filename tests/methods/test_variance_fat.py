from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import losses
from reference import variance_fat as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import MaximiseCE, MaximiseKL
from robustfair.methods import FAAL, FriendlyAT, Method, VarianceFAT, compose
from robustfair.methods.variance_fat import variance_of_present
from robustfair.objectives import MART, PGDAT, Objective, Standard, Trades
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Differences = Callable[[TrainState, TrainState], list[str]]

OBJECTIVES: list[Objective] = [PGDAT(), Trades(beta=6), MART()]
ROLE = frozenset({"role.class_weight"})


def batch_of(y: list[int]) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(len(y), 1, 5, 5, generator=rng, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)
    return Batch(x=x, y=torch.tensor(y), index=torch.arange(len(y)), seed=1, x_adv=x_adv)


def variance(method: VarianceFAT, values: Tensor, y: list[int], run: Any) -> Tensor:
    return method.variance(values, torch.tensor(y), method.at_epoch({}, run)["members"], run)


def run_of(stand_in_run: Run, classes: int, groups: list[int] | None = None) -> Any:
    run = stand_in_run(groups=None if groups is None else torch.tensor(groups))
    run.num_classes = classes
    return run


def train(net: Net, data: ImageDataset, *methods: Method, objective: Any = None, **rest: Any) -> Fitted:
    options: dict[str, Any] = {"validation": 0, "select": "last"} | rest
    objective = PGDAT(eps=0.1, steps=2) if objective is None else objective
    return fit(net(), data, objective, methods=methods, schedule=Schedule(epochs=2, lr=0.1, batch_size=7), **options)


# The variance


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_variance_is_the_loop_over_classes_and_super_classes(stand_in_run: Run, data: Any) -> None:
    classes = data.draw(st.integers(1, 7))
    images = data.draw(st.lists(st.tuples(st.integers(0, classes - 1), st.floats(0, 20)), min_size=1, max_size=30))
    y, values = [c for c, _ in images], [value for _, value in images]
    grouped = data.draw(st.booleans())
    groups = [c % data.draw(st.integers(1, classes)) for c in range(classes)] if grouped else None
    absent = data.draw(st.sampled_from(["skip", "zero"]))
    pad_to = data.draw(st.one_of(st.none(), st.integers(classes, 100)))
    method = VarianceFAT(absent=absent, pad_to=pad_to, superclass=grouped)
    if groups is not None:
        groups = [sorted(set(groups)).index(group) for group in groups]
    found = variance(method, torch.tensor(values, dtype=torch.float64), y, run_of(stand_in_run, classes, groups))
    entries = reference.entries(values, y, classes, groups=groups, absent=absent, pad_to=pad_to)
    assert found.item() == pytest.approx(reference.variance(entries), rel=1e-9, abs=1e-9)


def test_ninety_zeros_make_a_variance_small_and_dependent_on_the_mean(stand_in_run: Run) -> None:
    """Ten losses with a variance of 0.103 have 0.026 in a vector of 100."""
    rng = random.Random(0)
    drawn = [rng.gauss(0, 1) for _ in range(10)]
    spread = (0.103 / statistics.variance(drawn)) ** 0.5
    losses_of = [0.428 + spread * (value - statistics.mean(drawn)) for value in drawn]
    run, y = run_of(stand_in_run, 10), list(range(10))
    values = torch.tensor(losses_of, dtype=torch.float64)
    assert variance(VarianceFAT(), values, y, run).item() == pytest.approx(0.103)
    padded = VarianceFAT(pad_to=100, absent="zero")
    assert variance(padded, values, y, run).item() == pytest.approx(0.026, abs=5e-4)
    assert variance(padded, values, y, run).item() == pytest.approx(statistics.variance([*losses_of, *[0.0] * 90]))
    assert variance(padded, values + 1, y, run) > variance(padded, values, y, run)
    assert variance(VarianceFAT(), values + 1, y, run).item() == pytest.approx(0.103)


def test_a_missing_class_is_left_out_or_a_loss_of_zero(stand_in_run: Run) -> None:
    run, values, y = run_of(stand_in_run, 4), torch.tensor([1.0, 3.0, 5.0]), [0, 0, 3]
    assert variance(VarianceFAT(), values, y, run).item() == pytest.approx(statistics.variance([2, 5]))
    zeros = VarianceFAT(absent="zero")
    assert variance(zeros, values, y, run).item() == pytest.approx(statistics.variance([2, 0, 0, 5]))


def test_super_classes_are_means_of_their_classes(stand_in_run: Run) -> None:
    run, values = run_of(stand_in_run, 6, [0, 1, 0, 1, 2, 0]), torch.tensor([1.0, 3.0, 5.0, 4.0])
    y = [0, 2, 3, 3]
    found = variance(VarianceFAT(superclass=True), values, y, run).item()
    assert found == pytest.approx(statistics.variance([2, 4.5]))
    found = variance(VarianceFAT(superclass=True, absent="zero"), values, y, run).item()
    assert found == pytest.approx(statistics.variance([4 / 3, 4.5 / 2, 0]))


def test_one_class_alone_has_no_variance_and_no_gradient(stand_in_run: Run) -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    found = variance(VarianceFAT(), values, [1, 1, 1], run_of(stand_in_run, 3))
    found.backward()
    assert found.item() == 0
    assert values.grad.tolist() == [0.0] * 3  # type: ignore[union-attr]
    nothing = variance_of_present(torch.zeros(2), torch.zeros(2))
    assert nothing.item() == 0


def test_the_gradient_weighs_hard_classes_up_and_easy_ones_down(stand_in_run: Run) -> None:
    y, numbers = [0, 2, 2, 1, 1, 1], [0.3, 2.0, 1.5, 0.1, 0.9, 0.2]
    values = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    variance(VarianceFAT(), values, y, run_of(stand_in_run, 3)).backward()
    assert values.grad is not None
    slope = values.grad.tolist()
    assert slope == pytest.approx(reference.slope(numbers, y), abs=1e-12)
    assert sum(slope) == pytest.approx(0, abs=1e-12)
    assert slope[1] > 0 > slope[3]


def test_equal_class_means_add_no_value_and_no_gradient(stand_in_run: Run) -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    found = variance(VarianceFAT(), values, [0, 0, 1, 1, 2, 2], run_of(stand_in_run, 3))
    found.backward()
    assert found.item() == 0
    assert values.grad.tolist() == [0.0] * 6  # type: ignore[union-attr]


# The loss


@pytest.mark.parametrize("alpha", [0.1, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_the_loss_is_that_of_the_objective_and_alpha_times_the_variance(
    tiny_net: Net, stand_in_run: Run, objective: Objective, alpha: float
) -> None:
    y = [0, 2, 1, 1, 2, 2, 2]
    model, batch, method, run = (
        tiny_net(dtype=torch.float64).eval(),
        batch_of(y),
        VarianceFAT(alpha=alpha),
        stand_in_run(),
    )
    plain = objective(model, batch)
    edited = method.loss(plain, batch, method.at_epoch({}, run), run)
    assert plain.out.adv is not None
    values = [losses.cross_entropy(z, c) for z, c in zip(plain.out.adv.tolist(), y, strict=True)]
    expected = plain.total().item() + alpha * reference.variance(reference.entries(values, y, 3))
    assert edited.total().item() == pytest.approx(expected, abs=1e-9)
    assert edited.terms["variance"].shape == edited.coef["variance"].shape == ()
    ours = torch.autograd.grad(edited.total() - plain.total(), plain.out.adv, retain_graph=True)[0]
    slopes = reference.slope(values, y)
    rows = [
        [alpha * s * g for g in losses.cross_entropy_gradient(z, c)]
        for s, z, c in zip(slopes, plain.out.adv.tolist(), y, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(rows, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_statistics_are_those_of_all_processes(stand_in_run: Run, monkeypatch: Any) -> None:
    run, parts = run_of(stand_in_run, 3), []
    values, y = torch.tensor([0.3, 2.0, 1.5, 0.1, 0.9, 0.2], dtype=torch.float64), [0, 2, 2, 1, 1, 1]
    whole = variance(VarianceFAT(), values, y, run)
    monkeypatch.setattr(run, "total", lambda part: parts.append(part) or part, raising=False)
    variance(VarianceFAT(), values[3:], y[3:], run)
    monkeypatch.setattr(run, "total", lambda part: part + parts.pop(0))
    torch.testing.assert_close(variance(VarianceFAT(), values[:3], y[:3], run), whole)


def test_alpha_zero_is_the_plain_run(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    plain = train(tiny_net, tiny_data()).state
    assert not [
        d for d in differences(plain, train(tiny_net, tiny_data(), VarianceFAT(alpha=0)).state) if "meth" not in d
    ]
    assert VarianceFAT(alpha=0.0).remark(1) == "variance-fat(alpha=0) adds nothing to the loss: it does nothing"
    assert VarianceFAT().remark(1) is None


@pytest.mark.parametrize("first", [True, False])
def test_weights_of_examples_leave_the_variance_alone_where_both_are_asked_for(
    tiny_net: Net, stand_in_run: Run, first: bool
) -> None:
    """One number of the batch is no example's: FAAL's weights, whose mean over the batch is not 1, do not reach it."""
    methods = [VarianceFAT(), FAAL()] if first else [FAAL(), VarianceFAT()]
    for order in (methods, methods[::-1]):
        with pytest.raises(
            ConflictError, match=r"both set role\.class_weight \(the balance between classes\): keep one"
        ):
            compose(Trades(), order)
    model, batch, run = tiny_net(dtype=torch.float64).eval(), batch_of([0, 2, 1, 1, 2, 2, 2]), stand_in_run()
    states = {"faal": {}, "variance-fat": VarianceFAT().at_epoch({}, run)}

    def total(*methods: Method) -> float:
        return compose(Trades(), methods, allow=ROLE).loss(model, batch, states, run).total().item()

    added = total(VarianceFAT()) - total()
    assert added > 1e-3
    assert abs(total(FAAL()) - total()) > 1e-3
    assert total(*methods) == pytest.approx(total(FAAL()) + added, rel=1e-12)


def test_both_train_to_the_same_bits_in_either_order(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    one, two = (
        train(tiny_net, tiny_data(), *methods, allow=ROLE).state
        for methods in ((FAAL(), VarianceFAT()), (VarianceFAT(), FAAL()))
    )
    assert differences(one, two) == []


# Attack, super-classes, and what is refused


def test_the_attack_is_the_objectives_or_pgd_on_the_cross_entropy(stand_in_run: Run) -> None:
    batch = batch_of([0, 1, 2])
    attack = Trades().attack(batch)
    assert VarianceFAT().attack(attack, batch, {}, stand_in_run()) is attack
    edited = VarianceFAT(goal="ce").attack(attack, batch, {}, stand_in_run())
    assert (edited.goal, edited.start, attack.goal) == (MaximiseCE(), "uniform", MaximiseKL())
    assert replace(edited, goal=attack.goal, start=attack.start) == attack
    assert VarianceFAT().claims == {"loss.variance", "role.class_weight"}
    assert VarianceFAT(goal="ce").claims == {"loss.variance", "role.class_weight", "attack.goal", "attack.start"}


def test_super_classes_come_with_the_data(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    grouped = replace(tiny_data((9, 6, 8)), groups=(0, 1, 0), group_names=("a", "b"))
    method = VarianceFAT(superclass=True)
    with_groups = train(tiny_net, grouped, method, Look()).state
    assert with_groups.methods["variance-fat"]["members"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert differences(with_groups, train(tiny_net, grouped, VarianceFAT(), Look()).state)
    message = "variance-fat: superclass must be false on data without super-classes, got True"
    with pytest.raises(ConfigError, match=message):
        train(tiny_net, tiny_data((9, 6, 8)), method, Look())


class Look(Method):
    """Fails if a step is taken on data that should have been refused before it."""

    name = "look"

    def prepare(self, batch: Batch, state: Any, run: Any) -> Batch:
        assert run.groups is not None
        return batch


@pytest.mark.parametrize("objective", [Trades(eps=0.1, steps=2), MART(eps=0.1, steps=2)], ids=lambda o: o.name)
def test_it_trains_on_the_attack_of_its_code(tiny_net: Net, tiny_data: Data, objective: Objective) -> None:
    state = train(tiny_net, tiny_data(), VarianceFAT(goal="ce"), FriendlyAT(tau=1), objective=objective).state
    assert len(state.history) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": -0.1}, "variance-fat: alpha must be a finite number >= 0"),
        ({"absent": "nan"}, "variance-fat: absent must be 'skip' or 'zero', got 'nan'"),
        ({"pad_to": 0}, "variance-fat: pad_to must be"),
        ({"goal": "kl"}, "variance-fat: goal must be 'objective' or 'ce', got 'kl'"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VarianceFAT(**given)


def test_a_vector_too_short_is_refused_before_the_first_step(tiny_net: Net, tiny_data: Data) -> None:
    message = "variance-fat: pad_to must be none, or at least 3, what the variance is over, got 2"
    with pytest.raises(ConfigError, match=message):
        train(tiny_net, tiny_data(), VarianceFAT(pad_to=2))


def test_an_objective_without_an_attack_is_refused() -> None:
    with pytest.raises(ConflictError, match="variance-fat needs attacked images, and standard trains without"):
        compose(Standard(), [VarianceFAT()])
