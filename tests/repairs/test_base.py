from __future__ import annotations

import dataclasses

import pytest
import torch

from robustfair.errors import UnknownNameError
from robustfair.models import create_model, head_norms
from robustfair.registry import REPAIRS
from robustfair.repairs import HWNwB, repair


def test_a_name_and_its_defaults_are_the_same_repair():
    model = create_model("small-cnn", width=4)
    by_name, by_value = repair(model, "HWNwB"), repair(model, HWNwB())
    assert torch.equal(by_name.head.weight, by_value.head.weight)
    assert not torch.equal(by_name.head.weight, model.head.weight)


def test_a_repair_with_settings_keeps_them():
    model = create_model("small-cnn", width=4)
    repaired = repair(model, HWNwB(target_norm="mean"))
    torch.testing.assert_close(head_norms(repaired), head_norms(model).mean().expand(10))


def test_an_example_reaches_the_search_for_the_head():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 9 * 7, 3))
    repaired = repair(model, "hwnwb", example=torch.rand(1, 1, 11, 9))
    torch.testing.assert_close(repaired[2].weight.norm(dim=1), torch.ones(3))


def test_unknown_repair_shows_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean hwnwb"):
        repair(create_model("small-cnn", width=4), "hwnb")


@pytest.mark.parametrize("name", list(REPAIRS))
def test_every_repair_is_frozen_bears_its_name_and_builds_by_default(name):
    repair = REPAIRS.get(name)()
    assert dataclasses.is_dataclass(repair)
    assert repair.name == name
    assert isinstance(repair.needs_data, bool)
    assert repair.describe()
    for field in dataclasses.fields(repair):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(repair, field.name, None)
