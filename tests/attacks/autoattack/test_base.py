from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.attacks.autoattack.base import SearchNetwork, distance, into_ball, margins
from robustfair.attacks.autoattack.fab import lead
from robustfair.errors import ModelError
from robustfair.losses import cross_entropy

Build = Callable[..., Any]


def test_margin_is_the_largest_other_logit_over_that_of_the_label() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margins(logits, torch.tensor([0, 2, 1])).tolist() == [-1.0, 1.0, 0.0]
    assert margins(torch.tensor([[torch.nan, 1.0]]), torch.tensor([1])).isnan().all()


def test_gradients_are_those_of_each_example_alone(scene: Build) -> None:
    many = scene(4, classes=6)
    target, network = many.other(), SearchNetwork(many.model)
    logits, gradient = network.gradient(many.x, lead, many.y, target)
    torch.testing.assert_close(logits, network.logits(many.x))
    all_logits, jacobian = network.jacobian(many.x)
    assert torch.equal(all_logits, logits)
    for row in range(4):
        z = many.x[row : row + 1].clone().requires_grad_(True)
        out = many.model(z)[0]
        for k in range(6):
            expected = torch.autograd.grad(out[k], z, retain_graph=True)[0][0]
            torch.testing.assert_close(jacobian[row, k], expected, rtol=0, atol=1e-12)
        (expected,) = torch.autograd.grad(out[target[row]] - out[many.y[row]], z)
        torch.testing.assert_close(gradient[row], expected[0], rtol=0, atol=1e-12)
    assert not many.x.requires_grad
    assert all(parameter.grad is None for parameter in many.model.parameters())


def test_what_is_no_finite_gradient_is_zero() -> None:
    def root(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.flatten(1).sqrt().sum(1), x.flatten(1).sum(1)], 1)

    x = torch.tensor([0.0, 0.25, 0.0, 1.0]).view(1, 1, 2, 2)
    _, gradient = SearchNetwork(root).gradient(x, lead, torch.tensor([1]), torch.tensor([0]))
    assert gradient.flatten().tolist() == [0.0, 0.0, 0.0, -0.5]
    _, jacobian = SearchNetwork(root).jacobian(x)
    assert jacobian[0].flatten(1).tolist() == [[0.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.0, 1.0]]


def test_a_model_without_a_gradient_is_an_error(scene: Build) -> None:
    few = scene(2)
    cut = SearchNetwork(lambda x: few.model(x).detach())
    with pytest.raises(ModelError, match="no gradient to its input"):
        cut.gradient(few.x, cross_entropy, few.y)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([0.0, 1e-4, 1 / 255, 8 / 255, 0.5, 1.0]),
    size=st.sampled_from([(1, 2, 3), (3, 5, 4)]),
    far=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_into_ball_is_the_projection(norm: Any, eps: float, size: tuple[int, ...], far: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(5, *size, generator=rng) * 1.2 - 0.1).clamp(0, 1)
    point = x + far * eps * torch.randn(x.shape, generator=rng)
    found = into_ball(x, point, eps, norm)
    assert found.dtype == x.dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (distance(x, found, norm) <= eps + 1e-6).all()
    within = (distance(x, point, norm) <= eps) & (point >= 0).flatten(1).all(1) & (point <= 1).flatten(1).all(1)
    torch.testing.assert_close(found[within], point[within], rtol=0, atol=1e-7)
    again = into_ball(x, found, eps, norm)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-7)


def test_distance_is_that_of_the_norm() -> None:
    x = torch.zeros(1, 1, 1, 2)
    point = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    assert distance(x, point, "linf").tolist() == [4.0]
    assert distance(x, point, "l2").tolist() == [5.0]
    assert distance(x, point, "l2").dtype == torch.float64


def test_a_model_that_cuts_its_graph_is_refused_in_one_line() -> None:
    def cut(x: torch.Tensor) -> torch.Tensor:
        return x.detach().flatten(1)[:, :3]

    x = torch.rand(2, 1, 2, 2)
    for ask in (lambda network: network.jacobian(x), lambda network: network.gradient(x, lambda logits: logits[:, 0])):
        with pytest.raises(ModelError, match="gives no gradient to its input"):
            ask(SearchNetwork(cut))
