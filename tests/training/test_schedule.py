from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from robustfair.errors import ConfigError
from robustfair.training import Schedule


def curve(schedule: Schedule, steps_per_epoch: int = 1) -> list[float]:
    return [schedule.lr_at(e, s, steps_per_epoch) for e in range(schedule.epochs) for s in range(steps_per_epoch)]


def test_multistep_is_the_papers_100_and_150_of_200() -> None:
    rates = curve(Schedule(epochs=200, lr=0.1), 3)
    assert rates[: 100 * 3] == [0.1] * 300
    assert rates[100 * 3 : 150 * 3] == pytest.approx([0.01] * 150)
    assert rates[150 * 3 :] == pytest.approx([0.001] * 150)


@pytest.mark.parametrize(
    ("epochs", "drops"),
    [(110, (100, 105)), (100, (75, 90)), (100, (55, 75, 90)), (120, (60, 90, 110)), (30, (15, 29)), (35, (29,))],
)
def test_a_drop_falls_on_the_epoch_it_was_written_for(epochs: int, drops: tuple[int, ...]) -> None:
    rates = curve(Schedule(epochs=epochs, lr=1.0, milestones=tuple(drop / epochs for drop in drops)))
    expected = [0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]
    assert rates == pytest.approx(expected)


def test_every_whole_epoch_can_be_a_milestone() -> None:
    late = []
    for epochs in range(2, 201):
        for drop in range(1, epochs):
            schedule = Schedule(epochs=epochs, lr=1.0, milestones=(drop / epochs,))
            if (schedule.lr_at(drop - 1, 0, 1), schedule.lr_at(drop, 0, 1)) != (1.0, 0.1):
                late.append((drop, epochs))
    assert late == []


def test_a_milestone_between_epochs_waits_for_the_next() -> None:
    assert curve(Schedule(epochs=3, lr=1.0, milestones=(0.5,))) == pytest.approx([1.0, 1.0, 0.1])


def test_gamma_and_no_milestones() -> None:
    assert curve(Schedule(epochs=4, lr=1.0, milestones=(0.5,), gamma=0.5)) == [1.0, 1.0, 0.5, 0.5]
    assert curve(Schedule(epochs=4, lr=1.0, milestones=())) == [1.0] * 4


def test_cosine_falls_from_lr_towards_zero_every_step() -> None:
    rates = curve(Schedule(epochs=5, lr=0.2, kind="cosine"), 4)
    assert rates[0] == 0.2
    assert rates[10] == pytest.approx(0.1)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    assert rates[-1] < 0.2 * 0.01


def test_one_cycle_rises_over_the_warmup_and_ends_at_zero() -> None:
    rates = curve(Schedule(epochs=5, lr=0.2, kind="one-cycle", warmup=0.4), 4)
    assert rates[0] == pytest.approx(0.2 / 8)
    assert rates[7] == pytest.approx(0.2)
    assert max(rates) == rates[7]
    assert rates[13] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.0, abs=1e-15)
    assert all(rate >= 0 for rate in rates)


def test_momentum_moves_against_a_one_cycle_rate_as_in_pytorch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.0, max_lr=0.2, step_size_up=10, step_size_down=10)
    ours = Schedule(epochs=5, lr=0.2, kind="one-cycle", warmup=0.5, cycle_momentum=True)
    for step in range(20):
        optimizer.step()
        cyclic.step()  # ours counts a step before it is taken, theirs after it
        assert ours.lr_at(step // 4, step % 4, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
        assert ours.momentum_at(step // 4, step % 4, 4) == pytest.approx(optimizer.param_groups[0]["momentum"])
    assert Schedule(kind="one-cycle", momentum=0.7).momentum_at(3, 0, 1) == 0.7


def test_constant_is_constant() -> None:
    assert curve(Schedule(epochs=3, lr=0.2, kind="constant"), 2) == [0.2] * 6


def test_only_names_the_parameters_to_train() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert list(Schedule().trainable(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(Schedule(only=("1.bias", "1.weight")).trainable(model)) == ["1.weight", "1.bias"]
    model[0].weight.requires_grad_(False)
    assert list(Schedule().trainable(model)) == ["0.bias", "1.weight", "1.bias"]
    with pytest.raises(ConfigError, match=r"only must be names of parameters, such as .*1\.bias, got 'hat'"):
        Schedule(only=("hat",)).trainable(model)
    assert list(Schedule(only=("head",)).trainable(model)) == ["1.weight", "1.bias"]
    assert list(Schedule(only=("head.bias",)).trainable(model)) == ["1.bias"]
