"""The plan of an audit: what it reads, and what its key tells apart."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from torch import nn

from reference.audits import random_audit
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError
from robustfair.evaluate.plan import AuditPlan, attack_names, plan_audit, threat
from robustfair.evaluate.run import audit
from robustfair.values import Threat

PLAN = AuditPlan(
    attacks=("clean", "pgd-20"),
    threat=Threat(),
    seed=3,
    precision="bf16",
    engine="reference",
    batch_size=100,
    points=True,
    fingerprint="c0ffee",
    images=60,
    checkpoint="best",
    model="net",
)


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


def test_radii_of_two_and_three_are_taken_under_l2() -> None:
    assert (threat("l2", "3").eps, threat("l2", 2).eps, threat("l2", "2", "1").step_size) == (3, 2, 1)
    with pytest.raises(ConfigError, match=r"Did you mean 128/255\? Under l2, 128\.0 is taken as it is"):
        threat("l2", "128")
    with pytest.raises(ConfigError, match=r"Did you mean 3/255\?"):
        threat("linf", "3")


def test_the_key_is_that_of_the_journals_written_so_far() -> None:
    """An audit that an earlier version left unfinished goes on."""
    own = replace(
        PLAN, attacks=attack_names("pgd-20, autoattack,clean"), threat=threat("l2", "0.5"), seed=0, model=None
    )
    own = replace(own, precision="auto", engine="native", batch_size=None, points=False)
    assert (own.journal_name, PLAN.key) == ("unfinished-f9f9b14d.safetensors", "e5104ea3")


@pytest.mark.parametrize("field", [field.name for field in fields(AuditPlan)])
def test_plans_that_differ_in_anything_have_other_keys(field: str) -> None:
    other: Any = {
        "attacks": ("clean", "pgd-20", "cw-20"),
        "threat": Threat(step_size=1 / 255),
        "precision": "fp32",
        "engine": "native",
        "points": False,
    }.get(field, 7 if field in ("seed", "batch_size", "images") else "other")
    changed = replace(PLAN, **{field: other})
    assert changed.key != PLAN.key
    assert changed.journal_name != PLAN.journal_name
    assert changed.stem(changed.attacks, complete=True) != PLAN.stem(PLAN.attacks, complete=True)


def test_the_usual_batch_size_is_one_plan_whether_it_is_named_or_not() -> None:
    assert replace(PLAN, batch_size=None).key == replace(PLAN, batch_size=250).key


def test_the_stem_tells_what_ran() -> None:
    assert PLAN.stem(["clean", "pgd-20"], complete=True) == f"clean,pgd-20_linf-8-255_best_60-images_seed-3_{PLAN.key}"
    bare = replace(PLAN, seed=0, checkpoint=None)
    assert bare.stem(["clean"], complete=False) == f"clean_linf-8-255_60-images_cut_{bare.key}"
    many = bare.stem([f"pgd-{steps}" for steps in range(100)], complete=True)
    assert many.startswith("pgd-0,pgd-1,")
    assert len(many) < 130


def test_an_audit_has_the_key_of_its_plan(small: tuple[nn.Module, ImageDataset]) -> None:
    model, data = small
    settings: dict[str, Any] = {"attacks": "PGD-2, cw-2(restarts=2)", "eps": 0.02, "seed": 5, "batch_size": 4}
    done = audit(model, data, **settings)
    assert AuditPlan.of(done) == plan_audit(data, **settings)
    assert plan_audit(data, **settings).attacks == done.attacks


def test_an_audit_that_was_cut_has_the_key_of_all_that_was_asked_for() -> None:
    about = {"seed": 0, "precision": "auto", "engine": "native", "batch_size": 250}
    whole = random_audit(0, provenance={**about, "not_run": []})
    cut = replace(whole, predictions={"clean": whole.predictions["clean"]})
    cut = replace(cut, provenance={**about, "not_run": list(whole.attacks[1:])})
    assert AuditPlan.of(cut).key == AuditPlan.of(whole).key
