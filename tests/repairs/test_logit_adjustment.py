from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reference import logit_adjustment as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, RobustFairWarning
from robustfair.models import create_model, find_head
from robustfair.repairs import HWNwB, PostHocLogitAdjustment, ReadsRun, repair
from robustfair.runs.composition import read_repair

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]

COUNTS = (500, 100, 10)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_predictions_are_those_of_the_formula(tiny_net: Net, tau: float) -> None:
    model = tiny_net(dtype=torch.float64).eval()
    x = torch.rand(60, 1, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        fixed = PostHocLogitAdjustment(prior=COUNTS, tau=tau)(model)(x)
    shift = torch.tensor(reference.log_prior(COUNTS, tau), dtype=torch.float64)
    torch.testing.assert_close(fixed, logits - shift, rtol=0, atol=1e-9)
    assert fixed.argmax(1).tolist() == reference.predicted(logits.tolist(), COUNTS, tau)


def test_all_but_the_bias_of_the_head_stays_and_the_model_is_left_alone(tiny_net: Net) -> None:
    model = tiny_net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = PostHocLogitAdjustment(prior=COUNTS)(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"head.bias"}
    assert after.training
    assert after.head.bias.requires_grad


@pytest.mark.parametrize("prior", [(4, 4, 4), (0.5, 0.5, 0.5)])
def test_an_equal_prior_predicts_the_same(tiny_net: Net, prior: tuple[float, ...]) -> None:
    model, x = tiny_net(dtype=torch.float64).eval(), torch.rand(40, 1, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        moved = PostHocLogitAdjustment(prior=prior)(model)(x) - model(x)
    assert float(moved.max() - moved.min()) < 1e-9


def test_adding_in_training_and_taking_off_afterwards_are_each_others_inverse(tiny_net: Net) -> None:
    """A model that fits z + log pi, repaired by 1 / pi, gives z + log pi."""
    model, x = tiny_net(dtype=torch.float64).eval(), torch.rand(8, 1, 5, 5, dtype=torch.float64)
    there = PostHocLogitAdjustment(prior=COUNTS)(model)
    back = PostHocLogitAdjustment(prior=tuple(1 / n for n in COUNTS))(there)
    with torch.no_grad():
        moved = back(x) - model(x)
    assert float(moved.max() - moved.min()) < 1e-6  # the 1e-12 beside the prior


def test_a_head_without_a_bias_gets_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3, bias=False))
    fixed = PostHocLogitAdjustment(prior=COUNTS)(model)
    assert model[1].bias is None
    x = torch.rand(5, 1, 3, 3)
    with torch.no_grad():
        moved = fixed(x) - model(x)
    torch.testing.assert_close(moved[0], -torch.tensor(reference.log_prior(COUNTS, 1)), rtol=1e-5, atol=1e-5)


def test_predicted_counts_what_the_model_says_in_eval_mode(tiny_net: Net, tiny_data: Data) -> None:
    model, data = tiny_net(dropout=0.5).train(), tiny_data((30, 20, 10))
    method = PostHocLogitAdjustment(prior="predicted", images=data)
    with torch.no_grad():
        labels = model.eval()(data.images.float() / 255).argmax(1)
    counts = torch.bincount(labels, minlength=3).clamp(min=0.5).tolist()
    shift = torch.tensor(reference.log_prior(counts, 1))
    fixed = method(model.train())
    assert model.training
    torch.testing.assert_close(find_head(fixed).bias, model.head.bias - shift, rtol=1e-5, atol=1e-5)


def test_a_run_fills_in_what_is_not_given(tiny_data: Data) -> None:
    def never() -> ImageDataset:
        raise AssertionError("the images are not needed")

    held = tiny_data()
    assert isinstance(PostHocLogitAdjustment(), ReadsRun)
    assert not isinstance(HWNwB(), ReadsRun)
    assert PostHocLogitAdjustment().of_run([3, 2, 1], never) == PostHocLogitAdjustment(counts=(3, 2, 1))
    own = PostHocLogitAdjustment(counts=(1, 1, 2))
    assert own.of_run([3, 2, 1], never) is own
    numbers = PostHocLogitAdjustment(prior=COUNTS)
    assert numbers.of_run([3, 2, 1], never) is numbers
    predicted = PostHocLogitAdjustment(prior="predicted")
    assert predicted.of_run([3, 2, 1], lambda: held) == PostHocLogitAdjustment(prior="predicted", images=held)
    assert (predicted.needs_data, numbers.needs_data) == (True, False)
    with pytest.raises(ConfigError, match=r"logit-adjustment: counts must be above 0 in every class, got \[3, 0, 1\]"):
        PostHocLogitAdjustment().of_run([3, 0, 1], never)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "counts must be given, got None. A run records them; else give the number of training images"),
        ({"prior": "predicted"}, "images must be given, got None. Give images that the model was not trained on"),
        ({"prior": (1, 2)}, "prior must be 10 numbers, one a class, got 2"),
        ({"counts": (1, 2)}, "prior must be 10 numbers, one a class, got 2"),
        ({"prior": "accuracy"}, "prior must be counts, predicted, or a positive number a class"),
        ({"prior": (1.0, -1.0)}, "prior must be counts, predicted, or a positive number a class"),
        ({"counts": (0, 1)}, "counts must be a list, each entry a whole number >= 1"),
        ({"tau": -1}, "tau must be"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    model = create_model("small-cnn", in_channels=1, width=4)
    with pytest.raises(ConfigError, match=f"^logit-adjustment: {message}"):
        repair(model, PostHocLogitAdjustment(**given))


def test_images_of_other_classes_are_refused(tiny_data: Data) -> None:
    model = create_model("small-cnn", in_channels=1, width=4)
    with pytest.raises(ConfigError, match="images must be of 10 classes, as the model has, got 3"):
        repair(model, PostHocLogitAdjustment(prior="predicted", images=tiny_data()))


def test_it_is_named_with_its_prior() -> None:
    assert read_repair("logit-adjustment(prior=predicted, tau=0.5)") == PostHocLogitAdjustment(
        prior="predicted", tau=0.5
    )
    assert read_repair('logit-adjustment(prior="3, 2, 1")').prior == (3, 2, 1)
    assert PostHocLogitAdjustment(tau=0.5).describe() == (
        "the log of the prior counts, to the power 0.5, taken off the head's bias"
    )


@pytest.mark.parametrize("given", [{"counts": (4,) * 10}, {"tau": 0, "counts": tuple(range(1, 11))}])
def test_a_repair_that_changes_nothing_is_said(given: dict[str, Any]) -> None:
    model = create_model("small-cnn", in_channels=1, width=4)
    with pytest.warns(RobustFairWarning, match="takes as much off every logit: it changes nothing; give another prior"):
        repair(model, PostHocLogitAdjustment(**given))


def test_a_run_that_held_nothing_out_has_no_predictions_to_count() -> None:
    message = "prior must be counts or numbers where the run held no images out, got 'predicted'"
    with pytest.raises(ConfigError, match=message):
        PostHocLogitAdjustment(prior="predicted").of_run([3, 2, 1], lambda: None)


def test_numbers_are_one_a_class_before_there_is_a_model() -> None:
    for given in ({"prior": (1, 2)}, {"counts": (1, 2)}):
        PostHocLogitAdjustment(**given).check_classes(2)
        with pytest.raises(ConfigError, match="logit-adjustment: prior must be 3 numbers, one a class, got 2"):
            PostHocLogitAdjustment(**given).check_classes(3)
