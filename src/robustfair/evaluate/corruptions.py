"""Audit under common corruptions: what a model predicts for every image, clean and under each corruption and severity.

All numbers are read off those predictions. Where several cells of corruption and severity are taken together, accuracy
is the mean of theirs, class by class, as the corruption benchmark averages; the worst class is the lowest of the means.
Images are corrupted on the fly, or come from a downloaded set in the benchmark's layout (CIFAR-10-C).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robustfair import metrics
from robustfair.attacks.predict import predict
from robustfair.config import require
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.data.corruptions.frost import frost_source
from robustfair.data.corruptions.generate import parameter_scale, parse_corruption
from robustfair.data.corruptions.names import ALL, CORRUPTIONS, SETS, SEVERITIES
from robustfair.errors import CheckpointError, ConfigError, DataError, RobustFairError, UnknownNameError
from robustfair.evaluate.corruption_images import Generated, Images, open_published
from robustfair.evaluate.files import paths, read_pair
from robustfair.evaluate.plan import BATCH_SIZE, whole
from robustfair.evaluate.rates import ClassRates
from robustfair.evaluate.result import CLEAN
from robustfair.evaluate.runner import Progress
from robustfair.execution.device import resolve_device, warn_of_slow_bf16
from robustfair.execution.memory import kept_memory
from robustfair.execution.precision import InPrecision, Precision
from robustfair.files import as_json, write_arrays, write_json
from robustfair.grammar import canonical_key, read_path
from robustfair.models.head import check_outputs, in_float32, prepared, require_finite, unwrap
from robustfair.models.modes import attacking
from robustfair.runs.folder import versions

SCHEMA = "robustfair.corruptions/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class CorruptionAudit(ClassRates):
    """What a model predicts for every image of a data set, clean and under each corruption and severity.

    Most methods take `what`, and a `severity` or None for the mean over all. `what` is a corruption of this audit,
    "clean", or a set of which the audit holds every corruption, see `sets`: the mean over its corruptions. Rates are
    fractions, nan for a class without images; tensors are on the CPU.

    Attributes:
        model: what reports call the model.
        data: name of the data set.
        class_names: (C,).
        index: (N,) positions of the images in the audited data set.
        labels: (N,) true classes.
        severities: those audited, ascending.
        clean: (N,) predicted classes of the images as they are.
        predictions: corruption -> (severities, N) predicted classes.
        fingerprint: of the data set.
        split: part of the data set ("test").
        groups: (C,) super-class per class, or None.
        provenance: versions, seed, precision, device, seconds per corruption, source of the images and of the frost,
            date, as JSON values.

    Raises:
        DataError: arrays that do not fit each other or the classes.
    """

    model: str
    data: str
    class_names: tuple[str, ...]
    index: Tensor
    labels: Tensor
    severities: tuple[int, ...]
    clean: Tensor
    predictions: Mapping[str, Tensor]
    fingerprint: str = ""
    split: str = ""
    groups: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner, images = f"corruption audit of {self.model}", (len(self.labels),)
        if len(self.labels) == 0 or not self.predictions:
            raise DataError(f"{owner}: no images, or no corruption")
        for name, column in {
            "index": self.index,
            "labels": self.labels,
            CLEAN: self.clean,
            **self.predictions,
        }.items():
            shape = (len(self.severities), *images) if name in self.predictions else images
            if column.dtype != torch.int64 or column.shape != shape:
                got = f"{str(column.dtype).removeprefix('torch.')} {tuple(column.shape)}"
                raise DataError(f"{owner}: {name} must be int64 {shape}, got {got}")
            if name != "index" and not 0 <= int(column.min()) <= int(column.max()) < self.num_classes:
                raise DataError(f"{owner}: {name} holds a class outside 0 to {self.num_classes - 1}")

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions in order."""
        return tuple(self.predictions)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets whose corruptions are all here, see `SETS`."""
        return tuple(name for name, members in SETS.items() if name == ALL or set(members) <= set(self.corruptions))

    def prediction(self, corruption: str, severity: int) -> Tensor:
        """(N,) predicted classes.

        Raises:
            UnknownNameError: the audit holds no such corruption.
            ConfigError: the audit holds no such severity.
        """
        name = canonical_key(corruption)
        if name not in self.predictions:
            raise UnknownNameError("corruption of this audit", corruption, self.corruptions)
        allowed = f"one of {', '.join(map(str, self.severities))}"
        require(severity in self.severities, "corruption audit", "severity", allowed=allowed, got=severity)
        return self.predictions[name][self.severities.index(severity)]

    def confusion(self, corruption: str, severity: int) -> Tensor:
        """(C, C) int64 counts, rows predicted, columns true."""
        predicted = self.prediction(corruption, severity)
        return metrics.confusion_pred_true(predicted, self.labels, self.num_classes, check=False)

    def hits(self, what: str, severity: int | None = None) -> Tensor:
        """(N,) float64, of how many of the cells each image is classified right; 0 or 1 for one cell.

        Raises:
            UnknownNameError: `what` names nothing in this audit.
            ConfigError: the audit holds no such severity.
        """
        cells = self._cells(what, severity)
        return torch.stack([(cell == self.labels).double() for cell in cells]).mean(0)

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON values, without the predictions: nan is null.

        `correct` counts images per class (C,), over several cells in the mean.
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
            "count": self.count(),
            "severities": self.severities,
            CLEAN: self._numbers(CLEAN),
            "corruptions": {
                name: {
                    "mean": self._numbers(name),
                    "severity": {str(severity): self._numbers(name, severity) for severity in self.severities},
                }
                for name in self.corruptions
            },
            "sets": {name: self._numbers(name) for name in self.sets},
            "provenance": self.provenance,
        }
        return as_json(about)

    def save(self, folder: Path | str, stem: str) -> tuple[Path, Path]:
        """Write `<stem>.json` and `<stem>.npz`, each whole or not at all; an earlier audit of that name is replaced.

        The npz holds `index`, `labels`, `clean` (N,) and an array per corruption (severities, N), no pickle. A slash in
        `stem` becomes a hyphen.

        Returns:
            The two paths, JSON first.
        """
        json_path, npz_path = paths(read_path(folder) / stem.replace("/", "-"))
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(npz_path, {"index": self.index, "labels": self.labels, CLEAN: self.clean, **self.predictions})
        write_json(json_path, self.to_dict())
        return json_path, npz_path

    def _cells(self, what: str, severity: int | None) -> list[Tensor]:
        name = canonical_key(what)
        if name == CLEAN:
            return [self.clean]
        if name in self.predictions:
            members: tuple[str, ...] = (name,)
        elif name in self.sets:
            members = self.corruptions if name == ALL else SETS[name]
        else:
            known = (CLEAN, *self.corruptions, *self.sets)
            raise UnknownNameError("corruption or set of this audit", what, known)
        chosen = self.severities if severity is None else (severity,)
        return [self.prediction(member, each) for member in members for each in chosen]

    def _numbers(self, what: str, severity: int | None = None) -> dict[str, Any]:
        lower, upper = self.interval(what, severity)
        return {
            "correct": self.correct(what, severity),
            "wilson": {"level": 0.95, "lower": lower, "upper": upper},
            "average": self.average(what, severity),
            "average_interval": self.average_interval(what, severity),
            "worst": self.worst(what, severity)._asdict(),
            "worst_interval": self.worst_interval(what, severity),
        }


def audit_corruptions(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    corruptions: str | Sequence[str] = ALL,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    scale: str = "auto",
    frost: Path | str | None = None,
    published: Path | str | None = None,
    precision: Precision = "fp32",
    label: str = "",
    split: str = "test",
    on_progress: Progress | None = None,
) -> CorruptionAudit:
    """Keep what `model` predicts for every image of `dataset`, clean and under each corruption and severity.

    The model is moved to `device`, runs in eval mode, and leaves with the modes and flags it came with. How an image is
    corrupted depends on (seed, corruption, severity, its position in the data set) alone.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images; never those that a checkpoint was selected on.
        corruptions: names as a list or with commas between them, or one of `SETS`: "all", "standard" (the 15 of the
            benchmark), "fair_tat" (18), "extra" (4).
        severities: 1 to 5.
        batch_size: images at a time; None is 250.
        seed: of the corruptions.
        scale: which parameters, see `robustfair.data.corruptions.parameter_scale`.
        frost: folder of photographs of frost; None synthesises ice crystals.
        published: folder of `<corruption>.npy` and `labels.npy` in the benchmark's layout, taken in place of images
            corrupted here; it must be of the same images in the same order.
        precision: of the forward passes, "fp32" or "bf16".
        label: what reports call the model; its class name if empty.
        split: which part of the data this is, for the record.
        on_progress: called with ("clean" or corruption, images done, images in all severities) after every batch.

    Raises:
        UnknownNameError: no such corruption; shows the nearest names.
        ConfigError: severities, a scale or images that do not fit.
        DataError: no images; a folder that is missing, damaged, or of other images.
        ModelError: outputs that do not fit the classes.
    """
    if not isinstance(dataset, ImageDataset):
        got = type(dataset).__name__
        raise ConfigError("corruption audit", "dataset", allowed="an ImageDataset", got=got, hint="Pass data.test")
    chosen, levels = parse_corruptions(corruptions), _severities(severities)
    allowed = " or ".join(get_args(Precision))
    require(precision in get_args(Precision), "corruption audit", "precision", allowed=allowed, got=precision)
    size = BATCH_SIZE if batch_size is None else whole("corruption audit", "batch_size", batch_size, least=1)
    seed = whole("corruption audit", "seed", seed)
    ice = frost_source(frost)
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to audit on")
    device = torch.device(resolve_device(device))
    warn_of_slow_bf16(precision, device)
    data = dataset.to(device)
    height, width = data.images.shape[2:]
    source = {"images": "corrupted here", "scale": parameter_scale(height, width, scale)}
    images: Images = Generated(data=data, seed=seed, scale=scale, frost=frost)
    if published is not None:
        images = open_published(published, chosen, data)
        source = {"images": str(published)}
    elif "frost" in chosen:
        source["frost"] = ice
    images(chosen[0], levels[0], slice(0, 1))  # images that cannot be corrupted are refused before the model runs
    example = next(evaluation_batches(data, 2)).x
    model = prepared(in_float32(model.to(device), example), example)
    check_outputs(model, data.num_classes, example)
    runner = _Runner(
        model=InPrecision(model, precision, device.type),
        data=data,
        batch_size=size,
        on_progress=on_progress,
    )
    with kept_memory(device), attacking(model, "eval"):
        clean = runner.clean()
        predictions, seconds = runner.all(images, chosen, levels)
    return CorruptionAudit(
        model=label or type(unwrap(model)).__name__,
        data=dataset.name,
        class_names=dataset.class_names,
        index=torch.arange(len(dataset)),
        labels=dataset.labels.cpu(),
        severities=levels,
        clean=clean,
        predictions=predictions,
        fingerprint=dataset.fingerprint,
        split=split,
        groups=dataset.groups,
        provenance={
            "versions": versions(),
            "seed": seed,
            "precision": precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "batch_size": size,
            "source": source,
            "seconds": seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def parse_corruptions(names: str | Sequence[str]) -> tuple[str, ...]:
    """Corruptions from a set of `SETS`, from names with commas between them, or from a list; each once.

    >>> parse_corruptions("fog, Gaussian-Noise"), len(parse_corruptions("fair-tat"))
    (('fog', 'gaussian_noise'), 18)

    Raises:
        UnknownNameError: no such corruption or set; shows the nearest names.
        ConfigError: no name at all.
    """
    listed = [name for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)
    require(bool(listed), "corruption audit", "corruptions", allowed="at least one name", got=names)
    found: list[str] = []
    for name in listed:
        key = canonical_key(name.strip())
        if key not in SETS and key not in CORRUPTIONS:
            raise UnknownNameError("corruption", name.strip(), (*CORRUPTIONS, *SETS))
        found += SETS.get(key) or [parse_corruption(name)]
    return tuple(dict.fromkeys(found))


def load_corruption_audit(path: Path | str) -> CorruptionAudit:
    """Read back what `CorruptionAudit.save` wrote, from the path of either file or of both without suffix.

    Raises:
        CheckpointError: a file is missing, cut or foreign, or the counts of the two disagree.
    """
    json_path, npz_path = paths(read_path(path))
    about, columns = read_pair(json_path, npz_path, SCHEMA)
    try:
        found = CorruptionAudit(
            model=about["model"],
            data=about["data"]["name"],
            class_names=tuple(about["class_names"]),
            index=columns["index"],
            labels=columns["labels"],
            severities=tuple(about["severities"]),
            clean=columns[CLEAN],
            predictions={name: columns[name] for name in about["corruptions"]},
            fingerprint=about["data"]["fingerprint"],
            split=about["data"]["split"],
            groups=None if about["groups"] is None else tuple(about["groups"]),
            provenance=about["provenance"],
        )
        differing = [where for where, stored, counted in _counts(found, about) if stored != counted.tolist()]
    except KeyError as error:
        raise CheckpointError(f"{json_path} or {npz_path.name} lacks {error}: the audit is damaged") from None
    except (AttributeError, TypeError, RobustFairError) as error:
        raise CheckpointError(f"{json_path} does not describe a corruption audit ({error})") from None
    if differing:
        raise CheckpointError(
            f"{json_path} and {npz_path.name} disagree on {', '.join(differing)}: run the audit again"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Runs a model over a data set that is resident on the device."""

    model: nn.Module
    data: ImageDataset
    batch_size: int
    on_progress: Progress | None

    def clean(self) -> Tensor:
        """(N,) predictions of the images as they are, on the CPU."""
        return self._predict(lambda rows: self.data.images[rows], CLEAN, done=0, total=len(self.data))

    def all(
        self, images: Images, corruptions: Sequence[str], severities: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Predictions (severities, N) on the CPU, and seconds, per corruption."""
        predictions, seconds, n = {}, {}, len(self.data)
        for name in corruptions:
            began = time.perf_counter()
            columns = [
                self._predict(partial(images, name, severity), name, done=position * n, total=len(severities) * n)
                for position, severity in enumerate(severities)
            ]
            predictions[name] = torch.stack(columns)
            seconds[name] = round(time.perf_counter() - began, 3)
        return predictions, seconds

    def _predict(self, images: Callable[[slice], Tensor], name: str, *, done: int, total: int) -> Tensor:
        columns: list[Tensor] = []
        for start in range(0, len(self.data), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.data)))
            part = replace(self.data, images=images(rows), labels=self.data.labels[rows])
            for batch in evaluation_batches(part, self.batch_size):
                if name == CLEAN and start == 0:
                    with torch.no_grad():
                        require_finite(self.model, self.model(batch.x))
                columns.append(predict(self.model, batch))
            if self.on_progress:
                self.on_progress(name, done + rows.stop, total)
        return torch.cat(columns).cpu()


def _severities(severities: Sequence[int]) -> tuple[int, ...]:
    given = list(severities) if isinstance(severities, Iterable) else []
    fits = bool(given) and all(type(severity) is int and severity in SEVERITIES for severity in given)
    allowed, hint = "whole numbers from 1 to 5", "Write them as (1, 3), one alone as (3,)"
    require(fits, "corruption audit", "severities", allowed=allowed, got=severities, hint=hint)
    return tuple(sorted(set(given)))


def _counts(audit: CorruptionAudit, about: Mapping[str, Any]) -> list[tuple[str, list[float], Tensor]]:
    """(where, hits per class as stored, as counted) of every cell."""
    cells = [(CLEAN, about[CLEAN]["correct"], audit.correct(CLEAN))]
    for name, entry in about["corruptions"].items():
        for severity in audit.severities:
            stored = entry["severity"][str(severity)]["correct"]
            cells.append((f"{name} {severity}", stored, audit.correct(name, severity)))
    return cells
