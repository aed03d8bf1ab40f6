from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import attacks, losses
from reference import bat as reference
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConflictError
from robustfair.losses import MaximiseKL, cross_entropy
from robustfair.methods import CCM, AVmixup, FriendlyAT, LabelSmoothing, Method, Run, compose
from robustfair.objectives import BAT, Trades
from robustfair.objectives.bat import kl_to_uniform
from robustfair.training import Schedule, fit
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]


class Slope(nn.Module):
    """Two classes on images of one pixel: class 0 above `boundary`, linear in the pixel."""

    def __init__(self, boundary: float) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, x: Tensor) -> Tensor:
        above = 5 * (x.flatten(1) - self.boundary)
        return torch.cat([above, -above], 1)


# The two points


def test_defaults(batch_of: BatchOf) -> None:
    objective = BAT()
    assert (objective.beta, objective.tau, objective.uniform_weight) == (6, 1, 1)
    made = objective.attacks(batch_of(2))
    assert list(made) == ["x_adv", "last-clean"]
    for attack in made.values():
        assert attack.eps.tolist() == [8 / 255] * 2
        assert attack.step_size.tolist() == pytest.approx([2 / 255] * 2)
        assert (attack.steps, attack.start, attack.mode, attack.goal) == (10, "gauss001-clipped", "eval", MaximiseKL())
    assert [attack.keep for attack in made.values()] == ["last", "inside"]


@pytest.mark.parametrize("crossing", [0, 1, 2, 5, 7, 8, 9])
@pytest.mark.parametrize("tau", [0, 1, 2, 8])
def test_on_a_line_both_points_are_the_iterates_next_to_the_crossing(crossing: int, tau: int) -> None:
    """Iterates go down by 0.05 from 0.79; iterate `crossing` is the first below the boundary. Eight steps, so that
    iterate 8 is never looked at."""
    steps, x = 8, torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64)
    path = [0.79 - 0.05 * t for t in range(steps + 1)]
    model = Slope(path[0] - 0.05 * crossing + 0.025)
    y = torch.tensor([0])
    objective = BAT(eps=0.5, step_size=0.05, steps=steps, tau=tau)
    found = {
        name: float(pgd(model, x, y, attack, torch.Generator(), x_init=x - 0.01))
        for name, attack in objective.attacks(Batch(x, y, y, 0)).items()
    }
    seen = crossing < steps
    assert found["last-clean"] == pytest.approx(path[max(crossing - 1, 0)] if seen else path[steps])
    assert found["x_adv"] == pytest.approx(path[min(crossing + tau, steps)] if seen else path[steps])


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_the_points_are_those_of_the_loop_from_the_same_starts(
    tiny_net: Net, batch_of: BatchOf, tau: int, attacked: Attacked
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of(24)
    with torch.no_grad():
        model.head.bias -= model(batch.x).mean(0)  # type: ignore[union-attr]
        y = model(batch.x).argmax(1)
    batch = replace(batch, y=torch.where(torch.arange(24) < 3, (y + 1) % 3, y))  # three are wrong from the start
    objective = BAT(eps=0.15, step_size=0.04, steps=5, tau=tau)
    ours = attacked(model, objective, batch)
    draws = [torch.empty_like(batch.x).normal_(generator=batch.rng(f"attack{name}")) for name in ("/last-clean", "")]
    starts = [attacks.gauss_start(batch.x, draw).clamp(0, 1) for draw in draws]
    settings = {"eps": 0.15, "step_size": 0.04, "steps": 5, "tau": tau}
    slow = reference.points(model, batch.x, batch.y, starts, **settings)
    assert ours.x_adv is not None
    torch.testing.assert_close((ours.views["last-clean"], ours.x_adv), slow, rtol=0, atol=1e-9)
    with torch.no_grad():
        wrong = model(slow[1]).argmax(1) != batch.y
    assert 3 < int(wrong.sum()) < 24, "some cross, some do not"
    assert bool((model(slow[0]).argmax(1) != batch.y)[:3].all()), "the start is kept where it is wrong"


def test_a_budget_of_all_steps_is_the_whole_attack(tiny_net: Net, batch_of: BatchOf) -> None:
    model, batch = tiny_net(), batch_of(16, dtype=torch.float32)
    whole = replace(BAT(eps=0.2, steps=4).attack(batch), stop=None)
    start = whole.start
    for tau in (4, 5, 2**62):
        attack = BAT(eps=0.2, steps=4, tau=tau).attack(batch)
        assert attack.start == start
        ends = [pgd(model, batch.x, batch.y, a, batch.rng("attack")) for a in (attack, whole)]
        assert torch.equal(*ends)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_both_points_stay_in_the_ball_and_the_box(
    tiny_net: Net, batch_of: BatchOf, norm: Any, attacked: Attacked
) -> None:
    batch = attacked(tiny_net(), BAT(norm=norm, eps=0.3), batch_of(16, dtype=torch.float32))
    assert batch.x_adv is not None
    for point in (batch.x_adv, batch.views["last-clean"]):
        delta = (point - batch.x).flatten(1)
        away = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert float(away.max()) <= 0.3 + 1e-6
        assert bool(((point >= 0) & (point <= 1)).all())


def test_the_two_attacks_start_apart_and_share_nothing_but_the_batch(tiny_net: Net, tiny_data: Any) -> None:
    """In training; without a step each point is its start."""
    seen: list[Batch] = []

    class Watch(Method):
        name = "watch"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            seen.append(batch)
            return state

    data: ImageDataset = tiny_data()
    schedule = Schedule(epochs=1, lr=0.1, batch_size=7)
    fit(tiny_net(), data, BAT(eps=0.1, steps=0), methods=[Watch()], schedule=schedule, validation=0, select="last")
    assert sum(len(batch.y) for batch in seen) == len(data)
    for batch in seen:
        assert batch.x_adv is not None
        one, two = batch.x_adv - batch.x, batch.views["last-clean"] - batch.x
        assert 0.0005 < float(one.std()) < 0.002
        assert not torch.equal(one, two)


# The loss


def test_value_and_gradients_are_the_formula_at_all_three_points(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked
) -> None:
    model = tiny_net(dtype=torch.float64)
    objective = BAT(eps=0.2, beta=6, uniform_weight=0.7)
    batch = attacked(model, objective, batch_of())
    passes: list[Tensor] = []

    def called(images: Tensor) -> Tensor:
        passes.append(model(images))
        return passes[-1]

    loss = objective(called, batch)
    value, slopes = reference.loss(*(logits.tolist() for logits in passes), batch.y.tolist(), 6.0, 0.7)
    assert loss.total().item() == pytest.approx(value, abs=1e-12)
    ours = torch.autograd.grad(loss.total(), passes)
    theirs = [torch.tensor(rows, dtype=torch.float64) for rows in slopes]
    torch.testing.assert_close(list(ours), theirs, rtol=0, atol=1e-12)
    assert min(float(slope.abs().max()) for slope in theirs) > 1e-3


def test_the_passes_come_in_the_order_of_the_code(batch_of: BatchOf) -> None:
    asked: list[Tensor] = []

    def called(images: Tensor) -> Tensor:
        asked.append(images)
        return images.flatten(1)[:, :3]

    batch = batch_of()
    batch = replace(batch, x_adv=batch.x + 0.1, views={"last-clean": batch.x + 0.05})
    BAT()(called, batch)
    assert batch.x_adv is not None
    assert [id(images) for images in asked] == [id(batch.views["last-clean"]), id(batch.x_adv), id(batch.x)]


def test_the_uniform_terms_are_two_log_c_less_the_entropies(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked
) -> None:
    model = tiny_net(dtype=torch.float64)
    batch = attacked(model, BAT(eps=0.2), batch_of(32))
    loss = BAT()(model, batch)
    assert batch.x_adv is not None
    entropies = [
        torch.tensor([losses.entropy(z) for z in model(images).tolist()], dtype=torch.float64)
        for images in (batch.views["last-clean"], batch.x_adv)
    ]
    uniform = loss.terms["uniform_last_clean"] + loss.terms["uniform_first_adversarial"]
    torch.testing.assert_close(uniform, 2 * log(3) - entropies[0] - entropies[1], rtol=0, atol=1e-12)
    assert bool((uniform > 0).all())
    assert bool((uniform < 2 * log(3)).all())


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_the_divergence_from_uniform_has_its_ends(classes: int) -> None:
    level = kl_to_uniform(torch.full((1, classes), 3.0, dtype=torch.float64))
    certain = kl_to_uniform(torch.eye(classes, dtype=torch.float64)[:1] * 1e4)
    assert level.item() == pytest.approx(0, abs=1e-12)
    assert certain.item() == pytest.approx(log(classes), rel=1e-12)
    rising = kl_to_uniform(torch.eye(classes, dtype=torch.float64)[:1] * torch.linspace(0, 20, 30)[:, None])
    assert bool((rising.diff() > 0).all())


def test_without_weights_it_is_cross_entropy_at_the_last_clean_point(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked
) -> None:
    model = tiny_net(dtype=torch.float64)
    batch = attacked(model, BAT(eps=0.2), batch_of())
    bare = BAT(beta=0, uniform_weight=0)(model, batch).total()
    torch.testing.assert_close(bare, cross_entropy(model(batch.views["last-clean"]), batch.y).mean())


def test_the_uniform_weight_is_beside_beta(tiny_net: Net, batch_of: BatchOf, attacked: Attacked) -> None:
    batch = attacked(tiny_net(dtype=torch.float64), BAT(eps=0.2), batch_of())
    loss = BAT(beta=2, uniform_weight=0.5)(tiny_net(dtype=torch.float64), batch)
    coefficients = {name: coef.unique().tolist() for name, coef in loss.coef.items()}
    expected = {"label": [1], "consistency": [2], "uniform_last_clean": [0.5], "uniform_first_adversarial": [0.5]}
    assert coefficients == expected


# With methods


def test_what_makes_its_points_is_not_for_methods() -> None:
    class Aims(Method):
        name = "aims"
        claims = frozenset({"attack.goal", "attack.target"})

    with pytest.raises(ConflictError, match=r"friendly-at sets attack\.stop, but bat is defined by its own"):
        compose(BAT(), [FriendlyAT()])
    with pytest.raises(ConflictError, match=r"aims sets attack\.goal, but bat is defined by its own"):
        compose(BAT(), [Aims()])
    with pytest.raises(ConflictError, match="avmixup sets labels of x_adv"):
        compose(BAT(), [AVmixup()])


def test_a_radius_of_a_class_holds_for_both_points(tiny_net: Net, stand_in_run: Any, batch_of: BatchOf) -> None:
    batch, ccm = batch_of(9), CCM(lam=0.5, begin=1)
    run = stand_in_run(objective=BAT(eps=0.1), epoch=1, hits=(0, 2, 4), count=(4, 4, 4))
    plan = compose(BAT(eps=0.1), [ccm])
    made = plan.attacks(batch, {"ccm": ccm.at_epoch({}, run)}, run)
    expected = [0.1 * scale for scale in (0.5, 1.0, 1.5)] * 3
    assert all(attack.eps.tolist() == pytest.approx(expected) for attack in made.values())


def test_smoothed_labels_are_those_of_the_last_clean_point(
    tiny_net: Net, stand_in_run: Any, batch_of: BatchOf, attacked: Attacked
) -> None:
    smoothing, run = LabelSmoothing(amount=0.3), stand_in_run(objective=BAT())
    compose(BAT(), [smoothing])
    model = tiny_net(dtype=torch.float64)
    batch = smoothing.examples(attacked(model, BAT(eps=0.2), batch_of()), smoothing.at_epoch({}, run), run)
    expected = cross_entropy(model(batch.views["last-clean"]), batch.y, 0.3)
    torch.testing.assert_close(BAT()(model, batch).terms["label"], expected)


def test_it_is_not_trades_with_a_shorter_attack(tiny_net: Net, batch_of: BatchOf) -> None:
    """Even where both points are x itself: TRADES has no uniform terms, and here they weigh as the label does."""
    batch = batch_of()
    batch = replace(batch, x_adv=batch.x, views={"last-clean": batch.x})
    model = tiny_net(dtype=torch.float64)
    ours, trades = BAT(uniform_weight=0)(model, batch), Trades()(model, batch)
    torch.testing.assert_close(ours.total(), trades.total())
    assert float(BAT()(model, batch).total().detach() - trades.total().detach()) > 0.01
