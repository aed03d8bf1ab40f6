from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import faal as reference
from reference import losses
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import AWP, CCR, DAFA, FAAL, Method, compose
from robustfair.methods.awp import perturbation
from robustfair.methods.faal import worst_weights
from robustfair.objectives import MART, PGDAT, Objective, Standard, Trades
from robustfair.training import Schedule, fit
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

COUNT, MARGIN = (3, 5, 4, 4), (-0.2, 0.1, -0.5, 0.3)
OBJECTIVES: list[Objective] = [PGDAT(), Trades(beta=6), MART(beta=6)]


def solve(a: Any, radius: float = 0.5) -> list[float]:
    found: list[float] = worst_weights(torch.tensor(a, dtype=torch.float64), radius).tolist()
    return found


def batch_of(y: list[int], *, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(len(y), 1, 5, 5, generator=rng, dtype=dtype)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=dtype)).clamp(0, 1)
    return Batch(x=x, y=torch.tensor(y), index=torch.arange(len(y)), seed=1, x_adv=x_adv)


# The weights


@pytest.mark.parametrize(
    ("counts", "radius", "expected"),
    [
        (COUNT, 0.5, (0.084552, 0.182017, 0.050283, 0.683148)),
        ((1, 1, 1, 1), 0.5, (0.082019, 0.174031, 0.053653, 0.690297)),
        (COUNT, 0.1, (0.180835, 0.276566, 0.125532, 0.417067)),
        ((1, 1, 1, 1), 0.1, (0.175637, 0.270732, 0.129981, 0.423650)),
    ],
)
def test_the_published_vectors(counts: tuple[int, ...], radius: float, expected: tuple[float, ...]) -> None:
    a = [n * margin for n, margin in zip(counts, MARGIN, strict=True)]
    assert solve(a, radius) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_rare_in_the_batch_gains_by_that_alone() -> None:
    counts = (9, 15, 9, 16, 10, 14, 11, 14, 16, 14)
    expected = (0.311, 0.029, 0.311, 0.026, 0.120, 0.035, 0.074, 0.035, 0.026, 0.035)
    assert solve([-0.2 * n for n in counts]) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("classes", "radius", "largest"),
    [(10, 0.1, 0.28238), (10, 0.5, 0.57482), (10, 1.0, 0.76363), (2, 0.5, 0.89753), (100, 0.5, 0.42476)],
)
def test_the_largest_weight_that_a_class_can_have(classes: int, radius: float, largest: float) -> None:
    assert max(solve([1.0] + [0.0] * (classes - 1), radius)) == pytest.approx(largest, abs=6e-6)


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 10])
def test_a_generic_solver_finds_the_same(classes: int, radius: float) -> None:
    rng = random.Random(classes)
    for _ in range(4):
        a = [rng.uniform(-1, 1) * rng.randrange(1, 20) for _ in range(classes)]
        assert solve(a, radius) == pytest.approx(reference.solved_weights(a, radius), abs=1e-5)


def hard(rng: random.Random, classes: int) -> list[list[float]]:
    """Numbers of many sizes, ties at the top, ties below, gaps of every size, and differences that rounding nearly
    eats."""
    return [
        [10 ** rng.uniform(-12, 12) * rng.choice((-1, 1)) for _ in range(classes)],
        [0.0] * (classes - 1) + [-1.0],
        [0.0] * (classes - 1) + [1.0],
        [-(10.0**-k) for k in range(classes)],
        [1 + 1e-14, *(1 + 1e-15 * rng.randrange(5) for _ in range(classes - 1))],
    ]


@pytest.mark.parametrize("radius", [1e-8, 1e-3, 0.1, 0.5, 20.0, 1e5])
@pytest.mark.parametrize("classes", [2, 10, 60])
def test_bisection_finds_the_same_where_inputs_are_hard(classes: int, radius: float) -> None:
    for a in hard(random.Random(classes), classes):
        ours = solve(a, radius)
        assert ours == pytest.approx(reference.worst_weights(a, radius), rel=1e-6, abs=1e-8)
        assert sum(ours) == pytest.approx(1, abs=1e-12)


NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.floats(1e-4, 5))
def test_the_weights_meet_the_conditions_of_a_maximum(a: list[float], radius: float) -> None:
    """On the simplex, on the border of the ball, and a_c + kappa / q_c the same for every class: enough, since the
    problem is convex."""
    q = solve(a, radius)
    assert sum(q) == pytest.approx(1, abs=1e-12)
    assert min(q) > 0
    if max(a) - min(a) < 1e-6:
        return
    assert reference.kl_from_uniform(q) == pytest.approx(radius, abs=1e-6)
    best, least = a.index(max(a)), a.index(min(a))
    kappa = (a[best] - a[least]) / (1 / q[least] - 1 / q[best])
    assert kappa > 0
    for value, weight in zip(a, q, strict=True):
        assert value + kappa / weight == pytest.approx(a[best] + kappa / q[best], abs=1e-5 * (max(a) - min(a)))


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.floats(1e-3, 5), st.floats(-50, 50), st.floats(1e-3, 1e3))
def test_order_and_invariances(a: list[float], radius: float, shift: float, scale: float) -> None:
    q = solve(a, radius)
    for (x, p), (y, r) in zip(zip(a, q, strict=True), list(zip(a, q, strict=True))[1:], strict=False):
        assert p <= r or x >= y
    if max(a) - min(a) > 1e-3:
        assert solve([value + shift for value in a], radius) == pytest.approx(q, abs=1e-6)
        assert solve([scale * value for value in a], radius) == pytest.approx(q, abs=1e-6)


def test_equal_numbers_or_no_radius_are_uniform() -> None:
    for value in (-3.0, 0.0, 0.25):
        assert solve([value] * 5) == pytest.approx([0.2] * 5, abs=1e-15)
    assert solve([1.0, 2.0, 3.0, 4.0], 0.0) == [0.25] * 4


# The loss


@pytest.mark.parametrize("over", ["count", "class"])
@pytest.mark.parametrize("measure", ["margin", "cross-entropy"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_the_loss_is_the_loop_over_classes_and_images(
    tiny_net: Net, stand_in_run: Run, objective: Objective, measure: Any, over: Any
) -> None:
    model = tiny_net(dtype=torch.float64).eval()
    for y in ([0, 2, 1, 1, 2, 2, 2], [0, 0, 2, 0]):
        batch = batch_of(y)
        plain = objective(model, batch)
        assert plain.out.adv is not None
        edited = FAAL(over=over, measure=measure).loss(plain, batch, {}, stand_in_run())
        values, absent = losses.cross_entropy, 0.0
        if measure == "margin":
            values, absent = reference.probability_margin, -1.0
        adv = plain.out.adv.tolist()
        means, counts = reference.class_means([values(z, c) for z, c in zip(adv, y, strict=True)], y, 3, absent)
        a = [n * mean for n, mean in zip(counts, means, strict=True)] if over == "count" else means
        q = reference.worst_weights(a, 0.5)
        assert edited.weight.tolist() == pytest.approx([3 * q[c] for c in y], abs=1e-6)
        assert not edited.weight.requires_grad
        assert edited.total().item() == pytest.approx(reference.loss(plain.per_example().tolist(), y, q), abs=1e-6)
        assert replace(edited, weight=plain.weight) == plain, "nothing but the weight moves"


def test_a_class_without_images_has_minus_one_over_classes_and_nothing_over_images(stand_in_run: Run) -> None:
    """Three logits of two images, both right: margins near -1/4 and -1/2, the third class missing."""
    adv = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.625, 0.125]], dtype=torch.float64))
    batch = batch_of([0, 1])
    found = {}
    for over in ("count", "class"):
        loss = PGDAT()(lambda _: adv, batch)
        found[over] = FAAL(over=over).loss(loss, batch, {}, stand_in_run()).weight.tolist()  # type: ignore[arg-type]
    assert found["count"] == pytest.approx([3 * q for q in reference.worst_weights([-0.25, -0.375, 0.0], 0.5)[:2]])
    assert found["class"] == pytest.approx([3 * q for q in reference.worst_weights([-0.25, -0.375, -1.0], 0.5)[:2]])
    assert sum(found["count"]) < 1 < sum(found["class"]), "over images the missing class takes most of the weight"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_equal_margins_in_equal_numbers_are_the_unweighted_loss(
    tiny_net: Net, stand_in_run: Run, objective: Objective
) -> None:
    model = tiny_net()
    nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)  # type: ignore[union-attr, arg-type]
    batch = batch_of([0, 1, 2] * 3, dtype=torch.float32)
    plain = objective(model, batch)
    assert torch.equal(FAAL().loss(plain, batch, {}, stand_in_run()).total(), plain.total())


def test_statistics_are_those_of_all_processes(tiny_net: Net, stand_in_run: Run, monkeypatch: Any) -> None:
    model, whole = tiny_net(dtype=torch.float64).eval(), batch_of([0, 2, 1, 1, 2, 2])
    expected = FAAL().loss(PGDAT()(model, whole), whole, {}, stand_in_run()).weight
    halves = [replace(whole, x=whole.x[p], y=whole.y[p], x_adv=whole.x_adv[p]) for p in (slice(3), slice(3, None))]  # type: ignore[index]
    run, parts = stand_in_run(), []
    monkeypatch.setattr(run, "total", lambda part: parts.append(part) or part, raising=False)
    FAAL().loss(PGDAT()(model, halves[1]), halves[1], {}, run)
    monkeypatch.setattr(run, "total", lambda part: part + parts.pop(0))
    first = FAAL().loss(PGDAT()(model, halves[0]), halves[0], {}, run).weight
    assert not parts
    torch.testing.assert_close(first, expected[:3], rtol=1e-9, atol=0)


# With adversarial weight perturbation


class Look(Method):
    """Keeps what training computed of every step, and the weights that the step began with."""

    name = "look"

    def __init__(self) -> None:
        self.seen: list[tuple[Batch, Loss, dict[str, Tensor]]] = []
        self.weights: dict[str, Tensor] = {}

    def examples(self, batch: Batch, state: State, run: Any) -> Batch:
        self.weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        return batch

    def after_step(self, state: State, batch: Batch, loss: Loss, run: Any) -> State:
        self.seen.append((batch, loss, self.weights))
        return state


@pytest.mark.parametrize("methods", [(AWP(gamma=0.05), FAAL()), (FAAL(), AWP(gamma=0.05))], ids=["first", "last"])
@pytest.mark.parametrize("objective", [PGDAT(eps=0.1, steps=2), Trades(eps=0.1, steps=2)], ids=lambda o: o.name)
def test_weights_are_perturbed_along_the_unweighted_loss_and_margins_are_theirs(
    tiny_net: Net, tiny_data: Data, stand_in_run: Run, objective: Objective, methods: tuple[Method, ...]
) -> None:
    look, data = Look(), tiny_data((8, 5, 3))
    schedule = Schedule(epochs=1, lr=0.1, batch_size=8)
    fit(tiny_net(), data, objective, methods=(*methods, look), schedule=schedule, validation=0, select="last")
    for batch, loss, weights in look.seen:
        model = tiny_net()
        model.load_state_dict(weights)
        plain = objective(model.train(), batch).total()
        moved = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
        for weight, gradient in zip(moved.values(), torch.autograd.grad(plain, list(moved.values())), strict=True):
            with torch.no_grad():
                weight.add_(perturbation(weight.detach().clone(), gradient, 0.05))
        perturbed = objective(model, batch)
        assert loss.out.adv is not None
        torch.testing.assert_close(perturbed.out.adv, loss.out.adv, rtol=1e-4, atol=1e-5)
        expected = FAAL().loss(perturbed, batch, {}, stand_in_run()).weight
        torch.testing.assert_close(loss.weight, expected, rtol=1e-3, atol=1e-4)
        assert float(loss.weight.max() - loss.weight.min()) > 0.01
    assert len(look.seen) == 2


# What it says of itself


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"radius": -0.1}, r"faal: radius must be a finite number >= 0, got -0\.1"),
        ({"radius": float("nan")}, "faal: radius must be"),
        ({"over": "sample"}, "faal: over must be 'count' or 'class', got 'sample'"),
        ({"measure": "loss"}, "faal: measure must be 'margin' or 'cross-entropy', got 'loss'"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAAL(**given)


def test_what_it_cannot_act_beside_is_refused() -> None:
    with pytest.raises(ConflictError, match="faal needs attacked images, and standard trains without an attack"):
        compose(Standard(), [FAAL()])
    for other in (CCR(), DAFA()):
        with pytest.raises(ConflictError, match=r"both set role\.class_weight \(the balance between classes\)"):
            compose(Trades(), [FAAL(), other])
        compose(Trades(), [FAAL(), other], allow=frozenset({"role.class_weight"}))


def test_no_radius_is_remarked_upon() -> None:
    assert FAAL().remark(2) is None
    assert FAAL(radius=0.0).remark(2) == "faal(radius=0) weighs all classes alike: it does nothing"
