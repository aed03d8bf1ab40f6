"""The kernels beside torch's convolutions in float64, and what happens where they cannot be had."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.execution.kernels import compiled
from robustfair.execution.kernels.compiled import Kernels, Pointwise, kernels, missing

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"the kernels cannot be had: {missing()}")

CLOSE = 2e-5
"""Share of the largest number: transformed tiles round some ten times as coarsely as sums."""


@pytest.fixture
def at_hand() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def images(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.double() - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 5), (4, 4), (7, 9), (16, 13)])
@pytest.mark.parametrize(("channels", "out"), [(1, 1), (1, 2), (2, 1), (3, 4)])
def test_a_3x3_convolution(at_hand: Kernels, size: tuple[int, int], channels: int, out: int) -> None:
    channels, out = channels * at_hand.lanes, out * at_hand.lanes
    x, weight = images(3, channels, *size), images(out, channels, 3, 3, seed=1)
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    assert_close(at_hand.convolve(x, at_hand.transformed(weight)), wanted)


def test_a_convolution_of_no_images(at_hand: Kernels) -> None:
    x, weight = images(0, at_hand.lanes, 5, 4), images(2 * at_hand.lanes, at_hand.lanes, 3, 3)
    taps = at_hand.taps_of(weight, step=1, padding=(1, 1), dilation=1)
    assert at_hand.convolve(x, at_hand.transformed(weight)).shape == (0, 2 * at_hand.lanes, 5, 4)
    assert at_hand.sum(x, taps, (0, 2 * at_hand.lanes, 5, 4)).shape == (0, 2 * at_hand.lanes, 5, 4)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 8), (9, 15), (17, 6)])
@pytest.mark.parametrize(("channels", "out"), [(1, 2), (2, 1)])
def test_a_3x3_convolution_with_stride_two_and_its_way_back(
    at_hand: Kernels, size: tuple[int, int], channels: int, out: int
) -> None:
    channels, out = channels * at_hand.lanes, out * at_hand.lanes
    x, weight = images(3, channels, *size), images(out, channels, 3, 3, seed=1)
    z = x.double().requires_grad_()
    wanted = F.conv2d(z, weight.double(), stride=2, padding=1)
    assert_close(at_hand.convolve(x, at_hand.transformed(weight, strided=True), scheme="strided"), wanted.detach())
    g, other = images(*wanted.shape, seed=2), images(*x.shape, seed=3)
    signs = at_hand.signs(g.shape)
    at_hand.pointwise(images(*wanted.shape, seed=4), Pointwise(keep=signs))
    (gradient,) = torch.autograd.grad(wanted, z, gated(at_hand, g, signs).double())
    back = at_hand.transformed(weight.transpose(0, 1), strided=True, flipped=True)
    found = at_hand.convolve(g, back, Pointwise(gate=signs), Pointwise(add=other), scheme="spread", size=size)
    assert_close(found, gradient + other)


def test_many_tiles_and_large_weights(at_hand: Kernels) -> None:
    x, weight = images(40, 128, 8, 8), images(128, 128, 3, 3, seed=1)
    assert_close(at_hand.convolve(x, at_hand.transformed(weight)), F.conv2d(x.double(), weight.double(), padding=1))


def test_fewer_channels_than_a_register_holds(at_hand: Kernels) -> None:
    x, weight = images(3, at_hand.lanes, 6, 7), images(3, at_hand.lanes, 3, 3, seed=1)
    found = at_hand.convolve(x, at_hand.transformed(weight), channels=3)
    assert_close(found, F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_what_stands_around_a_convolution(
    at_hand: Kernels, normed: bool, positive: bool, shifts: bool, adds: bool
) -> None:
    c = at_hand.lanes
    x, weight, other = images(2, c, 9, 6), images(2 * c, c, 3, 3, seed=1), images(2, 2 * c, 9, 6, seed=2)
    scale, shift, bias = torch.rand(c) - 0.5, torch.randn(c), torch.randn(2 * c)
    first, then = at_hand.signs(x.shape), at_hand.signs(other.shape)
    before = Pointwise(scale=scale, shift=shift, positive=True, keep=first) if normed else Pointwise()
    after = Pointwise(
        shift=bias if shifts else None,
        add=other if adds else None,
        positive=positive,
        keep=then if positive else None,
    )
    found = at_hand.convolve(x, at_hand.transformed(weight), before, after)
    z = x.double()
    z = (z * scale[:, None, None] + shift[:, None, None]).relu() if normed else z
    wanted = F.conv2d(z, weight.double(), bias.double() if shifts else None, padding=1)
    wanted = wanted + other if adds else wanted
    assert_close(found, wanted.relu() if positive else wanted)
    if normed:
        assert torch.equal(gated(at_hand, torch.ones_like(x), first), (z > 0).float())
    if positive:
        assert torch.equal(gated(at_hand, torch.ones_like(other), then), (found > 0).float())


def gated(at_hand: Kernels, x: Tensor, signs: Tensor) -> Tensor:
    return at_hand.pointwise(x, Pointwise(gate=signs))


def test_the_way_back_through_all_of_it(at_hand: Kernels) -> None:
    """relu(conv(relu(norm(x)))), whose gradient meets another at x."""
    c = at_hand.lanes
    x, weight, g, other = images(2, c, 6, 5), images(c, c, 3, 3, seed=1), images(2, c, 6, 5, seed=2), images(2, c, 6, 5)
    scale, shift = torch.rand(c) - 0.5, torch.randn(c)
    first, then = at_hand.signs(x.shape), at_hand.signs(x.shape)
    at_hand.convolve(
        x,
        at_hand.transformed(weight),
        Pointwise(scale=scale, shift=shift, positive=True, keep=first),
        Pointwise(positive=True, keep=then),
    )
    back = at_hand.transformed(weight.transpose(0, 1).flip(2, 3))
    found = at_hand.convolve(g, back, Pointwise(gate=then), Pointwise(gate=first, scale=scale, add=other))
    z = x.double().requires_grad_()
    made = F.conv2d((z * scale[:, None, None] + shift[:, None, None]).relu(), weight.double(), padding=1).relu()
    (gradient,) = torch.autograd.grad(made, z, g.double())
    assert_close(found, gradient + other)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_a_convolution_as_a_sum_and_its_way_back(
    at_hand: Kernels, channels: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int], dilation: int
) -> None:
    x, weight = images(2, channels, 11, 12), images(2 * at_hand.lanes, channels, *kernel, seed=1)
    z = x.double().requires_grad_()
    wanted = F.conv2d(z, weight.double(), None, stride, padding, dilation)
    geometry = {"step": stride, "padding": padding, "dilation": dilation}
    found = at_hand.sum(x, at_hand.taps_of(weight, **geometry), wanted.shape)  # type: ignore[arg-type]
    assert_close(found, wanted.detach())
    g = images(*wanted.shape, seed=2)
    signs = at_hand.signs(g.shape)
    at_hand.pointwise(images(*wanted.shape, seed=3), Pointwise(keep=signs))
    (gradient,) = torch.autograd.grad(wanted, z, gated(at_hand, g, signs).double())
    into = torch.zeros_like(x)
    for taps in at_hand.taps_back(weight, **geometry):  # type: ignore[arg-type]
        at_hand.sum(g, taps, x.shape, Pointwise(gate=signs), into=into)
    assert_close(into, gradient)


def test_results_depend_on_no_neighbour_and_no_thread(at_hand: Kernels) -> None:
    x, weight = images(9, 2 * at_hand.lanes, 9, 9), images(at_hand.lanes, 2 * at_hand.lanes, 3, 3, seed=1)
    there, taps = at_hand.transformed(weight), at_hand.taps_of(weight, step=2, padding=(1, 1), dilation=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = at_hand.convolve(x, there), at_hand.sum(x, taps, (9, at_hand.lanes, 5, 5))
        torch.set_num_threads(1)
        few = at_hand.convolve(x[4:6], there), at_hand.sum(x[4:6], taps, (2, at_hand.lanes, 5, 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[4:6], two) for one, two in zip(many, few, strict=True))


def test_what_is_no_number_stays_so(at_hand: Kernels) -> None:
    x = images(1, at_hand.lanes, 4, 4)
    x[0, 3, 1, 2] = torch.nan
    signs = at_hand.signs(x.shape)
    found = at_hand.pointwise(x, Pointwise(positive=True, keep=signs))
    assert torch.equal(found.isnan(), x.isnan())
    assert gated(at_hand, torch.ones_like(x), signs)[0, 3, 1, 2] == 1
    assert at_hand.convolve(x, at_hand.transformed(images(at_hand.lanes, at_hand.lanes, 3, 3))).isnan().any()


def test_what_no_layer_needs_is_refused(at_hand: Kernels) -> None:
    x, weight = images(1, at_hand.lanes, 4, 4), images(at_hand.lanes, at_hand.lanes, 3, 3)
    odd = Pointwise(gate=at_hand.signs(x.shape), positive=True)
    with pytest.raises(ValueError, match="no kernel does that"):
        at_hand.convolve(x, at_hand.transformed(weight), after=odd)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Kernels that are not loaded yet, with a cache of their own."""
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    compiled._loaded.cache_clear()
    yield tmp_path / "cache" / "kernels"
    compiled._loaded.cache_clear()


@pytest.fixture(scope="module")
def library() -> Path:
    """What the compiler of this machine makes of them, which takes many seconds on a slow one."""
    return compiled._compiled()


@pytest.fixture
def quick(anew: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that gives out what was compiled before; the file that it notes its work in."""
    compiler, notes = tmp_path / "quick", tmp_path / "notes"
    copy = f'for made; do :; done\ncp {shlex.quote(str(library))} "$made"\necho "$made" >> {shlex.quote(str(notes))}\n'
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{copy}')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return notes


def test_they_are_compiled_once_and_kept_for_their_owner(anew: Path, quick: Path) -> None:
    assert compiled.missing() is None
    (made,) = anew.iterdir()
    assert anew.stat().st_mode & 0o077 == 0
    written = made.stat().st_mtime_ns
    compiled._loaded.cache_clear()
    assert compiled.kernels() is not None
    assert made.stat().st_mtime_ns == written
    assert quick.read_text().count("\n") == 1


def test_without_a_compiler_they_are_missing(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.kernels() is None
    assert compiled.missing() == "no C++ compiler was found: there is no no-such-compiler, which CXX names"


def test_a_compiler_may_come_with_arguments(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C c++")
    assert compiled.missing() is None


def test_a_compiler_that_cannot_be_read_is_no_error(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ '-O2")
    assert compiled.missing() == "CXX=c++ '-O2 cannot be read: No closing quotation"


def test_a_compiler_that_fails_is_quoted(anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no room on the device" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiled.missing() == "broken cannot compile them: no room on the device"
    assert list(anew.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_compiler_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "conv2d", lambda x, weight, padding: torch.zeros(3, weight.shape[0], 7, 5) + 1)
    assert "computes something else" in str(compiled.missing())


def test_code_that_others_may_have_written_is_not_run(anew: Path, quick: Path) -> None:
    anew.mkdir(parents=True)
    anew.chmod(0o777)
    assert compiled.kernels() is not None
    assert list(anew.iterdir()) == []
    assert str(anew) not in quick.read_text()


def test_a_process_with_another_instruction_set_has_its_own(anew: Path, library: Path) -> None:
    anew.mkdir(parents=True, mode=0o700)
    shutil.copy(library, anew)
    assert compiled.kernels() is not None
    assert [path.name for path in anew.iterdir()] == [library.name]
    code = "from robustfair.execution.kernels.compiled import kernels, missing; print(kernels().lanes, missing())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["8", "None"]


def test_layers_of_torch_are_what_the_kernels_stand_for(at_hand: Kernels) -> None:
    layer = nn.Conv2d(at_hand.lanes, at_hand.lanes, 3, padding=1, bias=False)
    x = images(1, at_hand.lanes, 5, 5)
    assert_close(at_hand.convolve(x, at_hand.transformed(layer.weight)), layer.double()(x.double()).detach())


def test_squares_are_corners_of_the_ball_inside_the_box(at_hand: Kernels) -> None:
    x, point = (images(3, 2, 7, 9, seed=seed).sigmoid() for seed in (0, 1))
    rows, top, left = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 3, 6, 1]), torch.tensor([0, 5, 8, 2])
    side, sign = torch.tensor([7, 4, 1, 0]), torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    found = at_hand.squares(point, x, rows, (top, left, side), sign, 0.3)
    for m, row in enumerate(rows.tolist()):
        wanted = point[row].clone()
        down = slice(int(top[m]), int(top[m] + side[m]))
        across = slice(int(left[m]), int(left[m] + side[m]))
        wanted[:, down, across] = (x[row] + 0.3 * sign[m, :, None, None]).clamp(0, 1)[:, down, across]
        assert torch.allclose(found[m], wanted, rtol=0, atol=1e-7)
