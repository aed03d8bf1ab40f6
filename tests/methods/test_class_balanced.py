from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import class_balanced as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, RobustFairWarning
from robustfair.methods import CCR, ClassBalanced, LabelSmoothing, compose
from robustfair.methods.class_balanced import effective_weights, focal_loss
from robustfair.objectives import BAT, MART, PGDAT, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.values import Batch, Loss

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

KINDS = ("softmax", "sigmoid", "focal")


def batch_of(b: int = 10) -> Batch:
    """Classes 0 to 2 in turn: four images of the first, three of the others."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=torch.float64)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x.flip(0))


def weighed(run: Run, model: nn.Module, objective: Objective, method: ClassBalanced, batch: Batch) -> Loss:
    plan = compose(objective, [method])
    stand_in = run(objective=objective, images=(batch.x,))
    return plan.loss(model, batch, plan.at_epoch({}, stand_in), stand_in)


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


# Weights


def test_the_published_vector_of_weights() -> None:
    found = effective_weights(torch.tensor([500, 100, 10]), 0.999)
    assert found.tolist() == pytest.approx([0.067153, 0.277634, 2.655212], abs=1e-6)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("counts", [(500, 100, 10), (1, 2, 3), (4, 4, 4), (5000, 1)])
def test_weights_are_those_of_the_sums(counts: tuple[int, ...], b: float) -> None:
    found = effective_weights(torch.tensor(counts), b)
    assert found.tolist() == pytest.approx(reference.weights(counts, b), rel=1e-9)
    assert float(found.sum()) == pytest.approx(len(counts), rel=1e-12)
    assert bool((found > 0).all())
    order = torch.tensor(counts).argsort(descending=True)
    assert bool((found[order].diff() >= -1e-12).all()), "fewer images never weigh less"


def test_limits_of_b() -> None:
    counts = torch.tensor([500, 100, 10])
    assert effective_weights(counts, 0.0).tolist() == [1.0, 1.0, 1.0]
    inverse = 1 / counts.double()
    limit = 3 * inverse / inverse.sum()
    torch.testing.assert_close(effective_weights(counts, 1 - 1e-9), limit, rtol=1e-6, atol=0)
    assert effective_weights(torch.tensor([10**9, 10**9 - 1]), 0.9999).tolist() == [1.0, 1.0]


# The loss


@pytest.mark.parametrize("objective", [Standard(), PGDAT(eps=0.1)], ids=lambda objective: objective.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_loss_is_the_loop_over_examples(
    tiny_net: Net, stand_in_run: Run, objective: Objective, kind: Any, gamma: float
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    method = ClassBalanced(kind=kind, b=0.9, gamma=gamma)
    ours = weighed(stand_in_run, model, objective, method, batch).total().item()
    with torch.no_grad():
        logits = model(batch.x if objective.name == "standard" else batch.x_adv).tolist()
    assert ours == pytest.approx(reference.loss(logits, batch.y.tolist(), (4, 3, 3), 0.9, kind, gamma), rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_of_the_focal_loss_is_that_of_differences(gamma: float) -> None:
    rng = torch.Generator().manual_seed(1)
    z = (3 * torch.randn(6, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda logits: focal_loss(logits, y, gamma), z)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_focal_loss_is_finite_for_any_logits(gamma: float) -> None:
    z = torch.tensor([[200.0, -200.0, 1e4], [-200.0, 200.0, -1e4]], requires_grad=True)
    value = focal_loss(z, torch.tensor([0, 0]), gamma)
    value.sum().backward()
    assert z.grad is not None
    assert bool(value.isfinite().all())
    assert bool(z.grad.isfinite().all())


def test_focal_with_gamma_zero_is_sigmoid(tiny_net: Net, stand_in_run: Run) -> None:
    model, twin, batch = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64), batch_of()
    focal = weighed(stand_in_run, model, Standard(), ClassBalanced(kind="focal", gamma=0), batch).total()
    sigmoid = weighed(stand_in_run, twin, Standard(), ClassBalanced(kind="sigmoid"), batch).total()
    torch.testing.assert_close(focal, sigmoid)
    every = nn.functional.binary_cross_entropy_with_logits
    hot = nn.functional.one_hot(batch.y, 3).double()
    logits = tiny_net(dtype=torch.float64)(batch.x)
    expected = every(logits, hot, reduction="none").sum(1)
    torch.testing.assert_close(focal_loss(logits, batch.y, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "objective", [Standard(), PGDAT(eps=0.1), Trades(eps=0.1), MART(eps=0.1)], ids=lambda o: o.name
)
def test_without_weights_it_is_the_objective(tiny_net: Net, stand_in_run: Run, objective: Objective) -> None:
    """b = 0, and equal counts for any b: value and gradient."""
    for method, batch in ((ClassBalanced(b=0), batch_of()), (ClassBalanced(b=0.9999), batch_of(9))):
        model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
        with pytest.warns(RobustFairWarning, match="class-balanced gives every class the weight 1"):
            ours = weighed(stand_in_run, model, objective, method, batch).total()
        plain = objective(twin, batch).total()
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
        for a, b in zip(gradients(ours, model), gradients(plain, twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_all_terms_of_an_example_are_weighed(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64), batch_of()
    plain = Trades(eps=0.1)(model, batch)
    ours = weighed(stand_in_run, model, Trades(eps=0.1), ClassBalanced(b=0.9), batch)
    w = torch.tensor(reference.weights((4, 3, 3), 0.9), dtype=torch.float64)[batch.y]
    torch.testing.assert_close(ours.per_example(), w * plain.per_example(), rtol=1e-9, atol=0)
    replaced = weighed(stand_in_run, model, Trades(eps=0.1), ClassBalanced(b=0.9, kind="sigmoid"), batch)
    torch.testing.assert_close(replaced.terms["consistency"], plain.terms["consistency"])
    torch.testing.assert_close(replaced.terms["label"], focal_loss(model(batch.x), batch.y, 0.0))


def test_on_bat_the_label_term_is_still_that_of_the_last_clean_point(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    batch = replace(batch, views={"last-clean": (batch.x + 0.3).clamp(0, 1)})
    ours = weighed(stand_in_run, model, BAT(eps=0.1), ClassBalanced(b=0.9, kind="focal"), batch)
    expected = focal_loss(model(batch.views["last-clean"]), batch.y, 1.0)
    torch.testing.assert_close(ours.terms["label"], expected, rtol=1e-12, atol=0)
    assert not torch.allclose(expected, focal_loss(model(batch.x), batch.y, 1.0))


# What it claims, and what is refused


def test_claims_follow_the_kind() -> None:
    assert ClassBalanced().claims == {"loss.weight", "role.class_weight"}
    for kind in ("sigmoid", "focal"):
        assert ClassBalanced(kind=kind).claims == {"loss.weight", "loss.label", "role.class_weight"}
    compose(PGDAT(), [ClassBalanced(), LabelSmoothing()])
    with pytest.raises(ConflictError, match=r"label-smoothing sets batch\.soft, and class-balanced replaces the term"):
        compose(PGDAT(), [LabelSmoothing(), ClassBalanced(kind="focal")])
    with pytest.raises(ConflictError, match=r"both set role\.class_weight"):
        compose(Trades(), [CCR(), ClassBalanced()])


@pytest.mark.parametrize(
    ("field", "wrong"), [("b", 1.0), ("b", -0.1), ("b", float("nan")), ("kind", "hinge"), ("gamma", -1.0)]
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^class-balanced: {field} must be"):
        ClassBalanced(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^class-balanced: {field} must be"):
        read_composition(f"standard + class-balanced({field}={wrong})")


def test_a_class_without_training_images_is_refused_before_the_first_step(tiny_net: Net, tiny_data: Data) -> None:
    with (
        pytest.warns(RobustFairWarning, match="no training image of class class 1"),
        pytest.raises(ConfigError, match="class-balanced: training images must be at least one of every class, got"),
    ):
        fit(tiny_net(), tiny_data((4, 0, 4)), Standard(), methods=[ClassBalanced()], validation=0, select="last")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_counts_are_said_where_nothing_changes(tiny_net: Net, tiny_data: Data, kind: Any) -> None:
    schedule = Schedule(epochs=2, batch_size=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"validation": 0, "select": "last", "schedule": schedule}
        fit(tiny_net(), tiny_data((5, 5, 5)), Standard(), methods=[ClassBalanced(kind=kind)], **options)
    said = [str(each.message) for each in caught if "class-balanced" in str(each.message)]
    assert len(said) == (kind == "softmax"), "the other kinds change the loss all the same"


def test_weights_are_of_the_images_that_are_trained_on(tiny_net: Net, tiny_data: Data) -> None:
    """Held out images do not count."""
    seen: list[Tensor] = []
    data = tiny_data((20, 10, 4))

    def save(state: Any) -> None:
        seen.append(state.methods["class-balanced"]["weight"])

    schedule = Schedule(epochs=1, batch_size=8)
    fit(tiny_net(), data, Standard(), methods=[ClassBalanced(b=0.9)], validation=0.5, schedule=schedule, save=save)
    assert seen[0].tolist() == pytest.approx(reference.weights((10, 5, 2), 0.9))
    assert replace(data).class_counts().tolist() == [20, 10, 4]
