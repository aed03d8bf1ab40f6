"""Audits under the AutoAttack family: what is kept, what it depends on, both engines, bad input, and early ends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from robustfair.attacks.autoattack import named as family
from robustfair.attacks.autoattack.base import distance
from robustfair.attacks.autoattack.named import AutoAttack, cheaper
from robustfair.attacks.named import parse_attacks
from robustfair.data import ImageDataset
from robustfair.errors import CheckpointError, ConfigError, ModelError, RobustFairWarning
from robustfair.evaluate import autoattack as strong
from robustfair.evaluate import runner
from robustfair.evaluate.diagnostics.results import diagnose
from robustfair.evaluate.result import Audit, load_audit
from robustfair.evaluate.run import audit

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Same = Callable[[Audit, Audit], bool]
Small = tuple[nn.Module, ImageDataset]

MEMBERS = (
    "apgd-ce(steps=6)",
    "apgd-dlr(steps=6, restarts=2)",
    "apgd-t(steps=5, targets=2)",
    "fab(steps=4)",
    "fab-t(steps=4, targets=2)",
    "square(queries=40)",
)
EPS = {"linf": 0.04, "l2": 0.2}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions of autoattack with few steps, targets and queries."""
    for version, restarts in (("standard", 1), ("plus", 2)):
        attack = AutoAttack(name=version, members=family.VERSIONS[version])
        members = cheaper(attack, steps=6, restarts=restarts, targets=3, queries=30).members
        monkeypatch.setitem(family.VERSIONS, version, members)  # type: ignore[arg-type]


@pytest.fixture
def each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is told and the journal written after every turn."""
    monkeypatch.setattr(strong, "TELL_EVERY", 0.0)
    monkeypatch.setattr(strong, "SAVE_EVERY", 0.0)


def assert_confirmed(model: nn.Module, data: ImageDataset, found: Audit, name: str, *, inside: float = 1e-6) -> None:
    """Points, members and predictions tell one story, and the model itself tells it too."""
    column, broken_by = found.predictions[name], found.broken_by[name]
    broken = (broken_by >= 0).nonzero().squeeze(1).tolist()
    right = found.hits("clean")
    assert torch.equal(right & (column != found.labels), broken_by >= 0)
    assert torch.equal(column[~right], found.predictions["clean"][~right])
    assert sorted(found.points[name]) == broken
    images = data.images.float() / 255
    for row in broken:
        point = found.points[name][row][None]
        assert (point.dtype, point.shape) == (torch.float32, images[:1].shape)
        assert 0 <= float(point.min()) <= float(point.max()) <= 1
        assert float(distance(images[row : row + 1], point, found.threat.norm)) <= found.threat.eps + inside
        with torch.no_grad():
            assert int(model(point).argmax()) == int(column[row]) != int(found.labels[row])


# What an audit keeps of them


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", [*MEMBERS, "autoattack", "autoattack(version=plus)"])
def test_what_is_broken_is_confirmed_by_the_model_in_the_ball(small: Small, norm: str, name: str) -> None:
    model, data = small
    found = audit(model, data, attacks=name, eps=EPS[norm], norm=norm, keep_points=True)
    assert 0 < len(found.points[name]) < len(data)
    assert_confirmed(model, data, found, name)
    assert found.complete
    assert set(found.settings[name]["ran"].values()) == {1.0}
    assert found.settings[name]["not_finite"] == 0
    assert found.provenance["not_run"] == []


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 9, 4), (3, 32, 2), (1, 1, 12)], ids=str)
def test_images_of_any_shape(tiny_net: Net, norm: str, shape: tuple[int, ...]) -> None:
    model = tiny_net(channels=shape[0], classes=5).eval()
    images = torch.randint(256, (12, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        model.head.bias -= model(images / 255).mean(0)
        labels = model(images / 255).argmax(1)
    data = ImageDataset(images=images, labels=labels, class_names=tuple("abcde"), name="odd")
    found = audit(model, data, attacks=["autoattack", *MEMBERS], eps=EPS[norm], norm=norm, keep_points=True)
    for name in found.broken_by:
        assert_confirmed(model, data, found, name)
    assert found.points["autoattack"]


def test_members_that_broke_an_image_are_counted_by_class(small: Small) -> None:
    model, data = small
    found = audit(model, data, attacks=["pgd-2", "autoattack", "apgd-ce(steps=1)"], eps=0.05)
    fell = found.fell_to("autoattack")
    assert list(fell) == [
        "apgd-ce(steps=6)",
        "apgd-t(steps=6, targets=3)",
        "fab-t(steps=6, targets=3)",
        "square(queries=30)",
    ]
    lost = found.correct("clean") - found.correct("autoattack")
    assert torch.equal(torch.stack(list(fell.values())).sum(0), lost)
    for number, by_class in enumerate(fell.values()):
        rows = found.broken_by["autoattack"] == number
        assert by_class.tolist() == [int((rows & (found.labels == c)).sum()) for c in range(4)]
    assert list(found.fell_to("apgd-ce(steps=1)")) == ["apgd-ce(steps=1)"]
    assert found.fell_to("pgd-2") == found.fell_to("clean") == {}
    assert found.points == {}


def test_what_fell_to_whom_survives_the_disk(small: Small, tmp_path: Path, same: Same) -> None:
    model, data = small
    first = audit(model, data, attacks=["autoattack", "fab(steps=4)", "pgd-2"], eps=0.04)
    second = load_audit(first.save(tmp_path, "audit")[0])
    assert same(first, second)
    assert set(second.broken_by) == {"autoattack", "fab(steps=4)"}
    assert second.to_dict() == first.to_dict()
    stored = first.to_dict()["attacks"]
    assert stored["autoattack"]["fell_to"] == {
        member: by_class.tolist() for member, by_class in second.fell_to("autoattack").items()
    }
    assert "fell_to" not in stored["pgd-2"]
    assert second.complete


def test_points_are_written_beside_the_audit_and_go_with_it(small: Small, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, data = small
    found = audit(model, data, attacks=["autoattack", "apgd-ce(steps=1)"], eps=0.03, keep_points=True)
    paths = found.save(tmp_path, "a.b")
    assert [path.name for path in paths] == ["a.b.json", "a.b.npz", "a.b.points.safetensors"]
    tensors = load_file(paths[2])
    for name, points in found.points.items():
        assert tensors[f"{name}/image"].tolist() == list(points)
        if points:
            assert torch.equal(tensors[f"{name}/pixels"], torch.stack(list(points.values())))
    load_audit(paths[0])
    replace(found, points={}).save(tmp_path, "a.b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.json", "a.b.npz"]


# What it does not depend on


@pytest.mark.parametrize("name", ["autoattack", "apgd-t(steps=5, targets=2)", "square(queries=40)"])
def test_adding_an_attack_changes_no_other(small: Small, same: Same, name: str) -> None:
    model, data = small
    alone = audit(model, data, attacks=name, eps=0.03, keep_points=True)
    among = audit(model, data, attacks=["square(queries=9)", "pgd-2", "fab(steps=2)", name], eps=0.03, keep_points=True)
    assert among.attacks == ("clean", "square(queries=9)", "pgd-2", "fab(steps=2)", name)
    only = {
        field: {key: getattr(among, field)[key] for key in getattr(alone, field)}
        for field in ("predictions", "broken_by", "points", "settings")
    }
    assert same(alone, replace(among, **only))
    assert torch.equal(among.hits("robust"), torch.stack([among.hits(attack) for attack in among.attacks]).all(0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_verdicts_do_not_depend_on_the_batch_size(small: Small, same: Same, norm: str) -> None:
    model, data = small
    attacks = ["autoattack", "fab(steps=4)", "apgd-dlr(steps=6, restarts=2)"]
    audits = [
        audit(model, data, attacks=attacks, eps=EPS[norm], norm=norm, keep_points=True, batch_size=size)
        for size in (250, 1, 5)
    ]
    assert all(same(audits[0], other) for other in audits[1:])


def test_draws_follow_the_seed_and_the_image(small: Small) -> None:
    model, data = small

    def points(seed: int, images: ImageDataset) -> dict[int, Tensor]:
        found = audit(model, images, attacks="square(queries=3)", eps=0.15, seed=seed, keep_points=True)
        return dict(found.points["square(queries=3)"])

    first, again, other = points(0, data), points(0, data), points(1, data)
    assert first
    assert all(torch.equal(first[row], again[row]) for row in first)
    assert any(not torch.equal(first[row], other[row]) for row in first.keys() & other.keys())
    half = points(0, data.subset(range(8)))
    assert half.keys() == {row for row in first if row < 8}
    assert all(torch.equal(half[row], first[row]) for row in half)


def test_a_wrong_image_is_not_attacked_and_moves_no_draw(small: Small) -> None:
    model, data = small
    labels = data.labels.clone()
    labels[0] = (labels[0] + 1) % 4
    found, usual = (
        audit(model, images, attacks="apgd-ce(steps=6)", eps=0.03, keep_points=True)
        for images in (replace(data, labels=labels), data)
    )
    assert int(found.broken_by["apgd-ce(steps=6)"][0]) == -1
    assert torch.equal(found.predictions["apgd-ce(steps=6)"][1:], usual.predictions["apgd-ce(steps=6)"][1:])


# Precision


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bf16_searches_and_float32_decides(robust_net: nn.Module, digits: ImageDataset, norm: str) -> None:
    eps = {"linf": 0.1, "l2": 0.6}[norm]
    low, full = (
        audit(robust_net, digits, attacks="autoattack", eps=eps, norm=norm, precision=precision, keep_points=True)
        for precision in ("bf16", "fp32")
    )
    assert [found.provenance["search_precision"]["strong"] for found in (low, full)] == ["bf16", "fp32"]
    for found in (low, full):
        assert_confirmed(robust_net, digits, found, "autoattack")
        assert 0.2 < found.average("autoattack") < found.average("clean") - 0.1
    assert int((low.hits("autoattack") != full.hits("autoattack")).sum()) <= 2
    assert torch.equal(low.prediction("clean"), full.prediction("clean"))


def test_search_in_bf16_sees_bf16(small: Small) -> None:
    model, data = small
    seen: set[torch.dtype] = set()
    hook = model.model.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for precision, dtypes in (("fp32", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):
        seen.clear()
        audit(model, data, attacks="apgd-ce(steps=2)", eps=0.03, precision=precision)
        assert seen == dtypes
    hook.remove()


def test_auto_is_bf16_only_where_the_hardware_has_it(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(runner, "has_bf16", lambda device, has=has: has)
        monkeypatch.setattr(runner, "fastest", lambda ways: "bf16")
        found = audit(model, data, attacks="pgd-1,apgd-ce(steps=2)", eps=0.03)
        assert found.provenance["search_precision"] == {"pgd": "fp32", "strong": expected, "fab": "fp32"}
        assert found.provenance["precision"] == "auto"


# The reference engine


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6)])
@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("autoattack", 2),
        ("apgd-ce(steps=20)", 2),
        ("apgd-dlr(steps=20)", 2),
        ("apgd-t(steps=20, targets=3)", 2),
        ("fab(steps=5)", 2),
        ("fab-t(steps=20, targets=3)", 2),
        ("square(queries=200)", 3),
    ],
)
def test_both_engines_agree(
    robust_net: nn.Module, digits: ImageDataset, norm: str, eps: float, name: str, apart: int
) -> None:
    """Sixty images; the draws of the engines differ, and with so few steps and queries they decide an image or two."""
    native, reference = (
        audit(robust_net, digits, attacks=name, eps=eps, norm=norm, engine=engine, precision="fp32", keep_points=True)
        for engine in ("native", "reference")
    )
    assert torch.equal(native.prediction("clean"), reference.prediction("clean"))
    assert int(native.hits(name).sum()) < int(native.hits("clean").sum()) - 4
    assert int((native.hits(name) != reference.hits(name)).sum()) <= apart
    for found in (native, reference):
        assert_confirmed(robust_net, digits, found, name, inside=1e-5)
        assert found.complete
    assert [found.provenance["engine"] for found in (native, reference)] == ["native", "reference"]


def test_the_reference_engine_takes_our_settings(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyautoattack

    engines: list[Any] = []

    class Watched(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, *args: Any, **keys: Any) -> Any:
            engines.append((self, keys["batch_size"], len(args[0])))
            return super().run_standard_evaluation(*args, **keys)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Watched)
    model, data = small
    names = ["apgd-ce(steps=3, restarts=2)", "apgd-t(steps=4, targets=2)", "fab-t(steps=2, targets=9)"]
    names += ["square(queries=7, restarts=2, p_init=0.3, rescale_schedule=true)"]
    audit(model, data, attacks=names, eps=0.02, norm="l2", engine="reference", seed=4, batch_size=8)
    ce, targeted, fab, square = (engine for engine, *_ in engines)
    assert [engine.attacks_to_run for engine, *_ in engines] == [["apgd-ce"], ["apgd-t"], ["fab-t"], ["square"]]
    assert all((engine.norm, engine.epsilon, engine.seed) == ("L2", 0.02, 4) for engine, *_ in engines)
    assert [lanes for _, lanes, _ in engines] == [8] * 4
    assert (ce.apgd.n_iter, ce.apgd.n_restarts) == (3, 2)
    assert (targeted.apgd_targeted.n_iter, targeted.apgd_targeted.n_target_classes) == (4, 2)
    assert (fab.fab.n_iter, fab.fab.n_target_classes) == (2, 3)
    assert (square.square.n_queries, square.square.n_restarts, square.square.p_init) == (7, 2, 0.3)
    assert square.square.rescale_schedule


def test_the_reference_engine_gives_each_member_what_is_still_robust(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyautoattack

    sizes: list[int] = []
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def watched(self: Any, x: Tensor, y: Tensor, **keys: Any) -> Any:
        sizes.append(len(x))
        return run(self, x, y, **keys)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", watched)
    model, data = small
    found = audit(model, data, attacks="autoattack", eps=0.02, engine="reference")
    left = int(found.hits("clean").sum())
    for size, by_class in zip(sizes, found.fell_to("autoattack").values(), strict=True):
        assert size == left
        left -= int(by_class.sum())
    sizes.clear()
    all_fall = audit(model, data, attacks="autoattack", eps=0.5, engine="reference")
    assert all_fall.average("autoattack") == 0
    assert len(sizes) < 4
    assert all_fall.complete


@pytest.mark.parametrize(
    ("name", "classes", "hint"),
    [
        ("apgd-dlr", 2, "DLR needs 3 classes and there are 2"),
        ("autoattack", 3, "targeted DLR needs 4 classes and there are 3"),
        ("square(per_image_windows=true)", 4, "per_image_windows must be false"),
    ],
)
def test_what_the_reference_cannot_run_is_refused_before_any_work(
    tiny_net: Net, tiny_data: Data, name: str, classes: int, hint: str
) -> None:
    model, data = tiny_net(classes=classes), tiny_data((5,) * classes)
    told: list[str] = []
    with pytest.raises(ConfigError, match=hint):
        audit(model, data, attacks=["pgd-2", name], engine="reference", on_progress=lambda *call: told.append(call[0]))
    assert told == []


# Bad input


def test_a_model_that_is_never_right(small: Small) -> None:
    model, data = small
    data = replace(data, labels=(data.labels + 1) % 4)
    for engine in ("native", "reference"):
        found = audit(model, data, attacks=["autoattack", *MEMBERS], eps=0.03, engine=engine, keep_points=True)
        for name in found.broken_by:
            assert torch.equal(found.prediction(name), found.prediction("clean"))
            assert (found.broken_by[name] == -1).all()
            assert found.points[name] == {}
        assert found.complete
        assert found.average("robust") == 0


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (
            2,
            [
                "apgd-t: targeted DLR needs 4 classes and there are 2: the cross-entropy takes its place",
                "apgd-dlr: DLR needs 3 classes and there are 2: the cross-entropy takes its place",
            ],
        ),
        (3, ["apgd-t: targeted DLR needs 4 classes and there are 3: the cross-entropy takes its place"]),
        (4, []),
    ],
)
def test_few_classes_are_said_once_and_audited(
    tiny_net: Net, tiny_data: Data, classes: int, expected: list[str]
) -> None:
    model, data = tiny_net(classes=classes).eval(), tiny_data((6,) * classes)
    with torch.no_grad():
        model.head.bias -= model(data.images / 255).mean(0)
        data = replace(data, labels=model(data.images / 255).argmax(1))
    names = ["autoattack", "autoattack(version=plus)", *MEMBERS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = audit(model, data, attacks=names, eps=0.05, keep_points=True)
    assert [str(one.message) for one in caught if issubclass(one.category, RobustFairWarning)] == expected
    for name in names:
        assert_confirmed(model, data, found, name)
        assert found.points[name]
    ce, dlr = (found.prediction(name) for name in ("apgd-ce(steps=6)", "apgd-dlr(steps=6, restarts=2)"))
    assert int((ce != dlr).sum()) <= (6 if classes > 2 else 2)


def test_a_class_without_images(small: Small) -> None:
    model, data = small
    found = audit(model, data.subset((data.labels != 2).nonzero().squeeze(1)), attacks="autoattack", eps=0.03)
    assert found.count()[2] == found.correct("autoattack")[2] == 0
    assert all(int(by_class[2]) == 0 for by_class in found.fell_to("autoattack").values())
    assert "no-images" in {diagnostic.code for diagnostic in diagnose(found)}
    assert torch.isnan(found.rate("autoattack")[2])


class NotFinite(nn.Module):
    """A network whose logits are no numbers for some images."""

    def __init__(self, model: nn.Module, where: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.where = model, where

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.where(x)[:, None], torch.nan, self.model(x))


def test_logits_that_are_no_numbers_on_clean_images_are_one_clear_error(small: Small) -> None:
    model, data = small
    marked = (data.images[[7, 9, 11]] / 255).flatten(1)
    nan = NotFinite(model, lambda x: (x.flatten(1)[:, None] == marked).all(2).any(1))
    with pytest.raises(ModelError, match="not finite for 3 of 16 images, the first is image 7") as caught:
        audit(nan, data, attacks="autoattack", eps=0.03)
    assert "\n" not in str(caught.value)
    assert "[0, 1]" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_that_are_no_numbers_at_attacked_points_break_an_image(small: Small, precision: Any) -> None:
    model, data = small

    def off_the_grid(x: Tensor) -> Tensor:
        levels = 255 * x.float()
        return ((levels - levels.round()).abs() > 1e-3).flatten(1).any(1)

    found = audit(
        NotFinite(model, off_the_grid), data, attacks=["pgd-2", "autoattack", *MEMBERS], eps=0.0301, precision=precision
    )
    assert torch.equal(found.prediction("pgd-2"), (data.labels + 1) % 4)
    for name in found.broken_by:
        assert found.settings[name]["not_finite"] > 0
        if not name.startswith("fab"):  # FAB leaves the ball, where nothing is judged
            assert found.average(name) == 0
    (diagnostic,) = [diagnostic for diagnostic in diagnose(found) if diagnostic.code == "not-finite"]
    assert diagnostic.severity == "warn"
    assert f"pgd-2 met {len(data)}, autoattack met {found.settings['autoattack']['not_finite']}" in diagnostic.text


class Underflowing(nn.Module):
    """Log of a softmax whose last class underflows, and has no finite logit, in all but dark images."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 100 * (x.mean((1, 2, 3)) - 0.495)
        return torch.stack([-bright.abs(), 0 * bright - 2, -60 - 60 * (bright > 0)], 1).softmax(1).log()


@pytest.mark.parametrize("name", ["pgd-4", "autoattack", *(name for name in MEMBERS if "fab" not in name)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_logit_that_is_no_number_breaks_an_image_whatever_the_margin(name: str, precision: Any) -> None:
    images = torch.full((4, 3, 4, 4), 126, dtype=torch.uint8)
    data = ImageDataset(images=images, labels=torch.zeros(4).long(), class_names=("a", "b", "c"), name="grey")
    found = audit(Underflowing(), data, attacks=name, eps="16/255", precision=precision, checks=False)
    assert found.average("clean") == 1
    assert found.average(name) == 0
    assert found.settings[name]["not_finite"] > 0


def test_logits_that_are_always_numbers_are_no_finding(small: Small) -> None:
    model, data = small
    assert "not-finite" not in {diagnostic.code for diagnostic in diagnose(audit(model, data, attacks="autoattack"))}


def test_radius_zero_breaks_nothing(small: Small) -> None:
    model, data = small
    for norm in ("linf", "l2"):
        found = audit(model, data, attacks=["autoattack", *MEMBERS], eps=0, norm=norm)
        assert found.average("robust") == found.average("clean") == 1


# The model, and the caller


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_the_model_leaves_as_it_came(tiny_net: Net, tiny_data: Data, engine: Any) -> None:
    data = tiny_data((4, 4, 4, 4))
    model = tiny_net(classes=4, dropout=0.5).train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def unchanged() -> bool:
        return (
            [module.training for module in model.modules()] == modes
            and [parameter.requires_grad for parameter in model.parameters()] == flags
            and all(parameter.grad is None for parameter in model.parameters())
            and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        )

    audit(model, data, attacks="autoattack,fab(steps=2)", eps=0.03, engine=engine)
    assert unchanged()

    def stop(attack: str, *_: int) -> None:
        if attack == "autoattack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(model, data, attacks="autoattack", eps=0.03, engine=engine, on_progress=stop)
    assert unchanged()


def test_progress_rises_to_all_of_what_is_attacked(small: Small, each_turn: None) -> None:
    model, data = small
    labels = data.labels.clone()
    labels[:3] = (labels[:3] + 1) % 4
    calls: list[tuple[str, int, int]] = []
    audit(
        model,
        replace(data, labels=labels),
        attacks="autoattack,pgd-1",
        eps=0.02,
        on_progress=lambda *c: calls.append(c),
    )
    told = [call[1:] for call in calls if call[0] == "autoattack"]
    assert {total for _, total in told} == {13}
    assert told == sorted(told)
    assert told[-1] == (13, 13)
    assert len({done for done, _ in told}) > 5


# Interrupted, and gone on with

WHOLE = ["pgd-2", "cw-2(restarts=3)", "autoattack", "fab(steps=3)"]


@pytest.fixture(scope="module")
def kept() -> dict[str, Audit]:
    """The audit that was not interrupted, once it was made."""
    return {}


@pytest.fixture
def interrupted(small: Small, kept: dict[str, Audit], tmp_path: Path, same: Same) -> Iterator[Callable[..., Audit]]:
    """Goes on with an audit that was interrupted, and compares the end with one that was not."""
    model, data = small
    journal = tmp_path / "new" / "deeper" / "journal.safetensors"
    common: dict[str, Any] = {"attacks": WHOLE, "eps": 0.04, "keep_points": True, "batch_size": 6, "checks": False}
    common["precision"] = "fp32"  # in bf16 a copy of the model is searched, which tells of no passes
    if not kept:
        kept["whole"] = audit(model.model, data, **common)
    whole = kept["whole"]
    assert 2 < len(whole.points["autoattack"]) < 14
    assert len(set(whole.broken_by["autoattack"].tolist())) > 2

    def run(**keys: Any) -> Audit:
        found = audit(model.model, data, journal=journal, **common, **keys)
        if found.complete:
            assert same(found, whole)
            assert not journal.exists()
            assert not list(tmp_path.rglob(".*"))
        return found

    yield run
    assert not journal.exists(), "no audit ran to its end"


def run_to_the_end(audit_again: Callable[..., Audit], every: int, at_pass: Any, model: nn.Module) -> int:
    """Interrupt every `every`-th forward pass until the audit is through; how often that was."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for times in range(200):
        try:
            with at_pass(model, every, interrupt):
                audit_again()
        except KeyboardInterrupt:
            continue
        return times
    raise AssertionError("the audit gets nowhere")


@pytest.mark.parametrize("number", [1, 3, 4, 9, 14, 15, 16, 20, 33, 50, 51, 52, 53, 75, 99, 110])
def test_interrupted_in_any_pass_it_ends_as_if_it_had_not_been(
    small: Small, interrupted: Callable[..., Audit], at_pass: Any, number: int
) -> None:
    model = small[0].model

    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_pass(model, number, interrupt), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert interrupted().complete


@pytest.mark.parametrize("every", [25, 40])
def test_interrupted_again_and_again_it_still_comes_to_the_same_end(
    small: Small, interrupted: Callable[..., Audit], at_pass: Any, every: int
) -> None:
    assert run_to_the_end(interrupted, every, at_pass, small[0].model) > 2


@pytest.mark.parametrize("number", [1, 2, 5, 20, 60])
def test_interrupted_in_a_report_of_progress(interrupted: Callable[..., Audit], each_turn: None, number: int) -> None:
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(on_progress=stop)
    assert interrupted().complete


def test_any_other_error_leaves_a_journal_too(
    small: Small, interrupted: Callable[..., Audit], at_pass: Any, each_turn: None
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with at_pass(small[0].model, 60, fail), pytest.raises(RuntimeError, match="out of memory"):
        interrupted()
    assert interrupted().complete


def test_what_was_done_is_not_done_again(small: Small, interrupted: Callable[..., Audit], at_pass: Any) -> None:
    model = small[0].model

    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_pass(model, 0, interrupt) as whole:
        interrupted()
    with at_pass(model, 90, interrupt), pytest.raises(KeyboardInterrupt):
        interrupted()
    with at_pass(model, 0, interrupt) as rest:
        interrupted()
    again = 12  # what measures memory, checks the outputs and ranks the targets, and the turn that was interrupted
    assert whole[0] - 90 <= rest[0] <= whole[0] - 90 + again


def interrupting(attack: str) -> Callable[[str, int, int], None]:
    """Progress of an audit whose user gives up after some images of an attack."""

    def tell(name: str, done: int, total: int) -> None:
        if name == attack and done >= 6:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(("first", "second"), [(5, 16), (7, 2), (3, 8)])
@pytest.mark.parametrize("attack", ["pgd-3", "cw-3(restarts=3)"])
def test_pgd_goes_on_where_it_stood_when_other_batches_fit(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, first: int, second: int
) -> None:
    model, data = small
    journal = tmp_path / "journal.safetensors"
    keys: dict[str, Any] = {"attacks": attack, "eps": 0.3, "checks": False}
    module = sys.modules[audit.__module__]
    monkeypatch.setattr(module, "images_that_fit", lambda *_, **__: first)
    with pytest.raises(KeyboardInterrupt):
        audit(model, data, journal=journal, on_progress=interrupting(attack), **keys)
    with safe_open(journal, "pt") as file:
        assert first <= int(file.get_tensor("now/done")) < len(data)
    monkeypatch.setattr(module, "images_that_fit", lambda *_, **__: second)
    resumed = audit(model, data, journal=journal, **keys)
    assert resumed.complete
    assert resumed.average(attack) == audit(model, data, **keys).average(attack) == 0, "left out, one would hold"


def test_a_journal_of_another_function_with_the_same_weights_is_refused(small: Small, tmp_path: Path) -> None:
    model, data = small
    journal = tmp_path / "journal.safetensors"
    keys: dict[str, Any] = {"attacks": "pgd-3", "eps": 0.02, "checks": False, "journal": journal, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        audit(model, data, on_progress=interrupting("pgd-3"), **keys)
    before = journal.read_bytes()
    handle = model.register_forward_hook(lambda module, given, logits: logits.roll(1, 1))
    with pytest.raises(CheckpointError, match="predicted 16 of 16 clean images otherwise: delete it to begin"):
        audit(model, data, **keys)
    handle.remove()
    assert journal.read_bytes() == before
    assert audit(model, data, **keys).complete


# Stopped by the clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, each_pass: Any) -> Iterator[Callable[[nn.Module], None]]:
    """A function that makes time go by in the passes of a model and of searches alone, a minute each."""
    with ExitStack() as stack:

        def wind(model: nn.Module) -> None:
            now = [0.0]

            def tick() -> None:
                now[0] += 60.0

            stack.enter_context(each_pass(model, tick))
            monkeypatch.setattr("time.monotonic", lambda: now[0])

        yield wind


def test_a_budget_says_what_ran(small: Small, clock: Callable[[nn.Module], None]) -> None:
    model, data = small
    clock(model)
    with pytest.warns(RobustFairWarning, match="60 minutes are over") as caught:
        found = audit(model, data, attacks=["pgd-2", "autoattack", "square(queries=5)"], eps=0.02, max_minutes=60)
    said = " ".join(str(one.message) for one in caught)
    assert not found.complete
    assert found.attacks == ("clean", "pgd-2", "autoattack")
    assert found.provenance["not_run"] == ["square(queries=5)"]
    shares = list(found.settings["autoattack"]["ran"].values())
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0
    assert "square(queries=5) at 0 %" in said
    assert "square(queries=30) of autoattack at 0 %" in said
    assert "upper bound" in said
    assert "goes on" not in said
    (diagnostic,) = [diagnostic for diagnostic in diagnose(found) if diagnostic.code == "cut-short"]
    assert diagnostic.severity == "warn"
    assert "square(queries=30) of autoattack at 0 %" in diagnostic.text
    assert "square(queries=5) at 0 %" in diagnostic.text


def test_pgd_that_was_cut_says_how_far_it_came(small: Small, clock: Callable[[nn.Module], None]) -> None:
    model, data = small
    clock(model)
    with pytest.warns(RobustFairWarning, match=r"pgd-4 at [1-9]\d? %"):
        found = audit(model, data, attacks="pgd-4,pgd-5", eps=0.02, max_minutes=30, batch_size=2, checks=False)
    assert found.provenance["not_run"] == ["pgd-4", "pgd-5"]
    assert found.unfinished() == {"pgd-4": found.provenance["begun"]["pgd-4"], "pgd-5": 0.0}
    assert 0 < found.unfinished("pgd-4")["pgd-4"] < 1


@pytest.mark.parametrize("attacks", ["pgd-2,pgd-3", "cw-2(restarts=2),autoattack"])
def test_a_budget_that_is_over_at_once_still_gets_somewhere(
    small: Small, tmp_path: Path, same: Same, attacks: str
) -> None:
    model, data = small
    keys: dict[str, Any] = {"attacks": attacks, "eps": 0.02, "batch_size": 6}
    journal = tmp_path / "journal.safetensors"
    with pytest.warns(RobustFairWarning, match="The same command goes on"):
        found = audit(model, data, max_minutes=1e-9, journal=journal, **keys)
    calls = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustFairWarning)
        while not found.complete and calls < 500:
            assert journal.exists()
            found = audit(model, data, max_minutes=1e-9, journal=journal, **keys)
            calls += 1
    assert calls > 3
    assert found.complete
    assert same(found, audit(model, data, **keys))
    assert not journal.exists()


@pytest.mark.parametrize("minutes", [8, 17, 25, 38, 60, 100])
def test_cut_anywhere_it_goes_on_to_the_same_end(
    small: Small, interrupted: Callable[..., Audit], clock: Callable[[nn.Module], None], minutes: float
) -> None:
    clock(small[0].model)
    with pytest.warns(RobustFairWarning, match="minutes are over"):
        found = interrupted(max_minutes=minutes)
    assert not found.complete
    assert interrupted().complete


def test_cut_again_and_again(
    small: Small, interrupted: Callable[..., Audit], clock: Callable[[nn.Module], None]
) -> None:
    clock(small[0].model)
    robust = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustFairWarning)
        for _ in range(30):
            found = interrupted(max_minutes=20)
            if "autoattack" in found.attacks:
                robust.append(found.average("autoattack"))
            if found.complete:
                break
    assert found.complete
    assert len(robust) > 2
    assert robust == sorted(robust, reverse=True)


def test_a_budget_that_suffices_leaves_no_trace(small: Small, interrupted: Callable[..., Audit]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustFairWarning)
        assert interrupted(max_minutes=60).complete


def test_the_reference_engine_is_stopped_between_members(
    small: Small,
    tmp_path: Path,
    clock: Callable[[nn.Module], None],
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = small
    whole = audit(model, data, attacks="autoattack", eps=0.02, engine="reference")
    clock(model)
    keys: dict[str, Any] = {"eps": 0.02, "engine": "reference", "journal": tmp_path / "journal.safetensors"}
    with pytest.warns(RobustFairWarning, match=r"square\(queries=30\) of autoattack at 0 %"):
        found = audit(model, data, attacks="autoattack", max_minutes=20, **keys)
    shares = list(found.settings["autoattack"]["ran"].values())
    assert (shares[0], shares[-1]) == (1, 0)
    assert set(shares) == {0, 1}
    assert not found.complete
    began: list[int] = []
    run = strong.AutoAttackRun._reference_member
    monkeypatch.setattr(strong.AutoAttackRun, "_reference_member", lambda *given: began.append(given[1]) or run(*given))
    assert same(audit(model, data, attacks="autoattack", **keys), whole)
    assert began == list(range(4))[sum(map(int, shares)) :]


def test_the_reference_engine_leaves_the_callers_generator_and_keeps_points_in_the_ball(small: Small) -> None:
    model, data = small
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = audit(model, data, attacks="autoattack", eps=0.02, engine="reference", keep_points=True)
    assert torch.equal(torch.get_rng_state(), before)
    points = found.points["autoattack"]
    assert points
    for row, point in points.items():
        assert (point.double() - data.images[row].double() / 255).abs().max() <= 0.02 + 1e-6
        assert 0 <= float(point.min()) <= float(point.max()) <= 1
    assert not audit(model, data, attacks="autoattack", eps=0.02, engine="reference").points


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_budget_must_be_positive(small: Small, minutes: float) -> None:
    with pytest.raises(ConfigError, match="max_minutes must be > 0"):
        audit(*small, attacks="clean", max_minutes=minutes)


def test_engines_are_two(small: Small) -> None:
    with pytest.raises(ConfigError, match="engine must be one of native, reference, got 'pyautoattack'"):
        audit(*small, attacks="clean", engine="pyautoattack")  # type: ignore[arg-type]


def test_parsed_names_are_those_of_the_columns(small: Small) -> None:
    model, data = small
    found = audit(deepcopy(model), data, attacks="APGD_CE(steps=6), square(queries=40, restarts=1)", eps=0.01)
    assert found.attacks == ("clean", "apgd-ce(steps=6)", "square(queries=40)")
    assert [attack.name for attack in parse_attacks(found.attacks[1:])] == list(found.attacks[1:])


@pytest.mark.parametrize(("name", "low"), [("fab-t(steps=2, targets=1)", False), ("autoattack", True)])
def test_fab_searches_in_float32_by_itself_and_as_the_others_in_an_ensemble(
    small: Small, monkeypatch: pytest.MonkeyPatch, name: str, low: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    monkeypatch.setattr(runner, "fastest", lambda ways: "bf16")
    monkeypatch.setattr(runner.AutoAttackRun, "run", lambda run, *given: seen.append(run) or _stop())
    with pytest.raises(KeyboardInterrupt):
        audit(*small, attacks=name, eps=0.03)
    assert seen[0].distance_precision == ("bf16" if low else "fp32")
    assert seen[0].precision == "bf16"


def _stop() -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("faster", "chosen"), [(0.5, "bf16"), (0.95, "fp32"), (2.0, "fp32")])
def test_auto_takes_the_precision_whose_passes_are_clearly_faster(
    small: Small, monkeypatch: pytest.MonkeyPatch, faster: float, chosen: str
) -> None:
    model, data = small
    times = iter([1.0, faster])
    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    monkeypatch.setattr(runner, "seconds", lambda run, images: next(times))
    found = audit(model, data, attacks="apgd-ce(steps=2)", eps=0.02, checks=False)
    assert found.provenance["search_precision"] == {"pgd": "fp32", "strong": chosen, "fab": "fp32"}
    assert found.provenance["searches"]["precision"].startswith(f"{chosen}, of fp32 ")
    assert f"searches in {chosen}" in found.provenance["searches"]["apgd-ce(steps=2)"]


def test_what_was_begun_goes_on_in_the_precision_that_was_chosen(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, data = small
    keys: dict[str, Any] = {"attacks": "apgd-ce(steps=4)", "eps": 0.02, "journal": tmp_path / "journal.safetensors"}
    times = iter([1.0, 0.5])
    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    monkeypatch.setattr(runner, "seconds", lambda run, images: next(times))
    with pytest.warns(RobustFairWarning, match="goes on"):
        audit(model, data, max_minutes=1e-9, checks=False, **keys)
    found = audit(model, data, checks=False, **keys)  # nothing is left of `times`: it is not timed again
    assert found.provenance["search_precision"]["strong"] == "bf16"
    assert found.complete


def test_nothing_is_timed_where_no_attack_of_the_family_runs(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(run: object, images: object) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    monkeypatch.setattr(runner, "seconds", timed)
    assert audit(*small, attacks="pgd-2", eps=0.02, checks=False).provenance["searches"] == {}


def test_a_search_takes_one_thread_where_that_is_faster_and_leaves_the_others(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(strong, "seconds", lambda run, images: float(torch.get_num_threads()))
        found = audit(*small, attacks="apgd-ce(steps=2)", eps=0.02, precision="fp32", checks=False)
        assert ", 1 thread," in found.provenance["searches"]["apgd-ce(steps=2)"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_each_member_took_is_kept(small: Small) -> None:
    spent = audit(*small, attacks="autoattack", eps=0.02, checks=False).provenance["spent"]["autoattack"]
    assert list(spent) == [member.name for member in family.VERSIONS["standard"]]
    assert all(one["passes"] > 0 and one["images"] >= one["passes"] and one["seconds"] > 0 for one in spent.values())
