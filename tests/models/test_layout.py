"""The weight gradient of a strided 1x1 convolution, which oneDNN gets wrong channels last where channels are few.

A fault corrupts memory and may end the process or hang it: the sweep over widths runs in processes of its own, as this
processor is and as one without AVX-512.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import robustfair
from robustfair.data import ImageDataset
from robustfair.models import OnCopies, create_model, laid_out, prepared
from robustfair.models.layout import FaultWatch, is_channels_last, lay_out
from robustfair.objectives import PGDAT
from robustfair.training import Schedule, fit
from robustfair.training.engine import Engine

SIZE = 64
"""Large enough for the fault to show on every processor."""

SWEEP = """
import sys
sys.path.insert(0, {tests!r})
from models.test_layout import differences, fit_narrow
found = differences()
fit_narrow()
print("done", *found, sep="\\n")
"""


class Narrow(nn.Module):
    """A convolution to `width` channels, a 1x1 convolution with a stride, and a head.

    Without biases, whose gradients cancel out here and are mostly rounding.
    """

    def __init__(self, width: int, stride: int | tuple[int, int] = 2, **options: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.down = nn.Conv2d(width, 8, 1, stride=stride, bias=False, **options)
        self.head = nn.Linear(8, 3)

    def shrink(self, x: Tensor) -> Tensor:
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shrink(self.stem(x).relu()).relu().mean((2, 3)))


class Called(Narrow):
    """Calls the convolution without a layer of that geometry."""

    def __init__(self, width: int) -> None:
        super().__init__(width, stride=1)

    def shrink(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.down.weight, stride=(2, 1))


class LaysOut(Narrow):
    """Lays its images out channels last itself."""

    def shrink(self, x: Tensor) -> Tensor:
        return self.down(x.contiguous(memory_format=torch.channels_last))


class Checkpointed(Narrow):
    def shrink(self, x: Tensor) -> Tensor:
        return checkpoint(self.down, x, use_reentrant=False)


def given_channels_last(width: int) -> nn.Module:
    return Narrow(width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


CASES: dict[str, Callable[[], nn.Module]] = {
    **{
        f"width {width}, stride {stride}": lambda w=width, s=stride: Narrow(w, s)
        for width in range(1, 17)
        for stride in (1, 2)
    },
    **{f"stride {stride}": lambda s=stride: Narrow(4, s) for stride in ((1, 2), (2, 1), (3, 3))},
    "dilation": lambda: Narrow(4, dilation=2),
    "groups": lambda: Narrow(8, groups=2),
    "padding": lambda: Narrow(4, padding=1),
    "called": lambda: Called(4),
    "lays out": lambda: LaysOut(4),
    "checkpointed": lambda: Checkpointed(4),
    "given channels last": lambda: given_channels_last(4),
    "float64": lambda: Narrow(4).double(),
}


def differences(cases: dict[str, Callable[[], nn.Module]] = CASES) -> list[str]:
    """The cases whose gradients of weights and images, taken as `fit` takes them, are not those of float64."""
    torch.set_num_threads(1)
    found = []
    for name, build in cases.items():
        torch.manual_seed(0)
        model, x, y = build(), torch.rand(4, 3, SIZE, SIZE), torch.arange(4) % 3
        reference = deepcopy(model).double()
        lay_out(reference, torch.contiguous_format)
        wanted = gradients(reference, reference, x.double(), y)
        x = x.to(next(model.parameters()).dtype).contiguous(memory_format=torch.channels_last)
        called = laid_out(model, x)
        if isinstance(called, OnCopies):
            x = x.contiguous()
        for _ in range(2):
            for got, want in zip(gradients(Engine(called), model, x, y), wanted, strict=True):
                if float((got.double() - want).abs().max()) > 1e-4 * float(want.abs().max()):
                    found.append(f"{name}, {tuple(got.shape)}")
    return found


def fit_narrow() -> None:
    """A run over a network at fault."""
    images = torch.randint(256, (48, 3, 16, 16), dtype=torch.uint8)
    data = ImageDataset(images=images, labels=torch.arange(48) % 3, class_names=("a", "b", "c"), name="toy")
    fit(Narrow(4), data, PGDAT(steps=2), schedule=Schedule(epochs=2, batch_size=16), validation=0, select="last")


def gradients(called: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(called(x), y), [*model.parameters(), x])


@pytest.mark.parametrize("processor", ["", "AVX2"])
def test_gradients_are_those_of_float64_at_every_width(processor: str) -> None:
    path, source = Path(__file__).parents[1], Path(robustfair.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source)} | ({"ONEDNN_MAX_CPU_ISA": processor} if processor else {})
    command = [sys.executable, "-c", SWEEP.format(tests=str(path))]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout.split("\n"), child.stderr) == (0, ["done", ""], "")


@pytest.mark.parametrize("name", ["called", "lays out", "checkpointed", "given channels last"])
def test_a_network_that_would_meet_the_fault_is_laid_out_plainly(name: str) -> None:
    model, x = CASES[name](), torch.rand(2, 3, 8, 8)
    called = laid_out(model, x)
    assert isinstance(called, OnCopies)
    assert called.network is model
    assert not any(is_channels_last(weight) for weight in model.parameters())
    assert prepared(called, x) is called
    assert isinstance(prepared(nn.Sequential(model), x), OnCopies)


def test_any_other_network_stays_channels_last() -> None:
    x = torch.rand(2, 3, 32, 32)
    others = [Narrow(16), Narrow(4, stride=1), Narrow(8, groups=2), nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten())]
    for model in (create_model("preact-resnet18", width=16), *others):
        assert laid_out(model, x) is model
        assert any(is_channels_last(weight) for weight in model.parameters())
    assert isinstance(laid_out(create_model("preact-resnet18", width=8), x), OnCopies)


def test_another_device_has_no_such_fault() -> None:
    assert FaultWatch(Narrow(4)).found
    assert not FaultWatch(Narrow(4).to("meta")).found


@pytest.mark.parametrize("width", [4, 16])
def test_a_compiled_network_is_looked_at_too(width: int) -> None:
    model = torch.compile(Narrow(width), backend="eager")
    assert isinstance(prepared(model, torch.rand(2, 3, 8, 8)), OnCopies) is (width == 4)


def test_plain_weights_stay_where_they_are_and_others_lose_channels_last() -> None:
    model = given_channels_last(4)
    before = deepcopy(model.state_dict())
    assert is_channels_last(model.down.weight)
    lay_out(model, torch.contiguous_format)
    assert not is_channels_last(model.down.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    places = [weight.data_ptr() for weight in model.parameters()]
    lay_out(model, torch.contiguous_format)
    assert places == [weight.data_ptr() for weight in model.parameters()]


def test_thinned_images_give_the_same_sums() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 9, 7)
    for stride in (2, (1, 2), (3, 2)):
        for network in (LaysOut(4, stride), LaysOut(4, stride, dilation=2)):
            plain = Narrow(4, stride)
            plain.load_state_dict(network.state_dict())
            torch.testing.assert_close(OnCopies(network, thins=True)(x), plain(x))
