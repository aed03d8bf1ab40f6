"""Checks for masked gradients: each fires on a model that deserves it, and none on an ordinary one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfair.data import ImageDataset
from robustfair.evaluate import diagnose_gradients
from robustfair.evaluate.diagnostics import masking
from robustfair.evaluate.diagnostics.base import Diagnostic
from robustfair.evaluate.diagnostics.results import diagnose
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.values import Threat

Net = Callable[..., nn.Module]
THREAT = Threat(eps=0.1, step_size=0.025)


class Before(nn.Module):
    """A network behind a change of its images."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.change(x))


def rounded(x: Tensor) -> Tensor:
    """Eight grey levels; the gradient of a rounding is zero."""
    return torch.round(7 * x) / 7


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images and queries than a real check takes."""
    monkeypatch.setattr(masking, "SAMPLE", 60)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=150)")


def codes(found: tuple[Diagnostic, ...]) -> list[str]:
    return [diagnostic.code for diagnostic in found]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_none_warns_of_an_ordinary_network(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None, norm: Any
) -> None:
    threat = THREAT if norm == "linf" else Threat(norm="l2", eps=0.6, step_size=0.1)
    found = diagnose_gradients(robust_net, digits, threat)
    assert all(diagnostic.severity == "note" for diagnostic in found), "one image of sixty is more than a point"


def test_gradients_that_are_rounded_away(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    masked = Before(robust_net, rounded)
    found = diagnose_gradients(masked, digits, THREAT)
    assert {"square-beats-pgd", "robust-at-large-radius"} <= set(codes(found))
    assert all(diagnostic.severity == "warn" for diagnostic in found if diagnostic.code != "not-converged")
    by_code = {diagnostic.code: diagnostic for diagnostic in found}
    figures = audit(masked, digits, attacks=["pgd-20", "square(queries=150)"], eps=0.1)
    square, pgd = (f"{100 * figures.average(name):.1f} %" for name in ("square(queries=150)", "pgd-20"))
    assert by_code["square-beats-pgd"].text.startswith(
        f"square(queries=150) leaves {square} of 60 images, pgd-20 {pgd}, "
    )
    assert "points fewer (95 % interval" in by_code["square-beats-pgd"].text
    assert "At radius 0.5 (linf)" in by_code["robust-at-large-radius"].text
    assert "masked-gradient" in codes(diagnose(figures)), "an audit sees the zero gradients by itself"


def test_steps_too_short_to_arrive(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    found = diagnose_gradients(robust_net, digits, Threat(eps=0.1, step_size=0.001))
    by_code = {diagnostic.code: diagnostic for diagnostic in found}
    assert by_code["not-converged"].severity == "note"
    assert "pgd-100" in by_code["not-converged"].text
    assert "60 images" in by_code["not-converged"].text
    assert "robust-at-large-radius" not in by_code


def test_the_large_radius_turns_any_image_grey(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    (linf,) = (f for f in diagnose_gradients(Before(robust_net, rounded), digits, THREAT) if "radius" in f.code)
    assert "At radius 0.5 (linf)" in linf.text
    l2 = Threat(norm="l2", eps=0.6, step_size=0.1)
    found = {f.code: f for f in diagnose_gradients(Before(robust_net, rounded), digits, l2)}
    assert "At radius 4 (l2)" in found["robust-at-large-radius"].text


def test_the_sample_is_the_first_images_of_each_class(
    robust_net: nn.Module, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[str, ...], float, int, str]] = []

    def watched(model: nn.Module, data: ImageDataset, **keys: Any) -> Any:
        assert data.fingerprint == digits.limit_per_class(2).fingerprint
        assert not keys["checks"]
        seen.append((keys["attacks"], keys["eps"], keys["seed"], keys["precision"]))
        return audit(model, data, attacks="pgd-20,pgd-100,pgd-20(restarts=5),square(queries=9)", eps=0.01)

    monkeypatch.setattr(masking, "SAMPLE", 29)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=9)")
    monkeypatch.setattr(masking, "audit", watched)
    diagnose_gradients(robust_net, digits, THREAT, seed=3, precision="bf16")
    again = ("pgd-20", "pgd-100", "pgd-20(restarts=5)", "square(queries=9)")
    assert seen == [(again, 0.1, 3, "bf16"), (("pgd-20",), 0.5, 3, "bf16")]


def test_a_model_that_is_never_right_has_nothing_to_mask(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None
) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -robust_net(x)

    assert audit(Wrong(), digits, attacks="clean").average("clean") == 0
    assert diagnose_gradients(Wrong(), digits, THREAT) == ()


def test_the_model_leaves_as_it_came(tiny_net: Net, small_sample: None, digits: ImageDataset) -> None:
    model = tiny_net(classes=10, dropout=0.3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnose_gradients(model, digits.subset(range(6)), THREAT)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Custom(torch.autograd.Function):
    """The identity, through which no gradient can be taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no backward here")


@pytest.mark.parametrize(
    ("change", "why"),
    [(Custom.apply, "cannot be taken through Before: no backward here"), (Tensor.detach, "gives no gradient")],
    ids=["raises", "detaches"],
)
def test_without_gradients_square_is_made_alone_and_that_is_said(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None, change: Callable[[Tensor], Tensor], why: str
) -> None:
    (found,) = diagnose_gradients(Before(robust_net, change), digits, THREAT)
    assert (found.code, found.severity) == ("no-gradient", "warn")
    assert "with gradients, by pgd-20, pgd-100 and pgd-20(restarts=5), could not be made: the " in found.text
    assert why in found.text
    seen = audit(robust_net, digits, attacks="square(queries=150)", eps=0.1)
    left, clean = (f"{100 * seen.average(name):.1f} %" for name in ("square(queries=150)", "clean"))
    assert found.text.endswith(
        f"square(queries=150) by itself leaves {left} of 60 images; {clean} are right when clean."
    )
    assert left != clean


# What counts as a drop


def leaving(**left: int) -> Audit:
    """An audit of 256 images of which so many stay right; attacks of the checks by short names."""
    names = {"base": masking.BASE, "longer": masking.LONGER, "restarted": masking.RESTARTED, "square": masking.SQUARE}
    labels = torch.arange(256) % 2
    columns = {names[key]: torch.where(torch.arange(256) < n, labels, 1 - labels) for key, n in left.items()}
    return Audit(
        model="made",
        data="made",
        class_names=("a", "b"),
        index=torch.arange(256),
        labels=labels,
        predictions={"clean": labels, **columns},
        settings={name: {} for name in ("clean", *columns)},
        threat=THREAT,
    )


def judged(monkeypatch: pytest.MonkeyPatch, digits: ImageDataset, found: Audit) -> list[Diagnostic]:
    """The diagnostics on a model for which the attacks of the checks leave this."""
    far = leaving(base=0)
    monkeypatch.setattr(masking, "audit", lambda *given, **keys: found if len(keys["attacks"]) > 1 else far)
    return list(diagnose_gradients(nn.Flatten(), digits, THREAT))


def test_more_than_a_point_is_flagged_with_its_interval(monkeypatch: pytest.MonkeyPatch, digits: ImageDataset) -> None:
    assert judged(monkeypatch, digits, leaving(base=128, longer=126, restarted=128, square=128)) == []
    (diagnostic,) = judged(monkeypatch, digits, leaving(base=128, longer=125, restarted=120, square=128))
    assert (diagnostic.code, diagnostic.severity) == ("not-converged", "note")
    assert diagnostic.text.startswith(
        "pgd-20 leaves 50.0 % of 256 images, pgd-100 48.8 %, 1.2 points fewer (95 % interval -0.3 to 2.7); "
        "pgd-20(restarts=5) 46.9 %, 3.1 points fewer (95 % interval 0.9 to 5.3): "
    ), diagnostic.text


@pytest.mark.parametrize(("left", "severity"), [(126, None), (125, "note"), (110, "warn")])
def test_square_is_noted_from_a_point_on_and_warned_of_beyond_chance(
    monkeypatch: pytest.MonkeyPatch, digits: ImageDataset, left: int, severity: str | None
) -> None:
    found = judged(monkeypatch, digits, leaving(base=128, longer=128, restarted=128, square=left))
    assert [(diagnostic.code, diagnostic.severity) for diagnostic in found] == (
        [("square-beats-pgd", severity)] if severity else []
    )
    assert all("points fewer (95 % interval " in diagnostic.text for diagnostic in found)


# Time and progress


def test_without_time_nothing_runs_and_that_is_said(digits: ImageDataset, small_sample: None) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    (diagnostic,) = diagnose_gradients(Never(), digits, THREAT, max_minutes=-0.5)
    assert (diagnostic.code, diagnostic.severity) == ("checks-cut", "note")
    assert "the time budget left pgd-20 at 0 %, pgd-100 at 0 %, " in diagnostic.text
    assert diagnostic.text.endswith("square(queries=150) at 0 %, pgd-20 at a large radius at 0 %.")


def test_attacks_that_were_cut_prove_nothing(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a masked model, by a clock that a pass moves on by a minute."""
    masked, now = Before(robust_net, rounded), [0.0]
    masked.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 60.0))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    begun: dict[str, float] = {}
    whole = diagnose_gradients(masked, digits, THREAT, on_progress=lambda name, *_: begun.setdefault(name, now[0]))
    assert {"square-beats-pgd", "robust-at-large-radius"} <= set(codes(whole))
    early = diagnose_gradients(masked, digits, THREAT, max_minutes=10)
    assert codes(early) == ["checks-cut"]
    assert "pgd-100 at 0 %" in early[0].text
    half = diagnose_gradients(masked, digits, THREAT, max_minutes=begun["check square(queries=150)"] / 60 + 1)
    assert set(codes(half)) <= {"not-converged", "checks-cut"}
    assert re.search(r"the time budget left square\(queries=150\) at [1-9]\d? %, pgd-20 at a large", half[-1].text)


def test_without_gradients_and_time_square_is_named_and_proves_nothing(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind, now = Before(robust_net, Tensor.detach), [0.0]
    blind.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 60.0))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    first, cut = diagnose_gradients(blind, digits, THREAT, max_minutes=15)
    assert (first.code, cut.code) == ("no-gradient", "checks-cut")
    assert "by itself" not in first.text
    assert "square(queries=150) at " in cut.text


def test_progress_bears_the_names_of_the_checks(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None
) -> None:
    told: list[tuple[str, int, int]] = []
    diagnose_gradients(robust_net, digits, THREAT, on_progress=lambda *call: told.append(call))
    names = ["clean", "pgd-20", "pgd-100", "pgd-20(restarts=5)", "square(queries=150)"]
    far = [f"check {name} at a large radius" for name in ("clean", "pgd-20")]
    assert list(dict.fromkeys(name for name, *_ in told)) == [*(f"check {name}" for name in names), *far]
    assert ("check clean", 60, 60) in told
