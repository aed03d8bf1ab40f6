from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from reference import strong_attacks as reference
from robustfair.attacks.autoattack.apgd import LOSSES, Apgd, dlr, dlr_targeted
from robustfair.values import seeded_generator

Build = Callable[..., object]
EPS = {"linf": 0.05, "l2": 0.3}


def noise(x: Tensor, norm: str, seed: int = 0) -> Tensor:
    """What `begin` draws for the searches of a course."""
    draw = torch.rand if norm == "linf" else torch.randn
    return torch.stack([draw(x.shape[1:], generator=seeded_generator("cpu", seed, row)) for row in range(len(x))]).to(x)


@pytest.mark.parametrize(
    ("loss", "norm", "channels", "classes"),
    [
        ("ce", "linf", 3, 2),
        ("ce", "l2", 1, 5),
        ("dlr", "linf", 1, 3),
        ("dlr", "l2", 3, 12),
        ("dlr-targeted", "linf", 3, 12),
        ("dlr-targeted", "l2", 1, 4),
        ("ce-targeted", "linf", 1, 2),
        ("ce-targeted", "l2", 3, 3),
    ],
)
def test_equals_the_slow_single_run(
    scene: Build, course: Build, loss: str, norm: str, channels: int, classes: int
) -> None:
    small = scene(2, channels=channels, classes=classes, size=(4, 5))
    target = small.other()
    search = Apgd(name="apgd", loss=loss, eps=EPS[norm], norm=norm, steps=25)
    ours = course(search, small, target)
    drawn = noise(small.x, norm)
    for row in range(2):
        slow = reference.apgd(
            small.model,
            small.x[row].flatten().tolist(),
            small.x.shape[1:],
            int(small.y[row]),
            int(target[row]),
            (2 * drawn - 1 if norm == "linf" else drawn)[row].flatten().tolist(),
            loss=loss,
            eps=EPS[norm],
            norm=norm,
            steps=25,
        )
        alike = until_rounding_decides(slow)
        assert alike >= 5, "not even the first checkpoint is compared"
        points = torch.stack([point[row].flatten() for point in ours.points])[:alike]
        torch.testing.assert_close(points, torch.tensor(slow["points"][:alike], dtype=points.dtype), rtol=0, atol=1e-9)
        if alike == len(slow["points"]):
            best = torch.tensor(slow["best"], dtype=points.dtype)
            torch.testing.assert_close(ours.states[-1]["best"][row].flatten(), best, rtol=0, atol=1e-9)
        losses = [float(state["best_loss"][row]) for state in ours.states]
        assert losses[:alike] == pytest.approx(slow["best_losses"][:alike], abs=1e-9)
        assert [float(state["step_size"][row]) for state in ours.states][:alike] == slow["step_sizes"][:alike]
        reset = [i for i, state in enumerate(ours.states) if i and state["since_check"][row] == 0]
        assert reset[0] == slow["checkpoints"][0]
        assert [i for i in reset if i < alike] == [i for i in slow["checkpoints"] if i < alike]


def until_rounding_decides(slow: dict[str, list[float]]) -> int:
    """How many points a single run goes through before a checkpoint counts a rise that may be one of rounding alone.

    At a corner of the ball the loss no longer moves, and whether it rose depends on the machine.
    """
    history = slow["history"]
    tie = next((i for i in range(1, len(history)) if abs(history[i] - history[i - 1]) < 1e-12), len(history))
    return next((check for check in slow["checkpoints"] if check > tie), len(slow["points"]))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_equals_the_reference_engine(scene: Build, course: Build, loss: str, norm: str, steps: int) -> None:
    many = scene(8, classes=6, seed=1)
    target = many.other(2)
    eps = EPS[norm] / 3
    ours = course(Apgd(name="apgd", loss=loss, eps=eps, norm=norm, steps=steps), many, target)
    name = "Linf" if norm == "linf" else "L2"
    kind = APGDAttack_targeted if loss.endswith("targeted") else APGDAttack
    engine = kind(many.model, n_iter=steps, norm=name, eps=eps, device="cpu")
    engine.loss, engine.y_target = loss, target
    engine.init_hyperparam(many.x)
    drawn = noise(many.x, norm)
    with mock.patch(f"torch.{'rand' if norm == 'linf' else 'randn'}", return_value=drawn):
        best, stands, best_loss, fooled = engine.attack_single_run(many.x, many.y)
    wrong = torch.stack([logits.argmax(1) != many.y for logits in ours.logits])
    assert torch.equal(~wrong.any(0), stands.bool())
    torch.testing.assert_close(ours.states[-1]["best"], best.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.states[-1]["best_loss"], best_loss, rtol=1e-6, atol=1e-9)
    last = torch.stack(ours.points)[(wrong * torch.arange(1, steps + 2)[:, None]).argmax(0), torch.arange(8)]
    torch.testing.assert_close(last[wrong.any(0)], fooled.detach()[wrong.any(0)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_checkpoints_step_sizes_and_best_loss_over_a_hundred_steps(scene: Build, course: Build, norm: str) -> None:
    search = Apgd(name="apgd", loss="ce", eps=EPS[norm], norm=norm)
    state = course(search, scene(6, seed=2)).states
    assert len(state) == search.iterations == 101
    assert [i for i, state in enumerate(state) if i and (state["since_check"] == 0).all()] == [
        *(22, 41, 57, 70, 80, 87, 93, 99)
    ]
    halvings = torch.log2(2 * EPS[norm] / torch.stack([state["step_size"] for state in state]))
    assert torch.equal(halvings, halvings.round())
    assert halvings.max() > 1
    best = torch.stack([state["best_loss"] for state in state])
    assert (best.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_radius_nothing_moves(scene: Build, course: Build, norm: str) -> None:
    few = scene(3)
    for point in course(Apgd(name="apgd", loss="ce", eps=0.0, norm=norm, steps=5), few).points:
        assert torch.equal(point, few.x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_searches_know_nothing_of_each_other(
    scene: Build, assert_searches_independent: Build, loss: str, norm: str
) -> None:
    many = scene(4, seed=3)
    search = Apgd(name="apgd", loss=loss, eps=EPS[norm], norm=norm, steps=24)
    assert_searches_independent(search, many, many.other())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_stops_no_search(scene: Build, course: Build, norm: str) -> None:
    """A square root at zero has no finite slope: only that pixel rests, and only while it is zero."""
    few = scene(3, seed=4)
    few.x[:, 0, 0, 0] = 0.0
    net = few.model

    class Rooted(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return net(z) + (z[:, 0, 0, 0] * 0).sqrt()[:, None] * torch.arange(5)

    rooted = replace(few, model=Rooted())
    search = Apgd(name="apgd", loss="ce", eps=EPS[norm], norm=norm, steps=10)
    ours = course(search, rooted)
    assert all(point.isfinite().all() for point in ours.points)
    assert (ours.states[-1]["best_loss"] > ours.states[0]["best_loss"]).all()


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=12, unique=True)


@given(logits=LOGITS, label=st.integers(0, 11), target=st.integers(0, 11))
@settings(max_examples=100, deadline=None)
def test_dlr_equals_its_formula(logits: list[float], label: int, target: int) -> None:
    y, t = label % len(logits), target % len(logits)
    z = torch.tensor([logits], dtype=torch.float64)
    assert float(dlr(z, torch.tensor([y]))) == pytest.approx(reference.dlr(logits, y), rel=1e-9)
    ours = float(dlr_targeted(z, torch.tensor([y]), torch.tensor([t])))
    assert ours == pytest.approx(reference.dlr_targeted(logits, y, t), rel=1e-9)
    assert y != t or ours == 0


@given(logits=LOGITS, label=st.integers(0, 3), scale=st.floats(0.1, 50), shift=st.floats(-100, 100))
@settings(max_examples=50, deadline=None)
def test_dlr_knows_neither_scale_nor_shift(logits: list[float], label: int, scale: float, shift: float) -> None:
    z, y = torch.tensor([logits], dtype=torch.float64), torch.tensor([label])
    ranked = z.sort().values[0]
    if ranked[-1] - ranked[-3] < 1e-3:
        return
    torch.testing.assert_close(dlr(scale * z + shift, y), dlr(z, y), rtol=1e-6, atol=1e-6)
    assert (float(dlr(z, y)) < 0) == (int(z.argmax()) == label)
