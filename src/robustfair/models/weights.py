"""Load weights of any common origin into a network: our files, nested checkpoints, wrapped modules, public names.

Which set of weights in a file, and which prefix of its keys, is the network's is decided by what fits. What was taken
is never left unsaid: the report names the branch of a nested checkpoint, the prefix removed, the naming, and what was
not used.

Sources of the public names: the WideResNet file shared by TRADES, MART, AWP and FAAL; the PreActResNet file shared by
"Overfitting in adversarially robust deep learning", AWP, CFA and FAIR-TAT; the ResNet files of CIFAR codes and of
torchvision; DeepMind's WideResNet. Prefixes and branches: RobustBench; statistics and the copy inside an attacker: the
"robustness" package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from robustfair.errors import ModelError, UnknownNameError
from robustfair.models.head import unwrap
from robustfair.models.weight_file import holds_weights, read_weight_file, stand_ins

__all__ = ["LoadReport", "load_weights", "read_weight_file"]

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
_WRAPPERS = ("module", "_orig_mod")
_UNKNOWN = len(BRANCHES)

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
        other_branches: names of further sets of weights in the checkpoint, not taken.
        prefix: what was removed from the front of the keys, "" for nothing.
        added: what was put there instead, for a model that wraps its network; "" for nothing.
        naming: "own" keys, or "public" ones that were translated.
        unused: keys beside the taken ones that went nowhere.
        missing: entries of the model that the file does not have; they keep their value.
        not_read: Python objects in the file, each with its kind.
    """

    branch: str
    other_branches: tuple[str, ...]
    prefix: str
    added: str
    naming: str
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    not_read: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"weights from {self.branch!r}" if self.branch else "weights from the top level"]
        if self.other_branches:
            names = ", ".join(map(repr, self.other_branches))
            parts.append(f"not taken: {names} (`select_weights` chooses)")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r} removed")
        if self.added:
            parts.append(f"prefix {self.added!r} added")
        if self.naming == "public":
            parts.append("names of a public repository translated")
        if self.unused:
            parts.append(f"unused keys: {_some(self.unused)}")
        if self.missing:
            parts.append(f"kept from the model: {_some(self.missing)}")
        if self.not_read:
            parts.append(f"Python objects not read: {_some(self.not_read)}")
        return "; ".join(parts)


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Any], *, select_weights: str | None = None, strict: bool = True
) -> LoadReport:
    """Copy the weights in `state_dict`, flat or nested, into `model`, which changes only if all of them fit.

    Keys may bear wrapper prefixes and the names that public repositories use for our architectures; where the model is
    a network behind an input normalisation, they may be those of the bare network. The network's own prefix is the one
    under which most of the model is found: keys beside it (a loss, a metric, another network) are left out, and so are
    unused copies in public files; input statistics that a file lacks stay as they are.

    Args:
        model: one of ours or any module; compile and parallel wrappers are looked through.
        state_dict: what `read_weight_file` returns.
        select_weights: which set of weights is meant where there are several, such as "ema": its name, or a part of it
            that no other has. None takes the only one that fits, or among several the one that comes first in
            `BRANCHES` and `PREFIXES`.
        strict: refuse other missing or unexpected keys of the network; a wrong shape is refused always.

    Raises:
        ModelError: no weights found, several sets of them, shapes or keys that do not fit (up to five are named).
        UnknownNameError: no set of weights is named so.
    """
    bare = unwrap(model)
    target = bare.state_dict()
    reading, others = _choose(_readings(state_dict, target), select_weights)
    name = type(bare).__name__
    if not reading.sources:
        raise ModelError(
            f"no key fits {name}: it has {_some(target)}; the weights have {_some(reading.flat)}. "
            "Build the architecture that the weights were saved from"
        )
    if reading.naming == "public":
        _check_twin(bare, reading.flat)
    if strict:
        _check_keys(name, reading)
    entries = {name: _in_shape(name, reading.flat[key], target[name]) for name, key in reading.sources.items()}
    _check_shapes(bare, entries, target)
    bare.load_state_dict(entries, strict=False)
    return LoadReport(
        branch=".".join(reading.branch),
        other_branches=others,
        prefix=reading.prefix,
        added=reading.added,
        naming=reading.naming,
        unused=reading.unused,
        missing=reading.missing,
        not_read=tuple(f"{where} ({what})" for where, what in stand_ins(state_dict)),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reading:
    """One way to read a file: a set of weights in it, and what each of its keys means.

    Attributes:
        branch: keys that lead to `flat` in a nested checkpoint.
        prefix: in front of the keys of the network.
        sources: for a name of the model, the key of the file with its value.
        missing: names of the model without one.
        unexpected: keys of the network that the model has no place for.
        fits: whether all of it has its place, in the right shape.
    """

    branch: tuple[str, ...]
    flat: Mapping[str, Any]
    prefix: str
    added: str
    naming: str
    sources: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fits: bool

    @property
    def name(self) -> str:
        """What a user may call this set of weights; "" for one that stands alone at the top level."""
        words = (*self.branch, *self.prefix.split("."))
        return ".".join(word for word in words if word not in ("", *_WRAPPERS))

    @property
    def rank(self) -> tuple[int, ...]:
        """The order among sets that fit; begins with `_UNKNOWN` where a word does not tell whose weights they are."""
        words = [f"{word}." for word in self.prefix.split(".") if word]
        places = [BRANCHES.index(word) if word in BRANCHES else _UNKNOWN for word in self.branch]
        places += [1 if word[:-1].isdigit() else 0 if word in PREFIXES else _UNKNOWN for word in words]
        return (max(places, default=0), *places)

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of the set that go nowhere."""
        taken = set(self.sources.values())
        return tuple(key for key in self.flat if key not in taken)


def _choose(readings: Sequence[_Reading], selected: str | None) -> tuple[_Reading, tuple[str, ...]]:
    """The set of weights to load, and the names of further ones.

    Raises:
        ModelError: several may be meant.
        UnknownNameError: none is `selected`.
    """
    names = [reading.name for reading in readings]
    if selected is not None:
        words = ".".join(word for word in selected.split(".") if word not in ("", *_WRAPPERS))
        exact = [reading for reading in readings if reading.name == words]
        inside = [reading for reading in readings if f".{words}." in f".{reading.name}."]
        meant = exact or inside or [reading for reading in readings if words and words in reading.name]
        if not meant:
            raise UnknownNameError("set of weights", selected, [name or "the top level" for name in names])
    else:
        meant = list(readings)
    fitting = [reading for reading in meant if reading.fits] or meant
    best = min(fitting, key=lambda reading: reading.rank)
    equal = [reading for reading in fitting if reading.rank == best.rank]
    if len(equal) > 1 or (len(fitting) > 1 and best.rank[0] == _UNKNOWN):
        raise ModelError(
            f"the file holds several sets of weights, {_some(reading.name for reading in fitting)}. "
            "Name the one that is meant with `select_weights`"
        )
    others = [reading for reading in readings if reading.sources or set(reading.branch) & set(BRANCHES)]
    return best, tuple(dict.fromkeys(reading.name for reading in others if reading is not best))


def _readings(checkpoint: Mapping[str, Any], target: Mapping[str, Tensor]) -> list[_Reading]:
    """The sets of weights in a file, each read as it fits best. One that does not fit stands only for its branch."""
    found = []
    for branch, flat in _branches(checkpoint):
        readings = _prefixed_readings(branch, flat, target)
        found += [reading for reading in readings if reading.fits] or readings[:1]
    return found


def _branches(
    checkpoint: Mapping[str, Any], branch: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Where weights stand: the keys that lead there, and the flat state dict."""
    checkpoint = {key: value for key, value in checkpoint.items() if isinstance(key, str)}
    nested = [key for key, value in checkpoint.items() if holds_weights(value)]
    is_flat = any(isinstance(value, Tensor) and ("." in key or not nested) for key, value in checkpoint.items())
    if is_flat and not any(key in BRANCHES for key in nested):
        yield branch, checkpoint
        return
    if not nested:
        raise ModelError(f"the checkpoint holds no weights; its keys are {_some(checkpoint)}")
    for key in nested:
        yield from _branches(checkpoint[key], (*branch, key))


def _prefixed_readings(
    branch: tuple[str, ...], flat: Mapping[str, Any], target: Mapping[str, Tensor]
) -> list[_Reading]:
    """A flat state dict read with each prefix that its keys may have, as own and as public names; the best first."""
    keys = [key for key, value in flat.items() if isinstance(value, Tensor)]
    wrapper = _wrapper(target)
    statistics = {bool(match[1]): name for name in target if (match := _STATISTIC.fullmatch(name))}
    ways = [(added, way) for added in dict.fromkeys(("", wrapper)) for way in ("own", "public")]
    tried = []
    for prefix in _prefixes(keys, target, wrapper):
        named = [_Way(prefix, added, way, _names(keys, prefix, added, way, statistics)) for added, way in ways]
        tried.append(max(named, key=lambda way: len(way.placed(target))))
    tried.sort(key=lambda way: -len(way.placed(target)))
    found: list[tuple[_Way, set[str]]] = []
    for way in tried:
        own = {key for key, name in way.names.items() if name in target and not _STATISTIC.fullmatch(name)}
        if not any(own <= other for _, other in found):
            found.append((way, own))
    whole = [(way, own) for way, own in found if not _lacking(target.keys() - way.placed(target))]
    readings = []
    for way, own in found:
        copies = [copy for copy, other in whole if not own & other]
        aside = {key for copy in copies for key, name in copy.names.items() if name in target}
        others = tuple(copy.prefix for copy in copies if not way.prefix.startswith(copy.prefix))
        readings.append(_reading(branch, flat, target, way, aside | {key for key in keys if key.startswith(others)}))
    return sorted(readings, key=lambda reading: (not reading.fits, len(reading.missing)))


class _Way(NamedTuple):
    """A way to read the keys of a flat state dict: `names` has the model's name for each that is the network's."""

    prefix: str
    added: str
    naming: str
    names: dict[str, str]

    def placed(self, target: Mapping[str, Tensor]) -> set[str]:
        """The names of the model that it finds."""
        return target.keys() & set(self.names.values())


def _prefixes(keys: Iterable[str], target: Mapping[str, Tensor], wrapper: str) -> list[str]:
    """What stands in front of a name of the model in any of the keys, and "".

    >>> _prefixes(["model.fc.bias", "loss.weight"], {"fc.bias": Tensor()}, "")
    ['', 'model.']
    """
    found = {"": None}
    for key in keys:
        for cut in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            names = (key[cut:], _own_name(key[cut:]))
            if any(name in target or wrapper + name in target for name in names):
                found[key[:cut]] = None
    return list(found)


def _names(keys: Iterable[str], prefix: str, added: str, naming: str, statistics: Mapping[bool, str]) -> dict[str, str]:
    """The model's names for the keys under `prefix`, and for input statistics wherever they stand."""
    bare = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    names = {key: added + (_own_name(name) if naming == "public" else name) for key, name in bare.items()}
    if naming == "public" or added:
        names |= _statistics(bare, statistics)
        beside = {key: _bare(key) for key in keys if key not in bare}
        names |= {key: name for key, name in _statistics(beside, statistics).items() if name not in names.values()}
    return names


def _reading(
    branch: tuple[str, ...],
    flat: Mapping[str, Any],
    target: Mapping[str, Tensor],
    way: _Way,
    aside: set[str],
) -> _Reading:
    """What a way to read a state dict comes to, where the keys in `aside` are those of other whole networks in it."""
    names = {key: name for key, name in way.names.items() if name in target or key not in aside}
    sources = {name: key for key, name in names.items() if name in target}
    unexpected = [key for key, name in names.items() if sources.get(name) != key and not _DEAD_COPY.search(name)]
    beside = [key for key, value in flat.items() if isinstance(value, Tensor) and key not in names and key not in aside]
    unexpected += [key for key in beside if _STATISTIC.fullmatch(_bare(key))]
    # In nn.Sequential the other parts act on the images or the logits.
    if place := re.fullmatch(r"(.*\.)?\d+\.", way.prefix):
        sibling = re.compile(re.escape(place[1] or "") + r"\d+\.")
        unexpected += [key for key in beside if sibling.match(key)]
    missing = tuple(name for name in target if name not in sources)
    shapes = all(_in_shape(name, flat[key], target[name]).shape == target[name].shape for name, key in sources.items())
    return _Reading(
        branch=branch,
        flat=flat,
        prefix=way.prefix,
        added=way.added,
        naming=way.naming,
        sources=sources,
        missing=missing,
        unexpected=tuple(dict.fromkeys(unexpected)),
        fits=shapes and not unexpected and not _lacking(missing),
    )


def _lacking(missing: Iterable[str]) -> list[str]:
    """What of it a file must have: all but input statistics and counters of batches."""
    return [name for name in missing if not _STATISTIC.fullmatch(name) and not name.endswith("num_batches_tracked")]


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


@cache
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


def _check_keys(name: str, reading: _Reading) -> None:
    lost, unexpected = _lacking(reading.missing), reading.unexpected
    if not lost and unexpected and all(_STATISTIC.fullmatch(_bare(key)) for key in unexpected):
        raise ModelError(
            f"the weights bring input statistics ({_some(unexpected)}), and {name} has no place for them: "
            "put it behind a normalisation, such as robustfair.models.Normalised"
        )
    problems = [f"lack {_some(lost)}"] if lost else []
    problems += [f"hold the unknown {_some(unexpected)}"] if unexpected else []
    if problems:
        aside = ", or save the file without what is no part of the network" if unexpected else ""
        raise ModelError(
            f"the weights do not fit {name}: they {' and '.join(problems)}. "
            f"Build the architecture they were saved from{aside}"
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
            f"the weights have {outputs} outputs, the model has {len(target[bias])}, as many as the data has classes. "
            f"Choose data of {outputs} classes, or weights for {len(target[bias])}"
        )
    shapes = [f"{name} {tuple(entries[name].shape)} for {tuple(target[name].shape)}" for name in wrong]
    raise ModelError(
        f"the weights have other shapes than {type(model).__name__}: {_some(shapes)}. "
        "Build the model with the `width`, channels and classes they were saved with"
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
