from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import distillation as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import ABSLD, FairARD, compose
from robustfair.methods.absld import tempered
from robustfair.objectives import ARD, RSLAD, Trades
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Forward, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Differences = Callable[[TrainState, TrainState], list[str]]

NO_RUN: Any = None


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(b: int = 9) -> Batch:
    x = torch.rand(b, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = 2 * normal(b, 3, seed=4)
    teacher = {"distil": logits, "distil_clean": logits}
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x.flip(0), teacher=teacher)


def state_of(t_adv: list[float], t_clean: list[float]) -> State:
    pair = {"temperature_adv": t_adv, "temperature_clean": t_clean}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in pair.items()}


def after(method: ABSLD, run: Any, steps: list[tuple[Tensor, Tensor, Tensor]]) -> State:
    """The state after an epoch of steps with these logits at x', at x, and labels."""
    state = method.at_epoch({}, run)
    for adv, clean, y in steps:
        batch = Batch(x=clean, y=y, index=y, seed=0)
        loss = Loss.of(Forward(clean=clean, adv=adv), distil=(adv[:, 0], 1.0))
        state = method.after_step(state, batch, loss, run)
    return method.at_epoch(state, run)


def test_the_published_vector() -> None:
    sums = torch.tensor([100.0, 140.0, 60.0], dtype=torch.float64)
    assert tempered(torch.ones(3, dtype=torch.float64), sums, 0.1).tolist() == pytest.approx([1, 0.9, 1.1], abs=1e-12)
    assert reference.next_temperatures([1, 1, 1], [100, 140, 60], 0.1) == pytest.approx([1, 0.9, 1.1], abs=1e-12)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.5, 5)), min_size=2, max_size=12),
    st.sampled_from([0.0, 0.1, 1.0, 7.0]),
)
def test_the_update_is_the_loop_over_classes(classes: list[tuple[float, float]], rate: float) -> None:
    losses, before = ([pair[i] for pair in classes] for i in (0, 1))
    ours = tempered(*(torch.tensor(v, dtype=torch.float64) for v in (before, losses)), rate)
    spread = max(losses) - min(losses)
    if spread == 0 or spread > 1e-9 * max(losses):  # else the largest gap is a rounding
        assert ours.tolist() == pytest.approx(reference.next_temperatures(before, losses, rate), abs=1e-6)
    assert 0.5 <= float(ours.min()) <= float(ours.max()) <= 5


def test_the_most_extreme_class_moves_by_exactly_the_rate_and_harder_ones_get_sharper_labels() -> None:
    losses = torch.tensor([3.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    moved = tempered(torch.full((4,), 2.0, dtype=torch.float64), losses, 0.25) - 2
    assert float(moved.abs().max()) == abs(float(moved[0])) == 0.25
    assert bool((moved[losses.argsort()].diff() < 0).all())


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [float("nan")] * 3])
def test_equal_losses_leave_the_temperatures(losses: list[float]) -> None:
    before = torch.tensor([1.0, 0.6, 4.0], dtype=torch.float64)
    assert torch.equal(tempered(before, torch.tensor(losses, dtype=torch.float64), 0.1), before)


def test_a_class_without_images_stays_and_does_not_count() -> None:
    absent = torch.tensor([100.0, float("nan"), 140.0, 60.0], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    assert tempered(ones, absent, 0.1).tolist() == pytest.approx([1, 1, 0.9, 1.1])
    assert reference.next_temperatures([1] * 4, [100, None, 140, 60], 0.1) == pytest.approx([1, 1, 0.9, 1.1])


@pytest.mark.parametrize("compat", [None, "official"])
def test_an_epoch_is_the_loop_over_images(stand_in_run: Run, compat: Any) -> None:
    """Unequal classes, several steps; the two temperatures follow the two losses."""
    run, method = stand_in_run(epoch=1), ABSLD(compat=compat)
    labels = ([0, 0, 1, 2, 0], [2, 0, 0, 1], [0, 1])
    steps = [(2 * normal(len(y), 3, seed=i), normal(len(y), 3, seed=10 + i), y) for i, y in enumerate(labels)]
    state = after(method, run, [(adv, clean, torch.tensor(y)) for adv, clean, y in steps])
    gather = reference.class_sums if compat else reference.class_means
    for at, place in (("adv", 0), ("clean", 1)):
        wrong = [
            reference.losses.cross_entropy(z, c) for s in steps for z, c in zip(s[place].tolist(), s[2], strict=True)
        ]
        losses = gather(wrong, [c for step in steps for c in step[2]], 3)
        expected = reference.next_temperatures([1.0] * 3, losses, 0.1)
        assert state[f"temperature_{at}"].tolist() == pytest.approx(expected, abs=1e-12)
        assert set(state[f"loss_{at}"].tolist()) == set(state["count"].tolist()) == {0}, "every epoch counts anew"
    assert state["temperature_adv"].dtype == torch.float64
    assert not torch.equal(state["temperature_adv"], state["temperature_clean"])


def test_sums_and_means_agree_on_balanced_classes(stand_in_run: Run) -> None:
    y = torch.arange(12) % 3
    steps = [(normal(12, 3), normal(12, 3, seed=1), y)]
    mean, summed = (after(ABSLD(compat=compat), stand_in_run(), steps) for compat in (None, "official"))
    torch.testing.assert_close(summed["temperature_adv"], mean["temperature_adv"], rtol=0, atol=1e-12)


def test_the_rate_follows_the_learning_rate_unless_told_otherwise(stand_in_run: Run) -> None:
    steps = [(normal(6, 3), normal(6, 3, seed=1), torch.arange(6) % 3)]
    for follow, share, moved in ((True, 1.0, 0.1), (True, 0.1, 0.01), (False, 0.1, 0.1), (True, 0.0, 0.0)):
        state = after(ABSLD(follow_lr=follow), stand_in_run(lr_share=share), steps)
        assert float((state["temperature_adv"] - 1).abs().max()) == pytest.approx(moved)


@pytest.mark.parametrize("compat", [None, "official"])
def test_the_loss_is_the_loop_over_examples(tiny_net: Net, compat: Any) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    t_adv, t_clean = [0.5, 1.0, 4.0], [2.0, 0.7, 1.0]
    edited = ABSLD(compat=compat).prepare(batch, state_of(t_adv, t_clean), NO_RUN)
    with torch.no_grad():
        clean, adv = model(batch.x).tolist(), model(batch.x_adv).tolist()
    temperatures = {"t_adv": t_adv, "t_clean": t_clean, "official": compat == "official"}
    teacher = batch.teacher["distil"].tolist()
    expected = reference.absld_loss(clean, adv, batch.y.tolist(), teacher=teacher, **temperatures)
    assert RSLAD()(model, edited).total().item() == pytest.approx(expected, rel=1e-9)
    assert edited.x is batch.x
    assert batch.teacher["distil"].tolist() == teacher, "the batch itself stays as it was"


def test_the_attack_climbs_the_tempered_labels() -> None:
    batch = batch_of()
    edited = ABSLD().prepare(batch, state_of([0.5, 1.0, 4.0], [2.0, 0.7, 1.0]), NO_RUN)
    divisor = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)[batch.y, None]
    target = RSLAD().attack(edited).target
    assert target is not None
    torch.testing.assert_close(target, torch.softmax(batch.teacher["distil"] / divisor, 1))


def test_temperatures_of_one_are_rslad(
    tiny_net: Net, tiny_data: Data, differences: Differences, stand_in_run: Run
) -> None:
    batch = batch_of()
    state = ABSLD().at_epoch({}, stand_in_run())
    for compat in (None, "official"):
        edited = ABSLD(compat=compat).prepare(batch, state, NO_RUN)
        assert all(torch.equal(edited.teacher[term], logits) for term, logits in batch.teacher.items())
    plain, still = trained(tiny_net, tiny_data), trained(tiny_net, tiny_data, ABSLD(rate=0.0))
    assert all(torch.equal(tensor, still.weights[name]) for name, tensor in plain.weights.items())
    moving = trained(tiny_net, tiny_data, ABSLD())
    assert not all(torch.equal(tensor, moving.weights[name]) for name, tensor in plain.weights.items())


def trained(tiny_net: Net, tiny_data: Data, *methods: Any, **rest: Any) -> TrainState:
    objective = RSLAD(teacher=tiny_net(seed=5), eps=0.1, steps=2)
    options = {"schedule": Schedule(epochs=3, batch_size=7), "validation": 0, "select": "last"} | rest
    return fit(tiny_net(), tiny_data((10, 6, 8)), objective, methods=methods, **options).state  # type: ignore[arg-type]


def test_a_resumed_run_is_the_uninterrupted_one(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    methods = (ABSLD(), FairARD())
    saved: list[TrainState] = []
    whole = trained(tiny_net, tiny_data, *methods, save=saved.append)
    for state in saved[:2]:
        assert differences(whole, trained(tiny_net, tiny_data, *methods, resume=state)) == []
    assert whole.methods["absld"]["temperature_adv"].tolist() != [1, 1, 1]


@pytest.mark.parametrize("objective", [ARD(), Trades()], ids=lambda objective: objective.name)
def test_an_objective_without_both_terms_is_refused(objective: Any) -> None:
    with pytest.raises(ConflictError, match=r"absld needs the loss term 'distil.*use rslad, or drop absld"):
        compose(objective, [ABSLD()])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate", -0.1),
        ("lowest", 0.0),
        ("lowest", 1.1),
        ("highest", 0.9),
        ("highest", float("inf")),
        ("compat", "paper"),
        ("follow_lr", 1),
    ],
)
def test_a_bad_value_is_an_error_with_owner_and_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^absld: {field} must be .*got"):
        ABSLD(**{field: value})


def test_an_edit_of_the_teacher_belongs_to_one_method() -> None:
    class Other(ABSLD):
        name = "other"

    with pytest.raises(ConflictError, match=r"absld and other both set batch\.teacher \(the labels of the teacher\)"):
        compose(RSLAD(), [ABSLD(), Other()])
    assert replace(batch_of(), teacher={}).teacher == {}
