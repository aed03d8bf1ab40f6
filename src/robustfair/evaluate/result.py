"""The result of an audit: what a model predicts for every image, and every number read off those predictions.

On disk an audit is counts (JSON) and predictions (npz), never rates alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustfair import metrics
from robustfair.errors import CheckpointError, DataError, RobustFairError, UnknownNameError
from robustfair.evaluate.files import paths, points_path, read_pair
from robustfair.evaluate.rates import ClassRates
from robustfair.files import as_json, read_tensors, write_arrays, write_json, write_tensors
from robustfair.grammar import read_path
from robustfair.registry import REPORTS
from robustfair.values import Threat

SCHEMA = "robustfair.audit/2"
DENSE_SCHEMA = "robustfair.audit/1"
"""Of audits whose confusion counts are a whole matrix, which are read as ever: 1,000 classes made 8 MB an attack."""
CLEAN, ROBUST = "clean", "robust"
BROKEN_BY = ":broken_by"
"""What follows an attack's name in the npz."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit(ClassRates):
    """What a model predicts for every image of a data set, clean and under each attack.

    Methods take the name of an attack of this audit, or "robust": right only where every attack, clean included, fails
    to break the image, and else the first wrong prediction in the order of the attacks. Rates are fractions, nan for a
    class without images; tensors are on the CPU.

    Of a sample in which the classes have other shares than in the data set, the average weighs every class by its share
    there, so that it is an estimate of the whole's; so is what else depends on the shares.

    Attributes:
        model: what reports call the model.
        data: name of the data set.
        class_names: (C,).
        index: (N,) positions of the images in the audited data set; of a sample in what it was drawn from.
        labels: (N,) true classes.
        predictions: attack -> (N,) predicted classes, "clean" first; wrong when clean is wrong under all.
        settings: attack -> its settings as JSON values, see `NamedAttack.settings`.
        threat: norm, radius and step that all attacks share.
        fingerprint: of the data set.
        split: part of the data set ("test").
        head_norms: (C,) row norms of the head; None if the model has no plain linear head.
        groups: (C,) super-class per class, or None.
        group_names: names of the super-classes, empty without groups.
        drawn_from: (C,) of a sample that was drawn class by class, the images of each class in the data set; else None.
        broken_by: AutoAttack -> (N,) number of the member that broke the image, -1 where none did.
        points: AutoAttack -> image -> (C, H, W) where the model gives the prediction; kept only if asked for.
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
    drawn_from: tuple[int, ...] | None = None
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
    def shares(self) -> Tensor:
        """(C,) share of each class in the data set, float64."""
        counts = self.count() if self.drawn_from is None else torch.tensor(self.drawn_from)
        return counts.double() / int(counts.sum())

    @property
    def reweighted(self) -> bool:
        """Whether the classes have other shares among the images than in the data set that these were drawn from."""
        if self.drawn_from is None:
            return False
        counts, own = torch.tensor(self.drawn_from), self.count()
        return not torch.equal(own * int(counts.sum()), counts * int(own.sum()))

    def average(self, *cell: Any) -> float:
        """Share of all images that are right; estimated where `reweighted`, nan where a class has none in the sample.

        Raises:
            UnknownNameError: the audit holds no such attack.
        """
        if not self.reweighted:
            return super().average(*cell)
        return float((self.shares * self.rate(*cell))[self.shares > 0].sum())

    def average_interval(self, *cell: Any, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of `average`, stratified where `reweighted`: see `metrics.stratified_wilson`."""
        if not self.reweighted:
            return super().average_interval(*cell, level=level)
        return metrics.stratified_wilson(self.correct(*cell), self.count(), self.shares, level)

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks in order, "clean" first; without "robust"."""
        return tuple(self.predictions)

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

    def summary(self, attack: str) -> dict[str, Any]:
        """Every metric of one attack, as numbers and lists (C,).

        The scalars of `metrics.summarise`; `head_norm_ratio` and `head_norm_correlation` with the class accuracies, nan
        without head norms; `cfps`, `cfns`, `one_vs_rest_accuracy`, `natural_error` and `boundary_error` per class.
        """
        confusion, norms = self.confusion(attack), self.head_norms
        mixed = self._in_shares(confusion)
        vectors = {
            "cfps": metrics.cfps(mixed),
            "cfns": metrics.cfns(mixed),
            "one_vs_rest_accuracy": metrics.one_vs_rest_accuracy(mixed),
            "natural_error": metrics.natural_error(self.confusion(CLEAN)),
            "boundary_error": metrics.boundary_error(self.confusion(CLEAN), self.correct(attack)),
        }
        return {
            **metrics.summarise(confusion),
            "average": self.average(attack),
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
                **({} if self.drawn_from is None else {"drawn_from": self.drawn_from}),
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

        Attacked images that were kept go to `<stem>.points.safetensors`: for each AutoAttack `<name>/image` (M,)
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
        """Of an AutoAttack: member -> (C,) images of each class that it broke, each on what the ones before left.

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

    def _in_shares(self, counts_pred_true: Tensor) -> Tensor:
        """Confusion counts (C, C) scaled so that the classes, the columns, have their shares in the data set."""
        if not self.reweighted:
            return counts_pred_true
        return counts_pred_true * (self.shares * len(self.labels) / self.count().clamp(min=1))

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


def load_audit(path: Path | str) -> Audit:
    """Read back what `Audit.save` wrote, from the path of either file or of both without suffix.

    Raises:
        CheckpointError: a file is missing, cut or foreign, or the counts of the two disagree.
    """
    json_path, npz_path = paths(read_path(path))
    if read_path(path).is_dir() and not json_path.exists():
        raise CheckpointError(f"{path} is a folder: name the .json of an audit; a run keeps its own in {path}/audit")
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
            drawn_from=tuple(about["data"]["drawn_from"]) if "drawn_from" in about["data"] else None,
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


def _agrees(audit: Audit, attack: str, entry: Mapping[str, Any]) -> bool:
    counted: dict[str, Any] = {"correct": audit.correct(attack), "count": audit.count()}
    if "confusion_pred_true" in entry:  # of DENSE_SCHEMA
        counted["confusion_pred_true"] = audit.confusion(attack)
    else:
        counted["confusion"] = audit._confusion_counts(attack)
    return all(entry[key] == as_json(value) for key, value in counted.items())
