"""Explanations: every line follows from the plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from torch import nn

from robustfair.methods import ABSLD, CCM, CCR, EMA, FairARD, Method
from robustfair.methods.compose import compose
from robustfair.objectives import PGDAT, RSLAD, Standard, Trades
from robustfair.registry import BUNDLES, METHODS, OBJECTIVES
from robustfair.report.explain import explain_plan, summary


def explained(text: str) -> dict[str, list[str]]:
    """The lines below every heading; headings by the name before the colon."""
    found: dict[str, list[str]] = {}
    for block in re.split(r"\n(?! )", text):
        heading, *lines = block.splitlines()
        found[heading.split(":")[0]] = [line.strip() for line in lines]
    return found


def test_who_edits_what() -> None:
    plan = compose(Trades(beta=3, eps=4 / 255), [CCM(begin=1), CCR(begin=2), EMA(decay=0.9)])
    found = explained(explain_plan(plan))
    assert list(found) == ["trades", "ccm", "ccr", "ema"]
    settings, attack, terms = found["trades"]
    assert {"norm=linf", "eps=4/255", "step_size=none", "steps=10", "beta=3"} <= set(settings.split(", "))
    assert attack == "attack: 10 steps of 1/255 in linf"
    assert terms == "loss terms: consistency, label"
    assert found["ccm"] == ["lam=none, begin=1", "acts in: attack, at_epoch", "sets: attack.eps"]
    assert found["ccr"] == [
        "lam=0.5, begin=2",
        "acts in: loss, at_epoch",
        "sets: loss.consistency, loss.label, role.class_weight",
    ]
    assert found["ema"][-1] == "sets: export.ema"
    assert "after_step" in found["ema"][1]


def test_an_objective_alone() -> None:
    found = explained(explain_plan(compose(PGDAT(norm="l2", eps=0.5, steps=7))))
    assert list(found) == ["pgd-at"]
    assert "attack: 7 steps of 0.05859375 in l2" in found["pgd-at"]


def test_a_teacher_is_named_and_never_read() -> None:
    plan = compose(RSLAD(teacher="runs/wrn"), [ABSLD(), FairARD()])
    found = explained(explain_plan(plan))
    assert "teacher=runs/wrn" in found["rslad"][0]
    assert found["rslad"][2] == "loss terms: distil, distil_clean"
    assert found["absld"][1:] == ["acts in: prepare, after_step, at_epoch", "sets: batch.teacher"]
    assert found["fair-ard"][2] == "sets: attack.watch, loss.weight, role.class_weight"
    given = explained(explain_plan(compose(RSLAD(teacher=nn.Linear(2, 2)))))
    assert "teacher=Linear" in given["rslad"][0].split(", ")


def test_training_without_an_attack_names_none() -> None:
    text = explain_plan(compose(Standard(), [EMA()]))
    assert "attack:" not in text
    assert explained(text)["standard"] == ["no settings", "loss terms: label"]


def test_methods_that_would_not_act_are_noted_when_the_length_is_known() -> None:
    plan = compose(Trades(), [CCM(), EMA(begin=3)])
    assert "note:" not in explain_plan(plan)
    assert "note:" not in explain_plan(plan, 11)
    notes = [line for line in explain_plan(plan, 3).splitlines() if line.startswith("  note: ")]
    assert [line.split()[1] for line in notes] == ["ccm", "ema"]


def test_a_shared_claim_is_named_with_its_order() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Method):
        """Another radius."""

        name = "other"
        claims = frozenset({"attack.eps"})

    text = explain_plan(compose(Trades(), [CCM(), Other()], allow=frozenset({"attack.eps"})))
    assert text.splitlines()[-1] == "shared by permission, applied in list order: attack.eps"
    assert explained(text)["other"] == ["no settings", "acts in:", "sets: attack.eps"]


@pytest.mark.parametrize("registry", [OBJECTIVES, METHODS, BUNDLES], ids=["objectives", "methods", "bundles"])
def test_every_entry_is_summed_up_in_one_sentence(registry) -> None:
    for name in registry:
        text = summary(registry.get(name))
        assert 15 < len(text) < 200, name
        assert not text.endswith("."), name


def test_a_summary_is_the_first_sentence() -> None:
    class Cited:
        """Normalisation (Wei et al. 2023), by 1.5 at most
        over two lines. More follows."""

    assert summary(Cited) == "Normalisation (Wei et al. 2023), by 1.5 at most over two lines"
    assert summary(type("Bare", (), {})) == ""
