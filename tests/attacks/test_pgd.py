from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import attacks as reference
from robustfair.attacks.pgd import GRADIENT_START, STARTS, FreezeFooled, pgd, predicted, watched_pgd
from robustfair.errors import ConfigError, ModelError
from robustfair.losses import (
    MaximiseCE,
    MaximiseJS,
    MaximiseKL,
    MaximiseMargin,
    MaximiseReverseKL,
    MinimiseCE,
    cross_entropy,
    margin,
)
from robustfair.models.modes import attacking
from robustfair.values import Attack, Goal

Net = Callable[..., nn.Module]


def images(
    b: int = 4, channels: int = 1, size: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Pixels on all of [0, 1], some of them exactly 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(b, channels, size, size, generator=rng, dtype=dtype) * 1.2 - 0.1).clamp(0, 1)


def labels(b: int = 4, classes: int = 3, *, seed: int = 1) -> Tensor:
    return torch.randint(classes, (b,), generator=torch.Generator().manual_seed(seed))


def settings_for(x: Tensor, eps: float = 0.1, step_size: float | None = None, **rest: object) -> Attack:
    full = {"steps": 4, "goal": MaximiseCE(), **rest}
    step = eps / 3 if step_size is None else step_size
    flat = x[:, 0, 0, 0]
    return Attack(eps=torch.full_like(flat, eps), step_size=torch.full_like(flat, step), **full)  # type: ignore[arg-type]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def balanced(model: nn.Module, x: Tensor) -> Tensor:
    """Centre the logits over `x`, so that its images lie near the boundaries; returns the predictions."""
    with torch.no_grad():
        model.head.bias -= model(x).mean(0)
        return model(x).argmax(1)


EVERY_START = [*sorted(STARTS), GRADIENT_START]
GOALS: dict[str, Goal] = {
    "ce": MaximiseCE(),
    "kl": MaximiseKL(),
    "revkl": MaximiseReverseKL(),
    "js": MaximiseJS(),
    "margin": MaximiseMargin(),
}
GEOMETRY = {"linf": ("linf", False), "l2-rice": ("l2", False), "l2-trades": ("l2", True)}


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("goal", [*GOALS, "targeted"])
def test_equals_the_loop_over_examples_and_pixels(tiny_net: Net, geometry: str, goal: str) -> None:
    model = tiny_net(channels=2, classes=4, dtype=torch.float64).eval()
    x, y = images(5, 2), labels(5, 4)
    target = (y + torch.tensor([1, 2, 3, 1, 2])) % 4
    goals: dict[str, Goal] = {**GOALS, "targeted": MinimiseCE()}
    norm, box_first = GEOMETRY[geometry]
    eps = torch.tensor([0.05, 0.1, 0.2, 0.0, 0.15], dtype=torch.float64) * (1 if norm == "linf" else 4)
    step_size = eps / torch.tensor([2.0, 3.0, 1.5, 1.0, 4.0])
    start = x + 0.02 * torch.randn(x.shape, generator=stream(2), dtype=torch.float64)
    attack = Attack(eps, step_size, 5, goals[goal], norm=norm, box_first=box_first)  # type: ignore[arg-type]
    attack = replace(attack, target=target) if goal == "targeted" else attack
    paths = reference.pgd(
        model, x, y, start, eps=eps, step_size=step_size, steps=5, goal=goal, geometry=geometry, target=target
    )
    ours = pgd(model, x, y, attack, stream(), x_init=start)
    torch.testing.assert_close(ours, reference.last(paths, x), rtol=0, atol=1e-9)
    assert torch.equal(ours[3], x[3])


@pytest.mark.parametrize("goal", ["ce", "margin"])
def test_best_is_the_largest_goal_along_the_path_of_the_loop(tiny_net: Net, goal: str) -> None:
    model, x = tiny_net(dtype=torch.float64, seed=3).eval(), images(6)
    y = balanced(model, x)
    eps, step_size = torch.full((6,), 0.2, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    start = (x + 0.1 * (2 * torch.rand(x.shape, generator=stream(3), dtype=torch.float64) - 1)).clamp(0, 1)
    paths = reference.pgd(model, x, y, start, eps=eps, step_size=step_size, steps=6, goal=goal, geometry="linf")
    best = []
    for path, label in zip(paths, y.tolist(), strict=True):
        logits = [reference.logits_of(model, point, x.shape[1:]) for point in path]
        values = [reference.value_at_logits(goal, z, None, label, None) for z in logits]
        best.append(path[values.index(max(values))])
    attack = Attack(eps, step_size, 6, MaximiseCE() if goal == "ce" else MaximiseMargin(), keep="best")
    ours = pgd(model, x, y, attack, stream(), x_init=start)
    torch.testing.assert_close(ours, torch.tensor(best, dtype=x.dtype).view_as(x), rtol=0, atol=1e-9)
    assert any(point is not path[-1] for point, path in zip(best, paths, strict=True)), "no path ever came down"


@pytest.mark.parametrize("geometry", GEOMETRY)
def test_without_the_box_the_ball_alone_bounds_the_pixels(tiny_net: Net, geometry: str) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(5), labels(5)
    norm, box_first = GEOMETRY[geometry]
    eps = 0.1 if norm == "linf" else 0.8
    start = x + 0.02 * torch.randn(x.shape, generator=stream(2), dtype=torch.float64)
    attack = settings_for(x, eps, eps / 3, steps=5, norm=norm, box_first=box_first, box=False)
    paths = reference.pgd(
        model, x, y, start, eps=[eps] * 5, step_size=[eps / 3] * 5, steps=5, goal="ce", geometry=geometry, box=False
    )
    ours = pgd(model, x, y, attack, stream(), x_init=start)
    torch.testing.assert_close(ours, reference.last(paths, x, box=False), rtol=0, atol=1e-9)
    moved = length(ours - x) if norm == "l2" else (ours - x).flatten(1).abs().amax(1)
    assert bool((moved <= eps * (1 + 1e-6)).all())
    assert int(((ours < 0) | (ours > 1)).sum()) > 5, "no pixel had reason to leave the box"
    for extra in ({"keep": "best"}, {"restarts": 2}):
        compared = pgd(model, x, y, replace(attack, start="uniform-unclipped", **extra), stream())  # type: ignore[arg-type]
        assert bool(((compared < 0) | (compared > 1)).any()), extra


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_noise_joins_every_step_before_the_projection(tiny_net: Net, geometry: str, noise: float) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(5), labels(5)
    norm, box_first = GEOMETRY[geometry]
    eps = 0.1 if norm == "linf" else 0.8
    attack = settings_for(x, eps, eps / 4, steps=4, norm=norm, box_first=box_first, noise=noise)
    twin = stream(6)
    draws = [noise * torch.empty_like(x).normal_(generator=twin) for _ in range(4)]
    paths = reference.pgd(
        model, x, y, x, eps=[eps] * 5, step_size=[eps / 4] * 5, steps=4, goal="ce", geometry=geometry, noise=draws
    )
    rng = stream(6)
    ours = pgd(model, x, y, attack, rng, x_init=x)
    torch.testing.assert_close(ours, reference.last(paths, x), rtol=0, atol=1e-9)
    assert torch.equal(rng.get_state(), twin.get_state()), "one draw per step"
    assert torch.equal(pgd(model, x, y, attack, stream(6), x_init=x), ours)
    assert not torch.equal(pgd(model, x, y, attack, stream(7), x_init=x), ours)


def test_noise_is_drawn_only_where_it_is_asked_for(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64), images(), labels()
    before = torch.get_rng_state()
    for noise, draws in ((0.0, 0), (0.01, 3)):
        rng, twin = stream(), stream()
        pgd(model, x, y, settings_for(x, steps=3, noise=noise, start="gauss001"), rng)
        for _ in range(1 + draws):
            torch.empty_like(x).normal_(generator=twin)
        assert torch.equal(rng.get_state(), twin.get_state())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("goal", ["ce", "margin"])
@pytest.mark.parametrize("b", [1, 4])
def test_the_start_one_gradient_uphill(tiny_net: Net, b: int, goal: str) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(b), labels(b)
    slow = reference.gradient_start(model, x, y, goal)
    attack = settings_for(x, 0.2, 0.02, steps=0, start=GRADIENT_START, goal=GOALS[goal])
    rng, model_before = stream(), snapshot(model)
    ours = pgd(model, x, y, attack, rng)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    assert float((ours - x).abs().max()) > 1e-3
    assert torch.equal(rng.get_state(), stream().get_state()), "no draw"
    assert unchanged(model, model_before)
    moved = pgd(model, x, y, replace(attack, steps=3), stream())
    assert torch.equal(moved, pgd(model, x, y, replace(attack, steps=3), stream(), x_init=ours))


def test_the_start_one_gradient_uphill_of_a_divergence_is_the_image(tiny_net: Net) -> None:
    x, y = images(), labels()
    for goal in ("kl", "revkl", "js"):
        attack = settings_for(x, steps=0, start=GRADIENT_START, goal=GOALS[goal])
        found = pgd(tiny_net(dtype=torch.float64), x, y, attack, stream())
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRY)
def test_without_the_ball_points_go_where_their_steps_lead(tiny_net: Net, geometry: str, box: bool) -> None:
    """As in a ball that is larger than all steps together, under any rule that may return the start."""
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(5), labels(5)
    norm, box_first = GEOMETRY[geometry]
    step = 0.1 if norm == "linf" else 0.8
    start = x + 0.02 * torch.randn(x.shape, generator=stream(2), dtype=torch.float64)
    free = settings_for(x, 0.05, step, steps=5, norm=norm, box_first=box_first, ball=False, box=box)
    walls = {"eps": [100.0] * 5, "step_size": [step] * 5, "goal": "ce", "geometry": geometry, "box": box}
    paths = reference.pgd(model, x, y, start, steps=5, **walls)
    ours = pgd(model, x, y, free, stream(), x_init=start)
    torch.testing.assert_close(ours, reference.last(paths, x, box), rtol=0, atol=1e-9)
    assert float((ours - x).abs().max()) > 0.3
    for rule in ({"keep": "best"}, {"stop": FreezeFooled()}):
        wide = replace(free, eps=torch.full_like(free.eps, 100.0), ball=True, **rule)  # type: ignore[arg-type]
        ends = [pgd(model, x, y, a, stream(), x_init=start) for a in (replace(free, **rule), wide)]  # type: ignore[arg-type]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radius_of_a_start_is_in_units_of_eps(tiny_net: Net, norm: str) -> None:
    x, y = images(64), labels(64)
    eps = torch.linspace(0.01, 0.3, 64, dtype=torch.float64)
    near = replace(settings_for(x, steps=0, norm=norm, start="uniform-unclipped", box=False), eps=eps)
    delta = {r: pgd(tiny_net(), x, y, replace(near, start_radius=r), stream()) - x for r in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(delta[2.5], 2.5 * delta[1.0], rtol=0, atol=1e-12)
    assert torch.equal(delta[0.0], torch.zeros_like(x))
    reach = length(delta[1.0]) if norm == "l2" else delta[1.0].flatten(1).abs().amax(1)
    assert bool((reach <= eps).all())
    assert float((reach / eps).max()) > 0.9
    kept = replace(near, start_radius=2.5, steps=1, step_size=torch.zeros_like(eps))
    held = pgd(tiny_net(), x, y, kept, stream()) - x
    within = length(held) if norm == "l2" else held.flatten(1).abs().amax(1)
    assert bool((within <= eps * (1 + 1e-6)).all()), "a step brings it back into the ball"


@given(
    b=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    size=st.integers(2, 6),
    classes=st.integers(2, 5),
    norm=st.sampled_from(["linf", "l2"]),
    box_first=st.booleans(),
    start=st.sampled_from(EVERY_START),
    steps=st.integers(1, 4),
    eps=st.sampled_from([0.0, 1e-4, 0.03, 0.3, 1.0]),
    relative_step=st.sampled_from([0.1, 1.0, 3.0]),
    goal=st.sampled_from(list(GOALS.values())),
    keep=st.sampled_from(["last", "best"]),
    restarts=st.integers(1, 2),
    frozen=st.booleans(),
    mode=st.sampled_from(["eval", "train", "train_frozen"]),
    box=st.booleans(),
    noise=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_every_setting_stays_in_ball_and_box_and_repeats(
    tiny_net: Net,
    b: int,
    channels: int,
    size: int,
    classes: int,
    norm: str,
    box_first: bool,
    start: str,
    steps: int,
    eps: float,
    relative_step: float,
    goal: Goal,
    keep: str,
    restarts: int,
    frozen: bool,
    mode: str,
    box: bool,
    noise: float,
    seed: int,
) -> None:
    model = tiny_net(channels=channels, classes=classes, dtype=torch.float64, seed=seed)
    x, y = images(b, channels, size, seed=seed), labels(b, classes, seed=seed)
    kept = x.clone(), y.clone()
    attack = settings_for(
        x,
        eps,
        eps * relative_step,
        norm=norm,
        box_first=box_first,
        start=start,
        steps=steps,
        goal=goal,
        keep=keep,
        restarts=restarts,
        stop=FreezeFooled() if frozen else None,
        mode=mode,
        box=box,
        noise=noise,
    )
    before = snapshot(model)
    x_adv = pgd(model, x, y, attack, stream(seed))
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert not box or bool(((x_adv >= 0) & (x_adv <= 1)).all())
    moved = length(x_adv - x) if norm == "l2" else (x_adv - x).flatten(1).abs().amax(1)
    assert bool((moved <= eps * (1 + 1e-6) + 1e-12).all())
    if eps == 0:
        assert torch.equal(x_adv, x)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert unchanged(model, before) or mode == "train"
    model.load_state_dict(before)
    assert torch.equal(pgd(model, x, y, attack, stream(seed)), x_adv)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("stop", [None, FreezeFooled()])
@pytest.mark.parametrize("start", EVERY_START)
def test_a_radius_of_zero_returns_the_image_itself(tiny_net: Net, start: str, stop: object, keep: str) -> None:
    x, y = images(6, dtype=torch.float32), labels(6)
    for norm in ("linf", "l2"):
        for goal in (MaximiseCE(), MaximiseKL()):
            attack = settings_for(x, 0.0, 0.01, norm=norm, start=start, stop=stop, keep=keep, goal=goal)
            assert torch.equal(pgd(tiny_net(), x, y, attack, stream()), x), (norm, goal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_steps_the_start_comes_back_in_the_box(tiny_net: Net, norm: str, dtype: torch.dtype) -> None:
    x, y = images(dtype=dtype), labels()
    for start in STARTS:
        x_adv = pgd(tiny_net(dtype=dtype), x, y, settings_for(x, steps=0, start=start, norm=norm), stream())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    start_at = x + 0.01
    given_start = pgd(tiny_net(dtype=dtype), x, y, settings_for(x, steps=0), stream(), x_init=start_at)
    assert torch.equal(given_start, start_at.clamp(0, 1))


def test_starts_are_what_they_are_called(tiny_net: Net) -> None:
    x = images(64, size=8)
    draw = {
        name: {norm: start(x, settings_for(x, 0.2, norm=norm), stream(4)) for norm in ("linf", "l2")}
        for name, start in STARTS.items()
    }
    assert torch.equal(draw["zero"]["linf"], x)
    assert draw["zero"]["linf"] is not x
    uniform = (draw["uniform-unclipped"]["linf"] - x) / 0.2
    assert float(uniform.abs().max()) <= 1 + 1e-12
    assert float(uniform.mean().abs()) < 0.03
    assert float(uniform.var() - 1 / 3) == pytest.approx(0, abs=0.02)
    assert torch.equal(draw["uniform"]["linf"], draw["uniform-unclipped"]["linf"].clamp(0, 1))
    gauss = (draw["gauss001"]["linf"] - x) / 0.001
    assert float(gauss.std()) == pytest.approx(1, abs=0.03)
    assert float(gauss.abs().max()) > 3
    assert torch.equal(draw["gauss001-clipped"]["l2"], draw["gauss001"]["l2"].clamp(0, 1))
    radius = length(draw["uniform-unclipped"]["l2"] - x) / 0.2
    assert float(radius.max()) <= 1 + 1e-12
    assert float(radius.mean()) == pytest.approx(0.5, abs=0.12)


def test_a_start_that_does_not_exist_is_an_error(tiny_net: Net) -> None:
    x = images()
    with pytest.raises(ConfigError, match=r"attack: start must be one of .*gauss001"):
        pgd(tiny_net(), x, labels(), settings_for(x, start="sideways"), stream())


def test_equal_class_wise_radii_are_the_scalar_attack(tiny_net: Net) -> None:
    model, x, y = tiny_net(), images(8, dtype=torch.float32), labels(8)
    for norm in ("linf", "l2"):
        scalar = settings_for(x, 0.1, norm=norm)
        per_class = replace(scalar, eps=torch.full((3,), 0.1)[y], step_size=torch.full((3,), 0.1 / 3)[y])
        assert torch.equal(pgd(model, x, y, scalar, stream()), pgd(model, x, y, per_class, stream()))


def test_an_example_does_not_feel_the_others_in_eval_mode(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64), images(4), labels(4)
    start = x + 0.01
    attack = settings_for(x)
    together = pgd(model, x, y, attack, stream(), x_init=start)
    for i in range(4):
        one = replace(attack, eps=attack.eps[i : i + 1], step_size=attack.step_size[i : i + 1])
        alone = pgd(model, x[i : i + 1], y[i : i + 1], one, stream(), x_init=start[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


def test_fgsm_is_one_step_of_length_eps_from_the_image(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64), images(), labels()
    inside = x.clone().requires_grad_(True)
    with attacking(model, "eval"):
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(inside), y), inside)
    ours = pgd(model, x, y, settings_for(x, 0.1, 0.1, steps=1, start="zero"), stream())
    torch.testing.assert_close(ours, (x + 0.1 * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_targeted_with_two_classes_is_untargeted(tiny_net: Net) -> None:
    model, x, y = tiny_net(classes=2, dtype=torch.float64), images(8), labels(8, 2)
    start = x + 0.02
    for norm in ("linf", "l2"):
        attack = settings_for(x, norm=norm)
        untargeted = pgd(model, x, y, attack, stream(), x_init=start)
        targeted = pgd(model, x, y, replace(attack, goal=MinimiseCE(), target=1 - y), stream(), x_init=start)
        torch.testing.assert_close(targeted, untargeted, rtol=0, atol=1e-9)


def test_targeted_comes_nearer_to_its_target_than_untargeted(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(16), labels(16)
    target = (y + 1) % 3
    attack = settings_for(x, 0.2, goal=MinimiseCE(), target=target, steps=10)
    x_adv = pgd(model, x, y, attack, stream(), x_init=x)
    with torch.no_grad():
        assert bool((cross_entropy(model(x_adv), target) < cross_entropy(model(x), target)).all())


def test_restarts_keep_the_largest_cross_entropy_of_each_example(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(12), labels(12)
    attack = settings_for(x, 0.1, 0.1, steps=2)
    rng = stream(7)
    singles = [pgd(model, x, y, attack, rng) for _ in range(3)]
    best = pgd(model, x, y, replace(attack, restarts=3), stream(7))
    with torch.no_grad():
        values = torch.stack([cross_entropy(model(single), y) for single in singles])
        assert torch.equal(cross_entropy(model(best), y), values.amax(0))
    assert len(values.argmax(0).unique()) > 1, "one restart won everywhere"


def test_the_best_iterate_is_never_below_the_last(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64).eval(), images(12), labels(12)
    for goal in (MaximiseCE(), MaximiseMargin()):
        attack = settings_for(x, 0.2, 0.2, steps=5, goal=goal)
        with torch.no_grad():
            ends = [pgd(model, x, y, replace(attack, keep=keep), stream()) for keep in ("last", "best")]
            last, best = (goal(model(x_adv), None, y) for x_adv in ends)
        assert bool((best >= last).all())
        assert bool((best > last).any())


def test_freezing_fooled_examples_can_only_lower_robust_accuracy(tiny_net: Net) -> None:
    model, x = tiny_net(dtype=torch.float64, seed=2).eval(), images(64)
    y = balanced(model, x)
    attack = settings_for(x, 0.1, 0.2, steps=6)
    with torch.no_grad():
        start = (x + 0.001).clamp(0, 1)
        ends = [pgd(model, x, y, replace(attack, stop=s), stream(), x_init=start) for s in (None, FreezeFooled())]
        last, frozen = (model(end).argmax(1) == y for end in ends)
    assert not bool((frozen & ~last).any())
    assert 0 < int(frozen.sum()) < int(last.sum())


def test_a_fooled_example_stays_where_it_was_first_fooled(tiny_net: Net) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), images(32)
    y = balanced(model, x)
    start = (x + 0.001).clamp(0, 1)
    attack = settings_for(x, 0.2, 0.05, steps=8)
    paths = reference.pgd(
        model, x, y, start, eps=attack.eps, step_size=attack.step_size, steps=8, goal="ce", geometry="linf"
    )
    expected, first = [], set()
    for path, label in zip(paths, y.tolist(), strict=True):
        logits = [reference.logits_of(model, point, x.shape[1:]) for point in path]
        fooled = [reference.value_at_logits("margin", z, None, label, None) > 0 for z in logits]
        first.add(fooled.index(True) if any(fooled) else None)
        expected.append(path[fooled.index(True)] if any(fooled) else path[-1])
    assert len(first) > 3, "the examples are fooled at too few different steps"
    ours = pgd(model, x, y, replace(attack, stop=FreezeFooled()), stream(), x_init=start)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=x.dtype).view_as(x), rtol=0, atol=1e-9)


@dataclass(frozen=True)
class TimesRight:
    """Watch: from how many points an image was moved that were still classified right."""

    def start(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def __call__(self, seen: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return seen + (predicted(logits, y) == y)


@pytest.mark.parametrize("start", sorted(STARTS))
@pytest.mark.parametrize(
    "extra", [{}, {"keep": "best"}, {"restarts": 2}, {"noise": 0.01}, {"stop": FreezeFooled()}, {"steps": 0}], ids=str
)
def test_watching_moves_no_point(tiny_net: Net, extra: dict[str, Any], start: str) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), images(8)
    attack = settings_for(x, 0.2, 0.05, start=start, **extra)
    plain, nothing = watched_pgd(model, x, labels(8), attack, stream())
    x_adv, seen = watched_pgd(model, x, labels(8), replace(attack, watch=TimesRight()), stream())
    assert torch.equal(x_adv, plain)
    assert nothing is None
    assert seen is not None
    assert 0 <= int(seen.min()) <= int(seen.max()) <= attack.steps


@pytest.mark.parametrize("stop", [None, FreezeFooled()])
def test_what_is_watched_are_the_points_that_steps_leave(tiny_net: Net, stop: Any) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), images(32)
    y = balanced(model, x)
    start, steps = (x + 0.001).clamp(0, 1), 8
    attack = settings_for(x, 0.2, 0.05, steps=steps, watch=TimesRight(), stop=stop)
    points = {"eps": attack.eps, "step_size": attack.step_size, "steps": steps, "goal": "ce", "geometry": "linf"}
    right = []
    for path, label in zip(reference.pgd(model, x, y, start, **points), y.tolist(), strict=True):
        logits = [reference.logits_of(model, point, x.shape[1:]) for point in path[:-1]]
        right.append([reference.value_at_logits("margin", z, None, label, None) < 0 for z in logits])
    expected = [(row.index(False) if not all(row) else steps) if stop else sum(row) for row in right]
    _, seen = watched_pgd(model, x, y, attack, stream(), x_init=start)
    assert seen is not None
    assert seen.tolist() == expected
    assert len(set(expected)) > 3, "the examples cross at too few different steps"


def test_a_stopped_example_is_watched_no_more() -> None:
    """Neither where the others go on, nor after all have stopped: a count does not depend on the batch."""

    class Twice:
        def start(self, y: Tensor) -> Tensor:
            return 2 + y

        def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return state - 1, state > 0

    x, y = torch.rand(2, 1, 2, 2, generator=stream()), torch.tensor([0, 1])
    right = torch.eye(2)[y] * 9
    attack = settings_for(x, 0.1, steps=6, stop=Twice(), watch=TimesRight())
    _, seen = watched_pgd(lambda z: right + z.flatten(1)[:, :2], x, y, attack, stream())
    assert seen is not None
    assert seen.tolist() == [2, 3]


def test_once_stopped_is_stopped_for_good() -> None:
    y = torch.tensor([0, 1, 1])
    right, wrong = torch.eye(2)[y], torch.eye(2)[1 - y]
    rule = FreezeFooled()
    state, active = rule(rule.start(y), torch.where(torch.tensor([[True], [False], [True]]), right, wrong), y)
    assert active.tolist() == [True, False, True]
    assert rule(state, right, y)[1].tolist() == [True, False, True]


def test_restarts_under_a_stop_rule_prefer_a_fooled_point(tiny_net: Net) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), images(64)
    y = balanced(model, x)
    attack = settings_for(x, 0.1, 0.02, steps=2, stop=FreezeFooled())
    rng = stream(3)
    with torch.no_grad():
        singles = [model(pgd(model, x, y, attack, rng)).argmax(1) != y for _ in range(3)]
        together = model(pgd(model, x, y, replace(attack, restarts=3), stream(3))).argmax(1) != y
    assert torch.equal(together, singles[0] | singles[1] | singles[2])
    assert 64 > int(together.sum()) > max(int(single.sum()) for single in singles)


def test_inputs_may_require_grad_and_nothing_is_left_on_them(tiny_net: Net) -> None:
    model, y = tiny_net(), labels()
    x = images(dtype=torch.float32).requires_grad_(True)
    start = x.detach() + 0.01
    x_adv = pgd(model, x, y, settings_for(x.detach()), stream(), x_init=start)
    assert x.requires_grad
    assert x.grad is None
    assert not start.requires_grad
    assert not x_adv.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_runs_where_gradients_are_switched_off(tiny_net: Net) -> None:
    model, x, y = tiny_net(), images(dtype=torch.float32), labels()
    expected = pgd(model, x, y, settings_for(x), stream())
    with torch.no_grad():
        assert torch.equal(pgd(model, x, y, settings_for(x), stream()), expected)


class Watcher(nn.Module):
    """Passes images on and records what the attack does to the network behind it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.inner.parameters())
        self.calls.append((frozen, self.inner.training, torch.is_grad_enabled() and x.requires_grad))
        return self.inner(x)


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen"])
def test_parameters_are_frozen_while_the_model_is_called(tiny_net: Net, mode: str) -> None:
    model = Watcher(tiny_net())
    x, y = images(dtype=torch.float32), labels()
    pgd(model, x, y, settings_for(x, steps=3, mode=mode, goal=MaximiseKL()), stream())
    assert len(model.calls) == 1 + 3, "one clean pass, one per step, none to look back"
    assert all(frozen for frozen, _, _ in model.calls)
    assert {training for _, training, _ in model.calls} == {mode != "eval"}
    assert [live for _, _, live in model.calls] == [False, True, True, True]


def test_no_convolution_computes_a_weight_gradient(tiny_net: Net) -> None:
    model, x, y = tiny_net(), images(dtype=torch.float32), labels()
    wanted: list[tuple[bool, ...]] = []
    original = torch.ops.aten.convolution_backward.default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is original:
                wanted.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    with Spy():
        pgd(model, x, y, settings_for(x, steps=3), stream())
    assert len(wanted) == 3
    assert {mask[1:] for mask in wanted} == {(False, False)}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flags_and_modes_of_every_module_come_back(tiny_net: Net) -> None:
    model = tiny_net()
    model.train()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    x, y = images(dtype=torch.float32), labels()
    for mode in ("eval", "train", "train_frozen"):
        pgd(model, x, y, settings_for(x, mode=mode), stream())
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.bias"]
        assert model.norm.track_running_stats


def test_flags_come_back_after_an_error(tiny_net: Net) -> None:
    model = tiny_net()
    model.norm.eval()

    def fail(*_: object) -> None:
        raise RuntimeError("inside the model")

    handle = model.head.register_forward_hook(fail)
    x = images(dtype=torch.float32)
    for mode in ("eval", "train", "train_frozen"):
        with pytest.raises(RuntimeError, match="inside the model"):
            pgd(model, x, labels(), settings_for(x, mode=mode), stream())
        assert model.training
        assert not model.norm.training
        assert model.norm.track_running_stats
        assert all(parameter.requires_grad for parameter in model.parameters())
    handle.remove()


@pytest.mark.parametrize(("goal", "extra"), [(MaximiseCE(), 0), (MaximiseKL(), 1)])
@pytest.mark.parametrize(("mode", "counts"), [("eval", False), ("train_frozen", False), ("train", True)])
def test_the_batch_norm_ledger(tiny_net: Net, mode: str, counts: bool, goal: Goal, extra: int) -> None:
    model = tiny_net()
    before = snapshot(model)
    x, y = images(dtype=torch.float32), labels()
    pgd(model, x, y, settings_for(x, steps=5, mode=mode, goal=goal), stream())
    updates = int(model.norm.num_batches_tracked - before["norm.num_batches_tracked"])
    assert updates == (5 + extra if counts else 0)
    assert unchanged(model, before) != counts


def test_train_frozen_sees_batch_statistics(tiny_net: Net) -> None:
    model, x, y = tiny_net(dtype=torch.float64), images(), labels()
    attack = settings_for(x, steps=3)
    by_mode = {m: pgd(model, x, y, replace(attack, mode=m), stream()) for m in ("eval", "train_frozen", "train")}  # type: ignore[arg-type]
    assert torch.equal(by_mode["train_frozen"], by_mode["train"])
    assert not torch.equal(by_mode["train_frozen"], by_mode["eval"])


def test_a_plain_function_is_a_model_too() -> None:
    weights = torch.randn(25, 3, generator=stream(5), dtype=torch.float64)
    x, y = images(), labels()

    def linear(v: Tensor) -> Tensor:
        return v.flatten(1) @ weights

    x_adv = pgd(linear, x, y, settings_for(x, 0.1, 0.01, steps=5, start="zero"), stream())
    path = [pgd(linear, x, y, settings_for(x, 0.1, 0.01, steps=k, start="zero"), stream()) for k in range(6)]
    values = torch.stack([cross_entropy(linear(point), y) for point in path])
    assert torch.equal(path[-1], x_adv)
    assert bool((values.diff(dim=0) >= 0).all()), "small steps never lower the loss of a linear model"


def test_pixels_without_gradient_do_not_move() -> None:
    x, y = images(), labels()

    def first_row_only(v: Tensor) -> Tensor:
        return torch.stack([v[:, 0, 0].sum(1), -v[:, 0, 0].sum(1)], 1)

    for norm, box_first in GEOMETRY.values():
        attack = settings_for(x, 0.3, norm=norm, box_first=box_first, start="zero")
        x_adv = pgd(first_row_only, x, y % 2, attack, stream())
        assert torch.equal(x_adv[:, :, 1:], x[:, :, 1:])

    def constant(v: Tensor) -> Tensor:
        return 0 * v.flatten(1)[:, :3]

    for norm, box_first in GEOMETRY.values():
        attack = settings_for(x, 0.3, norm=norm, box_first=box_first, start="zero")
        assert torch.equal(pgd(constant, x, y, attack, stream()), x)


def test_the_margin_attack_ends_above_where_it_began(tiny_net: Net) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), images(16)
    y = balanced(model, x)
    with torch.no_grad():
        x_adv = pgd(model, x, y, settings_for(x, 0.1, goal=MaximiseMargin(), steps=10), stream(), x_init=x)
        assert bool((margin(model(x_adv), y) > margin(model(x), y)).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_a_number_moves_nothing(norm: str) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :2].clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.full((3, 1, 2, 2), torch.nan)

    x = torch.rand(3, 1, 2, 2)
    attack = Attack(
        eps=torch.full((3,), 0.1), step_size=torch.full((3,), 0.05), steps=3, goal=MaximiseCE(), norm=norm, start="zero"
    )
    found = pgd(Broken.apply, x, torch.zeros(3, dtype=torch.long), attack, torch.Generator())
    torch.testing.assert_close(found, x)


def test_a_model_without_a_gradient_is_refused() -> None:
    attack = Attack(eps=torch.ones(1), step_size=torch.ones(1), steps=1, goal=MaximiseCE())
    with pytest.raises(ModelError, match="no gradient"):
        pgd(
            lambda x: x.detach().flatten(1),
            torch.rand(1, 1, 2, 2),
            torch.zeros(1, dtype=torch.long),
            attack,
            torch.Generator(),
        )


@pytest.mark.parametrize("extra", [{"restarts": 2}, {"keep": "best"}, {"stop": FreezeFooled()}], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_an_image_without_logits_near_it_is_lost_whatever_its_class(label: int, extra: dict[str, object]) -> None:
    def model(x: Tensor) -> Tensor:
        """Right on flat images of one half, without logits elsewhere."""
        right = torch.nn.functional.one_hot(torch.full((len(x),), label), 3).to(x) + 0 * x.sum((1, 2, 3))[:, None]
        return torch.where((x != 0.5).flatten(1).any(1)[:, None], torch.nan, right)

    x, y = torch.full((2, 1, 3, 3), 0.5), torch.full((2,), label)
    attack = settings_for(x, start="uniform", **extra)
    found = pgd(model, x, y, attack, stream())
    assert torch.equal(predicted(model(found), y), (y + 1) % 3)
