"""A robust network on digits, networks that see every image alone, and a way to end an audit at a given pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfair.attacks.autoattack.base import SearchNetwork
from robustfair.data import ImageDataset, load_dataset
from robustfair.evaluate.result import Audit
from robustfair.models import create_model
from robustfair.objectives import PGDAT
from robustfair.training import Schedule, fit

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]


class OneByOne(nn.Module):
    """A network that sees every image alone, so that its rounding does not depend on the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return torch.cat([self.model(image) for image in x.split(1)])


@pytest.fixture(scope="session")
def digits() -> ImageDataset:
    """Sixty test images, six of each class."""
    return load_dataset("digits").test.limit_per_class(6)


@pytest.fixture(scope="session")
def robust_net() -> nn.Module:
    """A small network trained against PGD at a radius of 0.15, where about half of the digits stay right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model("small-cnn", in_channels=1, width=8)
    schedule = Schedule(epochs=10, lr=0.004, kind="constant", batch_size=32, optimizer="adam", weight_decay=0.0)
    return fit(
        model, load_dataset("digits").train.limit_per_class(70), PGDAT(eps=0.15, steps=2), schedule=schedule
    ).model


@pytest.fixture
def small(tiny_net: Net, tiny_data: Data) -> tuple[nn.Module, ImageDataset]:
    """A network of four classes and sixteen images that it classifies right, most of them by little."""
    model, data = OneByOne(tiny_net(classes=4)).eval(), tiny_data((4, 4, 4, 4))
    x = data.images.float() / 255
    with torch.no_grad():
        model.model.head.bias -= model(x).mean(0)
        labels = model(x).argmax(1)
    return model, ImageDataset(images=data.images, labels=labels, class_names=data.class_names, name="small")


@contextmanager
def _each_pass(model: nn.Module, then: Callable[[], Any]) -> Iterator[None]:
    """Within it `then` is called at every pass of a model, and of a search, which may see a copy of the model."""

    def followed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            then()
            return method(*args)

        return run

    hook = model.register_forward_pre_hook(lambda *_: then())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("logits", "gradient", "jacobian"):
            patch.setattr(SearchNetwork, name, followed(getattr(SearchNetwork, name)))
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def _at_pass(model: nn.Module, number: int, then: Callable[[], Any]) -> Iterator[list[int]]:
    seen = [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == number:
            then()

    with _each_pass(model, count):
        yield seen


@pytest.fixture(scope="session")
def at_pass() -> Callable[..., Any]:
    """A context manager: in the given pass of a model or of a search, counted from 1, it calls a function."""
    return _at_pass


@pytest.fixture(scope="session")
def each_pass() -> Callable[..., Any]:
    """A context manager: at every pass of a model or of a search it calls a function."""
    return _each_pass


def _same(one: Audit, two: Audit) -> bool:
    return (
        one.attacks == two.attacks
        and all(torch.equal(one.predictions[name], two.predictions[name]) for name in one.attacks)
        and one.broken_by.keys() == two.broken_by.keys()
        and all(torch.equal(one.broken_by[name], two.broken_by[name]) for name in one.broken_by)
        and one.points.keys() == two.points.keys()
        and all(one.points[name].keys() == two.points[name].keys() for name in one.points)
        and all(
            torch.equal(point, two.points[name][row]) for name in one.points for row, point in one.points[name].items()
        )
        and one.settings == two.settings
    )


@pytest.fixture(scope="session")
def same() -> Callable[[Audit, Audit], bool]:
    """Whether two audits hold the same predictions, members that broke, points and settings, bit for bit."""
    return _same
