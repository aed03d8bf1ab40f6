"""The corruption audit against images corrupted one by one, a published folder, and its way to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference.public_networks import Plain, Viewing, WritingOnImages
from robustfair import metrics
from robustfair.data import ImageDataset
from robustfair.data.corruptions.generate import corrupt
from robustfair.data.corruptions.names import CORRUPTIONS, FAIR_TAT, SEVERITIES, STANDARD
from robustfair.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from robustfair.evaluate.corruption_images import open_published
from robustfair.evaluate.corruptions import (
    CorruptionAudit,
    audit_corruptions,
    load_corruption_audit,
    parse_corruptions,
)
from robustfair.models import OnCopies


class Brightness(nn.Module):
    """Three classes by the mean of the image: below 0.4, up to 0.6, above."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        level = self.dropout(x.mean((1, 2, 3)))
        return torch.stack([0.4 - level, torch.full_like(level, 0.0) - (level - 0.5).abs() + 0.1, level - 0.6], 1)


def dataset(counts: tuple[int, ...] = (14, 20, 6), size: int = 16, channels: int = 3) -> ImageDataset:
    rng = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=rng)]
    levels = torch.tensor([60.0, 125.0, 190.0])[labels][:, None, None, None]
    images = levels + 30 * torch.randn(len(labels), channels, size, size, generator=rng)
    images += 25 * torch.randn(len(labels), 1, 1, 1, generator=rng)
    return ImageDataset(
        images=images.clamp(0, 255).to(torch.uint8),
        labels=labels,
        class_names=tuple(f"class {c}" for c in range(3)),
        name="grey levels",
    )


def small(**fields: Any) -> CorruptionAudit:
    """Class a: 2 images, class b: 4, class c: none; two corruptions at severities 1 and 4."""
    defaults: dict[str, Any] = {
        "model": "net",
        "data": "toy",
        "class_names": ("a", "b", "c"),
        "index": torch.arange(6),
        "labels": torch.tensor([0, 0, 1, 1, 1, 1]),
        "severities": (1, 4),
        "clean": torch.tensor([0, 0, 1, 1, 1, 0]),
        "predictions": {
            "fog": torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]),
            "snow": torch.tensor([[0, 2, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1]]),
        },
    }
    return CorruptionAudit(**{**defaults, **fields})


# Running


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_are_those_of_images_corrupted_one_by_one(channels: int) -> None:
    data, model = dataset((4, 5, 3), channels=channels), Brightness().eval()
    found = audit_corruptions(model, data, severities=(5, 2), batch_size=5, seed=3)
    assert found.corruptions == CORRUPTIONS
    assert found.severities == (2, 5)
    assert torch.equal(found.clean, model(data.images / 255).argmax(1))
    for name in CORRUPTIONS:
        for severity in (2, 5):
            expected = [
                model(corrupt(data.images[i : i + 1], name, severity, index=torch.tensor([i]), seed=3) / 255).argmax()
                for i in range(12)
            ]
            assert found.prediction(name, severity).tolist() == [int(value) for value in expected]


@pytest.mark.parametrize("network", [Viewing, WritingOnImages])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_needs_copies_gets_them(network: type[Plain], precision: Literal["fp32", "bf16"]) -> None:
    data = dataset(size=8)
    found, wanted = (
        audit_corruptions(model, data, corruptions="fog,contrast", severities=(1,), batch_size=9, precision=precision)
        for model in (network(classes=3), OnCopies(Plain(classes=3)))
    )
    assert (found.model, wanted.model) == (network.__name__, "Plain")
    assert torch.equal(found.clean, wanted.clean)
    assert all(torch.equal(found.predictions[name], wanted.predictions[name]) for name in wanted.predictions)


def test_numbers_do_not_depend_on_the_batch_size() -> None:
    data, names = dataset(), ["gaussian_noise", "glass_blur", "snow", "spatter"]
    audits = [audit_corruptions(Brightness(), data, corruptions=names, batch_size=size) for size in (1, 7, 100)]
    for name in names:
        for other in audits[1:]:
            assert torch.equal(audits[0].predictions[name], other.predictions[name])
    assert any(audits[0].average(name) < audits[0].average("clean") for name in names)


def test_the_seed_moves_what_is_drawn() -> None:
    data = dataset((60, 60, 60), size=8)
    first, same, other = (
        audit_corruptions(Brightness(), data, corruptions="gaussian-noise", seed=seed).predictions["gaussian_noise"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_progress_counts_images_of_all_severities() -> None:
    calls: list[tuple[str, int, int]] = []
    audit_corruptions(
        Brightness(),
        dataset(),
        corruptions=["fog", "contrast"],
        severities=(1, 3),
        batch_size=25,
        on_progress=lambda *call: calls.append(call),
    )
    assert calls[:2] == [("clean", 25, 40), ("clean", 40, 40)]
    assert calls[2:6] == [("fog", 25, 80), ("fog", 40, 80), ("fog", 65, 80), ("fog", 80, 80)]
    assert [call[0] for call in calls[6:]] == ["contrast"] * 4


def test_the_model_leaves_as_it_came() -> None:
    model = Brightness().train()
    audit_corruptions(model, dataset(), corruptions="contrast", severities=(1,))
    assert model.training
    assert model.dropout.training


def test_provenance_says_what_the_images_are() -> None:
    found = audit_corruptions(Brightness(), dataset(), corruptions=["frost"], severities=(1,), label="mine")
    assert found.model == "mine"
    assert found.provenance["source"] == {
        "images": "corrupted here",
        "scale": "cifar",
        "frost": "synthetic ice crystals",
    }
    assert set(found.provenance["seconds"]) == {"frost"}
    without = audit_corruptions(Brightness(), dataset(), corruptions="fog", severities=(1,), scale="imagenet")
    assert without.provenance["source"] == {"images": "corrupted here", "scale": "imagenet"}


# Numbers


def test_one_cell() -> None:
    audit = small()
    assert audit.correct("fog", 1).tolist() == [2, 2, 0]
    assert audit.rate("fog", 4)[:2].tolist() == [0.5, 0.25]
    assert audit.average("fog", 4) == pytest.approx(2 / 6)
    assert audit.worst("fog", 4)[:3] == (1, "b", 0.25)
    assert audit.confusion("snow", 4).tolist() == [[0, 0, 0], [0, 4, 0], [2, 0, 0]]
    assert audit.correct("clean").tolist() == [2, 3, 0]
    lower, upper = audit.interval("fog", 4)
    expected = metrics.wilson(torch.tensor([1, 1, 0]), torch.tensor([2, 4, 0]))
    assert torch.equal(lower[:2], expected[0][:2])
    assert bool(upper[2].isnan())
    assert audit.average_interval("fog", 4) == tuple(float(end) for end in metrics.wilson(2, 6))
    found = metrics.bootstrap_statistic(torch.tensor([1, 1, 0]), torch.tensor([2, 4, 0]), "worst")
    assert audit.worst_interval("fog", 4) == (found.lower, found.upper)


def test_a_mean_gives_every_cell_the_same_weight() -> None:
    audit = small()
    assert audit.hits("fog").tolist() == [1, 0.5, 1, 0.5, 0, 0]
    assert audit.rate("fog")[:2].tolist() == [0.75, 0.375]
    assert audit.worst("snow")[:3] == (0, "a", 0.25)
    assert audit.average("snow") == pytest.approx((5 / 6 + 4 / 6) / 2)
    assert audit.rate("all")[:2].tolist() == [0.5, pytest.approx(0.6875)]
    assert audit.rate("all", 1)[:2].tolist() == [0.75, 0.75]
    assert audit.worst("all", 4)[:3] == (0, "a", 0.25)
    for what in ("fog", "all"):
        lower, upper = audit.average_interval(what)
        assert 0 < lower < audit.average(what) < upper < 1
        low, high = audit.worst_interval(what)
        assert low <= audit.worst(what).value <= high


def test_sets_are_those_whose_corruptions_are_all_there() -> None:
    column = torch.zeros(2, 6, dtype=torch.int64)

    def of(names: tuple[str, ...]) -> CorruptionAudit:
        return small(predictions=dict.fromkeys(names, column))

    assert of(CORRUPTIONS).sets == ("standard", "fair_tat", "extra", "all")
    assert of(STANDARD).sets == ("standard", "all")
    assert of(FAIR_TAT).sets == ("fair_tat", "extra", "all")
    assert small().sets == ("all",)
    with pytest.raises(UnknownNameError, match=r"unknown corruption or set of this audit 'standard'"):
        small().rate("standard")


def test_means_over_sets() -> None:
    rng = torch.Generator().manual_seed(0)
    predictions = {name: torch.randint(0, 2, (2, 6), generator=rng) for name in CORRUPTIONS}
    audit = small(predictions=predictions)
    for what, names in (("standard", STANDARD), ("fair-tat", FAIR_TAT), ("all", CORRUPTIONS)):
        rates = torch.stack([audit.rate(name, severity) for name in names for severity in (1, 4)])
        torch.testing.assert_close(audit.rate(what), rates.mean(0), equal_nan=True)
        assert audit.worst(what).value == pytest.approx(float(rates.mean(0)[:2].min()))


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UnknownNameError, match="unknown corruption of this audit 'frost': did you mean fog"):
        small().prediction("frost", 1)
    with pytest.raises(ConfigError, match="corruption audit: severity must be one of 1, 4, got 2"):
        small().rate("fog", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predictions": {}}, "no images, or no corruption"),
        ({"clean": torch.zeros(5, dtype=torch.int64)}, r"clean must be int64 \(6,\), got int64 \(5,\)"),
        ({"predictions": {"fog": torch.zeros(6, dtype=torch.int64)}}, r"fog must be int64 \(2, 6\), got int64 \(6,\)"),
        ({"labels": torch.tensor([0, 0, 1, 1, 1, 3])}, "labels holds a class outside 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(**fields)


# On disk


def test_a_saved_audit_reads_back(tmp_path: Path) -> None:
    audit = audit_corruptions(Brightness(), dataset(), corruptions="standard", severities=(1, 5), split="test")
    json_path, npz_path = audit.save(tmp_path / "audit", "corruptions")
    about = json.loads(json_path.read_text())
    assert about["schema"] == "robustfair.corruptions/1"
    assert list(about["corruptions"]) == list(STANDARD)
    assert about["corruptions"]["fog"]["severity"]["5"]["correct"] == audit.correct("fog", 5).tolist()
    assert about["sets"]["standard"]["worst"]["class_name"] == audit.worst("standard").class_name
    for path in (json_path, npz_path, json_path.with_suffix("")):
        found = load_corruption_audit(path)
        assert found.to_dict() == audit.to_dict()
        assert all(torch.equal(found.predictions[name], audit.predictions[name]) for name in STANDARD)
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["corruptions.json", "corruptions.npz"]


def test_a_class_without_images_is_null_on_disk(tmp_path: Path) -> None:
    json_path, _ = small().save(tmp_path, "toy/x")
    assert json_path.name == "toy-x.json"
    assert json.loads(json_path.read_text())["clean"]["wilson"]["lower"][2] is None
    assert load_corruption_audit(json_path).worst("all", 4)[:3] == (0, "a", 0.25)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    json_path, npz_path = small().save(tmp_path, "toy")
    other = small(predictions={**small().predictions, "fog": torch.zeros(2, 6, dtype=torch.int64)})
    _, changed = other.save(tmp_path, "other")
    whole = npz_path.read_bytes()
    npz_path.write_bytes(changed.read_bytes())
    with pytest.raises(CheckpointError, match=r"toy.npz disagree on fog 1, fog 4: run the audit again"):
        load_corruption_audit(json_path)
    npz_path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="the file is cut or damaged"):
        load_corruption_audit(json_path)
    npz_path.write_bytes(whole)
    about = json.loads(json_path.read_text())
    del about["severities"]
    json_path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="lacks 'severities': the audit is damaged"):
        load_corruption_audit(json_path)
    json_path.write_text(json.dumps({**about, "schema": "robustfair.audit/1"}))
    with pytest.raises(CheckpointError, match=r"has schema 'robustfair\.audit/1'"):
        load_corruption_audit(json_path)
    npz_path.unlink()
    with pytest.raises(CheckpointError, match=r"toy\.npz does not exist"):
        load_corruption_audit(json_path)


# Published images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fog and snow of `dataset()` as CIFAR-10-C ships them."""
    data = dataset()
    for name in ("fog", "snow"):
        blocks = [corrupt(data.images, name, s, index=torch.arange(40), seed=9) for s in SEVERITIES]
        np.save(tmp_path / f"{name}.npy", torch.cat(blocks).permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "labels.npy", np.tile(data.labels.numpy(), 5))
    return tmp_path


def test_published_images_are_taken_as_they_are(folder: Path) -> None:
    names = ("fog", "snow")
    found = audit_corruptions(Brightness(), dataset(), corruptions=names, severities=(2, 5), published=folder)
    expected = audit_corruptions(Brightness(), dataset(), corruptions=names, severities=(2, 5), seed=9)
    assert all(torch.equal(found.predictions[name], expected.predictions[name]) for name in names)
    assert found.provenance["source"] == {"images": str(folder)}


def test_published_images_stay_on_disk(folder: Path) -> None:
    images = open_published(folder, ["fog"], dataset())
    assert isinstance(images.files["fog"], np.memmap)
    assert images("fog", 3, slice(5, 9)).shape == (4, 3, 16, 16)


def test_a_folder_of_other_images_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no frost\.npy: name the corruptions that it holds"):
        open_published(folder, ["fog", "frost"], dataset())
    with pytest.raises(DataError, match=r"labels\.npy are not the labels of the 10 images of grey levels, 5 times"):
        open_published(folder, ["fog"], dataset().subset(range(10)))
    data = dataset()
    with pytest.raises(DataError, match=r"labels\.npy are not the labels of the 40 images"):
        open_published(folder, ["fog"], replace(data, labels=data.labels.flip(0)))
    with pytest.raises(DataError, match=r"fog\.npy must be uint8 \(200, 8, 8, 3\), got uint8 \(200, 16, 16, 3\)"):
        open_published(folder, ["fog"], replace(data, images=data.images[..., ::2, ::2]))
    with pytest.raises(DataError, match=r"'.*nowhere' is not a folder"):
        open_published(tmp_path / "nowhere", ["fog"], data)
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:500])
    with pytest.raises(DataError, match=r"fog\.npy cannot be read .* the file is cut or damaged"):
        open_published(folder, ["fog"], data)
    np.save(folder / "fog.npy", np.array([{"run": "code"}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"fog\.npy cannot be read"):
        audit_corruptions(Brightness(), data, corruptions="fog", published=folder)


# Wrong input


def test_names_of_corruptions_and_sets() -> None:
    assert parse_corruptions("all") == CORRUPTIONS
    assert parse_corruptions("Standard") == STANDARD
    assert parse_corruptions(["fog", "extra", "fog"]) == (
        "fog",
        "speckle_noise",
        "gaussian_blur",
        "spatter",
        "saturate",
    )
    with pytest.raises(UnknownNameError, match=r"unknown corruption 'fogg': did you mean fog"):
        parse_corruptions("snow,fogg")
    for nothing in ("", " , ", []):
        with pytest.raises(ConfigError, match="corruption audit: corruptions must be at least one name"):
            parse_corruptions(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"severities": (0, 1)}, "severities must be whole numbers from 1 to 5"),
        ({"severities": ()}, "severities must be whole numbers from 1 to 5"),
        ({"severities": 3}, r"severities must be whole numbers from 1 to 5, got 3\. Write them as \(1, 3\), one alone"),
        ({"severities": ("3",)}, r"whole numbers from 1 to 5, got \('3',\)\. Write them as \(1, 3\)"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number >= 1, got 2\.5"),
        ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({"device": "nonsense"}, "device must be auto, cpu, or a GPU that torch sees, got 'nonsense'"),
        ({"precision": "fp8"}, "precision must be fp32 or bf16, got 'fp8'"),
        ({"scale": "huge"}, "corruption: scale must be auto or cifar or imagenet"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        audit_corruptions(Brightness(), dataset(), corruptions="fog", **options)


def test_images_that_cannot_be_corrupted_are_refused_before_the_model_runs() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    with pytest.raises(ConfigError, match="corruption: images must be uint8"):
        audit_corruptions(Never(), dataset(size=7))
    with pytest.raises(DataError, match="no images to audit on"):
        audit_corruptions(Never(), dataset().subset([]))
    with pytest.raises(DataError, match=r"frost: .* is not a folder"):
        audit_corruptions(Never(), dataset(), frost="/nowhere")
    with pytest.raises(DataError, match=r"frost: .* is not a folder"):
        audit_corruptions(Never(), dataset(), corruptions="fog", frost="/nowhere")
    with pytest.raises(ConfigError, match="dataset must be an ImageDataset, got 'Tensor'"):
        audit_corruptions(Never(), dataset().images)  # type: ignore[arg-type]
