"""Small batches, attacks on them, and comparisons of an objective with its slow reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reference import attacks
from robustfair.attacks.pgd import pgd
from robustfair.objectives import AdversarialObjective, Objective
from robustfair.values import Batch, Model

Net = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    """A function that builds a batch of random images, all classes in turn, with the logits of a teacher for every term
    that may ask for them; with `soft` it has soft labels too."""

    def build(b: int = 6, *, dtype: torch.dtype = torch.float64, classes: int = 3, soft: bool = False) -> Batch:
        rng = torch.Generator().manual_seed(0)
        x = torch.rand(b, 1, 5, 5, generator=rng, dtype=dtype)
        mixed = torch.rand(b, classes, generator=rng, dtype=dtype).add(0.1) if soft else None
        labels = None if mixed is None else mixed / mixed.sum(1, keepdim=True)
        logits = torch.randn(2, b, classes, generator=torch.Generator().manual_seed(7), dtype=dtype)
        teacher = dict(zip(("distil", "distil_clean"), 2 * logits, strict=True))
        return Batch(x=x, y=torch.arange(b) % classes, index=torch.arange(b), seed=1, soft=labels, teacher=teacher)

    return build


@pytest.fixture(scope="session")
def attacked() -> Callable[..., Batch]:
    """A function that makes `x_adv` and views of a batch by the attacks of an objective, as training draws them."""

    def attack(model: Model, objective: AdversarialObjective, batch: Batch) -> Batch:
        made = {
            name: pgd(model, batch.x, batch.y, one, batch.rng("attack" if name == "x_adv" else f"attack/{name}"))
            for name, one in objective.attacks(batch).items()
        }
        return replace(batch, x_adv=made.pop("x_adv"), views=made)

    return attack


@pytest.fixture(scope="session")
def gradients() -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """A function that gives the gradient of a value with respect to every parameter."""

    def differentiate(model: nn.Module, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, list(model.parameters()), retain_graph=True))

    return differentiate


@pytest.fixture(scope="session")
def terms_on() -> Callable[..., dict[str, Tensor]]:
    """A function that gives the terms of a loss where the network answers `clean` at x and `adv` at x'."""

    def answer(objective: Objective, batch: Batch, clean: Tensor, adv: Tensor) -> dict[str, Tensor]:
        return dict(objective(lambda x: clean if x is batch.x else adv, batch).terms)

    return answer


@pytest.fixture(scope="session")
def start_of() -> Callable[..., Tensor]:
    """A function that draws a start by the pixel formulas, from the stream that an attack on the batch reads."""

    def start(batch: Batch, kind: str, norm: str, eps: float, *, box: bool = True) -> Tensor:
        rng = batch.rng("attack")
        if kind == "gauss001":
            return attacks.gauss_start(batch.x, torch.empty_like(batch.x).normal_(generator=rng))
        if norm == "linf":
            draw = torch.empty_like(batch.x).uniform_(-1, 1, generator=rng)
            return attacks.uniform_start(batch.x, draw, eps, box)
        direction = torch.empty_like(batch.x).normal_(generator=rng)
        share = torch.empty_like(batch.x[:, 0, 0, 0]).uniform_(0, 1, generator=rng)
        return attacks.radial_start(batch.x, direction, share, eps, box)

    return start


@pytest.fixture(scope="session")
def assert_attack_is_the_pixel_loop(
    tiny_net: Net, batch_of: Callable[..., Batch], attacked: Callable[..., Batch], start_of: Callable[..., Tensor]
) -> Callable[..., None]:
    """A function that compares the attack of an objective with the loop over pixels from the same start."""

    def check(
        objective: AdversarialObjective,
        *,
        eps: float,
        step_size: float,
        steps: int,
        goal: str,
        geometry: str,
        start: str | Tensor = "uniform",
        box: bool = True,
        target: Tensor | None = None,
    ) -> None:
        model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
        begin = start_of(batch, start, objective.norm, eps, box=box) if isinstance(start, str) else start
        b = len(batch.x)
        settings = {"eps": [eps] * b, "step_size": [step_size] * b, "steps": steps}
        paths = attacks.pgd(
            model, batch.x, batch.y, begin, goal=goal, geometry=geometry, box=box, target=target, **settings
        )
        ours = attacked(model, objective, batch).x_adv
        assert ours is not None
        torch.testing.assert_close(ours, attacks.last(paths, batch.x, box), rtol=0, atol=1e-9)
        assert float((ours - batch.x).abs().max()) > eps / 5, "the attack hardly moved"

    return check


@pytest.fixture(scope="session")
def assert_loss_is_the_formula(tiny_net: Net, gradients: Callable[..., list[Tensor]]) -> Callable[..., None]:
    """A function that compares value and gradients of an objective with a reference in closed form.

    The reference takes the logits of the passes the objective made (clean, attacked, or both) and the labels, and
    returns the value and its gradient with respect to each of them. Batch norm trains on both sides.
    """

    def check(objective: Objective, batch: Batch, slow: Callable[..., tuple], *, classes: int = 3) -> None:
        model, twin = (tiny_net(dtype=torch.float64, classes=classes) for _ in range(2))
        loss = objective(model, batch)
        passes = [(loss.out.clean, batch.x), (loss.out.adv, batch.x_adv)]
        ours = [logits for logits, _ in passes if logits is not None]
        theirs = [twin(images) for logits, images in passes if logits is not None]
        value, *slopes = slow(*(logits.tolist() for logits in theirs), batch.y.tolist())
        assert loss.total().item() == pytest.approx(value, rel=0, abs=1e-10)
        upstream = [torch.tensor(slope, dtype=torch.float64) for slope in slopes]
        at_logits = torch.autograd.grad(loss.total(), ours, retain_graph=True)
        torch.testing.assert_close(list(at_logits), upstream, rtol=0, atol=1e-10)
        expected = list(torch.autograd.grad(theirs, list(twin.parameters()), upstream))
        torch.testing.assert_close(gradients(model, loss.total()), expected, rtol=1e-9, atol=1e-10)
        assert max(float(g.abs().max()) for g in expected) > 1e-3, "nothing to compare"

    return check
