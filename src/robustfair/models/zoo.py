"""Networks of two optional packages: timm's classifiers, and what RobustBench's own loader returns.

Nothing is downloaded for a timm network: it is built bare, behind the input statistics that timm publishes for it, and
its weights come from a file. Neither package is part of the core, and neither is imported before its name is asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from robustfair.errors import ModelError, needed
from robustfair.models.normalise import Normalisation, Normalised, Statistics, named_statistics

EXTRA = '"robustfair[zoo]"'
_BENCHMARK_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
_BENCHMARK_THREATS = {"linf": "Linf", "l2": "L2", "corruptions": "corruptions"}


class Found(NamedTuple):
    """A network without its weights, and what its user should know."""

    model: nn.Module
    notes: tuple[str, ...]


def timm_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    normalise: Normalisation = "auto",
    image_size: tuple[int, int] | None = None,
) -> Found:
    """timm's network `name` with fresh weights, taking images in [0, 1].

    Args:
        name: an entry of `timm.list_models()`, with or without a tag ("resnet50", "resnet50.a1_in1k").
        num_classes: outputs C; None is what the published weights have.
        in_channels: channels of an image.
        normalise: input statistics, see `named_statistics`; "auto" is what timm publishes for the network, averaged
            over the channels where the images have another number of them.
        image_size: (H, W) of the images, to say where the network is made for another; None leaves that out.

    Raises:
        RobustFairError: timm is not installed.
        ModelError: timm cannot be imported, has no such network, or cannot build it for these sizes.
    """
    timm = _import_timm(name)
    network = _build(timm, name, {"num_classes": num_classes, "in_chans": in_channels})
    about = network.pretrained_cfg
    statistics = named_statistics(normalise, in_channels) or _published(about, in_channels)
    model = Normalised(network, in_channels, *statistics).eval()
    made_for = tuple(about["input_size"][1:])
    if image_size is None or image_size == made_for:
        return Found(model, ())
    given, wanted = ("x".join(map(str, size)) for size in (image_size, made_for))
    resize = f"`image_size={made_for[0]}` resizes them"
    if not _accepts(model, (in_channels, *image_size)):
        raise ModelError(f"timm:{name} takes images of {wanted}, these are {given} pixels: {resize}")
    note = f"timm:{name} is made for images of {wanted}, these are {given} and used as they are; {resize}"
    return Found(model, (note,))


def robustbench_model(name: str, *, num_classes: int | None = None) -> nn.Module:
    """What RobustBench's own loader returns for `name`, which it may download. It takes images in [0, 1].

    Files that would have to run code are refused here as everywhere.

    Args:
        name: of the model ("Carmon2019Unlabeled"), or with its data and threat ("cifar100/L2/..."); the data follows
            the number of classes and the threat is Linf where they are not named.
        num_classes: C of the data.

    Raises:
        RobustFairError: robustbench is not installed.
        ModelError: the name has another form, or the loader failed.
    """
    *about, model_name = name.split("/")
    data, threat = about if len(about) == 2 else (_BENCHMARK_DATA.get(num_classes or 10, "cifar10"), "Linf")
    if not model_name or len(about) not in (0, 2) or threat.lower() not in _BENCHMARK_THREATS:
        raise ModelError(f"robustbench:{name}: the form is robustbench:NAME or robustbench:cifar10/Linf/NAME")
    with needed("robustbench", f"robustbench:{name}"):
        from robustbench.utils import load_model
    try:
        with _weights_only():
            return load_model(model_name, dataset=data, threat_model=_BENCHMARK_THREATS[threat.lower()])
    except Exception as error:  # a foreign loader, with downloads in it
        raise ModelError(
            f"robustbench:{name}: its loader failed ({_reason(error)}). "
            "Fetch the weight file elsewhere, and audit it with `arch`"
        ) from error


def _import_timm(name: str) -> Any:
    with needed(EXTRA, f"timm:{name}"):
        try:
            import timm
        except ModuleNotFoundError:
            raise
        except (RuntimeError, ImportError) as error:
            raise ModelError(
                f"timm:{name}: timm is installed but cannot be imported ({_reason(error)}). It imports torchvision, "
                "which must be the build that belongs to this torch"
            ) from error
    return timm


def _build(timm: Any, name: str, sizes: dict[str, int | None]) -> Any:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has them all"
        raise ModelError(f"timm has no model {name!r}: {hint}")
    given = {key: value for key, value in sizes.items() if value is not None}
    try:
        return timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # a network of timm's thousand may refuse a size in its own way
        wanted = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ModelError(f"timm:{name} cannot be built with {wanted} ({_reason(error)})") from error


def _published(about: dict[str, Any], in_channels: int) -> Statistics:
    mean, std = (tuple(map(float, about[key])) for key in ("mean", "std"))
    if len(mean) == in_channels:
        return mean, std
    return (sum(mean) / len(mean),) * in_channels, (sum(std) / len(std),) * in_channels


def _accepts(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception:  # networks refuse a size with errors of any kind
        return False
    return True


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` inside read tensors only, whatever its caller asks for."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _reason(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
