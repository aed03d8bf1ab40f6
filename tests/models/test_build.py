from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from robustfair.errors import ConfigError, ModelError, UnknownNameError
from robustfair.models import build_model, create_model, describe_model
from robustfair.registry import MODELS

SMALL = {"small-cnn": 8, "resnet9": 8, "resnet18": 8, "preact-resnet18": 8, "wrn-10-1": 1, "dm-wrn-10-1": 1}
SMALL |= {"xcit-s12-p2": 8, "xcit-s12-p16": 8}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64), (2, 28)])
def test_any_channels_and_size_from_eight(name, channels, size):
    model = create_model(name, num_classes=7, in_channels=channels, width=SMALL[name]).eval()
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert (model.num_classes, model.in_channels) == (7, channels)
    assert isinstance(model.head, nn.Linear)


@pytest.mark.parametrize("name", SMALL)
def test_description_builds_the_same_network_again(name):
    model = create_model(name, num_classes=5, in_channels=1, width=SMALL[name], normalise=([0.1307], [0.3081])).eval()
    description = json.loads(json.dumps(describe_model(model)))
    again = build_model(description).eval()
    assert describe_model(again) == description
    assert description["mean"] == [0.1307]
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))


def test_description_sees_through_wrappers():
    model = create_model("small-cnn", width=4)
    assert describe_model(nn.DataParallel(model)) == describe_model(torch.compile(model)) == describe_model(model)


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model(name, width=SMALL[name]).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_every_registered_model_builds_with_its_own_name_and_published_width():
    widths = {"small-cnn": 32, "resnet9": 64, "resnet18": 64, "preact-resnet18": 64}
    assert {*widths, "wrn-28-2", "wrn-28-5", "wrn-28-10", "wrn-34-10", "dm-wrn-28-10", "dm-wrn-70-16"} <= set(MODELS)
    for name in MODELS:
        with torch.device("meta"):
            model = create_model(name)
        assert model.name == name
        published = int(name.split("-")[-1]) if "wrn" in name else 384 if "xcit" in name else None
        assert model.width == widths.get(name, published)


def test_any_wide_resnet_can_be_named():
    model = create_model("WRN_16_2", width=1)
    assert describe_model(model)["name"] == "wrn-16-1"


def test_normalisation_choices():
    def statistics(**kwargs):
        return create_model("small-cnn", width=4, **kwargs).normalise.statistics()

    cifar10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    assert statistics() == statistics(normalise="cifar10") == cifar10
    assert statistics(in_channels=1) == ((0.5,), (0.5,))
    assert statistics(normalise="none") == ((0.0,) * 3, (1.0,) * 3)
    assert statistics(in_channels=1, normalise=([0.25], [2.0])) == ((0.25,), (2.0,))
    assert statistics(normalise="imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics(normalise="half") == ((0.5,) * 3, (0.5,) * 3)


def test_none_passes_pixels_through_bit_for_bit():
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(create_model("small-cnn", width=4, normalise="none").normalise(x), x)


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"normalise": "cifar10", "in_channels": 1}, "mean"),
        ({"normalise": "imagnet"}, "normalise"),
        ({"normalise": "mnist"}, "mean"),
        ({"normalise": ([0.5, 0.5, 0.5],)}, "normalise"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"width": -1}, "width"),
    ],
)
def test_bad_arguments_name_the_field(kwargs, field):
    with pytest.raises(ConfigError, match=f"{field} must be"):
        create_model("small-cnn", **kwargs)


def test_unknown_name_shows_the_nearest():
    with pytest.raises(UnknownNameError, match="preact-resnet18"):
        create_model("preactresnet-18")
    with pytest.raises(ConfigError, match="depth"):
        create_model("wrn-29-2")


def test_foreign_modules_have_no_description():
    with pytest.raises(ModelError, match="Linear cannot be rebuilt"):
        describe_model(nn.Linear(2, 2))


@pytest.mark.parametrize("change", [{"depth": 3}, {"std": None}])
def test_descriptions_with_wrong_keys_are_refused(change):
    description = describe_model(create_model("small-cnn", width=4))
    (key, value) = next(iter(change.items()))
    description = {**description, key: value} if value else {k: v for k, v in description.items() if k != key}
    with pytest.raises(ModelError, match="a model description has the keys"):
        build_model(description)
