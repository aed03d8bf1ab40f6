"""A network as a list of steps: its logits and its gradients beside autograd's in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.execution.folded import folded, search_network
from robustfair.execution.kernels import compiled
from robustfair.execution.kernels.compiled import kernels, missing
from robustfair.execution.program import Program, program
from robustfair.models import create_model

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"the kernels cannot be had: {missing()}")

CLOSE = 1e-4


def as_program(model: nn.Module) -> Program:
    at_hand = kernels()
    assert at_hand is not None
    return program(folded(model).requires_grad_(False), at_hand)


def with_statistics(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that are not those of a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def assert_same(network: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Logits and gradients of the network are the model's, in float64, to rounding."""
    exact = deepcopy(model).double()
    z, double = x.clone().requires_grad_(), x.double().requires_grad_()
    logits, wanted = network(z), exact(double)
    assert (logits - wanted).abs().max() <= CLOSE * wanted.abs().max()
    with torch.no_grad():
        assert torch.equal(network(x), logits)
    for k in range(3):
        (found,) = torch.autograd.grad(logits[:, k].sum(), z, retain_graph=True)
        (gradient,) = torch.autograd.grad(wanted[:, k].sum(), double, retain_graph=True)
        assert (found - gradient).norm() <= CLOSE * gradient.norm()


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("name", ["preact-resnet18", "resnet18", "resnet9", "small-cnn"])
def test_it_is_the_network(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = with_statistics(create_model(name, width=width))
    assert_same(as_program(model), model, torch.rand(3, 3, 16, 16))


class Odd(nn.Module):
    """Values that several steps read, sums and ReLUs in other places, and layers that no kernel takes."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.one = nn.Conv2d(32, 32, 1)
        self.even = nn.Conv2d(16, 32, (2, 3), stride=2, padding=(0, 1))
        self.act = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.first(x))
        b = self.second(a) + a
        c = self.norm(b)
        d = self.act(c) + a * 0.5
        e = torch.relu(self.third(d) + self.even(d))
        f = e + self.grouped(e)
        g = (f + self.one(f)).relu()
        return self.head(F.adaptive_avg_pool2d(g, 1).flatten(1)) + g.mean((2, 3))[:, :4]


@pytest.mark.parametrize("inplace", [False, True])
def test_values_that_several_steps_read(inplace: bool) -> None:
    torch.manual_seed(0)
    model = with_statistics(Odd(inplace))
    assert_same(as_program(model), model, torch.rand(2, 3, 10, 10))


def test_a_norm_and_relu_that_two_layers_read_are_computed_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            z = self.norm(stem).relu()
            return self.head((self.one(z) + self.two(z) + stem).mean((2, 3)))

    torch.manual_seed(0)
    model = with_statistics(Two())
    assert_same(as_program(model), model, torch.rand(2, 3, 7, 9))


def test_a_batch_does_not_change_what_becomes_of_an_image() -> None:
    torch.manual_seed(0)
    network = as_program(with_statistics(create_model("preact-resnet18", width=8)))
    x = torch.rand(9, 3, 16, 16)
    with torch.no_grad():
        assert (network(x)[3:5] - network(x[3:5])).abs().max() < 1e-6


def test_the_weights_of_the_model_are_left_alone() -> None:
    torch.manual_seed(0)
    model = with_statistics(create_model("preact-resnet18", width=8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(2, 3, 16, 16)
    network = search_network(model, x, "fp32")
    assert any(isinstance(module, Program) for module in network.modules())
    network(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_kernels_a_search_sees_the_folded_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, "none"))
    torch.manual_seed(0)
    model = with_statistics(create_model("preact-resnet18", width=8))
    network = search_network(model, torch.rand(2, 3, 16, 16), "fp32")
    assert not any(isinstance(module, Program) for module in network.modules())
    assert_same(network, model, torch.rand(2, 3, 16, 16))


class Shifting(nn.Module):
    """It works in place on what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x)
        y = self.two(z)
        y.mul_(2)
        return self.head(y.mean((2, 3)) + z.mean((2, 3)))


def test_a_network_that_no_program_can_be_is_searched_all_the_same() -> None:
    torch.manual_seed(0)
    model = Shifting().eval()
    x = torch.rand(2, 3, 9, 9)
    assert_same(search_network(model, x, "fp32"), model, x)


class Halving(nn.Module):
    """Numbers that the kernels do not take, between layers that they take."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(x) + x.bfloat16() if self.adds else self.norm(x.tanh().bfloat16())
        return y.mean((2, 3)).float()


@pytest.mark.parametrize("adds", [False, True])
def test_numbers_of_another_kind_are_not_read_as_float32(adds: bool) -> None:
    torch.manual_seed(0)
    model = Halving(adds=adds).eval()
    x = torch.rand(8, 3, 64, 64)
    with pytest.raises(TypeError, match=r"float32 on a CPU, not torch\.bfloat16"):
        as_program(model)(x)
    assert torch.allclose(search_network(model, x, "fp32")(x), model(x), atol=1e-2)


def test_images_of_other_channels_are_refused() -> None:
    torch.manual_seed(0)
    plain = as_program(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval())
    normed = as_program(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()).eval())
    for network in (plain, normed):
        with pytest.raises(ValueError, match="images of 8 channels"):
            network(torch.rand(2, 8, 5, 5))


def test_a_pass_over_no_images() -> None:
    torch.manual_seed(0)
    model = with_statistics(create_model("preact-resnet18", width=8))
    x = torch.rand(0, 3, 16, 16, requires_grad=True)
    logits = as_program(model)(x)
    assert logits.shape == (0, 10)
    assert torch.autograd.grad(logits.sum(), x)[0].shape == x.shape


class InPlace(nn.Module):
    """Layers that no kernel takes, each followed by one that writes to what it returned."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.grouped, self.last = (nn.Conv2d(16, 16, 3, padding=1, groups=4) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.grouped(x)
        z = self.act(y)
        h = F.silu(self.norm(self.last(z)), inplace=True)
        h += x
        h = self.two(h).mul_(2).relu_()
        return self.head((h + (y if self.again else z)).mean((2, 3)))


def test_layers_that_write_to_what_they_read() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(InPlace()), torch.rand(3, 3, 9, 7)
    assert_same(as_program(model), model, x)
    assert isinstance(search_network(model, x, "fp32").get_submodule("model"), Program)


def test_a_value_that_is_read_after_it_was_written_to_is_no_program() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(InPlace(again=True)), torch.rand(3, 3, 9, 7)
    network = search_network(model, x, "fp32")
    assert not isinstance(network.get_submodule("model"), Program)
    assert_same(network, model, x)
