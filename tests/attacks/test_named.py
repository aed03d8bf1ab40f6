"""Attack names: reading, canonical text, defaults, and the attacks they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.attacks.named import AttackKind, NamedAttack, list_attacks, parse_attacks
from robustfair.attacks.pgd import STARTS, FreezeFooled
from robustfair.errors import ConfigError, RecipeError, RobustFairWarning, UnknownNameError
from robustfair.losses import MaximiseCE, MaximiseMargin
from robustfair.registry import ATTACKS
from robustfair.values import Batch, Threat

THREAT = Threat(norm="linf", eps=0.2, step_size=0.05)
BATCH = Batch(x=torch.zeros(3, 2, 4, 4), y=torch.tensor([0, 1, 0]), index=torch.arange(3), seed=0)


def only(text: str) -> NamedAttack:
    (attack,) = parse_attacks(text)
    return attack


def test_pgd_takes_step_and_radius_of_the_threat() -> None:
    attack = only("pgd-20").on(BATCH, THREAT)
    assert attack.steps == 20
    assert attack.eps.tolist() == pytest.approx([0.2] * 3)
    assert attack.step_size.tolist() == pytest.approx([0.05] * 3)
    assert (attack.norm, attack.start, attack.keep, attack.restarts, attack.mode) == (
        "linf",
        "uniform",
        "last",
        1,
        "eval",
    )
    assert attack.goal == MaximiseCE()
    assert attack.stop is None
    assert only("cw-20").on(BATCH, THREAT).stop == FreezeFooled()


def test_cw_is_the_same_loop_on_the_margin() -> None:
    attack = only("cw-20").on(BATCH, THREAT)
    assert attack.goal == MaximiseMargin()
    assert "not the minimum-norm attack" in only("cw-20").describe(THREAT)
    assert "linf or l2 PGD" in dict(list_attacks())["cw-K"]


def test_fgsm_is_one_step_of_the_radius_from_the_image() -> None:
    attack = only("fgsm").on(BATCH, THREAT)
    assert (attack.steps, attack.start) == (1, "zero")
    assert attack.step_size.tolist() == pytest.approx([0.2] * 3)
    assert only("fgsm(step_size=0.1)").on(BATCH, THREAT).step_size.tolist() == pytest.approx([0.1] * 3)


def test_clean_attacks_nothing() -> None:
    clean = only("clean")
    assert (clean.name, clean.steps, clean.needs_gradient, clean.settings(THREAT)) == ("clean", 0, False, {})
    with pytest.raises(ConfigError, match="clean"):
        clean.on(BATCH, THREAT)


def test_options_are_read() -> None:
    attack = only("pgd-20(restarts=5, step_size=2/255, start=gauss001, freeze=false, keep=best)").on(BATCH, THREAT)
    assert (attack.restarts, attack.start, attack.stop, attack.keep) == (5, "gauss001", None, "best")
    assert attack.step_size.tolist() == pytest.approx([2 / 255] * 3)


def test_settings_hold_everything_as_json_values() -> None:
    assert only("cw-50(restarts=5)").settings(THREAT) == {
        "norm": "linf",
        "eps": 0.2,
        "step_size": 0.05,
        "steps": 50,
        "start": "uniform",
        "restarts": 5,
        "goal": "margin",
        "freeze": True,
        "keep": "last",
    }


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("PGD_20", "pgd-20"),
        ("pgd-20()", "pgd-20"),
        ("pgd-020", "pgd-20"),
        ("pgd-20(restarts=1, start=uniform, freeze=false)", "pgd-20"),
        ("pgd-20(freeze=true, restarts=3)", "pgd-20(restarts=3, freeze=true)"),
        ("pgd-20(alpha=2/255)", "pgd-20(step_size=2/255)"),
        ("pgd-20(step-size=0.01)", "pgd-20(step_size=0.01)"),
        ("fgsm(start=zero)", "fgsm"),
        ("fgsm(start=uniform)", "fgsm(start=uniform)"),
    ],
)
def test_name_is_canonical(text: str, name: str) -> None:
    assert only(text).name == name


@given(
    kind=st.sampled_from(["fgsm", "pgd", "cw"]),
    steps=st.integers(1, 500),
    restarts=st.integers(1, 20),
    step_size=st.none() | st.floats(1e-4, 0.5),
    start=st.sampled_from(sorted(STARTS)),
    freeze=st.booleans(),
    keep=st.sampled_from(["last", "best"]),
)
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings(f"ignore::{RobustFairWarning.__module__}.{RobustFairWarning.__name__}")
def test_name_reads_back_as_the_same_attack(kind, steps, restarts, step_size, start, freeze, keep) -> None:
    attack = NamedAttack(
        kind=kind,
        steps=1 if kind == "fgsm" else steps,
        restarts=1 if start == "zero" else restarts,
        step_size=step_size,
        start=start,
        freeze=freeze,
        keep=keep,
    )
    assert only(attack.name) == attack


def test_lists_split_at_commas_outside_brackets() -> None:
    names = ["clean", "pgd-20(restarts=2, start=uniform-unclipped)", "cw-20"]
    assert [attack.name for attack in parse_attacks(", ".join(names))] == names
    assert [attack.name for attack in parse_attacks(names)] == names
    assert [attack.name for attack in parse_attacks([names[0], ",".join(names[1:])])] == names


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("pdg-20", "did you mean pgd-20"),
        ("pgd20", "did you mean pgd-20"),
        ("pgd-2o", "pgd-2"),
        ("pdg-7", "pgd-7"),
        ("cv-50", "cw-50"),
        ("clena", "clean"),
        ("auto-attack", "did you mean autoattack"),
        ("triangle", "known: apgd-ce, apgd-dlr, apgd-t, autoattack, clean, cw-20, fab, fab-t, fgsm, pgd-20, square"),
        ("pgd-20(restart=5)", "did you mean restarts"),
        ("pgd-20(steps=5)", "option of pgd-20 'steps'"),
    ],
)
def test_unknown_names_show_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_attacks(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("pgd-0", "steps"),
        ("pgd-20(restarts=0)", "restarts"),
        ("pgd-20(restarts=2.5)", "restarts"),
        ("pgd-20(restarts=3, start=zero)", "restarts"),
        ("fgsm(restarts=3)", "restarts"),
        ("pgd-20(start=corner)", "start"),
        ("pgd-20(keep=first)", "keep"),
        ("pgd-20(freeze=1)", "freeze"),
        ("pgd-20(step_size=2)", "step_size"),
        ("pgd-20(step_size=0)", "step_size"),
        ("clean(restarts=2)", "options"),
        ("pgd-20, PGD-20", "list"),
        ("", "list"),
        (" , ", "list"),
    ],
)
def test_bad_values_name_their_field(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_attacks(text)
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["pgd-20 + cw-20", "pgd-20(restarts=5", "pgd-20 restarts=5", "pgd-20)"])
def test_broken_grammar_is_one_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_attacks(text)


def test_every_listed_pattern_parses_and_describes_itself() -> None:
    for pattern, description in list_attacks():
        attack = only(pattern.replace("K", "10"))
        assert description
        assert attack.describe(THREAT).startswith(f"{attack.name}: ")


@dataclass(frozen=True)
class LowerTrue:
    """Goal: the logit of the true class, downwards."""

    needs_clean = False

    def __call__(self, logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        return -logits.gather(1, y[:, None]).squeeze(1)


def test_an_attack_of_the_users_own_is_named_with_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_attacks("pgd-1")
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    kind = AttackKind(goal=LowerTrue(), goal_name="true logit", about="K steps down the true logit", freeze=True)
    ATTACKS.register("true-logit")(kind)
    (attack,) = parse_attacks("True_Logit-7(restarts=3)")
    assert attack.name == "true-logit-7(restarts=3)"
    assert attack.settings(Threat())["goal"] == "true logit"
    assert attack.describe(Threat()).startswith("true-logit-7(restarts=3): 7 steps of 2/255 up the true logit, ")
    batch = Batch(x=torch.rand(2, 1, 4, 4), y=torch.tensor([0, 1]), index=torch.arange(2), seed=0)
    assert isinstance(attack.on(batch, Threat()).goal, LowerTrue)
    assert attack.on(batch, Threat()).stop is not None
    assert ("true-logit-K", "K steps down the true logit") in list_attacks()
    with pytest.raises(UnknownNameError, match="true-logit-20"):
        parse_attacks("true-logit")
