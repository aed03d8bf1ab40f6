"""Audit: attack a model, keep what it predicts for every image, and read every number off those predictions.

A robust hit requires a clean hit: an image that is misclassified as it is counts as lost under every attack, with its
clean prediction, and is not attacked. Each attack runs on all other images, so its column stands alone: adding an
attack to an audit never changes another's numbers. On disk an audit is counts (JSON) and predictions (npz), never rates
alone.
"""

from __future__ import annotations

import io
import math
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from robustfair import metrics
from robustfair.attacks.named import NamedAttack, parse_attacks
from robustfair.attacks.pgd import attacking, input_gradient
from robustfair.attacks.sweep import predict
from robustfair.checkpoint import read_json, write_json
from robustfair.config import Norm, parse_eps, parse_norm, require
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import CheckpointError, ConfigError, DataError, ModelError, RobustFairError, UnknownNameError
from robustfair.losses import cross_entropy
from robustfair.memory import kept_memory
from robustfair.models.head import check_outputs, head_norms, unwrap
from robustfair.registry import canonical
from robustfair.rundir import versions
from robustfair.training.precision import InPrecision, Precision
from robustfair.values import Model, Threat, default_eps, default_step, derive_seed

SCHEMA = "robustfair.audit/1"
CLEAN, ROBUST = "clean", "robust"
BATCH_SIZE = 250
"""Images at a time by default: one number for all hardware, since a random start depends on its batch."""

Progress = Callable[[str, int, int], None]


class WorstClass(NamedTuple):
    """The class of lowest accuracy, the lowest index on ties."""

    class_index: int
    class_name: str
    value: float


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
        provenance: versions, seed, precision, device, seconds per attack, date, as JSON values.

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

    def prediction(self, attack: str) -> Tensor:
        """(N,) predicted classes.

        Raises:
            UnknownNameError: the audit holds no such attack.
        """
        for name in (attack, canonical(attack)):
            if name in self.predictions:
                return self.predictions[name]
            if name == ROBUST:
                return self._robust()
        raise UnknownNameError("attack of this audit", attack, (*self.attacks, ROBUST))

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
        """The class of lowest accuracy among those with images."""
        rate = self.rate(attack)
        index = metrics.worst_class(rate)
        return WorstClass(index, self.class_names[index], float(rate[index]))

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
        """The audit as JSON values, without the predictions: nan is null."""
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
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps, "step_size": self.threat.step_size},
            "head_norms": self.head_norms,
            "attacks": {
                name: {"settings": self.settings.get(name, {}), **self._numbers(name)} for name in self.attacks
            },
            ROBUST: self._numbers(ROBUST),
            "provenance": self.provenance,
        }
        return _as_json(about)

    def save(self, folder: Path | str, stem: str) -> tuple[Path, Path]:
        """Write `<stem>.json` and `<stem>.npz`, each whole or not at all; an earlier audit of that name is replaced.

        The npz holds `index`, `labels` and an array per attack (N,), no pickle. A slash in `stem` becomes a hyphen, so
        that a list of attacks may serve.

        Returns:
            The two paths, JSON first.
        """
        json_path, npz_path = _paths(Path(folder) / stem.replace("/", "-"))
        json_path.parent.mkdir(parents=True, exist_ok=True)
        _write_arrays(npz_path, {"index": self.index, "labels": self.labels, **self.predictions})
        write_json(json_path, self.to_dict())
        return json_path, npz_path

    def to_html(self, path: Path | str, **options: Any) -> Path:
        """Write the report, one offline file; `options` are those of `robustfair.report.html.write_report`."""
        from robustfair.report.html import write_report

        return write_report(path, self, **options)

    def _robust(self) -> Tensor:
        prediction = self.labels
        for name in reversed(self.attacks):
            column = self.predictions[name]
            prediction = torch.where(column != self.labels, column, prediction)
        return prediction

    def _numbers(self, attack: str) -> dict[str, Any]:
        lower, upper = self.interval(attack)
        return {
            "confusion_pred_true": self.confusion(attack),
            "correct": self.correct(attack),
            "count": self.count(),
            "wilson": {"level": 0.95, "lower": lower, "upper": upper},
            "average_interval": self.average_interval(attack),
            "worst_interval": self.worst_interval(attack),
            "summary": self.summary(attack),
        }


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
    precision: Precision = "fp32",
    label: str = "",
    split: str = "test",
    on_progress: Progress | None = None,
) -> Audit:
    """Attack `model` on every image of `dataset` and keep what it predicts.

    The model is moved to `device`, runs in eval mode, and leaves with the modes and flags it came with. Random starts
    are keyed by (seed, attack, restart, position of the batch): they depend on `batch_size` and on which images are
    right when clean, never on the other attacks.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images; never those that a checkpoint was selected on.
        attacks: names, see `robustfair.attacks.named`; `clean` is always part of an audit and comes first.
        eps: radius in pixel units, also as "8/255"; None is 8/255 under linf and 128/255 under l2.
        norm: "linf" or "l2".
        step_size: of pgd-K and cw-K; None follows the radius, see `threat`.
        batch_size: images at a time; None is 250.
        seed: of the random starts.
        precision: of the forward and backward passes, "fp32" or "bf16".
        label: what reports call the model; its class name if empty.
        split: which part of the data this is, for the record.
        on_progress: called with (attack, images done, images in all) after every batch; restarts count anew.

    Raises:
        UnknownNameError, ConfigError: attacks or radii that cannot be read.
        DataError: no images.
        ModelError: outputs that do not fit the classes.
    """
    if not isinstance(dataset, ImageDataset):
        got = type(dataset).__name__
        raise ConfigError("audit", "dataset", allowed="an ImageDataset", got=got, hint="Of splits, pass data.test")
    suite = _suite(attacks)
    limits = threat(norm, eps, step_size)
    allowed = get_args(Precision)
    require(precision in allowed, "audit", "precision", allowed=" or ".join(allowed), got=precision)
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to audit on")
    device = torch.device(device)
    data = dataset.to(device)
    model.to(device)
    example = next(evaluation_batches(data, 2)).x
    check_outputs(model, data.num_classes, example)
    sweeper = _Sweeper(
        model=InPrecision(model, precision, device.type),
        threat=limits,
        batch_size=BATCH_SIZE if batch_size is None else batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    with kept_memory(device), attacking(model, "eval"):
        predictions, seconds, gradients = sweeper.all(data, suite)
    return Audit(
        model=label or type(unwrap(model)).__name__,
        data=dataset.name,
        class_names=dataset.class_names,
        index=torch.arange(len(dataset)),
        labels=dataset.labels.cpu(),
        predictions=predictions,
        settings={attack.name: attack.settings(limits) for attack in suite},
        threat=limits,
        fingerprint=dataset.fingerprint,
        split=split,
        head_norms=_head_norms(model, example),
        groups=dataset.groups,
        provenance={
            "versions": versions(),
            "seed": seed,
            "precision": precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "batch_size": sweeper.batch_size,
            "seconds": seconds,
            "input_gradients": gradients,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def load_audit(path: Path | str) -> Audit:
    """Read back what `Audit.save` wrote, from the path of either file or of both without suffix.

    Raises:
        CheckpointError: a file is missing, cut or foreign, or the counts of the two disagree.
    """
    json_path, npz_path = _paths(Path(path))
    for missing in (file for file in (json_path, npz_path) if not file.is_file()):
        raise CheckpointError(f"{missing} does not exist: an audit is a .json file and the .npz file beside it")
    about = read_json(json_path, SCHEMA)
    columns = _read_arrays(npz_path)
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


@dataclass(frozen=True, kw_only=True)
class _Sweeper:
    """Runs attacks on a data set that is resident on the device."""

    model: Model
    threat: Threat
    batch_size: int
    seed: int
    on_progress: Progress | None

    def all(
        self, data: ImageDataset, suite: Sequence[NamedAttack]
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, int] | None]:
        """Predictions (N,) on the CPU and seconds, per attack, and `_gradients`; `suite` begins with clean."""
        predictions: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        gradients = None
        survivors, rows = data, torch.arange(len(data))
        for attack in suite:
            began = time.perf_counter()
            column = self._restarts(survivors, attack).cpu()
            seconds[attack.name] = round(time.perf_counter() - began, 3)
            if attack.needs_gradient:
                column = predictions[CLEAN].clone().index_copy_(0, rows, column)
            else:
                rows = (column == data.labels.cpu()).nonzero().squeeze(1)
                survivors = data.subset(rows.to(data.device))
                gradients = self._gradients(survivors) if len(suite) > 1 else None
            predictions[attack.name] = column
        return predictions, seconds, gradients

    def _gradients(self, data: ImageDataset) -> dict[str, int]:
        """How many images give the cross-entropy a gradient that no attack can follow: all zero, or not finite."""
        found = {"images": len(data), "zero": 0, "not_finite": 0}
        for batch in evaluation_batches(data, self.batch_size):
            x = batch.x.detach().requires_grad_(True)
            with torch.enable_grad():
                gradient = input_gradient(cross_entropy(self.model(x), batch.y), x).flatten(1)
            found["zero"] += int((gradient == 0).all(1).sum())
            found["not_finite"] += int((~gradient.isfinite()).any(1).sum())
        return found

    def _restarts(self, data: ImageDataset, attack: NamedAttack) -> Tensor:
        """Predictions (N,) under `attack`. Where fooled images stay so, a restart takes only those that are left."""
        if not attack.freeze or attack.restarts == 1:
            return self._predict(data, attack, attack.name, done=0, total=len(data))
        column, rows = data.labels.clone(), torch.arange(len(data), device=data.device)
        for restart in range(attack.restarts):
            done, total = (restart + 1) * len(data) - len(rows), attack.restarts * len(data)
            once = replace(attack, restarts=1)
            column[rows] = self._predict(data.subset(rows), once, attack.name, restart, done=done, total=total)
            rows = (column == data.labels).nonzero().squeeze(1)
        return column

    def _predict(self, data: ImageDataset, attack: NamedAttack, name: str, *keys: int, done: int, total: int) -> Tensor:
        columns = [data.labels[:0]]
        for position, batch in enumerate(evaluation_batches(data, self.batch_size)):
            batch = replace(batch, seed=derive_seed("audit", self.seed, name, *keys, position))
            on = (lambda batch: attack.on(batch, self.threat)) if attack.needs_gradient else None
            columns.append(predict(self.model, batch, on))
            done += len(batch.y)
            if self.on_progress:
                self.on_progress(name, done, total)
        return torch.cat(columns)


def _suite(attacks: str | Sequence[str]) -> tuple[NamedAttack, ...]:
    """The attacks to run, with clean first whether it was named or not."""
    parsed = parse_attacks(attacks)
    clean = NamedAttack(kind="clean", steps=0)
    return clean, *(attack for attack in parsed if attack != clean)


def _head_norms(model: nn.Module, example: Tensor) -> list[float] | None:
    try:
        return head_norms(model, example).tolist()
    except ModelError:
        return None


def _agrees(audit: Audit, attack: str, entry: Mapping[str, Any]) -> bool:
    counted = {
        "confusion_pred_true": audit.confusion(attack),
        "correct": audit.correct(attack),
        "count": audit.count(),
    }
    return all(entry[key] == value.tolist() for key, value in counted.items())


def _paths(path: Path) -> tuple[Path, Path]:
    """The JSON and npz files of one audit. The stem may hold dots, so only our own suffixes are cut off."""
    stem = path.name.removesuffix(".json").removesuffix(".npz")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.npz")


def _write_arrays(path: Path, columns: Mapping[str, Tensor]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **{name: column.numpy() for name, column in columns.items()})  # type: ignore[arg-type]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): the file is cut or damaged") from None


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
