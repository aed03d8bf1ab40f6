"""Read weights of any common origin into a network: our files, nested checkpoints, wrapped modules, public names.

A file is read as tensors only: safetensors, or torch's format with `weights_only=True`. What was taken is never left
unsaid: the report names the branch of a nested checkpoint, the prefix removed, the naming, and every key not used.

Sources of the public names: the WideResNet file shared by TRADES, MART, AWP and FAAL; the PreActResNet file shared by
"Overfitting in adversarially robust deep learning", AWP, CFA and FAIR-TAT. Prefixes and branches: RobustBench.
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
    "model_ema",
    "ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "1.")  # "1.": nn.Sequential(normalisation, network)

_PUBLIC_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"conv1\.(.+)", r"stem.\1"),
        (r"block(\d)\.layer\.(\d+)\.(.+)", r"stages.\1.\2.\3"),
        (r"layer(\d)\.(\d+)\.(.+)", r"stages.\1.\2.\3"),
        (r"(?:bn1|bn)\.(.+)", r"norm.\1"),
        (r"(?:fc|linear)\.(.+)", r"head.\1"),
        (r"(?:(?:0|normali[sz]er?|norm_layer)\.)?(mean|std)", r"normalise.\1"),
        (r"(?:(?:0|normali[sz]er?|norm_layer)\.)?mu", r"normalise.mean"),
        (r"(?:(?:0|normali[sz]er?|norm_layer)\.)?sigma", r"normalise.std"),
    )
)
_DEAD_COPY = re.compile(r"sub_block1\.")
_KEPT_WHEN_ABSENT = re.compile(r"normalise\.(mean|std)|.*num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_weights` took, and what it did not.

    Attributes:
        branch: keys that led to the weights in a nested checkpoint, "" for a flat one.
        other_branches: further sets of weights in the checkpoint, not taken.
        prefix: what was removed from the front of the keys, "" for nothing.
        naming: "own" keys, or "public" ones that were translated.
        unused: keys of the file that went nowhere.
        missing: entries of the model that the file does not have; they keep their value.
    """

    branch: str
    other_branches: tuple[str, ...]
    prefix: str
    naming: str
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"weights from {self.branch!r}" if self.branch else "weights from the top level"]
        if self.other_branches:
            parts.append(f"not taken: {', '.join(map(repr, self.other_branches))}")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r} removed")
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

    Keys may bear wrapper prefixes and the names that public repositories use for our architectures. The unused copy of
    the first stage in public WideResNet files is skipped; input statistics that a file lacks stay as they are.

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
    reading = max(_readings(flat), key=lambda reading: len(target.keys() & reading.names.values()))
    sources = {name: key for key, name in reading.names.items() if name in target}
    unexpected = tuple(key for key, name in reading.names.items() if sources.get(name) != key)
    missing = tuple(name for name in target if name not in sources)
    if not sources:
        raise ModelError(
            f"no key fits {type(bare).__name__}: it has {_some(target)}; the weights have {_some(flat)}. "
            "Build the architecture that the weights were saved from"
        )
    if strict:
        _check_keys(bare, [key for key in unexpected if not _DEAD_COPY.match(reading.names[key])], missing)
    entries = {name: _in_shape(name, flat[key], target[name]) for name, key in sources.items()}
    _check_shapes(bare, entries, target)
    bare.load_state_dict(entries, strict=False)
    return LoadReport(
        branch=branch,
        other_branches=others,
        prefix=reading.prefix,
        naming=reading.naming,
        unused=unexpected + tuple(key for key in flat if key not in reading.names),
        missing=missing,
    )


class _Reading(NamedTuple):
    """One way to read the keys of a flat state dict: `names` maps each key of the file to a name of the model."""

    prefix: str
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


def _readings(flat: Mapping[str, Any]) -> Iterator[_Reading]:
    """The keys as they are, then with one wrapper prefix after the other removed, each as own and as public names."""
    names = {key: key for key, value in flat.items() if isinstance(value, Tensor)}
    removed = ""
    while True:
        yield _Reading(removed, "own", names)
        yield _Reading(removed, "public", {key: _own_name(name) for key, name in names.items()})
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names.values())), None)
        if prefix is None:
            return
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        removed += prefix


def _own_name(name: str) -> str:
    """Our name for an entry of a public WideResNet or PreActResNet file; a name of neither stays.

    >>> _own_name("block2.layer.0.convShortcut.weight"), _own_name("layer1.1.bn2.bias")
    ('stages.1.0.shortcut.weight', 'stages.0.1.norm2.bias')
    """
    for pattern, replacement in _PUBLIC_NAMES:
        if match := pattern.fullmatch(name):
            own = match.expand(replacement)
            break
    else:
        return name
    own = re.sub(r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}", own)
    own = re.sub(r"\.(?:convShortcut|shortcut\.0)\.", ".shortcut.", own)
    return re.sub(r"\.bn([12])\.", r".norm\1.", own)


def _in_shape(name: str, value: Tensor, target: Tensor) -> Tensor:
    """`value`, with the statistics of a normalisation, which are stored as (C,), (C, 1, 1) or (1, C, 1, 1), as (C,)."""
    is_statistic = name.startswith("normalise.") and value.numel() == target.numel()
    return value.reshape(target.shape) if is_statistic else value


def _check_keys(model: nn.Module, unexpected: Sequence[str], missing: Sequence[str]) -> None:
    lost = [name for name in missing if not _KEPT_WHEN_ABSENT.fullmatch(name)]
    problems = [f"lack {_some(lost)}"] if lost else []
    problems += [f"hold the unknown {_some(unexpected)}"] if unexpected else []
    if problems:
        raise ModelError(
            f"the weights do not fit {type(model).__name__}: they {' and '.join(problems)}. "
            "Build the architecture they were saved from, or pass strict=False to load what fits"
        )


def _check_shapes(model: nn.Module, entries: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    wrong = [name for name, value in entries.items() if value.shape != target[name].shape]
    if not wrong:
        return
    if set(wrong) <= {"head.weight", "head.bias"} and entries["head.bias"].ndim == 1:
        outputs = len(entries["head.bias"])
        raise ModelError(
            f"the weights have {outputs} outputs, the model has {len(target['head.bias'])}. "
            f"Build the model with num_classes={outputs}, or load weights for its classes"
        )
    shapes = [f"{name} {tuple(entries[name].shape)} for {tuple(target[name].shape)}" for name in wrong]
    raise ModelError(
        f"the weights have other shapes than {type(model).__name__}: {_some(shapes)}. "
        "Build the model with the width, channels and classes they were saved with"
    )


def _some(names: Iterable[str]) -> str:
    """Up to five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
