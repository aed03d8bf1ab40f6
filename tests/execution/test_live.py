"""A model that trains as a program: it follows the weights, leaves the model alone, and is refused where it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustfair.execution import live
from robustfair.execution.kernels import compiled
from robustfair.execution.kernels.compiled import kernels, missing
from robustfair.execution.live import live_program
from robustfair.execution.program import Program
from robustfair.models import OnCopies, create_model
from robustfair.models.modes import attacking

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"the kernels cannot be had: {missing()}")

CLOSE = 1e-4
NETWORKS = ["preact-resnet18", "resnet18", "resnet9", "small-cnn", "wrn-28-2"]


def network(name: str = "preact-resnet18", width: int | None = 16) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, width=width).train()


def of(model: nn.Module, x: Tensor) -> Program:
    found, lacks = live_program(model, x)
    assert found is not None, lacks
    return found


def learn(model: nn.Module, x: Tensor) -> None:
    """A few steps with much too large a rate: every weight and every running statistic moves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).logsumexp(1).sum().backward()
        optimizer.step()


def passes(model: nn.Module, called: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of one of them, `called` in place of `model`, in eval mode with frozen weights."""
    with attacking(model, "eval"), torch.enable_grad():
        z = x.clone().requires_grad_()
        logits = called(z)
        return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), z)[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_follows_the_weights(name: str) -> None:
    model = network(name, None if name.startswith("wrn") else 16)
    x = torch.rand(4, 3, 16, 16)
    program = of(model, x)
    before, _ = passes(model, program, x)
    assert apart(before, passes(model, model, x)[0]) < CLOSE
    learn(model, x)
    wanted, right = passes(model, model, x)
    assert apart(before, wanted) > 0.1
    program.refresh()
    logits, gradient = passes(model, program, x)
    assert apart(logits, wanted) < CLOSE
    assert apart(gradient, right) < 1e-2
    logits, _ = passes(model, program, x[:3])
    assert apart(logits, wanted[:3]) < CLOSE


def test_a_program_that_follows_equals_one_made_anew() -> None:
    model, x = network(), torch.rand(4, 3, 16, 16)
    program = of(model, x)
    learn(model, x)
    program.refresh()
    found, wanted = passes(model, program, x), passes(model, of(model, x), x)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("wrap", [lambda model: model, OnCopies])
def test_the_model_is_left_as_it_was(wrap: type[OnCopies]) -> None:
    model, x = network(), torch.rand(2, 3, 16, 16)
    model.stem.eval()  # type: ignore[operator,union-attr]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    of(wrap(model), x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Net(nn.Module):
    """A stem and a head; `between` is what happens to the values between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.scale = nn.Parameter(torch.full((), 2.0))
        self.head = nn.Linear(16, 3)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.next(self.stem(x).relu()).relu()).mean((2, 3)))


class Branching(Net):
    def between(self, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h


class ReadingANumber(Net):
    """Its trace would keep the weight of the day."""

    def between(self, h: Tensor) -> Tensor:
        return h * float(self.scale)


class ComputingAConstant(Net):
    """So would this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def between(self, h: Tensor) -> Tensor:
        return h * (self.seen + 1)


class Cutting(Net):
    """Its gradient goes one way of two; its logits tell nothing of that."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            again = self.next(h)
        return h + 5 * again


class Writing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: object = None

    def between(self, h: Tensor) -> Tensor:
        self.seen = h
        return h


UNREADABLE = "the order of the model's layers cannot be read"
ELSE = "the model computes something else than its layers in order"


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Branching, UNREADABLE), (ReadingANumber, UNREADABLE), (ComputingAConstant, UNREADABLE), (Cutting, ELSE)],
)
def test_a_model_that_is_no_list_of_layers_is_refused(kind: type[Net], why: str) -> None:
    torch.manual_seed(0)
    found, lacks = live_program(kind(), torch.rand(2, 3, 8, 8))
    assert found is None
    assert lacks.startswith(why)


def test_no_value_of_a_trace_is_left_in_the_model() -> None:
    model = Writing()
    of(model, torch.rand(2, 3, 8, 8))
    assert model.seen is None or isinstance(model.seen, Tensor)


class ComputingAWeight(Net):
    def between(self, h: Tensor) -> Tensor:
        return h * (self.scale + 1)


@pytest.mark.parametrize("kind", [Net, ComputingAWeight])
def test_a_weight_that_is_computed_follows_too(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(2, 3, 8, 8)
    if kind is Net:
        parametrizations.weight_norm(model.next)
    program = of(model, x)
    learn(model, x)
    program.refresh()
    assert apart(passes(model, program, x)[0], passes(model, model, x)[0]) < CLOSE


def test_a_model_with_hooks_is_refused() -> None:
    model = Net()
    model.next.register_forward_hook(lambda module, inputs, output: output + 1)
    assert live_program(model, torch.rand(2, 3, 8, 8)) == (None, "the model has hooks")


def test_a_model_without_a_layer_for_them_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3))
    assert live_program(model, torch.rand(2, 3, 8, 8)) == (None, "")


def test_a_model_without_a_copy_is_refused() -> None:
    class Alone(Net):
        def __deepcopy__(self, memo: object) -> Net:
            raise TypeError("it holds a file")

    found, lacks = live_program(Alone(), torch.rand(2, 3, 8, 8))
    assert (found, lacks) == (None, f"{UNREADABLE} (it holds a file)")


def test_a_machine_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, "no C++ compiler such as g++ was found"))
    found = live.live_program(Net(), torch.rand(2, 3, 8, 8))
    assert found == (None, "no C++ compiler such as g++ was found")
