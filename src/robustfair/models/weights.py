"""Read weights of any common origin into a network: our files, nested checkpoints, wrapped modules, public names.

A file is read as tensors only: safetensors, or torch's format with `weights_only=True`. What was taken is never left
unsaid: the report names the branch of a nested checkpoint, the prefix removed, the naming, and every key not used.

Sources of the public names: the WideResNet file shared by TRADES, MART, AWP and FAAL; the PreActResNet file shared by
"Overfitting in adversarially robust deep learning", AWP, CFA and FAIR-TAT; the ResNet files of CIFAR codes and of
torchvision; DeepMind's WideResNet. Prefixes and branches: RobustBench; statistics and the copy inside an attacker: the
"robustness" package.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustfair.errors import CheckpointError, ModelError
from robustfair.models.head import unwrap

BRANCHES = (
    "state_dict",
    "model_state_dict",
    "net",
    "model",
    "rmodel",
    "weights",
    "params",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
    "network",
)
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "1.",  # nn.Sequential(normalisation, network)
)

_STATISTIC = re.compile(
    r"(?:(?:0|normali[sz]er?|normali[sz]ation|norm_layer|preprocess|input_norm)\.)?(?:new_)?(?:(mean|mu)|std|sigma)"
)

_PUBLIC_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?:conv1|init_conv)\.(.+)", r"stem.\1"),
        *((rf"(?:block{n}\.layer|layer{n}|layer\.{n - 1}\.block)\.(.+)", rf"stages.{n - 1}.\1") for n in range(1, 5)),
        (r"(?:bn1|bn|batchnorm)\.(.+)", r"norm.\1"),
        (r"(?:fc|linear|logits)\.(.+)", r"head.\1"),
    )
)
_PUBLIC_PARTS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.(?:convShortcut|shortcut\.0|downsample\.0)\.", ".shortcut."),
        (r"\.(?:shortcut|downsample)\.1\.", ".shortcut_norm."),
        (r"\.(?:bn1|batchnorm_0)\.", ".norm1."),
        (r"\.(?:bn2|batchnorm_1)\.", ".norm2."),
        (r"\.conv_0\.", ".conv1."),
        (r"\.conv_1\.", ".conv2."),
    )
)
_DM_NAME = re.compile(r"(?:^|\.)init_conv\.weight$")
_DEAD_COPY = re.compile(r"(?:^|\.)(?:sub_block1|attacker)\.")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_weights` took, and what it did not.

    Attributes:
        branch: keys that led to the weights in a nested checkpoint, "" for a flat one.
        other_branches: further sets of weights in the checkpoint, not taken.
        prefix: what was removed from the front of the keys, "" for nothing.
        added: what was put there instead, for a model that wraps its network; "" for nothing.
        naming: "own" keys, or "public" ones that were translated.
        unused: keys of the file that went nowhere.
        missing: entries of the model that the file does not have; they keep their value.
    """

    branch: str
    other_branches: tuple[str, ...]
    prefix: str
    added: str
    naming: str
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"weights from {self.branch!r}" if self.branch else "weights from the top level"]
        if self.other_branches:
            parts.append(f"not taken: {', '.join(map(repr, self.other_branches))}")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r} removed")
        if self.added:
            parts.append(f"prefix {self.added!r} added")
        if self.naming == "public":
            parts.append("names of a public repository translated")
        if self.unused:
            parts.append(f"unused keys: {', '.join(self.unused)}")
        if self.missing:
            parts.append(f"kept from the model: {', '.join(self.missing)}")
        return "; ".join(parts)


def read_weight_file(path: str | Path) -> dict[str, Any]:
    """The content of a `.safetensors` file, or of a `torch.save` file that holds nothing but tensors and plain values.

    Raises:
        CheckpointError: no such file, cut or foreign, or it would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, a weight file was expected"
        )
    try:
        content = _read(path)
    except Exception as error:  # the readers raise whatever the bytes lead them to
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: holds the Python object {refused[1]}, and a file that can run code is never read. "
                "Save only its state_dict, best as safetensors"
            ) from error
        raise CheckpointError(
            f"{path}: cut, corrupt or not a weight file ({type(error).__name__}). Fetch or save it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, a state dict was expected")
    return content


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True) -> LoadReport:
    """Copy the weights in `state_dict`, flat or nested, into `model`, which changes only if all of them fit.

    Keys may bear wrapper prefixes and the names that public repositories use for our architectures; where the model is
    a network behind an input normalisation, they may be those of the bare network. Unused copies in public files (of
    the first stage, of the network inside an attacker) are skipped; input statistics that a file lacks stay as they
    are.

    Args:
        model: one of ours or any module; compile and parallel wrappers are looked through.
        state_dict: what `read_weight_file` returns.
        strict: refuse other missing or unexpected keys; a wrong shape is refused always.

    Raises:
        ModelError: no weights found, shapes or keys that do not fit (up to five are named).
    """
    bare = unwrap(model)
    branch, flat, others = _branch(state_dict)
    target = bare.state_dict()
    reading = max(_readings(flat, target), key=lambda reading: len(target.keys() & reading.names.values()))
    if reading.naming == "public":
        _check_twin(bare, flat)
    sources = {name: key for key, name in reading.names.items() if name in target}
    unexpected = tuple(key for key, name in reading.names.items() if sources.get(name) != key)
    missing = tuple(name for name in target if name not in sources)
    if not sources:
        raise ModelError(
            f"no key fits {type(bare).__name__}: it has {_some(target)}; the weights have {_some(flat)}. "
            "Build the architecture that the weights were saved from"
        )
    if strict:
        _check_keys(bare, [key for key in unexpected if not _DEAD_COPY.search(reading.names[key])], missing)
    entries = {name: _in_shape(name, flat[key], target[name]) for name, key in sources.items()}
    _check_shapes(bare, entries, target)
    bare.load_state_dict(entries, strict=False)
    return LoadReport(
        branch=branch,
        other_branches=others,
        prefix=reading.prefix,
        added=reading.added,
        naming=reading.naming,
        unused=unexpected + tuple(key for key in flat if key not in reading.names),
        missing=missing,
    )


class _Reading(NamedTuple):
    """One way to read the keys of a flat state dict: `names` maps each key of the file to a name of the model."""

    prefix: str
    added: str
    naming: str
    names: dict[str, str]


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _branch(checkpoint: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
    """Where the weights stand: the keys that lead there, the flat state dict, and other sets of weights left aside."""
    checkpoint = {key: value for key, value in checkpoint.items() if isinstance(key, str)}
    nested = [key for key, value in checkpoint.items() if _holds_weights(value)]
    known = [key for key in BRANCHES if key in nested]
    is_flat = any(isinstance(value, Tensor) and ("." in key or not nested) for key, value in checkpoint.items())
    if is_flat and not known:
        return "", checkpoint, ()
    taken = known or nested
    if not taken:
        raise ModelError(f"the checkpoint holds no weights; its keys are {_some(checkpoint)}")
    if not known and len(nested) > 1:
        raise ModelError(f"the checkpoint holds several sets of weights, {_some(nested)}. Pass the one that is meant")
    inner, flat, others = _branch(checkpoint[taken[0]])
    left = tuple(key for key in nested if key != taken[0])
    return f"{taken[0]}.{inner}" if inner else taken[0], flat, left + others


def _holds_weights(value: object) -> bool:
    """Whether `value` is a state dict or leads to one; the state of an optimiser is keyed by numbers and is none."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(entry, Tensor) or _holds_weights(entry) for entry in value.values())


def _readings(flat: Mapping[str, Any], target: Iterable[str]) -> Iterator[_Reading]:
    """The keys as they are, then with one wrapper prefix after the other removed, each as own and as public names."""
    names = {key: key for key, value in flat.items() if isinstance(value, Tensor)}
    removed, wrapper = "", _wrapper(target)
    statistics = {bool(match[1]): name for name in target if (match := _STATISTIC.fullmatch(name))}
    while True:
        for added in ("", wrapper) if wrapper else ("",):
            for naming, translate in (("own", str), ("public", _own_name)):
                translated = {key: added + translate(name) for key, name in names.items()}
                if naming == "public" or added:
                    translated |= _statistics(names, statistics)
                yield _Reading(removed, added, naming, translated)
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names.values())), None)
        if prefix is None:
            return
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        removed += prefix


def _wrapper(target: Iterable[str]) -> str:
    """The prefix of the network in a model that is a network behind an input normalisation; "" for another model.

    >>> _wrapper(["0.mean", "0.std", "1.conv1.weight", "1.fc.bias"]), _wrapper(["conv1.weight", "fc.bias"])
    ('1.', '')
    """
    heads = {name.split(".", 1)[0] for name in target if not _STATISTIC.fullmatch(name)}
    return f"{heads.pop()}." if len(heads) == 1 else ""


def _statistics(names: Mapping[str, str], known: Mapping[bool, str]) -> dict[str, str]:
    """The keys of input statistics and the model's names for them; `known` has that of the mean under True."""
    found = {key: match for key, name in names.items() if (match := _STATISTIC.fullmatch(name))}
    return {key: known[bool(match[1])] for key, match in found.items() if bool(match[1]) in known}


def _own_name(name: str) -> str:
    """Our name for an entry of a public file of one of our architectures; a name of none of them stays.

    >>> _own_name("block2.layer.0.convShortcut.weight"), _own_name("layer1.1.bn2.bias")
    ('stages.1.0.shortcut.weight', 'stages.0.1.norm2.bias')
    >>> _own_name("layer.0.block.1.batchnorm_0.bias"), _own_name("layer2.0.downsample.1.weight")
    ('stages.0.1.norm1.bias', 'stages.1.0.shortcut_norm.weight')
    """
    for pattern, replacement in _PUBLIC_NAMES:
        if match := pattern.fullmatch(name):
            own = match.expand(replacement)
            break
    else:
        return name
    for pattern, replacement in _PUBLIC_PARTS:
        own = pattern.sub(replacement, own)
    return own


def _in_shape(name: str, value: Tensor, target: Tensor) -> Tensor:
    """`value`, with the statistics of a normalisation, which are stored as (C,), (C, 1, 1) or (1, C, 1, 1), as (C,)."""
    is_statistic = _STATISTIC.fullmatch(name) and value.numel() == target.numel()
    return value.reshape(target.shape) if is_statistic else value


def _check_keys(model: nn.Module, unexpected: Sequence[str], missing: Sequence[str]) -> None:
    name = type(model).__name__
    lost = [name for name in missing if not _STATISTIC.fullmatch(name) and not name.endswith("num_batches_tracked")]
    if not lost and unexpected and all(_STATISTIC.fullmatch(_bare(key)) for key in unexpected):
        raise ModelError(
            f"the weights bring input statistics ({_some(unexpected)}), and {name} has no place for them: "
            "put it behind a normalisation, such as robustfair.models.Normalised"
        )
    problems = [f"lack {_some(lost)}"] if lost else []
    problems += [f"hold the unknown {_some(unexpected)}"] if unexpected else []
    if problems:
        raise ModelError(
            f"the weights do not fit {name}: they {' and '.join(problems)}. "
            "Build the architecture they were saved from, or pass strict=False to load what fits"
        )


def _check_twin(model: nn.Module, flat: Iterable[str]) -> None:
    """Refuse the files of the two WideResNets in each other's place: all shapes fit, and the function is another."""
    name = str(getattr(model, "name", ""))
    is_dm, comes_from_dm = name.startswith("dm-wrn-"), any(_DM_NAME.search(key) for key in flat)
    if is_dm == comes_from_dm or not name.startswith(("wrn-", "dm-wrn-")):
        return
    other = name.removeprefix("dm-") if is_dm else f"dm-{name}"
    raise ModelError(f"the weights are those of a {other}, which is another function than {name}: build {other}")


def _check_shapes(model: nn.Module, entries: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    wrong = [name for name, value in entries.items() if value.shape != target[name].shape]
    if not wrong:
        return
    bias = wrong[0].rpartition(".")[0] + ".bias"
    if set(wrong) == {bias, bias.removesuffix("bias") + "weight"} and entries[bias].ndim == target[bias].ndim == 1:
        outputs = len(entries[bias])
        raise ModelError(
            f"the weights have {outputs} outputs, the model has {len(target[bias])}. "
            f"Build the model with num_classes={outputs}, or load weights for its classes"
        )
    shapes = [f"{name} {tuple(entries[name].shape)} for {tuple(target[name].shape)}" for name in wrong]
    raise ModelError(
        f"the weights have other shapes than {type(model).__name__}: {_some(shapes)}. "
        "Build the model with the width, channels and classes they were saved with"
    )


def _bare(key: str) -> str:
    """`key` without wrapper prefixes."""
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _some(names: Iterable[str]) -> str:
    """Up to five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
