"""Audit: attack a model, keep what it predicts for every image, and read every number off those predictions.

A robust hit requires a clean hit: an image that is misclassified as it is counts as lost under every attack, with its
clean prediction, and is not attacked. Each attack runs on all other images, so its column stands alone: adding an
attack to an audit never changes another's numbers. Every prediction is that of the model as given, a lower precision
only searches; where the logits are no finite numbers it is the class after the label, a wrong one. On disk an audit is
counts (JSON) and predictions (npz), never rates alone.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from robustfair import metrics
from robustfair.attacks.autoattack.named import Engine, StrongAttack
from robustfair.attacks.named import AnyAttack, NamedAttack, parse_attacks
from robustfair.config import Norm, require
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RobustFairError,
    RobustFairWarning,
    UnknownNameError,
)
from robustfair.evaluate.autoattack import require_reference
from robustfair.evaluate.columns import Progress, Sweeper, search_precisions
from robustfair.evaluate.diagnostics.inputs import suspect_model
from robustfair.evaluate.files import paths, points_path, read_pair
from robustfair.evaluate.journal import Journal, weights_fingerprint
from robustfair.execution.capacity import images_that_fit
from robustfair.execution.device import resolve_device, warn_of_slow_bf16
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import full_float32
from robustfair.files import as_json, read_tensors, write_arrays, write_json, write_tensors
from robustfair.grammar import parse_eps, parse_norm, read_path
from robustfair.models.head import check_outputs, head_norms, in_float32, prepared, unwrap
from robustfair.models.modes import attacking
from robustfair.registry import REPORTS
from robustfair.runs.folder import versions
from robustfair.values import Threat, default_eps, default_step

SCHEMA = "robustfair.audit/2"
DENSE_SCHEMA = "robustfair.audit/1"
"""Of audits whose confusion counts are a whole matrix, which are read as ever: 1,000 classes made 8 MB an attack."""
CLEAN, ROBUST = "clean", "robust"
BATCH_SIZE = 250
"""Images at a time by default: one number for all hardware, since a random start depends on its batch."""
CUDA_LANES = 1000
"""Images at a time by default for the AutoAttack family on a GPU, where nothing depends on it."""

SearchPrecision = Literal["auto", "fp32", "bf16"]
BROKEN_BY = ":broken_by"
"""What follows an attack's name in the npz."""
_ROUNDING = 1e-12


class WorstClass(NamedTuple):
    """The lowest accuracy of a class, and whose it is: what every report names and marks as worst.

    Attributes:
        class_index, class_name: the first class that has it.
        value: the accuracy.
        indices: all classes that have it; empty where all classes do, since then none is worse than another.
        name: the first class that has it, or "all classes".
        others: who shares it: "and 2 others", or "with images" where not all classes have any; else "".
    """

    class_index: int
    class_name: str
    value: float
    indices: tuple[int, ...]
    name: str
    others: str

    @classmethod
    def of(cls, rate: Tensor, names: Sequence[str], kind: str = "classes") -> WorstClass:
        """Read it off accuracies (C,), nan for a class without images; `kind` is what the names are names of.

        Two classes tie where the same share of their images is right, up to the rounding of a mean.

        Raises:
            ConfigError: no class has images.

        >>> WorstClass.of(torch.tensor([0.5, 0.25, 0.25]), ["cat", "dog", "ship"]).words
        'dog and 1 other'
        >>> WorstClass.of(torch.tensor([0.0, 0.0, math.nan]), ["cat", "dog", "ship"]).words
        'all classes with images'
        """
        first = metrics.worst_class(rate)
        tied = ((rate - rate[first]).abs() <= _ROUNDING).nonzero().flatten().tolist()
        present, more = int((~rate.isnan()).sum()), len(tied) - 1
        if more and len(tied) == present:
            return cls(
                first, names[first], float(rate[first]), (), f"all {kind}", "with images" * (present < len(rate))
            )
        others = f"and {more} other{'s' if more > 1 else ''}" if more else ""
        return cls(first, names[first], float(rate[first]), tuple(tied), names[first], others)

    @property
    def words(self) -> str:
        """Whose accuracy it is, in words."""
        return f"{self.name} {self.others}".strip()


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """What a model predicts for every image of a data set, clean and under each attack.

    Methods take the name of an attack of this audit, or "robust": right only where every attack, clean included, fails
    to break the image, and else the first wrong prediction in the order of the attacks. Rates are fractions, nan for a
    class without images; tensors are on the CPU.

    Attributes:
        model: what reports call the model.
        data: name of the data set.
        class_names: (C,).
        index: (N,) positions of the images in the audited data set.
        labels: (N,) true classes.
        predictions: attack -> (N,) predicted classes, "clean" first; wrong when clean is wrong under all.
        settings: attack -> its settings as JSON values, see `NamedAttack.settings`.
        threat: norm, radius and step that all attacks share.
        fingerprint: of the data set.
        split: part of the data set ("test").
        head_norms: (C,) row norms of the head; None if the model has no plain linear head.
        groups: (C,) super-class per class, or None.
        group_names: names of the super-classes, empty without groups.
        broken_by: strong attack -> (N,) number of the member that broke the image, -1 where none did.
        points: strong attack -> image -> (C, H, W) where the model gives the prediction; kept only if asked for.
        provenance: versions, seed, precision, device, seconds per attack, date, what was found on the model, as JSON
            values.

    Raises:
        DataError: arrays that do not fit each other or the classes.
    """

    model: str
    data: str
    class_names: tuple[str, ...]
    index: Tensor
    labels: Tensor
    predictions: Mapping[str, Tensor]
    settings: Mapping[str, Mapping[str, Any]]
    threat: Threat
    fingerprint: str = ""
    split: str = ""
    head_norms: list[float] | None = None
    groups: tuple[int, ...] | None = None
    group_names: tuple[str, ...] = ()
    broken_by: Mapping[str, Tensor] = field(default_factory=dict)
    points: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner = f"audit of {self.model}"
        if len(self.labels) == 0:
            raise DataError(f"{owner}: no images")
        if next(iter(self.predictions), None) != CLEAN:
            raise DataError(f"{owner}: the first predictions must be those on clean images, got {self.attacks}")
        for name, column in {"index": self.index, "labels": self.labels, **self.predictions}.items():
            if column.dtype != torch.int64 or column.shape != (len(self.labels),):
                got = f"{str(column.dtype).removeprefix('torch.')} {tuple(column.shape)}"
                raise DataError(f"{owner}: {name} must be int64 ({len(self.labels)},), got {got}")
            if name != "index" and not 0 <= int(column.min()) <= int(column.max()) < self.num_classes:
                raise DataError(f"{owner}: {name} holds a class outside 0 to {self.num_classes - 1}")
        for name, column in self.predictions.items():
            if bool(((column == self.labels) & (self.predictions[CLEAN] != self.labels)).any()):
                raise DataError(f"{owner}: {name} counts an image as right that is wrong when clean")

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks in order, "clean" first; without "robust"."""
        return tuple(self.predictions)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def complete(self) -> bool:
        """Whether every attack that was asked for ran to its end."""
        return not self.unfinished()

    def unfinished(self, attack: str = ROBUST) -> dict[str, float]:
        """The parts of an attack that a time budget cut short, and how far each came; of every attack for "robust".

        An accuracy that was measured so is an upper bound. `shortfall` puts it in words.
        """
        begun = self.provenance.get("begun", {})
        parts = {name: begun.get(name, 0.0) for name in self.provenance.get("not_run", ())}
        if attack != ROBUST:
            parts = {name: share for name, share in parts.items() if name == attack}
        for name in self.attacks if attack == ROBUST else (attack,):
            ran = self.settings.get(name, {}).get("ran", {})
            parts |= {part if part == name else f"{part} of {name}": share for part, share in ran.items() if share < 1}
        return parts

    def prediction(self, attack: str) -> Tensor:
        """(N,) predicted classes.

        Raises:
            UnknownNameError: the audit holds no such attack.
        """
        name = self._name(attack)
        return self._robust() if name == ROBUST else self.predictions[name]

    def hits(self, attack: str) -> Tensor:
        """(N,) bool, whether the prediction is right."""
        return self.prediction(attack) == self.labels

    def confusion(self, attack: str) -> Tensor:
        """(C, C) int64 counts, rows predicted, columns true."""
        return metrics.confusion_pred_true(self.prediction(attack), self.labels, self.num_classes, check=False)

    def correct(self, attack: str) -> Tensor:
        """(C,) int64 images of each class that are classified right."""
        return metrics.correct_per_class(self.hits(attack), self.labels, self.num_classes, check=False)

    def count(self) -> Tensor:
        """(C,) int64 images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def rate(self, attack: str) -> Tensor:
        """(C,) accuracy per class."""
        return metrics.class_accuracy(self.confusion(attack))

    def interval(self, attack: str, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Wilson interval of `rate`: lower and upper ends, (C,) each."""
        return metrics.wilson(self.correct(attack), self.count(), level)

    def average(self, attack: str) -> float:
        """Share of all images that are classified right."""
        return metrics.average(self.confusion(attack))

    def average_interval(self, attack: str, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of `average`."""
        lower, upper = metrics.wilson(int(self.hits(attack).sum()), len(self.labels), level)
        return float(lower), float(upper)

    def worst(self, attack: str) -> WorstClass:
        """The class of lowest accuracy among those with images, and who shares it."""
        return WorstClass.of(self.rate(attack), self.class_names)

    def worst_interval(self, attack: str, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the worst class accuracy, which as a minimum over classes is biased low.

        It is an interval for the minimum, whichever class that is; see `metrics.bootstrap_statistic`.
        """
        found = metrics.bootstrap_worst(self.hits(attack), self.labels, self.num_classes, level=level)
        return found.lower, found.upper

    def summary(self, attack: str) -> dict[str, Any]:
        """Every metric of one attack, as numbers and lists (C,).

        The scalars of `metrics.summarise`; `head_norm_ratio` and `head_norm_correlation` with the class accuracies, nan
        without head norms; `cfps`, `cfns`, `one_vs_rest_accuracy`, `natural_error` and `boundary_error` per class.
        """
        confusion, norms = self.confusion(attack), self.head_norms
        vectors = {
            "cfps": metrics.cfps(confusion),
            "cfns": metrics.cfns(confusion),
            "one_vs_rest_accuracy": metrics.one_vs_rest_accuracy(confusion),
            "natural_error": metrics.natural_error(self.confusion(CLEAN)),
            "boundary_error": metrics.boundary_error(self.confusion(CLEAN), self.correct(attack)),
        }
        return {
            **metrics.summarise(confusion),
            "head_norm_ratio": self.head_norm_ratio,
            "head_norm_correlation": (
                math.nan if norms is None else metrics.head_norm_correlation(torch.tensor(norms), self.rate(attack))
            ),
            **{name: vector.tolist() for name, vector in vectors.items()},
        }

    @property
    def head_norm_ratio(self) -> float:
        """Largest over smallest row norm of the head; nan if the norms are not known."""
        return math.nan if self.head_norms is None else metrics.head_norm_ratio(torch.tensor(self.head_norms))

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON values, without the predictions: nan is null.

        `confusion` holds what is not zero of the confusion matrix: `count` images of the class `true` are taken for the
        class `predicted`.
        """
        about = {
            "schema": SCHEMA,
            "model": self.model,
            "data": {
                "name": self.data,
                "split": self.split,
                "fingerprint": self.fingerprint,
                "images": len(self.labels),
            },
            "class_names": self.class_names,
            "groups": self.groups,
            "group_names": self.group_names,
            "count": self.count(),
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps, "step_size": self.threat.step_size},
            "head_norms": self.head_norms,
            "attacks": {
                name: {"settings": self.settings.get(name, {}), **self._numbers(name), **self._members(name)}
                for name in self.attacks
            },
            ROBUST: self._numbers(ROBUST),
            "provenance": self.provenance,
        }
        return as_json(about)

    def save(self, folder: Path | str, stem: str) -> tuple[Path, ...]:
        """Write `<stem>.json` and `<stem>.npz`, each whole or not at all; an earlier audit of that name is replaced.

        The npz holds `index`, `labels` and an array per attack (N,), no pickle. A slash in `stem` becomes a hyphen, so
        that a list of attacks may serve.

        Attacked images that were kept go to `<stem>.points.safetensors`: for each strong attack `<name>/image` (M,)
        and `<name>/pixels` (M, C, H, W).

        Returns:
            The paths, JSON first.
        """
        json_path, npz_path = paths(read_path(folder) / stem.replace("/", "-"))
        json_path.parent.mkdir(parents=True, exist_ok=True)
        broken_by = {f"{name}{BROKEN_BY}": column for name, column in self.broken_by.items()}
        write_arrays(npz_path, {"index": self.index, "labels": self.labels, **self.predictions, **broken_by})
        write_json(json_path, self.to_dict())
        return json_path, npz_path, *self._save_points(json_path)

    def to_html(self, path: Path | str, **options: Any) -> Path:
        """Write the report, one offline file; `options` are those of `robustfair.report.html.write_report`."""
        written: Path = REPORTS.get("html")(path, self, **options)
        return written

    def _save_points(self, beside: Path) -> tuple[Path, ...]:
        path = points_path(beside)
        if not self.points:
            path.unlink(missing_ok=True)
            return ()
        tensors = {}
        for name, points in self.points.items():
            tensors[f"{name}/image"] = torch.tensor(list(points), dtype=torch.int64)
            tensors[f"{name}/pixels"] = torch.stack(list(points.values())) if points else torch.empty(0)
        write_tensors(path, tensors)
        return (path,)

    def _name(self, attack: str) -> str:
        return find_attack(attack, (*self.attacks, ROBUST), "attack of this audit")

    def _robust(self) -> Tensor:
        prediction = self.labels
        for name in reversed(self.attacks):
            column = self.predictions[name]
            prediction = torch.where(column != self.labels, column, prediction)
        return prediction

    def fell_to(self, attack: str) -> dict[str, Tensor]:
        """Of a strong attack: member -> (C,) images of each class that it broke, each on what the ones before left.

        Raises:
            UnknownNameError: the audit holds no such attack.
        """
        name = self._name(attack)
        if name not in self.broken_by:
            return {}
        column = self.broken_by[name]
        return {
            member: torch.bincount(self.labels[column == number], minlength=self.num_classes)
            for number, member in enumerate(self.settings[name]["ran"])
        }

    def _members(self, attack: str) -> dict[str, Any]:
        return {"fell_to": self.fell_to(attack)} if attack in self.broken_by else {}

    def _confusion_counts(self, attack: str) -> dict[str, Tensor]:
        """The entries of the confusion matrix that are not zero, M in all, as three columns (M,)."""
        confusion = self.confusion(attack)
        predicted, true = confusion.nonzero(as_tuple=True)
        return {"predicted": predicted, "true": true, "count": confusion[predicted, true]}

    def _numbers(self, attack: str) -> dict[str, Any]:
        lower, upper = self.interval(attack)
        return {
            "confusion": self._confusion_counts(attack),
            "correct": self.correct(attack),
            "count": self.count(),
            "wilson": {"level": 0.95, "lower": lower, "upper": upper},
            "average_interval": self.average_interval(attack),
            "worst": self.worst(attack)._asdict(),
            "worst_interval": self.worst_interval(attack),
            "summary": self.summary(attack),
        }


def find_attack(name: str, known: Iterable[str], kind: str) -> str:
    """The entry of `known` that `name` spells, whatever its capitals, spaces, hyphens and underscores.

    Raises:
        UnknownNameError: there is none; `kind` says what was looked for.

    >>> find_attack("CW_50(restarts=5,keep=best)", ["clean", "cw-50(restarts=5, keep=best)"], "attack")
    'cw-50(restarts=5, keep=best)'
    """
    known = list(known)
    for entry in known:
        if _squeezed(entry) == _squeezed(name):
            return entry
    raise UnknownNameError(kind, name, known)


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def shortfall(parts: Mapping[str, float]) -> str:
    """What a time budget left undone, in words.

    >>> shortfall({"apgd-t of autoattack": 0.4, "square of autoattack": 0.0})
    'the time budget left apgd-t of autoattack at 40 %, square of autoattack at 0 %'
    """
    return f"the time budget left {', '.join(f'{part} at {100 * share:.0f} %' for part, share in parts.items())}"


def threat(norm: str = "linf", eps: float | str | None = None, step_size: float | str | None = None) -> Threat:
    """The threat of an audit; radius and step default as for training, see `values.default_eps` and `default_step`.

    >>> threat("Linf", "8/255").step_size == 2 / 255
    True

    Raises:
        ConfigError: an unknown norm, or a length that is none in pixel units (`8` for `8/255`).
    """
    kind: Norm = "linf" if parse_norm(norm) == "linf" else "l2"
    radius = default_eps(kind) if eps is None else parse_eps(eps, norm=kind)
    step = default_step(kind, radius) if step_size is None else parse_eps(step_size, norm=kind, field="step_size")
    return Threat(norm=kind, eps=radius, step_size=step)


def audit(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    attacks: str | Sequence[str] = (CLEAN, "pgd-20"),
    eps: float | str | None = None,
    norm: str = "linf",
    step_size: float | str | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    precision: SearchPrecision = "auto",
    engine: Engine = "native",
    max_minutes: float | None = None,
    journal: Path | str | None = None,
    keep_journal: bool = False,
    keep_points: bool = False,
    checks: bool = True,
    label: str = "",
    split: str = "test",
    on_progress: Progress | None = None,
) -> Audit:
    """Attack `model` on every image of `dataset` and keep what it predicts.

    The model is moved to `device`, runs in eval mode, and leaves with the modes and flags it came with. Random starts
    of pgd-K and cw-K are keyed by (seed, attack, restart, position of the batch): they depend on `batch_size` and on
    which images are right when clean, never on the other attacks. The AutoAttack family's are keyed by the image.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images; never those that a checkpoint was selected on.
        attacks: names, see `robustfair.attacks.named`; `clean` is always part of an audit and comes first.
        eps: radius in pixel units, also as "8/255"; None is 8/255 under linf and 128/255 under l2.
        norm: "linf" or "l2".
        step_size: of pgd-K and cw-K; None follows the radius, see `threat`.
        batch_size: images at a time; None is 250, and 1,000 for the AutoAttack family on a GPU. Fewer where so many
            would not fit, see `capacity`.
        device: where to run; "auto" is a GPU where there is one.
        seed: of the random starts.
        precision: in which attacks search, "fp32" or "bf16"; "auto" is fp32 for fgsm, pgd-K and cw-K, and for the
            AutoAttack family, but for FAB by itself, bf16 where the hardware has instructions for it. Predictions are
            the model's own always.
        engine: of the AutoAttack family: "native", or "reference" for pyautoattack.
        max_minutes: stop then, counted from the call; what ran is in the audit, and `settings[attack]["ran"]` says how
            much of it.
        journal: file that keeps what is known while the audit runs; where it exists the audit goes on from it.
        keep_journal: leave the journal of a finished audit, for a caller who has yet to save it.
        keep_points: keep where the model fails, per strong attack.
        checks: look first, on some clean images, whether the model is fed as it was trained and gives the same logits
            twice, see `normalisation.suspect_model`; what is found is among the `findings` on the audit.
        label: what reports call the model; its class name if empty.
        split: which part of the data this is, for the record.
        on_progress: called with (attack, images done, images in all) as work goes on; restarts count anew.

    Raises:
        UnknownNameError, ConfigError: attacks or radii that cannot be read, or that the engine cannot run; a device
            that is not there; another value that makes no sense.
        DataError: no images.
        ModelError: outputs that do not fit the classes, or are no numbers; gradients that an attack needs and that
            cannot be taken.
        CheckpointError: a journal of another audit.
    """
    began = time.monotonic()
    if not isinstance(dataset, ImageDataset):
        got = type(dataset).__name__
        raise ConfigError("audit", "dataset", allowed="an ImageDataset", got=got, hint="Of splits, pass data.test")
    suite = _suite(attacks)
    limits = threat(norm, eps, step_size)
    for field_name, value, kind in (("precision", precision, SearchPrecision), ("engine", engine, Engine)):
        allowed = get_args(kind)
        require(value in allowed, "audit", field_name, allowed=f"one of {', '.join(allowed)}", got=value)
    if max_minutes is not None:
        number = isinstance(max_minutes, Real) and not isinstance(max_minutes, bool)
        require(number, "audit", "max_minutes", allowed="a number", got=max_minutes)
        require(max_minutes > 0, "audit", "max_minutes", allowed="> 0", got=max_minutes)
    asked = BATCH_SIZE if batch_size is None else whole("audit", "batch_size", batch_size, least=1)
    seed = whole("audit", "seed", seed)
    device = torch.device(resolve_device(device))
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to audit on")
    data = dataset.to(device)
    example = next(evaluation_batches(data, 2)).x
    model = prepared(in_float32(model.to(device), example), example)
    check_outputs(model, data.num_classes, example)
    if engine == "reference":
        for attack in _strong(suite):
            require_reference(attack, data.num_classes)
    _warn_of_few_classes(suite, data.num_classes)
    lanes = CUDA_LANES if batch_size is None and device.type == "cuda" else asked
    gradient = any(attack.needs_gradient for attack in suite)
    fit = images_that_fit(model, example, gradient=gradient) if len(suite) > 1 else lanes
    size = min(asked, fit)
    suspected = suspect_model(model, dataset, device, batch_size=size) if checks else []
    precisions = search_precisions(precision if engine == "native" else "fp32", device)
    warn_of_slow_bf16("bf16" if "bf16" in precisions.values() else "fp32", device)
    sweeper = Sweeper(
        model=model,
        data=data,
        threat=limits,
        batch_size=size,
        lanes=min(lanes, fit),
        seed=seed,
        precisions=precisions,
        engine=engine,
        deadline=None if max_minutes is None else began + 60 * max_minutes,
        keep_points=keep_points,
        on_progress=on_progress,
    )
    settings = {attack.name: attack.settings(limits, data.num_classes) for attack in suite}
    identity = {
        "version": versions()["robustfair"],
        "images": [dataset.fingerprint, len(dataset)],
        "model": weights_fingerprint(unwrap(model)) if journal else None,
        "attacks": list(settings.items()),
        "seed": seed,
        "batch_size": asked,
        "precisions": sweeper.precisions,
        "engine": engine,
        "points": keep_points,
    }
    kept = None if journal is None else Journal(read_path(journal), identity)
    owning = nullcontext() if kept is None else kept.owned()
    with owning, kept_memory(device), full_float32(), attacking(model, "eval"):
        found = sweeper.run(suite, kept, keep_journal=keep_journal)
    ran = {name: {**settings[name], **found.about(name)} for name in found.predictions}
    result = Audit(
        model=label or type(unwrap(model)).__name__,
        data=dataset.name,
        class_names=dataset.class_names,
        index=torch.arange(len(dataset)),
        labels=dataset.labels.cpu(),
        predictions=found.predictions,
        settings=ran,
        threat=limits,
        fingerprint=dataset.fingerprint,
        split=split,
        head_norms=_head_norms(model, example),
        groups=dataset.groups,
        group_names=dataset.group_names,
        broken_by=found.broken_by,
        points=found.points,
        provenance={
            "versions": versions(),
            "seed": seed,
            "precision": precision,
            "search_precision": sweeper.precisions,
            "engine": engine,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "batch_size": sweeper.batch_size,
            "seconds": found.seconds,
            "not_run": found.not_run,
            "begun": found.begun,
            "input_gradients": found.gradients,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "checks": [asdict(finding) for finding in suspected],
        },
    )
    if not result.complete:
        again = " The same command goes on from what is finished." if journal else ""
        text = f"audit: {max_minutes:g} minutes are over: {shortfall(result.unfinished())}. Robust accuracies are "
        warnings.warn(f"{text}upper bounds.{again}", RobustFairWarning, stacklevel=2)
    return result


def whole(owner: str, field: str, value: int, *, least: int | None = None) -> int:
    """`value` as a plain int.

    Raises:
        ConfigError: it is no whole number, or below `least`.
    """
    allowed = "a whole number" if least is None else f"a whole number >= {least}"
    fits = isinstance(value, Integral) and not isinstance(value, bool) and (least is None or value >= least)
    require(fits, owner, field, allowed=allowed, got=value)
    return int(value)


def load_audit(path: Path | str) -> Audit:
    """Read back what `Audit.save` wrote, from the path of either file or of both without suffix.

    Raises:
        CheckpointError: a file is missing, cut or foreign, or the counts of the two disagree.
    """
    json_path, npz_path = paths(read_path(path))
    about, columns = read_pair(json_path, npz_path, SCHEMA, DENSE_SCHEMA)
    try:
        found = Audit(
            model=about["model"],
            data=about["data"]["name"],
            class_names=tuple(about["class_names"]),
            index=columns["index"],
            labels=columns["labels"],
            predictions={name: columns[name] for name in about["attacks"]},
            settings={name: entry["settings"] for name, entry in about["attacks"].items()},
            threat=Threat(**about["threat"]),
            fingerprint=about["data"]["fingerprint"],
            split=about["data"]["split"],
            head_norms=about["head_norms"],
            groups=None if about["groups"] is None else tuple(about["groups"]),
            group_names=tuple(about.get("group_names", ())),
            broken_by={
                name: columns[f"{name}{BROKEN_BY}"] for name in about["attacks"] if f"{name}{BROKEN_BY}" in columns
            },
            points=_read_points(points_path(json_path)),
            provenance=about["provenance"],
        )
        stored = {**about["attacks"], ROBUST: about[ROBUST]}
        differing = [name for name, entry in stored.items() if not _agrees(found, name, entry)]
    except KeyError as error:
        raise CheckpointError(f"{json_path} or {npz_path.name} lacks {error}: the audit is damaged") from None
    except (AttributeError, TypeError, RobustFairError) as error:
        raise CheckpointError(f"{json_path} does not describe an audit ({error})") from None
    if differing:
        raise CheckpointError(
            f"{json_path} and {npz_path.name} disagree on {', '.join(differing)}: run the audit again"
        )
    return found


def _read_points(path: Path) -> dict[str, dict[int, Tensor]]:
    """The attacked images that `Audit.save` wrote; none where none were kept."""
    tensors = read_tensors(path) if path.exists() else {}
    try:
        return {
            name: dict(zip(tensors[f"{name}/image"].tolist(), tensors[f"{name}/pixels"], strict=True))
            for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        }
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} does not hold the attacked images of an audit: delete it") from None


def _suite(attacks: str | Sequence[str]) -> tuple[AnyAttack, ...]:
    """The attacks to run, with clean first whether it was named or not."""
    parsed = parse_attacks(attacks)
    clean = NamedAttack(kind="clean", steps=0)
    return clean, *(attack for attack in parsed if attack != clean)


def _strong(suite: Sequence[AnyAttack]) -> list[StrongAttack]:
    return [attack for attack in suite if isinstance(attack, StrongAttack)]


def _warn_of_few_classes(suite: Sequence[AnyAttack], classes: int) -> None:
    members = [member for attack in _strong(suite) for member in attack.members]
    for text in dict.fromkeys(member.warning(classes) for member in members):
        if text:
            warnings.warn(text, RobustFairWarning, stacklevel=3)


def _head_norms(model: nn.Module, example: Tensor) -> list[float] | None:
    try:
        return head_norms(model, example).tolist()
    except ModelError:
        return None


def _agrees(audit: Audit, attack: str, entry: Mapping[str, Any]) -> bool:
    counted: dict[str, Any] = {"correct": audit.correct(attack), "count": audit.count()}
    if "confusion_pred_true" in entry:  # of DENSE_SCHEMA
        counted["confusion_pred_true"] = audit.confusion(attack)
    else:
        counted["confusion"] = audit._confusion_counts(attack)
    return all(entry[key] == as_json(value) for key, value in counted.items())
