"""Convolutions in bundles of images against torch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustfair.execution import bundle
from robustfair.execution.bundle import Bundled, Geometry, bundle_size, bundled_conv2d, may_gain
from robustfair.execution.precision import InPrecision
from robustfair.objectives import PGDAT
from robustfair.training.engine import Engine
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


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "batch": lambda t: t[::2],
    "channels": lambda t: t[:, :4],
    "pixels": lambda t: t[:, :, ::2, ::2],
    "every way": lambda t: t[1:, 1:, 1:, 1:],
    "none": lambda t: t[:0],
    "one for all": lambda t: t[:1].expand(6, -1, -1, -1),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("traced", [False, True])
def test_slices_of_any_layout_give_what_torch_gives_laid_out_so(
    monkeypatch: pytest.MonkeyPatch, cut: Callable[[Tensor], Tensor], traced: bool
) -> None:
    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)  # takes the way of strides without a compiler
    formats = (torch.contiguous_format, torch.channels_last)
    for size, kernel, stride, images, weights in product((4, 8), (1, 2, 3, 4), (1, 2), formats, formats):
        x = cut(draw(12, 8, size, size).detach().contiguous(memory_format=images))
        if x.shape[3] < kernel:
            continue
        whole = draw(6, 2 * x.shape[1], kernel, kernel).detach().contiguous(memory_format=weights)
        for weight in (whole[:, ::2], whole[:, ::2].clone(memory_format=weights)):
            expected = torch.conv2d(x, weight, None, stride)
            with Bundled():
                found = torch.conv2d(x, weight, None, stride)
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
        z = self.stem(x)
        return self.head(self.norm(self.down(z) + self.short(z)).relu().mean((2, 3)))

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x).relu()


class Checkpointed(Deep):
    """Computes its stem anew in the backward pass."""

    def stem(self, x: Tensor) -> Tensor:
        return checkpoint(super().stem, x, use_reentrant=False)


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """No layer counts as too small; shapes of the images of those that were bundled."""
    seen: list[tuple[int, ...]] = []
    compute = bundled_conv2d

    def noted(x: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(x.shape))
        return compute(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bundle, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(bundle, "bundled_conv2d", noted)
    return seen


def test_what_is_checkpointed_is_not_bundled_where_it_is_computed_anew(bundled: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), part).double() for part in (Deep(), Checkpointed())]
    models[1].load_state_dict(models[0].state_dict())
    x = draw(6, 3, 4, 4)
    wanted, found = (
        torch.autograd.grad(InPrecision(model, "fp32", "cpu", bundled=told)(x).square().sum(), [x, *model.parameters()])
        for model, told in zip(models, (False, True), strict=True)
    )
    assert bundled == [(6, 3, 4, 4)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    with torch.no_grad():
        InPrecision(models[1], "fp32", "cpu", bundled=True)(x)
    assert len(bundled) == 3


@pytest.mark.parametrize("count", [6, 4], ids=["whole batch", "smaller batch"])
def test_a_compiled_engine_trains_what_checkpoints(bundled: list[tuple[int, ...]], count: int) -> None:
    torch.manual_seed(0)
    plain, fast = Checkpointed().double(), Checkpointed().double()
    fast.load_state_dict(plain.state_dict())
    x = draw(count, 3, 4, 4).detach()
    for engine in (Engine(plain), Engine(fast, compile=True, batch_size=6)):
        engine(x).square().sum().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_a_compiled_engine_bundles_and_attacks_and_learns_as_the_plain_one(bundled: list[tuple[int, ...]]) -> None:
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


class Computing(nn.Conv2d):
    """Its weight is what a pass makes of other tensors."""

    def __init__(self, given: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__(256, 256, 3)
        weight = self.weight.detach()
        del self.weight
        if given is not None:
            self.weight = given(weight)


@pytest.mark.parametrize(
    "given", [None, lambda weight: None, lambda weight: weight.flatten(1)], ids=["absent", "none", "flat"]
)
def test_a_layer_that_has_no_weight_yet_does_not_count(given: Callable[[Tensor], Tensor] | None) -> None:
    layer = Computing(given)
    assert not may_gain(layer)
    assert may_gain(nn.Sequential(layer, nn.Conv2d(256, 256, 3)))


def test_a_weight_that_is_none_of_a_convolution_is_refused_in_the_words_of_torch() -> None:
    with pytest.raises(RuntimeError, match="match the convolution dimensions"), Bundled():
        torch.conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 3))


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
