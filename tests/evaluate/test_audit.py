"""The audit against linear models whose robust set is known in closed form, and its way to disk and back."""

from __future__ import annotations

import json
import math
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.audits import random_audit
from reference.linear_robustness import margin_left, survives
from reference.public_networks import Plain, Reentrant, Viewing, WritingOnImages
from robustfair import metrics
from robustfair.data import ImageDataset
from robustfair.errors import CheckpointError, ConfigError, DataError, ModelError, RobustFairWarning, UnknownNameError
from robustfair.evaluate.audit import Audit, audit, load_audit, threat
from robustfair.evaluate.compare import compare
from robustfair.evaluate.diagnostics.results import findings
from robustfair.models import OnCopies, unwrap
from robustfair.values import Threat

EPS = 0.1


class Linear(nn.Module):
    """Logits weight @ pixels + bias, weight (C, pixels)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def dataset(labels: Tensor, images: Tensor, num_classes: int) -> ImageDataset:
    names = tuple(f"class {c}" for c in range(num_classes))
    return ImageDataset(images=images, labels=labels, class_names=names, name="pixels")


def two_classes(n: int = 200, channels: int = 1) -> tuple[Linear, ImageDataset]:
    """Pixels at least 0.3 inside the box, labels right for about nine in ten."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(80, 176, (n, channels, 4, 4), generator=rng, dtype=torch.uint8)
    weight = torch.randn(2, 16 * channels, generator=rng)
    model = Linear(weight, -(weight * 0.5).sum(1))
    flip = torch.rand(n, generator=rng) < 0.1
    labels = model(images / 255).argmax(1) ^ flip.long()
    return model, dataset(labels, images, 2)


def block_classes(n: int = 200) -> tuple[Linear, ImageDataset]:
    """Four classes, each the sum of four pixels of its own: one perturbation is the worst for all pairs of classes."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(80, 176, (n, 1, 4, 4), generator=rng, dtype=torch.uint8)
    scale = torch.tensor([1.0, 1.5, 2.0, 2.5])
    weight = torch.eye(4).repeat_interleave(4, dim=1) * scale[:, None]
    model = Linear(weight, -2 * scale)
    return model, dataset(model(images / 255).argmax(1), images, 4)


def closed_form(model: Linear, data: ImageDataset, eps: float, norm: str) -> list[bool]:
    """Per image; checks that none lies so close to the boundary that rounding would decide."""
    weight, bias = model.head.weight.double().tolist(), model.head.bias.double().tolist()
    found = []
    for image, label in zip((data.images.double() / 255).flatten(1).tolist(), data.labels.tolist(), strict=True):
        assert abs(margin_left(image, label, weight, bias, eps, norm)) > 1e-4
        found.append(survives(image, label, weight, bias, eps, norm))
    return found


@pytest.mark.parametrize(
    "attack",
    [
        "fgsm",
        "pgd-20",
        "cw-20",
        "pgd-20(restarts=3)",
        "cw-20(restarts=2, freeze=false)",
        "pgd-20(freeze=true)",
        "pgd-20(keep=best)",
    ],
)
def test_linf_hits_are_the_closed_form_for_two_classes(attack: str) -> None:
    model, data = two_classes()
    expected = closed_form(model, data, 0.02, "linf")
    found = audit(model, data, attacks=attack, eps=0.02)
    assert 40 < sum(expected) < 160
    assert found.hits(attack).tolist() == expected


@pytest.mark.parametrize("attack", ["pgd-50", "cw-50"])
def test_l2_hits_are_the_closed_form_for_two_classes(attack: str) -> None:
    model, data = two_classes()
    found = audit(model, data, attacks=[attack], eps=0.1, norm="L2")
    expected = closed_form(model, data, 0.1, "l2")
    assert 40 < sum(expected) < 160
    assert found.hits(attack).tolist() == expected


def test_linf_hits_are_the_closed_form_for_four_classes() -> None:
    model, data = block_classes()
    found = audit(model, data, attacks="pgd-20", eps=0.02)
    expected = closed_form(model, data, 0.02, "linf")
    hits = torch.tensor(expected)
    assert 40 < sum(expected) < 190
    assert found.hits("pgd-20").tolist() == expected
    assert found.correct("pgd-20").tolist() == [int(hits[data.labels == c].sum()) for c in range(4)]


def test_no_attack_beats_the_closed_form_nor_the_clean_images() -> None:
    model, data = block_classes()
    found = audit(model, data, attacks="fgsm,pgd-3,cw-20(restarts=2)", eps=0.02)
    certain = torch.tensor(closed_form(model, data, 0.02, "linf"))
    for attack in found.attacks:
        assert bool((certain <= found.hits(attack)).all())
        assert bool((found.hits(attack) <= found.hits("clean")).all())


def test_radius_zero_is_clean() -> None:
    model, data = two_classes()
    found = audit(model, data, attacks="fgsm,pgd-20,cw-5", eps=0)
    for attack in found.attacks:
        assert torch.equal(found.prediction(attack), found.prediction("clean"))


def test_adding_an_attack_changes_no_other() -> None:
    model, data = block_classes()
    alone = audit(model, data, attacks="pgd-1", eps=EPS)
    among = audit(model, data, attacks="cw-2,fgsm,pgd-1,clean", eps=EPS)
    assert among.attacks == ("clean", "cw-2", "fgsm", "pgd-1")
    assert torch.equal(alone.prediction("pgd-1"), among.prediction("pgd-1"))


def test_numbers_follow_the_seed() -> None:
    model, data = block_classes()
    first, same, other = (
        audit(model, data, attacks="pgd-1", eps=EPS, step_size=0.001, seed=seed).hits("pgd-1") for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_two_attacks_draw_from_streams_of_their_own() -> None:
    model, data = block_classes()
    names = ("pgd-1", "pgd-1(freeze=true)")  # one step each, so that only the start differs
    found = audit(model, data, attacks=names, eps=EPS, step_size=0.001)
    assert not torch.equal(found.hits(names[0]), found.hits(names[1]))


def test_clean_predictions_do_not_depend_on_the_batch_size() -> None:
    model, data = two_classes()
    columns = [audit(model, data, attacks="clean", batch_size=size).prediction("clean") for size in (1, 7, 200, 1000)]
    assert all(torch.equal(columns[0], column) for column in columns)


def test_only_images_that_are_right_when_clean_are_attacked_in_full_batches() -> None:
    model, data = two_classes()
    calls: list[tuple[str, int, int]] = []
    found = audit(
        model, data, attacks="pgd-2,cw-2", eps=0.02, batch_size=64, on_progress=lambda *call: calls.append(call)
    )
    right = int(found.hits("clean").sum())
    assert 128 < right < 192
    assert [call for call in calls if call[0] == "clean"] == [("clean", done, 200) for done in (64, 128, 192, 200)]
    for attack in ("pgd-2", "cw-2"):
        assert [call[1:] for call in calls if call[0] == attack] == [(64, right), (128, right), (right, right)]
    wrong = ~found.hits("clean")
    assert torch.equal(found.prediction("pgd-2")[wrong], found.prediction("clean")[wrong])


def test_a_restart_takes_only_the_images_that_are_left() -> None:
    model, data = block_classes()
    seen: list[int] = []
    model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output)) if output.requires_grad else None
    )
    calls: list[tuple[str, int, int]] = []
    name = "pgd-1(restarts=3, freeze=true)"
    found = audit(model, data, attacks=name, eps=0.032, step_size=0.005, on_progress=lambda *call: calls.append(call))
    seen = seen[2:]  # the first passes measure memory and look for masked gradients
    assert seen[0] == 200 > seen[1] > seen[2] > int(found.hits(name).sum()) > 0
    assert [call for call in calls if call[0] == name] == [(name, done, 600) for done in (200, 400, 600)]


def test_a_model_that_is_never_right_is_audited_without_attacks() -> None:
    model, data = two_classes()
    data = replace(data, labels=1 - model(data.images / 255).argmax(1))
    found = audit(model, data, attacks="pgd-20", eps=EPS)
    assert found.average("pgd-20") == found.average("clean") == 0
    assert math.isnan(found.summary("pgd-20")["nsd"])


def test_the_model_leaves_as_it_came() -> None:
    data = two_classes(40, channels=3)[1]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    first = audit(model, data, attacks="pgd-2", eps=EPS)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(first.prediction("clean"), model.eval()(data.images / 255).argmax(1))


def test_what_is_recorded() -> None:
    model, data = block_classes(20)
    found = audit(model, data, attacks="pgd-2", eps="8/255", label="blocks", split="validation", seed=3)
    assert (found.model, found.data, found.split, found.fingerprint) == (
        "blocks",
        "pixels",
        "validation",
        data.fingerprint,
    )
    assert found.threat == Threat(norm="linf", eps=8 / 255, step_size=2 / 255)
    assert found.head_norms == pytest.approx([2, 3, 4, 5])
    assert found.summary("clean")["head_norm_ratio"] == pytest.approx(2.5)
    assert found.settings["clean"] == {}
    assert found.settings["pgd-2"]["step_size"] == 2 / 255
    assert found.provenance["seed"] == 3
    assert set(found.provenance["seconds"]) == {"clean", "pgd-2"}
    assert {"python", "torch", "numpy"} <= set(found.provenance["versions"])
    assert audit(model, data, attacks="clean").model == "Linear"


def test_a_low_precision_searches_and_the_model_itself_predicts() -> None:
    model, data = two_classes()
    seen: set[torch.dtype] = set()
    model.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    found = audit(model, data, attacks="pgd-5", eps=0.02, precision="bf16")
    assert torch.equal(found.prediction("clean"), model(data.images / 255).argmax(1))
    assert found.provenance["precision"] == "bf16"
    assert found.provenance["search_precision"] == {"pgd": "bf16", "strong": "bf16", "fab": "bf16"}
    assert seen == {torch.bfloat16, torch.float32}
    assert 0 < found.average("pgd-5") < found.average("clean")


FAMILY = "pgd-3,apgd-ce(steps=4),apgd-t(steps=3),fab(steps=2),fab-t(steps=2),square(queries=30)"


def right_on(model: nn.Module, channels: int = 3) -> ImageDataset:
    """Twenty images of 8x8 that a network classifies right."""
    images = torch.randint(0, 256, (20, channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        return dataset(model.eval()(images / 255).argmax(1), images, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("network", [Viewing, WritingOnImages])
def test_a_network_that_needs_copies_is_audited_as_one_that_does_not(
    network: type[Plain], channels: int, precision: Literal["fp32", "bf16"], tmp_path: Path
) -> None:
    model, twin = network(channels), OnCopies(Plain(channels))
    data = right_on(twin, channels)
    found, wanted = (audit(m, data, attacks=FAMILY, eps=0.1, precision=precision) for m in (model, twin))
    assert (found.model, wanted.model) == (network.__name__, "Plain")
    assert found.head_norms == wanted.head_norms is not None
    assert found.provenance["input_gradients"] == wanted.provenance["input_gradients"]
    assert all(torch.equal(found.prediction(name), wanted.prediction(name)) for name in wanted.attacks)
    assert found.average("clean") == 1 > found.average("apgd-t(steps=3)")
    assert model.training
    journal = tmp_path / "journal"
    audit(model, data, attacks="fgsm", eps=0.03, journal=journal, keep_journal=True)
    assert audit(unwrap(twin), data, attacks="fgsm", eps=0.03, journal=journal).attacks == ("clean", "fgsm")


def test_where_no_gradient_can_be_taken_attacks_that_need_one_are_refused() -> None:
    model = Reentrant()
    data = right_on(Plain())
    for attacks in ("fgsm", "square,apgd-ce", "autoattack"):
        with pytest.raises(ModelError, match="the gradient of the images cannot be taken through Reentrant: When"):
            audit(model, data, attacks=attacks)
    assert audit(model, data, attacks="clean").average("clean") == 1
    for precision in ("fp32", "bf16"):
        found, wanted = (
            audit(m, data, attacks="square(queries=50)", eps=0.1, precision=precision)  # type: ignore[arg-type]
            for m in (model, Plain())
        )
        assert found.provenance["input_gradients"] is None
        assert wanted.provenance["input_gradients"] == {"images": 20, "zero": 0, "not_finite": 0}
        assert 0 < found.average("square(queries=50)") < 1
        assert not [each for each in findings(found) if each.code == "masked-gradient"]


def test_wrong_input_is_refused_before_any_attack() -> None:
    model, data = two_classes(10)
    with pytest.raises(ModelError, match="2 outputs, data has 3 classes"):
        audit(model, dataset(data.labels, data.images, 3))
    with pytest.raises(DataError, match="no images"):
        audit(model, data.subset([]))
    with pytest.raises(ConfigError, match="8/255"):
        audit(model, data, eps="8")
    with pytest.raises(ConfigError, match="norm"):
        audit(model, data, norm="l1")
    with pytest.raises(ConfigError, match="batch_size"):
        audit(model, data, batch_size=0)
    with pytest.raises(ConfigError, match="precision"):
        audit(model, data, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="pgd-20"):
        audit(model, data, attacks="pdg-20")


class Never(nn.Module):
    """A model that must not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_minutes": "5"}, "audit: max_minutes must be a number, got '5'"),
        ({"max_minutes": math.nan}, "audit: max_minutes must be > 0, got nan"),
        ({"batch_size": 2.5}, "audit: batch_size must be a whole number >= 1, got 2.5"),
        ({"batch_size": 0}, "audit: batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": -1}, "audit: batch_size must be a whole number >= 1, got -1"),
        ({"seed": 1.5}, "audit: seed must be a whole number, got 1.5"),
        ({"seed": False}, "audit: seed must be a whole number, got False"),
        ({"batch_size": True}, "audit: batch_size must be a whole number >= 1, got True"),
        ({"max_minutes": True}, "audit: max_minutes must be a number, got True"),
        ({"device": "nonsense"}, "device: device must be auto, cpu, or a GPU that torch sees, got 'nonsense'"),
        pytest.param(
            {"device": "cuda"},
            "device: device must be auto, cpu, or a GPU that torch sees, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU"),
        ),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_one_line_before_anything_runs(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        audit(Never(), two_classes(10)[1], attacks="clean", **options)
    assert str(caught.value) == message


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model, data = two_classes(10)
    keys = {"seed": np.int64(3), "batch_size": np.int32(4), "device": torch.device("cpu")}
    found = audit(model, data, attacks="pgd-1", journal=tmp_path / "journal", **keys)
    assert load_audit(found.save(tmp_path, "audit")[0]).provenance["seed"] == 3


# What an audit looks at first


def codes(found: Audit) -> list[str]:
    return [check["code"] for check in found.provenance["checks"]]


def test_the_checks_of_the_model_are_kept_and_are_findings() -> None:
    model, data = two_classes()
    assert codes(audit(model, data, attacks="clean")) == []
    sharp = nn.Sequential(model, nn.Softmax(1)).train()
    found = audit(sharp, data, attacks="clean")
    assert codes(found) == ["probabilities"]
    assert "probabilities" in {finding.code for finding in findings(found)}
    assert codes(audit(sharp, data, attacks="clean", checks=False)) == []
    dark = replace(data, images=(data.images > 127).byte())
    assert "dark-images" in codes(audit(model, dark, attacks="clean"))


def test_a_random_model_is_warned_of_once() -> None:
    model, data = two_classes()

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x + 0.1 * torch.randn_like(x))

    assert codes(audit(Noisy(), data, attacks="clean")) == ["random-output"]


def test_a_model_that_fails_is_the_same_clear_error_with_checks_and_without() -> None:
    _, data = two_classes(10)

    def failing(x: Tensor) -> Tensor:
        raise ValueError("no such layer")

    class Model(nn.Module):
        def __init__(self, forward) -> None:
            super().__init__()
            self.forward = forward

    for forward, message in (
        (failing, "does not accept input of shape .* no such layer"),
        (lambda x: x, "must return logits"),
        (lambda x: x.flatten(1)[:, :3], "3 outputs, data has 2 classes"),
        (lambda x: torch.full((len(x), 2), math.nan), "not finite"),
    ):
        for checks in (True, False):
            with pytest.raises(ModelError, match=message):
                audit(Model(forward), data, attacks="clean", checks=checks)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, Threat(norm="linf", eps=8 / 255, step_size=2 / 255)),
        ({"eps": "4/255"}, Threat(norm="linf", eps=4 / 255, step_size=1 / 255)),
        ({"eps": 0.2, "step_size": "1/255"}, Threat(norm="linf", eps=0.2, step_size=1 / 255)),
        ({"norm": "L_2", "eps": 0.5}, Threat(norm="l2", eps=0.5, step_size=0.5 * 15 / 128)),
    ],
)
def test_the_step_follows_the_radius(words: dict, expected: Threat) -> None:
    assert threat(**words) == expected


# The value itself, on predictions that are made by hand


def by_hand() -> Audit:
    """Three classes, the last without images; eight images."""
    column = lambda *values: torch.tensor(values)  # noqa: E731
    return Audit(
        model="by hand",
        data="eight images",
        class_names=("a", "b", "none"),
        index=torch.arange(8),
        labels=column(0, 0, 0, 0, 1, 1, 1, 1),
        predictions={
            "clean": column(0, 0, 0, 1, 1, 1, 1, 1),
            "pgd-20": column(0, 2, 0, 1, 1, 0, 1, 1),
            "cw-20(step_size=2/255)": column(0, 0, 1, 1, 1, 2, 0, 1),
        },
        settings={"clean": {}, "pgd-20": {"steps": 20}, "cw-20(step_size=2/255)": {"steps": 20}},
        threat=Threat(),
        fingerprint="f",
        split="test",
        head_norms=[1.0, 2.0, 3.0],
        groups=(0, 0, 1),
        provenance={"seed": 0},
    )


def test_rates_and_counts_by_hand() -> None:
    found = by_hand()
    assert found.count().tolist() == [4, 4, 0]
    assert found.confusion("pgd-20").tolist() == [[2, 1, 0], [1, 3, 0], [1, 0, 0]]
    assert found.correct("pgd-20").tolist() == [2, 3, 0]
    assert found.rate("pgd-20").tolist() == pytest.approx([0.5, 0.75, math.nan], nan_ok=True)
    assert found.average("pgd-20") == 5 / 8
    assert found.worst("pgd-20")[:3] == (0, "a", 0.5)
    assert found.average_interval("pgd-20") == pytest.approx(tuple(map(float, metrics.wilson(5, 8))))
    lower, upper = found.interval("pgd-20", level=0.9)
    assert (float(lower[1]), float(upper[1])) == pytest.approx(tuple(map(float, metrics.wilson(3, 4, 0.9))))
    assert math.isnan(lower[2])
    low, high = found.worst_interval("pgd-20")
    assert 0 <= low <= 0.5 <= high <= 1


def test_robust_is_the_first_wrong_prediction_of_any_attack() -> None:
    found = by_hand()
    expected = []
    for row, label in enumerate(found.labels.tolist()):
        wrong = [int(column[row]) for column in found.predictions.values() if int(column[row]) != label]
        expected.append(wrong[0] if wrong else label)
    assert found.prediction("robust").tolist() == expected == [0, 2, 1, 1, 1, 0, 0, 1]
    assert found.attacks == ("clean", "pgd-20", "cw-20(step_size=2/255)")
    assert all(bool((found.hits("robust") <= found.hits(attack)).all()) for attack in found.attacks)


def test_summary_by_hand() -> None:
    found = by_hand().summary("pgd-20")
    assert (found["average"], found["worst"], found["worst_class"], found["range"]) == (0.625, 0.5, 0, 0.25)
    assert found["nsd"] == pytest.approx(0.125 / 0.625)
    assert found["cfps"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found["cfns"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert found["one_vs_rest_accuracy"] == pytest.approx([5 / 8, 6 / 8, 7 / 8])
    assert found["natural_error"] == pytest.approx([0.25, 0, math.nan], nan_ok=True)
    assert found["boundary_error"] == pytest.approx([0.25, 0.25, math.nan], nan_ok=True)
    assert found["head_norm_ratio"] == 3
    assert found["head_norm_correlation"] == pytest.approx(1)
    without = replace(by_hand(), head_norms=None)
    assert math.isnan(without.head_norm_ratio)
    assert math.isnan(without.summary("clean")["head_norm_correlation"])


def test_attacks_are_found_in_any_spelling() -> None:
    found = by_hand()
    assert found.average("PGD_20") == found.average("pgd-20")
    with pytest.raises(UnknownNameError, match="did you mean pgd-20"):
        found.average("pgd-10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([], dtype=torch.int64)}, "no images"),
        ({"labels": torch.full((8,), 3)}, "class outside 0 to 2"),
        ({"index": torch.arange(7)}, "index must be int64"),
        ({"predictions": {}}, "must be those on clean images"),
        ({"predictions": {"pgd-20": torch.zeros(8, dtype=torch.int64)}}, "must be those on clean images"),
        ({"predictions": {"clean": torch.zeros(8)}}, "clean must be int64"),
        ({"predictions": {"clean": torch.ones(8).long(), "pgd-20": torch.zeros(8).long()}}, "wrong when clean"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(by_hand(), **change)


def strong() -> Audit:
    """`by_hand` with a strong attack of two members: images 1 and 2 fell to the first, image 5 to the second."""
    found = by_hand()
    members = {"apgd-ce(steps=5)": 1.0, "square(p_init=0.5)": 1.0}
    return replace(
        found,
        predictions={**found.predictions, "autoattack(version=plus)": torch.tensor([0, 2, 1, 1, 1, 0, 1, 1])},
        settings={**found.settings, "autoattack(version=plus)": {"ran": members}},
        broken_by={"autoattack(version=plus)": torch.tensor([-1, 0, 0, -1, -1, 1, -1, -1])},
        points={"autoattack(version=plus)": {2: torch.rand(1, 2, 2), 5: torch.rand(1, 2, 2), 1: torch.rand(1, 2, 2)}},
    )


@pytest.mark.parametrize(
    "name", ["autoattack(version=plus)", "AutoAttack( Version = plus )", "auto_attack(version=plus)"]
)
def test_who_broke_what_is_found_in_any_spelling(name: str) -> None:
    found = strong()
    fell = found.fell_to(name)
    assert {member: count.tolist() for member, count in fell.items()} == {
        "apgd-ce(steps=5)": [2, 0, 0],
        "square(p_init=0.5)": [0, 1, 0],
    }
    assert found.average(name) == 4 / 8


def test_an_attack_without_members_broke_by_none_and_an_unknown_one_is_refused() -> None:
    found = strong()
    assert found.fell_to("PGD-20") == found.fell_to("clean") == found.fell_to("robust") == {}
    with pytest.raises(UnknownNameError, match="attack of this audit 'pgd-21': did you mean pgd-20"):
        found.fell_to("pgd-21")


# On disk


def test_points_are_read_back(tmp_path: Path) -> None:
    first = strong()
    second = load_audit(first.save(tmp_path, "audit")[0])
    (points,) = second.points.values()
    assert list(points) == [2, 5, 1]
    assert all(torch.equal(points[row], point) for row, point in first.points["autoattack(version=plus)"].items())
    none = replace(first, points={"autoattack(version=plus)": {}})
    assert load_audit(none.save(tmp_path, "none")[0]).points == none.points
    assert second.save(tmp_path, "again")[2].read_bytes() == (tmp_path / "audit.points.safetensors").read_bytes()
    assert compare(second, first).under("robust").average.difference.change == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "lengths", "names"])
def test_damaged_points_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    path = strong().save(tmp_path, "audit")[2]
    content, tensors = path.read_bytes(), load_file(path)
    if damage in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif damage == "lengths":
        save_file({name: value[:2] if name.endswith("/image") else value for name, value in tensors.items()}, path)
    else:
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"audit\.points\.safetensors") as caught:
        load_audit(tmp_path / "audit")
    assert "\n" not in str(caught.value)
    path.unlink()
    assert load_audit(tmp_path / "audit").points == {}


def test_round_trip(tmp_path: Path) -> None:
    first = by_hand()
    json_path, npz_path = first.save(tmp_path / "audit", "clean,pgd-20,cw-20(step_size=2/255)")
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [json_path.name, npz_path.name]
    for path in (json_path, npz_path, str(json_path).removesuffix(".json")):
        second = load_audit(path)
        assert second.attacks == first.attacks
        assert all(torch.equal(first.prediction(name), second.prediction(name)) for name in (*first.attacks, "robust"))
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.index, second.index)
        for name in (
            "model",
            "data",
            "class_names",
            "settings",
            "threat",
            "fingerprint",
            "split",
            "head_norms",
            "groups",
        ):
            assert getattr(second, name) == getattr(first, name)
        assert second.provenance == first.provenance
        assert second.to_dict() == first.to_dict()


def test_the_json_is_strict_and_holds_counts(tmp_path: Path) -> None:
    json_path, _ = by_hand().save(tmp_path, "audit")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    about = json.loads(json_path.read_text(), parse_constant=refuse)
    assert about["schema"] == "robustfair.audit/2"
    assert list(about["attacks"]) == ["clean", "pgd-20", "cw-20(step_size=2/255)"]
    entry = about["attacks"]["pgd-20"]
    assert entry["confusion"] == {"predicted": [0, 0, 1, 1, 2], "true": [0, 1, 0, 1, 0], "count": [2, 1, 1, 3, 1]}
    assert (entry["correct"], entry["count"]) == ([2, 3, 0], [4, 4, 0])
    assert entry["wilson"]["lower"][2] is None
    assert entry["summary"]["natural_error"] == [0.25, 0.0, None]
    assert about["robust"]["correct"] == [1, 2, 0]


def test_an_audit_with_whole_confusion_matrices_reads_as_ever(tmp_path: Path) -> None:
    first = by_hand()
    json_path, _ = first.save(tmp_path, "audit")
    about = json.loads(json_path.read_text())
    about["schema"] = "robustfair.audit/1"
    for name, entry in {**about["attacks"], "robust": about["robust"]}.items():
        del entry["confusion"]
        entry["confusion_pred_true"] = first.confusion(name).tolist()
    json_path.write_text(json.dumps(about))
    assert load_audit(json_path).to_dict() == first.to_dict()
    about["attacks"]["clean"]["confusion_pred_true"][0][1] += 1
    json_path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="disagree on clean"):
        load_audit(json_path)


def test_radii_of_two_and_three_are_taken_under_l2() -> None:
    assert (threat("l2", "3").eps, threat("l2", 2).eps, threat("l2", "2", "1").step_size) == (3, 2, 1)
    with pytest.raises(ConfigError, match=r"Did you mean 128/255\? Under l2, 128\.0 is taken as it is"):
        threat("l2", "128")
    with pytest.raises(ConfigError, match=r"Did you mean 3/255\?"):
        threat("linf", "3")


def test_a_thousand_classes_are_not_many_bytes(tmp_path: Path) -> None:
    first = random_audit(1, classes=1001, images=2000)
    json_path, npz_path = first.save(tmp_path, "audit")
    assert json_path.stat().st_size < 2_000_000
    assert npz_path.stat().st_size < 100_000
    again = load_audit(json_path)
    assert torch.equal(again.confusion("robust"), first.confusion("robust"))


def test_a_tilde_is_the_home_folder_from_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    first = by_hand()
    assert first.save("~/audits", "a")[0] == home / "audits" / "a.json"
    assert load_audit("~/audits/a").to_dict() == first.to_dict()
    assert first.to_html(Path("~/page.html")) == home / "page.html"
    assert list(here.iterdir()) == []


def test_the_arrays_need_no_pickle(tmp_path: Path) -> None:
    _, npz_path = by_hand().save(tmp_path, "audit")
    with np.load(npz_path, allow_pickle=False) as stored:
        assert set(stored.files) == {"index", "labels", *by_hand().attacks}
        assert stored["cw-20(step_size=2/255)"].tolist() == [0, 0, 1, 1, 1, 2, 0, 1]


def test_an_audit_of_a_real_run_reads_back(tmp_path: Path) -> None:
    model, data = block_classes(40)
    first = audit(model, data, attacks="pgd-2,cw-2", eps=EPS)
    assert load_audit(first.save(tmp_path, "a.b")[0]).to_dict() == first.to_dict()


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_cut_file_is_one_clear_error(tmp_path: Path, suffix: str, share: float) -> None:
    by_hand().save(tmp_path, "audit")
    path = tmp_path / f"audit{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"audit{suffix}") as caught:
        load_audit(tmp_path / "audit")
    assert "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    json_path, npz_path = by_hand().save(tmp_path, "audit")
    about = json.loads(json_path.read_text())

    def refused(match: str, **change: object) -> None:
        json_path.write_text(json.dumps({**about, **change}))
        with pytest.raises(CheckpointError, match=match) as caught:
            load_audit(json_path)
        assert "\n" not in str(caught.value)

    refused("schema 'robustfair.audit/9'", schema="robustfair.audit/9")
    refused("lacks 'fgsm'", attacks={**about["attacks"], "fgsm": about["attacks"]["clean"]})
    refused("does not describe an audit", threat={"eps": 1, "norms": "linf"})
    refused("does not describe an audit", attacks=["clean"])
    refused("does not describe an audit", data=None)
    refused("does not describe an audit", class_names=["a"])
    refused("disagree on pgd-20", attacks={**about["attacks"], "pgd-20": about["attacks"]["clean"] | {"settings": {}}})
    del about["threat"]
    refused("lacks 'threat'")
    npz_path.write_bytes(json_path.read_bytes())
    json_path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"audit\.npz"):
        load_audit(json_path)


def test_files_of_two_audits_are_not_one(tmp_path: Path) -> None:
    first = by_hand()
    other = replace(first, predictions={**first.predictions, "pgd-20": first.predictions["clean"]})
    first.save(tmp_path, "first")
    other.save(tmp_path, "other")
    (tmp_path / "other.npz").replace(tmp_path / "first.npz")
    with pytest.raises(CheckpointError, match="disagree on pgd-20"):
        load_audit(tmp_path / "first.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json does not exist"):
        load_audit(tmp_path / "none")
    by_hand().save(tmp_path, "audit")
    (tmp_path / "audit.npz").unlink()
    with pytest.raises(CheckpointError, match=r"audit\.npz does not exist"):
        load_audit(tmp_path / "audit.json")


def test_saving_again_replaces(tmp_path: Path) -> None:
    by_hand().save(tmp_path, "audit")
    replace(by_hand(), model="second").save(tmp_path, "audit")
    assert load_audit(tmp_path / "audit").model == "second"
    assert len(list(tmp_path.iterdir())) == 2


def test_to_html_writes_the_report(tmp_path: Path) -> None:
    path = by_hand().to_html(tmp_path / "report.html", title="Eight images by hand")
    assert path == tmp_path / "report.html"
    assert "Eight images by hand" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_audited_in_float32_and_left_as_it_is(dtype: torch.dtype) -> None:
    model, data = two_classes()
    wanted = audit(model, data, attacks="clean,pgd-3", eps=0.02)
    model = deepcopy(model).to(dtype)
    rounded = deepcopy(model).float()
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(RobustFairWarning, match=f"the model's {name} weights are computed in float32, on a copy"):
        found = audit(model, data, attacks="clean,pgd-3", eps=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(found.prediction("pgd-3"), audit(rounded, data, attacks="pgd-3", eps=0.02).prediction("pgd-3"))
    assert found.model == wanted.model


def test_a_model_that_casts_its_images_itself_stays_as_it_is() -> None:
    model, data = two_classes()
    model = model.half()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].half(),))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustFairWarning)
        found = audit(model, data, attacks="clean", eps=0.02)
    assert found.average("clean") > 0.5
