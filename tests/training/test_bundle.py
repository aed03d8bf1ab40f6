"""Convolutions in bundles of images against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustfair.objectives import PGDAT
from robustfair.training import bundle
from robustfair.training.bundle import Bundled, Geometry, bundle_size, bundled_conv2d
from robustfair.training.engine import Engine
from robustfair.training.precision import InPrecision
from robustfair.values import Batch

PLAIN = Geometry((1, 1), (1, 1))


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers for the same shape; leaves whose gradients are taken."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 4)),
    b=st.sampled_from((1, 2, 3, 6)),
    biased=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_bundles_give_the_values_and_gradients_of_a_convolution(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    b: int,
    biased: bool,
) -> None:
    assume(min(kernel[1], size[1]) >= stride[1])
    assume(all(side + 2 * pad >= reach for side, pad, reach in zip(size, padding, kernel, strict=True)))
    x, weight, bias = draw(6, 3, *size), draw(5, 3, *kernel), draw(5) if biased else None
    leaves = [x, weight] + ([] if bias is None else [bias])
    expected = torch.conv2d(x, weight, bias, stride, padding)
    found = bundled_conv2d(x, weight, bias, Geometry(stride, padding), b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("images", "channels", "width", "geometry", "size"),
    [
        (64, 512, 4, PLAIN, 8),
        (10, 512, 4, PLAIN, 5),
        (7, 256, 3, PLAIN, 7),
        (11, 512, 4, PLAIN, 1),
        (64, 512, 5, PLAIN, 1),
        (64, 128, 4, PLAIN, 1),
        (64, 512, 8, Geometry((2, 2), (1, 1)), 8),
        (64, 512, 2, Geometry((3, 3), (1, 1)), 1),
        (64, 512, 1, Geometry((1, 1), (0, 0)), 1),
    ],
)
def test_only_small_images_of_many_channels_are_bundled(
    images: int, channels: int, width: int, geometry: Geometry, size: int
) -> None:
    x = torch.empty(images, channels, width, width, device="meta")
    weight = torch.empty(channels, channels, 3, 3, device="meta")
    assert bundle_size(x, weight, geometry) == size


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "same"},
        {"padding": 1, "dilation": 2},
        {"padding": 1, "groups": 3},
        {"padding": 1, "stride": 2},
        {"padding": 2},
    ],
    ids=["same", "dilated", "grouped", "strided", "padded"],
)
def test_within_the_scope_every_convolution_computes_what_it_did(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object]
) -> None:
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    conv = nn.Conv2d(3, 6, 3, dtype=torch.float64, **arguments)  # type: ignore[arg-type]
    images = draw(6, 3, 4, 4).detach()
    for x in (images, images[0]):
        with Bundled():
            found = conv(x)
        torch.testing.assert_close(found, conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": [1], "padding": (1,)},
        {"padding": [1, 1], "dilation": (1,)},
        {"padding": torch.tensor(1)},
        {"padding": "valid"},
        {"padding": (1, 0), "stride": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [(), ("images",), ("weights",)], ids=str)
def test_every_spelling_of_a_call_gives_what_torch_gives_and_lays_it_out_so(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], last: tuple[str, ...]
) -> None:
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    given = {"images": draw(6, 3, 4, 4).detach(), "weights": draw(5, 3, 3, 3).detach()}
    for name in last:
        given[name] = given[name].contiguous(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(input=given["images"], weight=given["weights"], **arguments)  # type: ignore[arg-type]
    with Bundled():
        found = nn.functional.conv2d(input=given["images"], weight=given["weights"], **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.stride() == expected.stride()


class Deep(nn.Module):
    """A network whose convolutions are all bundled once no layer counts as too small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.short = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).relu()
        return self.head(self.norm(self.down(z) + self.short(z)).relu().mean((2, 3)))


def test_a_compiled_engine_bundles_and_attacks_and_learns_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    bundled = []
    compute = bundled_conv2d

    def noted(x: Tensor, *rest: object) -> Tensor:
        bundled.append(tuple(x.shape))
        return compute(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bundle, "bundled_conv2d", noted)
    torch.manual_seed(0)
    plain, fast = Deep().double(), Deep().double()
    fast.load_state_dict(plain.state_dict())
    batch = Batch(x=draw(6, 3, 4, 4).detach().sigmoid(), y=torch.arange(6) % 3, index=torch.arange(6), seed=0)
    attack = PGDAT(eps=0.1, steps=3).attack(batch)
    engines = Engine(plain), Engine(fast, compile=True, batch_size=6)
    torch.testing.assert_close(*(engine.attack(batch, attack) for engine in engines), rtol=0, atol=1e-12)
    for engine in engines:
        engine.model.train()
        engine(batch.x).square().sum().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)
    assert {(6, 3, 4, 4), (6, 6, 4, 4)} <= set(bundled)


def test_it_is_entered_in_bf16_where_a_layer_may_gain_or_where_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []
    small, large = nn.Conv2d(1, 1, 3), nn.Conv2d(256, 256, 3)
    monkeypatch.setattr(Bundled, "__enter__", lambda self: entered.append(self) or self)
    monkeypatch.setattr(Bundled, "__exit__", lambda self, *error: None)
    cases = [(large, "fp32", None, 0), (large, "bf16", None, 1), (small, "bf16", None, 0)]
    cases += [(small, "fp32", True, 1), (large, "bf16", False, 0)]
    for model, precision, bundled, expected in cases:
        entered.clear()
        x = torch.zeros(1, model.in_channels, 3, 3)
        InPrecision(model, precision, "cpu", bundled=bundled)(x)  # type: ignore[arg-type]
        assert len(entered) == expected
