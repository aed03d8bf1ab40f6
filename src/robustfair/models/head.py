"""The head of a classifier: its last linear map, found in any module by experiment instead of by name.

Names mislead: the last `nn.Linear` of a module tree may be an auxiliary branch, and a temperature, a cosine scale or a
log-softmax may stand behind it. So the module is run with the output of a candidate replaced by numbers of our own, and
the candidate is the head exactly if those numbers are what the model returns. The model is left as it was.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from robustfair.errors import ModelError, RobustFairWarning
from robustfair.models.layout import FaultWatch, Thinned, lay_out
from robustfair.models.normalise import Normalised

Head = nn.Linear | nn.Conv2d

_GUESSED_SIZES = (8, 28, 32, 64, 96, 224)


def mode_of(name: str) -> Any:
    """The `training` of a wrapper: always that of the module it holds as `name`, whichever of the two was switched."""
    return property(lambda wrapper: getattr(wrapper, name).training, lambda wrapper, mode: None)


class OnCopies(nn.Module):
    """A network that is given a copy of its images in torch's default layout, to view as it likes and to write on.

    Shares the network, its mode included.

    Args:
        thins: keep convolutions right that the network lays out channels last itself, see `Thinned`.
    """

    training = mode_of("network")

    def __init__(self, network: nn.Module, *, thins: bool = False) -> None:
        super().__init__()
        self.network = network
        self.thins = thins

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        with Thinned() if self.thins else nullcontext():
            return self.network(x.clone(memory_format=torch.contiguous_format))


def prepared(model: nn.Module, example: Tensor, *, trains: bool = False) -> nn.Module:
    """The model as it may be called here: itself, or `OnCopies` of it.

    Images come in the layout that convolutions are fastest in, on which `view` may fail behind one, and the same images
    come again: a model that fails on that layout, or changes its input in place, gets copies.

    Args:
        example: (B, C, H, W) on the device of the model.
        trains: the model is called in train mode too, where other layers may act: a copy of it is tried in that mode.
    """
    if isinstance(model, OnCopies):
        return model
    with torch.inference_mode(False), torch.no_grad():
        with _evaluating(model), FaultWatch(model) as watch:
            spares = _spares_images(model, example)
        thins = watch.found
        if spares and trains:
            spares = _spares_images_in_training(model, example)
    return OnCopies(model, thins=thins) if thins or not spares else model


def in_float32(model: nn.Module, example: Tensor) -> nn.Module:
    """The model where it takes images in float32, in which attacks compute; else a copy in float32, with a warning.

    Args:
        example: (B, C, H, W) in float32, on the device of the model.
    """
    others = other_dtypes(model)
    if not others or _takes(model, example):
        return model
    try:
        copy = deepcopy(model).float()
    except Exception:  # a foreign module may hold what cannot be copied: `check_outputs` refuses it in its own words
        return model
    warnings.warn(
        f"the model's {' and '.join(others)} weights are computed in float32, on a copy, as attacks need",
        RobustFairWarning,
        stacklevel=3,
    )
    return copy


def other_dtypes(model: nn.Module) -> list[str]:
    """Names of the floating-point types other than float32 that a model's tensors have."""
    tensors = (*model.parameters(), *model.buffers())
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _takes(model: nn.Module, example: Tensor) -> bool:
    try:
        with torch.inference_mode(False), _evaluating(model):
            model(example.clone())
    except Exception:  # of another type, or what `check_outputs` refuses
        return False
    return True


def laid_out(model: nn.Module, example: Tensor) -> nn.Module:
    """`prepared` for training, the weights laid out as the images are to be: as the loader lays them out by itself, or
    in torch's default layout for a model that gets copies.
    """
    if example.shape[1] >= 3:
        lay_out(model, torch.channels_last)
    called = prepared(model, example, trains=True)
    if isinstance(called, OnCopies):
        lay_out(model, torch.contiguous_format)
    return called


def _spares_images(model: nn.Module, example: Tensor) -> bool:
    """Whether a pass on images laid out channels last goes through and leaves them as they are."""
    x = example.clone(memory_format=torch.channels_last)
    version = x._version
    try:
        model(x)
    except Exception:  # `check_outputs` says what is wrong if it fails on a copy too
        return False
    return x._version == version and torch.equal(x, example)


def _spares_images_in_training(model: nn.Module, example: Tensor) -> bool:
    """The same in train mode, with all random streams and running statistics left; a model without a copy passes."""
    try:
        copy = deepcopy(model)
    except Exception:  # a foreign module may hold what cannot be copied
        return True
    with _streams_kept(example.device):
        return _spares_images(copy.train(), example)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, a data-parallel wrapper, an averaged copy or `OnCopies`, however deep."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(model, OnCopies):
            model = model.network
        else:
            return model


def find_head(model: nn.Module, example: Tensor | None = None) -> Head:
    """The last linear map on the way to the logits: an `nn.Linear`, or an `nn.Conv2d` with a 1x1 kernel.

    Reshaping, picking a token or a mean over positions may follow it; anything that changes the logits may not.

    Args:
        model: any module, wrapped or not, that returns logits (B, C).
        example: (B, ...) an input it accepts; None tries images of common sizes, or vectors if it has no convolution.

    Raises:
        ModelError: no such map, something follows it, its weight is computed from other tensors, or no input fits.

    >>> find_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    Linear(in_features=8, out_features=3, bias=True)
    """
    model = unwrap(model)
    candidates: list[Head] = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no linear layer to be its head (nn.Linear, or nn.Conv2d of 1x1)")
    with _evaluating(model):
        x, logits, called = _trace(model, candidates, example)
        wide_enough = [module for module in reversed(called) if _outputs(module) == logits.shape[1]]
        head = next((module for module in wide_enough if _emits_logits(model, module, x, logits)), None)
    if head is None:
        raise ModelError(
            f"the output of {type(model).__name__} is not that of its last linear layer: something acts on the logits "
            "after it (a scale, a log-softmax, an average of heads). Pass the part that returns plain logits"
        )
    if not isinstance(head._parameters.get("weight"), nn.Parameter):
        raise ModelError(
            f"the head of {type(model).__name__} computes its weight from other tensors (a parametrisation such as "
            "weight norm). Remove it first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return head


def head_norms(model: nn.Module, example: Tensor | None = None) -> Tensor:
    """(C,) L2 norm of each row of the head's weight, one a class, without the bias.

    Raises:
        ModelError: as `find_head`.
    """
    return find_head(model, example).weight.detach().flatten(1).float().norm(dim=1)


def check_outputs(model: nn.Module, num_classes: int, example: Tensor) -> None:
    """Make sure that `model` returns finite logits (B, num_classes) for `example` (B, ...).

    Raises:
        ModelError: it does not accept the example, or returns anything else.
    """
    with _evaluating(model):
        logits = _logits(model, example)
        _require_classes(model, logits, num_classes)
    require_finite(model, logits)


def check_training_outputs(
    model: nn.Module, num_classes: int, examples: Iterable[Tensor], train: Callable[[nn.Module], None]
) -> None:
    """Make sure that `model` returns logits (B, num_classes) in train mode too, where other layers may act.

    The pass is made on a copy, where the model can be copied; running statistics, modes and random streams stay.

    Args:
        examples: (B, ...) each. The first that goes through decides: a few images may be too few for a model that
            measures its batch.
        train: puts a model into the mode in which it is trained.

    Raises:
        ModelError: none of the examples goes through.
    """
    with _modes_kept(model):
        train(model)
        try:
            tried, kept = deepcopy(model), {}
        except Exception:  # a foreign module may hold what cannot be copied
            tried, kept = model, {name: buffer.clone() for name, buffer in model.named_buffers()}
        refusal = None
        for x in examples:
            try:
                with _streams_kept(x.device), torch.no_grad():
                    logits = _logits(tried, x)
            except ModelError as error:
                refusal = error
                continue
            finally:
                for name, buffer in kept.items():
                    tried.get_buffer(name).copy_(buffer)
            _require_classes(tried, logits, num_classes)
            return
    if refusal is not None:
        raise refusal


def _require_classes(model: nn.Module, logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise ModelError(
            f"model has {logits.shape[1]} outputs{_mode(model)}, data has {num_classes} classes. "
            "Build the model with as many outputs as the data has classes, or load the data it was trained on"
        )


def check_gradient(model: nn.Module, example: Tensor) -> None:
    """Make sure that the gradient of the images (B, ...) can be taken; one that is zero or cut off passes.

    Raises:
        ModelError: see `no_gradient`.
    """
    with _evaluating(model), torch.enable_grad():
        x = example.detach().clone().requires_grad_(True)
        try:
            logits = model(x)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), x, allow_unused=True)
        except Exception as error:  # a foreign module may raise anything in a graph that it was not made for
            raise no_gradient(model, error) from error


def no_gradient(model: nn.Module, error: Exception) -> ModelError:
    """What to raise where taking the gradient of the images failed with `error`."""
    reason = str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__
    return ModelError(
        f"the gradient of the images cannot be taken through {_name(model)}: {reason}. "
        "Compute out of place in it (x = x - 0.5, not x -= 0.5), checkpoint with use_reentrant=False, or choose what "
        "needs no gradient: the attacks clean and square, the objective standard"
    )


def require_finite(model: nn.Module, logits: Tensor, index: Tensor | None = None) -> None:
    """Refuse logits (B, C) that are not finite; `index` (B,) are the rows of the data set they belong to.

    Raises:
        ModelError: a logit is nan or infinite; says for how many images, and names the first.
    """
    rows = (~logits.isfinite().all(1)).nonzero().squeeze(1)
    if len(rows):
        first = int(rows[0] if index is None else index[rows[0]])
        raise ModelError(
            f"{_name(model)} returns logits that are not finite for {len(rows)} of {len(logits)} images, the first is "
            f"image {first}: its weights are not usable, or it was made for inputs of another scale than [0, 1]"
        )


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Leave the global random streams as they are: layers may draw from torch, numpy or Python."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _outputs(module: Head) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    with _modes_kept(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _OutputError(ModelError):
    """A model that returns no tensor, whatever its input."""


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        logits = model(x.clone(memory_format=torch.contiguous_format))
    except Exception as error:  # a foreign module may raise anything on an input it was not made for
        reason = _channels(model, x) or str(error).split("\n", 1)[0] or type(error).__name__
        raise ModelError(
            f"{_name(model)} does not accept input of shape {tuple(x.shape)}{_mode(model)}: {reason}"
        ) from error
    if not isinstance(logits, Tensor):
        raise _OutputError(
            f"{_name(model)} must return logits (B, C), got {_described(logits)}{_mode(model)}. "
            "Wrap it in a module that returns the logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(x):
        got = f"{tuple(logits.shape)} for {len(x)} inputs"
        raise ModelError(f"{_name(model)} must return logits (B, C), got {got}{_mode(model)}")
    return logits


def _described(output: object) -> str:
    """An output that is no tensor, for messages."""
    kind = f"{'an' if type(output).__name__[0] in 'AEIOUaeiou' else 'a'} {type(output).__name__}"
    if isinstance(output, Mapping):
        return f"{kind} of {', '.join(map(str, output))}"
    return f"{kind} of {len(output)}" if isinstance(output, tuple | list) else kind


def _mode(model: nn.Module) -> str:
    return " in train mode" if model.training else ""


def _channels(model: nn.Module, x: Tensor) -> str:
    """What to say where images have another number of channels than the first convolution takes; "" elsewhere."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or x.ndim != 4 or first.in_channels == x.shape[1]:
        return ""
    return (
        f"it takes images of {first.in_channels} channels and these have {x.shape[1]}. "
        "Build it for the images' channels, or choose the data it was trained on"
    )


def _name(model: nn.Module) -> str:
    """The class of the network, for messages."""
    bare = unwrap(model)
    return type(bare.network if isinstance(bare, Normalised) else bare).__name__


def _trace(model: nn.Module, candidates: list[Head], example: Tensor | None) -> tuple[Tensor, Tensor, list[Head]]:
    """An input that the model accepts, its logits, and the candidates in the order in which they last acted."""
    called: dict[Head, None] = {}

    def record(module: Head, inputs: object, output: object) -> None:
        called.pop(module, None)
        called[module] = None

    with _hooks([module.register_forward_hook(record) for module in candidates]):
        if example is not None:
            return example, _logits(model, example), list(called)
        for x in _guesses(model):
            called.clear()
            try:
                return x, _logits(model, x), list(called)
            except _OutputError:
                raise
            except ModelError as error:
                refusal = error
    raise ModelError(f"cannot guess an input of {type(model).__name__}, pass an example (B, ...). Last try: {refusal}")


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Images of each common size where the module has a convolution, else flat vectors for its first linear layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), layers[0])
    if isinstance(first, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, first.in_features)]
    else:
        shapes = [(2, first.in_channels, size, size) for size in _GUESSED_SIZES]
    for shape in shapes:
        yield torch.full(shape, 0.5, device=first.weight.device, dtype=first.weight.dtype)


def _emits_logits(model: nn.Module, module: Head, x: Tensor, logits: Tensor) -> bool:
    """Whether the model returns, row by row, whatever stands in place of the output of `module`."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(logits.shape[1], generator=generator).to(logits)
    channels = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return probe.to(output.dtype).view(channels).expand_as(output).clone()

    with _hooks([module.register_forward_hook(replace)]):
        returned = _logits(model, x)
    return torch.allclose(returned, probe.expand_as(returned), rtol=1e-5, atol=1e-6)


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
