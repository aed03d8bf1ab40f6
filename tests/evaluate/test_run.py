"""The audit against linear models whose robust set is known in closed form."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference.linear_robustness import margin_left, survives
from reference.public_networks import Plain, Reentrant, Viewing, WritingOnImages
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, DataError, ModelError, RobustFairWarning, UnknownNameError
from robustfair.evaluate.diagnostics.results import diagnose
from robustfair.evaluate.result import Audit, load_audit
from robustfair.evaluate.run import audit
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
        assert not [each for each in diagnose(found) if each.code == "masked-gradient"]


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
    assert "probabilities" in {diagnostic.code for diagnostic in diagnose(found)}
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


def test_an_audit_of_a_real_run_reads_back(tmp_path: Path) -> None:
    model, data = block_classes(40)
    first = audit(model, data, attacks="pgd-2,cw-2", eps=EPS)
    assert load_audit(first.save(tmp_path, "a.b")[0]).to_dict() == first.to_dict()


@pytest.mark.parametrize(("typed", "meant"), [("attack", "attacks"), ("epss", "eps"), ("devise", "device")])
def test_an_argument_that_does_not_exist_is_named_with_the_nearest(typed: str, meant: str) -> None:
    model, data = two_classes(4)
    with pytest.raises(UnknownNameError, match=f"unknown argument of audit '{typed}'.*[Dd]id you mean '?{meant}"):
        audit(model, data, **{typed: "pgd-20"})
