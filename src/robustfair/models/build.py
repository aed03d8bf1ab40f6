"""Build a network by name, and describe a network so that a checkpoint can build it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from robustfair.errors import ModelError
from robustfair.models.head import unwrap
from robustfair.models.networks.dm_wide_resnet import dm_wide_resnet_factory
from robustfair.models.networks.wide_resnet import wide_resnet_factory
from robustfair.models.networks.xcit import xcit_factory
from robustfair.models.normalise import Normalisation, Normalise, named_statistics
from robustfair.registry import MODELS

DESCRIPTION_KEYS = ("name", "num_classes", "in_channels", "width", "mean", "std")


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int | None = None,
    normalise: Normalisation = "auto",
) -> nn.Module:
    """A network with fresh weights (drawn from torch's global generator), taking images in [0, 1] of any size from 8x8.

    Args:
        name: an entry of the model registry, or `wrn-DEPTH-WIDTH` or `dm-wrn-DEPTH-WIDTH` for any depth 6 n + 4, or
            `xcit-s12-pP` for a patch embedding of stride P.
        num_classes: outputs C.
        in_channels: channels of an image, 1 for grey.
        width: channels of the first convolution, for a `wrn` the factor on its base of 16, for `xcit` the channels of a
            token; None is the published one.
        normalise: input statistics inside the model. "auto" is the model's own choice, "cifar10" for most with three
            channels and 0.5, 0.5 for others; "none" passes pixels through, as TRADES and WAT train; see
            `named_statistics`.

    Raises:
        UnknownNameError: no model of that name.
        ModelError: a network of another package, which can be audited alone.
        ConfigError: a size or statistic out of range.

    >>> create_model("small-cnn", in_channels=1, width=8).head
    Linear(in_features=32, out_features=10, bias=True)
    """
    factory = _factory(name)
    mean, std = named_statistics(normalise, in_channels) or (None, None)
    sizes = {} if width is None else {"width": width}
    return factory(num_classes=num_classes, in_channels=in_channels, mean=mean, std=std, **sizes)


def require_model(name: str) -> None:
    """Refuse a name that `create_model` does not know, before any image is read.

    Raises:
        UnknownNameError, ModelError: as `create_model`.
    """
    _factory(name)


def _factory(name: str) -> Callable[..., nn.Module]:
    """What builds the network of a name."""
    if ":" in name:
        raise ModelError(
            f"model {name} can be audited and not be trained: `model` names a network of ours, such as resnet18 or "
            "preact-resnet18, and `robustfair list models` has them all"
        )
    return wide_resnet_factory(name) or dm_wide_resnet_factory(name) or xcit_factory(name) or MODELS.get(name)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What `build_model` needs to build `model` again, as plain JSON values; sees through wrappers as `unwrap` does.

    Raises:
        ModelError: the network is not one of ours.

    >>> describe_model(create_model("wrn-10-1", in_channels=1))
    {'name': 'wrn-10-1', 'num_classes': 10, 'in_channels': 1, 'width': 1, 'mean': [0.5], 'std': [0.5]}
    """
    bare = unwrap(model)
    normalise = getattr(bare, "normalise", None)
    if not isinstance(normalise, Normalise) or not all(hasattr(bare, key) for key in DESCRIPTION_KEYS[:4]):
        raise ModelError(
            f"{type(bare).__name__} cannot be rebuilt from a description: it does not come from create_model. "
            "Build it with its own code and load the weights into it"
        )
    mean, std = normalise.statistics()
    return {**{key: getattr(bare, key) for key in DESCRIPTION_KEYS[:4]}, "mean": list(mean), "std": list(std)}


def build_model(description: Mapping[str, Any]) -> nn.Module:
    """The network of a description, with fresh weights.

    Raises:
        ModelError: a key is missing or unknown.
        UnknownNameError, ConfigError: as `create_model`.
    """
    if set(description) != set(DESCRIPTION_KEYS):
        raise ModelError(
            f"a model description has the keys {', '.join(DESCRIPTION_KEYS)}; got {', '.join(description)}"
        )
    arguments = dict(description)
    statistics = (arguments.pop("mean"), arguments.pop("std"))
    return create_model(**arguments, normalise=statistics)
