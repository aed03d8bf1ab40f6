"""Checks for masked gradients: each fires on a model that deserves it, and none on an ordinary one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.data import ImageDataset
from robustfair.evaluate import masking
from robustfair.evaluate.audit import audit
from robustfair.evaluate.masking import random_output, thorough_findings
from robustfair.evaluate.sanity import Finding, findings
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


def codes(found: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in found]


# Random output


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.dropout(x, 0.2, training=True),
        lambda x: x + 0.05 * torch.randn_like(x),
        lambda x: x.roll(int(torch.randint(1, 4, ())), 3),
    ],
    ids=["dropout", "noise", "shift"],
)
def test_random_output_is_a_warning(robust_net: nn.Module, digits: ImageDataset, change: Any) -> None:
    torch.manual_seed(0)
    (finding,) = random_output(Before(robust_net, change), digits.images / 255)
    assert (finding.code, finding.severity) == ("random-output", "warn")
    assert "of 60 predictions change" in finding.text
    assert "average over the randomness" in finding.advice


def test_predictions_that_change_are_counted() -> None:
    class Alternating(nn.Module):
        """The second half of the images changes its class at every pass."""

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            logits = torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)
            if self.passes % 2:
                logits[len(x) // 2 :] = torch.tensor([1.0, 0.0])
            return logits

    (finding,) = random_output(Alternating(), torch.rand(10, 1, 4, 4))
    assert "up to 1 apart in 5 passes, where logits spread over 1; 5 of 10 predictions change" in finding.text


def test_a_fixed_function_is_none(robust_net: nn.Module, tiny_net: Net, digits: ImageDataset) -> None:
    assert random_output(robust_net, digits.images / 255) == ()
    assert random_output(Before(robust_net, rounded), digits.images / 255) == ()
    dropout = tiny_net(classes=3, dropout=0.5).train()
    assert random_output(dropout, torch.rand(8, 1, 6, 6)) == ()
    assert dropout.training, "it keeps its modes"
    assert dropout.dropout.training


def test_rounding_between_passes_is_none() -> None:
    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.stack([x.flatten(1).sum(1), 5 - x.flatten(1).sum(1)], 1)
            return logits + 1e-6 * torch.rand_like(logits)

    assert random_output(Jitter(), torch.rand(8, 1, 6, 6)) == ()


def test_a_model_of_one_constant_answer_is_none() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 3)

    assert random_output(Constant(), torch.rand(4, 1, 6, 6)) == ()


# The thorough checks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_none_fires_on_an_ordinary_network(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None, norm: Any
) -> None:
    threat = THREAT if norm == "linf" else Threat(norm="l2", eps=0.6, step_size=0.1)
    assert thorough_findings(robust_net, digits, threat) == ()
    assert random_output(robust_net, digits.images / 255) == ()


def test_gradients_that_are_rounded_away(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    masked = Before(robust_net, rounded)
    found = thorough_findings(masked, digits, THREAT)
    assert {"square-beats-pgd", "robust-at-large-radius"} <= set(codes(found))
    assert all(finding.severity == "warn" for finding in found if finding.code != "not-converged")
    by_code = {finding.code: finding for finding in found}
    figures = audit(masked, digits, attacks=["pgd-20", "square(queries=150)"], eps=0.1)
    square, pgd = (f"{100 * figures.average(name):.1f} %" for name in ("square(queries=150)", "pgd-20"))
    assert by_code["square-beats-pgd"].text.startswith(
        f"square(queries=150) leaves {square} of 60 images, pgd-20 {pgd}:"
    )
    assert "At radius 0.5 (linf)" in by_code["robust-at-large-radius"].text
    assert "masked-gradient" in codes(findings(figures)), "an audit sees the zero gradients by itself"


def test_steps_too_short_to_arrive(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    found = thorough_findings(robust_net, digits, Threat(eps=0.1, step_size=0.001))
    by_code = {finding.code: finding for finding in found}
    assert by_code["not-converged"].severity == "note"
    assert "pgd-100" in by_code["not-converged"].text
    assert "60 images" in by_code["not-converged"].text
    assert "robust-at-large-radius" not in by_code


def test_the_large_radius_turns_any_image_grey(robust_net: nn.Module, digits: ImageDataset, small_sample: None) -> None:
    (linf,) = (f for f in thorough_findings(Before(robust_net, rounded), digits, THREAT) if "radius" in f.code)
    assert "At radius 0.5 (linf)" in linf.text
    l2 = Threat(norm="l2", eps=0.6, step_size=0.1)
    found = {f.code: f for f in thorough_findings(Before(robust_net, rounded), digits, l2)}
    assert "At radius 4 (l2)" in found["robust-at-large-radius"].text


def test_the_sample_is_the_first_images_of_each_class(
    robust_net: nn.Module, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float, int]] = []

    def watched(model: nn.Module, data: ImageDataset, **keys: Any) -> Any:
        assert data.fingerprint == digits.limit_per_class(2).fingerprint
        seen.extend((name, keys["eps"], keys["seed"]) for name in [keys["attacks"]])
        return audit(model, data, attacks="pgd-20,pgd-100,pgd-20(restarts=5),square(queries=9)", eps=0.01)

    monkeypatch.setattr(masking, "SAMPLE", 29)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=9)")
    monkeypatch.setattr(masking, "audit", watched)
    thorough_findings(robust_net, digits, THREAT, seed=3)
    assert seen == [(["pgd-20", "pgd-100", "pgd-20(restarts=5)", "square(queries=9)"], 0.1, 3), ("pgd-20", 0.5, 3)]


def test_a_model_that_is_never_right_has_nothing_to_mask(
    robust_net: nn.Module, digits: ImageDataset, small_sample: None
) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -robust_net(x)

    assert audit(Wrong(), digits, attacks="clean").average("clean") == 0
    assert thorough_findings(Wrong(), digits, THREAT) == ()


def test_the_model_leaves_as_it_came(tiny_net: Net, small_sample: None, digits: ImageDataset) -> None:
    model = tiny_net(classes=10, dropout=0.3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    thorough_findings(model, digits.subset(range(6)), THREAT)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
