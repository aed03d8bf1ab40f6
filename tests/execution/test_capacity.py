"""How many images fit: counted by hand on small networks, and kept to by an audit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reference.public_networks import Plain, Reentrant, WritingOnImages
from robustfair.data import ImageDataset
from robustfair.errors import ModelError
from robustfair.evaluate.run import audit
from robustfair.execution import capacity
from robustfair.execution.capacity import (
    CPU_BUDGET,
    FEWEST,
    HEADROOM,
    UNCOUNTED,
    bytes_per_image,
    cost_of_a_pass,
    images_that_fill,
    images_that_fit,
)
from robustfair.models import create_model

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]

FLOAT, LONG = 4, 8


def of_the_loss(classes: int) -> int:
    """Log-probabilities and label of one image, and the sum of the weights."""
    return classes * FLOAT + LONG + FLOAT


def perceptron(hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))


@pytest.mark.parametrize(("hidden", "classes"), [(100, 3), (500, 10), (4000, 7)])
def test_a_perceptron_by_hand(hidden: int, classes: int) -> None:
    """A frozen linear map keeps nothing but its weight, and a ReLU its output."""
    found = bytes_per_image(perceptron(hidden, classes), torch.rand(1, 1, 8, 8))
    assert found == pytest.approx(hidden * FLOAT + of_the_loss(classes), abs=64)


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (3, 32)])
def test_a_convolution_by_hand(channels: int, width: int) -> None:
    """A convolution keeps its input, a ReLU its output, which is the input of the next and is counted once."""
    model = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )
    pixels = channels * 12 * 12 + width * 12 * 12 + 2 * width * 6 * 6
    found = bytes_per_image(model, torch.rand(1, channels, 12, 12))
    assert found == pytest.approx(pixels * FLOAT + of_the_loss(10), abs=64)


def test_weights_and_statistics_do_not_count(tiny_net: Net) -> None:
    small = bytes_per_image(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(1, 1, 8, 8))
    assert small < 1000 < 64 * 10 * FLOAT
    model = tiny_net(classes=3)
    assert bytes_per_image(model, torch.rand(1, 1, 6, 6)) < 6000


def test_a_larger_image_takes_more(tiny_net: Net) -> None:
    model = tiny_net(classes=3)
    sizes = [bytes_per_image(model, torch.rand(1, 1, side, side)) for side in (6, 12, 24)]
    assert 3 < sizes[1] / sizes[0] < 4.5
    assert 3 < sizes[2] / sizes[1] < 4.5


def test_only_the_first_image_is_looked_at_and_the_model_stays_as_it_is(tiny_net: Net) -> None:
    model = tiny_net(classes=3, dropout=0.5).train()
    seen: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(50, 1, 6, 6)
    assert bytes_per_image(model, x) == bytes_per_image(model, x[:1].clone())
    assert seen == [(1, 1, 6, 6)] * 2
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not x.requires_grad


def test_a_model_without_gradients_counts_at_least_its_images() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.stack([x.flatten(1).sum(1), x.flatten(1).amax(1)], 1)

    x = torch.rand(1, 3, 8, 8)
    assert bytes_per_image(Blind(), x) == 3 * 8 * 8 * FLOAT


@pytest.mark.parametrize("network", [Reentrant, WritingOnImages])
def test_without_a_graph_what_the_layers_return_counts(network: Callable[[], nn.Module]) -> None:
    """Convolution and batch norm, the head; what they return stands for the rest too."""
    model, x = network(), torch.rand(1, 3, 8, 8)
    before = x.clone()
    with pytest.raises(ModelError, match="the gradient of the images cannot be taken through"):
        bytes_per_image(model, x)
    found = bytes_per_image(model, x, gradient=False)
    assert found == (2 * 6 * 6 * 6 + 4) * FLOAT
    assert images_that_fit(model, x, gradient=False) == int(CPU_BUDGET / (HEADROOM * found))
    assert torch.equal(x, before)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert bytes_per_image(Plain(), x) == bytes_per_image(Plain(), x, gradient=False)


@pytest.mark.parametrize("images", [1, 2, 7, 1000])
def test_what_fits_is_the_budget_by_the_image(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    model, x = perceptron(100, 10), torch.rand(1, 1, 8, 8)
    monkeypatch.setattr(capacity, "CPU_BUDGET", HEADROOM * bytes_per_image(model, x) * (images + 0.5))
    assert images_that_fit(model, x) == images


def test_one_image_always_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "CPU_BUDGET", 10)
    assert images_that_fit(perceptron(100, 10), torch.rand(1, 1, 8, 8)) == 1


def test_a_full_preact_resnet18_stays_below_the_budget() -> None:
    model, x = create_model("preact-resnet18", width=64), torch.rand(1, 3, 32, 32)
    each, most = bytes_per_image(model, x), images_that_fit(model, x)
    assert 1 << 20 < each < 32 << 20
    assert 50 < most < 1000
    assert most * each * HEADROOM <= CPU_BUDGET < (most + 1) * each * HEADROOM
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weights + CPU_BUDGET < 3e9, "4 GB less what Python, torch and the images take"


# An audit keeps to it


@pytest.fixture
def fits_five(tiny_net: Net, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network of which five images fit."""
    model = tiny_net(classes=4)
    monkeypatch.setattr(capacity, "CPU_BUDGET", HEADROOM * bytes_per_image(model, torch.rand(1, 1, 6, 6)) * 5.5)
    return model


@pytest.mark.parametrize("asked", [None, 100_000, 6])
def test_an_audit_takes_no_more_images_than_fit(fits_five: nn.Module, tiny_data: Data, asked: int | None) -> None:
    sizes: list[int] = []
    fits_five.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    attacks = "pgd-2,apgd-ce(steps=3),apgd-t(steps=2),fab(steps=2),square(queries=5)"
    found = audit(fits_five, tiny_data((9,) * 4), attacks=attacks, eps=0.03, batch_size=asked)
    assert found.provenance["batch_size"] == 5
    assert max(sizes) == 5


def test_a_smaller_batch_that_was_asked_for_is_kept(fits_five: nn.Module, tiny_data: Data) -> None:
    found = audit(fits_five, tiny_data((9,) * 4), attacks="apgd-ce(steps=3)", eps=0.03, batch_size=4)
    assert found.provenance["batch_size"] == 4


def test_clean_passes_keep_nothing_and_take_what_was_asked_for(fits_five: nn.Module, tiny_data: Data) -> None:
    sizes: list[int] = []
    fits_five.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert audit(fits_five, tiny_data((9,) * 4), attacks="clean", batch_size=20).provenance["batch_size"] == 20
    assert max(sizes) == 20


def test_the_reference_engine_keeps_to_it_too(fits_five: nn.Module, tiny_data: Data) -> None:
    sizes: list[int] = []
    fits_five.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    audit(fits_five, tiny_data((9,) * 4), attacks="apgd-ce(steps=3)", eps=0.03, engine="reference", batch_size=1000)
    assert max(sizes) == 5


def test_what_a_pass_costs_falls_with_what_an_image_does() -> None:
    small, large = (cost_of_a_pass(create_model("small-cnn", width=width), torch.rand(1, 3, 8, 8)) for width in (4, 16))
    assert small > 3 * large
    assert images_that_fill(small) > images_that_fill(large / 1000) == FEWEST


def test_a_model_whose_operations_cannot_be_counted_has_a_cost_too() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not while somebody counts")

    assert cost_of_a_pass(Counting(), torch.rand(1, 3, 8, 8)) == UNCOUNTED
