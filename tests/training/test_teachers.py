"""Objectives with a network beside the model: it labels what is trained on, stays as it is, and is looked at first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, ModelError, RobustFairWarning
from robustfair.methods import ABSLD, CCM, EMA, FairARD, Method, Run, compose
from robustfair.objectives import ARD, RSLAD, Trades
from robustfair.runs.checkpoint import checkpoint_names, read_state, write_state
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.training.teachers import check_teacher
from robustfair.values import Attack, Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Differences = Callable[[TrainState, TrainState], list[str]]

SHORT = {"eps": 0.1, "steps": 2}


def train(net: nn.Module, data: ImageDataset, objective: Any, *methods: Method, **rest: Any) -> Fitted:
    options: dict[str, Any] = {"schedule": Schedule(epochs=2, lr=0.1, batch_size=7), "validation": 0.25} | rest
    return fit(net, data, objective, methods=methods, **options)


class Watch(Method):
    """Keeps what every step ended with."""

    name = "watcher"

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.losses: list[Loss] = []

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
        self.batches.append(batch)
        self.losses.append(loss)
        return state


@pytest.mark.parametrize("objective", [RSLAD, ARD], ids=lambda cls: cls.name)
def test_a_frozen_copy_of_the_teacher_labels_every_batch(tiny_net: Net, tiny_data: Data, objective: Any) -> None:
    teacher, watch = tiny_net(seed=5, dropout=0.5).train(), Watch()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = train(tiny_net(), tiny_data(), objective(teacher=teacher, **SHORT), watch, EMA()).state
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert list(state.frozen) == [f"{objective.name}/teacher"]
    assert state.networks == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in state.frozen[f"{objective.name}/teacher"].items())
    teacher.eval()
    for batch in watch.batches:
        for logits in batch.teacher.values():
            assert torch.equal(logits, teacher(batch.x))
            assert not logits.requires_grad
    assert set(watch.batches[0].teacher) == set(objective.taught)


def test_a_model_may_be_the_teacher_of_itself(tiny_net: Net, tiny_data: Data) -> None:
    model, watch = tiny_net(seed=5), Watch()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = train(model, tiny_data(), RSLAD(teacher=model, **SHORT), watch).state
    assert all(torch.equal(first[name], tensor) for name, tensor in state.frozen["rslad/teacher"].items())
    assert not torch.equal(first["head.weight"], state.weights["head.weight"])


def test_a_resumed_run_goes_on_with_the_teacher_it_began_with(
    tiny_net: Net, tiny_data: Data, differences: Differences, tmp_path: Path
) -> None:
    states: list[TrainState] = []
    whole = train(tiny_net(), tiny_data(), RSLAD(teacher=tiny_net(seed=5), **SHORT), save=states.append)
    write_state(tmp_path, states[0], {})
    kept = read_state(tmp_path, states[0].history)
    other = RSLAD(teacher=tiny_net(seed=6), **SHORT)  # trained on since
    assert differences(whole.state, train(tiny_net(), tiny_data(), other, resume=kept).state) == []
    assert checkpoint_names(tmp_path) == ["best", "last"]
    larger = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ConfigError, match=r"the state of a run with the same networks, got 'rslad/teacher/1\.bias"):
        train(tiny_net(), tiny_data(), RSLAD(teacher=larger, **SHORT), resume=kept)
    with pytest.raises(ConfigError, match="the state of a run with the same networks"):
        train(tiny_net(), tiny_data(), ARD(teacher=tiny_net(seed=5), **SHORT), resume=replace(kept, objective="ard"))


def test_images_that_a_method_asks_for_are_labelled_before_they_are_attacked(tiny_net: Net, tiny_data: Data) -> None:
    moved: list[float] = []

    class Measures(Method):
        name = "measures"

        def at_epoch(self, state: State, run: Run) -> State:
            for split in ("train", "validation"):
                for batch in run.batches(split, run.objective.attack):  # type: ignore[arg-type]
                    assert batch.x_adv is not None
                    moved.append(float((batch.x_adv - batch.x).abs().max()))
                assert all(batch.teacher == {} for batch in run.batches(split))
            return state

    train(tiny_net(), tiny_data(), RSLAD(teacher=tiny_net(seed=5), **SHORT), Measures())
    assert min(moved) > 0.04


# What the labels of a teacher are to methods


def editing(claims: set[str]) -> Method:
    class Halves(Method):
        name = "halves"

        def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
            return replace(batch, teacher={**batch.teacher, "distil": batch.teacher["distil"] / 2})

    Halves.claims = frozenset(claims)
    return Halves()


def test_an_edit_of_the_labels_is_claimed_and_seen(tiny_net: Net, tiny_data: Data) -> None:
    teacher, watch = tiny_net(seed=5).eval(), Watch()
    with pytest.raises(ConflictError, match=r"halves changed batch\.teacher under another name than its own"):
        train(tiny_net(), tiny_data(), RSLAD(teacher=teacher, **SHORT), editing(set()))
    train(tiny_net(), tiny_data(), RSLAD(teacher=teacher, **SHORT), editing({"batch.teacher"}), watch)
    for batch in watch.batches:
        assert torch.equal(batch.teacher["distil"], teacher(batch.x) / 2)
        assert torch.equal(batch.teacher["distil_clean"], teacher(batch.x))
    with pytest.raises(ConflictError, match=r"halves sets batch\.teacher, but trades does not read teacher"):
        compose(Trades(), [editing({"batch.teacher"})])


def test_images_that_change_after_the_teacher_has_seen_them_are_refused() -> None:
    class Mixes(Method):
        name = "mixes"
        claims = frozenset({"batch.x"})

    compose(Trades(), [Mixes()])
    with pytest.raises(ConflictError, match=r"mixes sets batch\.x, but ard has its teacher label the images before"):
        compose(ARD(), [Mixes()])


def test_only_the_attack_of_the_attacked_images_is_watched(tiny_net: Net, tiny_data: Data) -> None:
    class TwoAttacks(Trades):
        name = "two-attacks"

        def attacks(self, batch: Batch) -> dict[str, Attack]:
            return {"x_adv": self.attack(batch), "second": replace(self.attack(batch), steps=7)}

    watch = Watch()
    train(tiny_net(), tiny_data(), TwoAttacks(**SHORT), watch, FairARD(), CCM(begin=1))
    seen = torch.cat([batch.watched for batch in watch.batches])  # type: ignore[misc]
    assert 0 < int(seen.max()) <= 2
    assert all(set(batch.views) == {"second"} for batch in watch.batches)
    watch = Watch()
    train(tiny_net(), tiny_data(), Trades(**SHORT), watch)
    assert all(batch.watched is None for batch in watch.batches)


@pytest.mark.parametrize(("kind", "shares"), [("multistep", [1, 1, 1, 0.1, 0.01]), ("constant", [1] * 5)])
def test_the_share_of_the_learning_rate_is_that_of_the_last_step(
    tiny_net: Net, tiny_data: Data, kind: Any, shares: list[float]
) -> None:
    found: list[float] = []

    class Notes(Method):
        name = "notes"

        def at_epoch(self, state: State, run: Run) -> State:
            found.append(run.lr_share)
            return state

    for lr in (0.01, 0.0):
        found.clear()
        schedule = Schedule(epochs=4, lr=lr, kind=kind, batch_size=7)
        train(tiny_net(), tiny_data(), Trades(**SHORT), Notes(), schedule=schedule)
        assert found == pytest.approx(shares if lr else [1] * 5)


# Refused before the first step


def no_step(*given: Any) -> None:
    raise AssertionError("a step was taken")


@pytest.mark.parametrize("objective", [RSLAD, ARD], ids=lambda cls: cls.name)
def test_a_run_needs_a_module(tiny_net: Net, tiny_data: Data, objective: Any) -> None:
    name = objective.name
    with pytest.raises(
        ConfigError, match=rf"{name}: teacher must be given, such as {name}\(teacher=runs/wrn\), got None"
    ):
        train(tiny_net(), tiny_data(), objective(), on_step=no_step)
    with pytest.raises(ConfigError, match=r"teacher must be a module here, got 'runs/wrn'\. rf\.load_model reads"):
        train(tiny_net(), tiny_data(), objective(teacher="runs/wrn"), on_step=no_step)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": 5}, "teacher of rslad: model has 5 outputs, data has 3 classes"),
        ({"channels": 3}, "teacher of rslad: .*channel"),
    ],
)
def test_a_teacher_of_other_classes_or_images_is_refused(
    tiny_net: Net, tiny_data: Data, changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        train(tiny_net(), tiny_data(), RSLAD(teacher=tiny_net(**changes), **SHORT), on_step=no_step)


def test_a_teacher_of_images_of_another_size_is_refused(tiny_net: Net, tiny_data: Data) -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="teacher of ard: "):
        train(tiny_net(), tiny_data(), ARD(teacher=fixed, **SHORT), on_step=no_step)


class Nearest(nn.Module):
    """Logits of the distance to the mean image of each class, on pixels as `scale` and `shift` leave them."""

    def __init__(self, data: ImageDataset, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        pixels = scale * data.images.float() / 255 + shift
        means = [pixels[data.labels == c].mean(0) for c in range(data.num_classes)]
        self.means = nn.Parameter(torch.stack(means).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.flatten(1), self.means)


@pytest.mark.parametrize(("scale", "shift", "found"), [(255.0, 0.0, "0 to 255"), (2.0, -1.0, "'half'")])
def test_a_teacher_that_expects_other_pixels_is_refused(
    tiny_net: Net, tiny_data: Data, scale: float, shift: float, found: str
) -> None:
    data = tiny_data((40, 40, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_teacher("teacher", Nearest(data), data)
    wrong = RSLAD(teacher=Nearest(data, scale, shift), **SHORT)
    with pytest.raises(ModelError, match=rf"^teacher of rslad is given pixels in \[0, 1\] .*accuracy rises .*{found}"):
        train(tiny_net(), data, wrong, on_step=no_step)


def test_a_teacher_that_knows_nothing_of_the_classes_is_warned_of(tiny_net: Net, tiny_data: Data) -> None:
    data = tiny_data((40, 40, 40))

    class Shifted(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(1, 1)

    with pytest.warns(RobustFairWarning, match=r"teacher is right on 0\.0 % of 120 training images, .*in this order"):
        check_teacher("teacher", Shifted(data), data)


def test_a_teacher_that_cannot_be_copied_is_refused_in_a_line(tiny_net: Net, tiny_data: Data) -> None:
    class Unique(nn.Module):
        def __deepcopy__(self, memo: Mapping[int, Any]) -> nn.Module:
            raise TypeError("there is one of me")

    with pytest.raises(ModelError, match="rslad: teacher cannot be copied: there is one of me"):
        train(tiny_net(), tiny_data(), RSLAD(teacher=Unique(), **SHORT), ABSLD(), on_step=no_step)
