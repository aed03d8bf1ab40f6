"""The network of a low-precision search: the model's own logits, whatever the model is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from robustfair.execution import bundle
from robustfair.execution.folded import search_network
from robustfair.models import create_model


def trained_statistics(model: nn.Module) -> nn.Module:
    """Batch norm with statistics and weights that are not those of a new one."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def images(channels: int = 3) -> Tensor:
    return torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def in_bf16(model: nn.Module) -> nn.Module:
    return search_network(model, images(), "bf16")


def norms(network: nn.Module) -> int:
    """Batch norms that a pass goes through."""
    seen: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda layer, *_: seen.append(layer))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    network(images())
    for hook in hooks:
        hook.remove()
    return len(seen)


@pytest.mark.parametrize("name", ["preact-resnet18", "resnet18", "resnet9"])
def test_it_gives_the_logits_of_bf16_with_fewer_batch_norms(name: str) -> None:
    torch.manual_seed(0)
    model = trained_statistics(create_model(name, width=4))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    network = in_bf16(model)
    found, exact = network(images()), model(images())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 0.05 * exact.abs().max()
    assert norms(network) < norms(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Branching(nn.Module):
    """No graph can be read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.head((z if z.mean() > 0 else -z).mean((2, 3)))


class Noisy(Branching):
    """A graph would hold the noise of one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)) + 0.01 * torch.randn(4))


class Single(Branching):
    """It has no copy."""

    def __deepcopy__(self, memo: object) -> Single:
        raise RuntimeError("there is only one")


class Shared(nn.Module):
    """A copy of it holds the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Branching()
        self.part.__class__ = type("Kept", (Branching,), {"__deepcopy__": lambda part, memo: part})
        self.conv = self.part.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Mixing(Branching):
    """It multiplies weights itself, and cannot where only some of them are in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.dot(self.head.weight[0], self.norm.weight)


@pytest.mark.parametrize("kind", [Branching, Noisy, Single, Shared, Mixing])
def test_what_cannot_be_folded_is_searched_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = trained_statistics(kind())
    network = in_bf16(model)
    assert not any(isinstance(module, fx.GraphModule) for module in network.modules())
    exact = model(images())
    assert (network(images()) - exact).abs().max() <= 0.05 * exact.abs().max()
    assert model.conv.weight.dtype == torch.float32


class Checkpointing(Branching):
    """It computes its convolution anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        z = checkpoint(self.conv, x, use_reentrant=False)
        return self.head(self.norm(z if z.mean() > 0 else -z).mean((2, 3)))


@pytest.mark.parametrize("kind", [Checkpointing, type("SingleCheckpointing", (Checkpointing, Single), {})])
def test_the_gradient_of_a_network_that_checkpoints_can_be_taken(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]
) -> None:
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(bundle, "WIDEST", 8)
    torch.manual_seed(0)
    model = trained_statistics(kind())
    wanted, found = (
        torch.autograd.grad(network(x)[:, 0].sum(), x)[0]
        for network, x in ((each, images().requires_grad_()) for each in (model, in_bf16(model)))
    )
    assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()


def test_train_mode_and_hooks_of_the_model_are_left_and_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    model.register_forward_hook(lambda module, inputs, logits: logits + 100)
    model.train()
    network = in_bf16(model)
    assert all(module.training for module in model.modules())
    network.eval()
    assert (network(images()) - model.eval()(images())).abs().max() < 1
