from __future__ import annotations

import pytest
import torch

from robustfair.errors import ConfigError
from robustfair.losses import MaximiseCE
from robustfair.objectives import PGDAT, AdversarialObjective, Objective, Trades
from robustfair.registry import OBJECTIVES
from robustfair.values import Batch

BATCH = Batch(x=torch.zeros(3, 2, 4, 4), y=torch.tensor([0, 1, 0]), index=torch.arange(3), seed=0)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_builds_and_says_what_it_reads(name: str) -> None:
    objective = OBJECTIVES.get(name)()
    assert isinstance(objective, Objective)
    assert objective.name == name
    assert "label" in objective.terms
    trains_on_an_attack = objective.attack(BATCH) is not None
    assert trains_on_an_attack == ("x_adv" in objective.reads) == isinstance(objective, AdversarialObjective)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "standard"])
def test_validation_is_pgd_10_on_cross_entropy_in_eval_mode(name: str) -> None:
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        objective = OBJECTIVES.get(name)(norm=norm, eps=eps, attack_mode="train", step_size=eps)
        attack = objective.evaluation_attack(BATCH)
        assert attack.steps == 10
        assert (attack.goal, attack.norm, attack.mode, attack.start) == (MaximiseCE(), norm, "eval", "uniform")
        assert attack.eps.tolist() == pytest.approx([eps] * 3)
        assert float(attack.step_size.max()) * 10 > eps, "too short to cross the ball"


@pytest.mark.parametrize("spelling", ["Linf", "L_INF", "l-inf"])
def test_norms_are_read_in_any_spelling(spelling: str) -> None:
    assert PGDAT(norm=spelling).norm == "linf"  # type: ignore[arg-type]


def test_a_radius_beyond_the_image_is_refused_under_linf_only() -> None:
    for cls in (PGDAT, Trades):
        with pytest.raises(ConfigError, match="Write 8/255, not 8"):
            cls(eps=8.0)
        assert cls(norm="l2", eps=2.0).eps == 2.0


def test_the_step_follows_the_radius_unless_it_is_given() -> None:
    assert PGDAT(eps=0.4).step == 0.1
    assert PGDAT(eps=0.4, step_size=0.3).step == 0.3
    assert PGDAT(eps=0.4, step_size=0.0).step == 0.0


def test_radii_have_the_type_and_device_of_the_images() -> None:
    for dtype in (torch.float32, torch.float64):
        batch = Batch(x=BATCH.x.to(dtype), y=BATCH.y, index=BATCH.index, seed=0)
        assert PGDAT().attack(batch).eps.dtype == dtype
        assert Trades().attack(batch).step_size.shape == (3,)
