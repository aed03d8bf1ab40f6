"""The AutoAttack family by name: reading, canonical text, versions, and the searches they stand for."""

from __future__ import annotations

import json
from typing import Any

import pyautoattack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.attacks.autoattack.apgd import Apgd
from robustfair.attacks.autoattack.fab import Fab
from robustfair.attacks.autoattack.named import OPTIONS, VERSIONS, AutoAttack, Member, cheaper
from robustfair.attacks.autoattack.square import Square
from robustfair.attacks.named import parse_attacks
from robustfair.errors import ConfigError, RecipeError, UnknownNameError
from robustfair.values import Threat

LINF, L2 = Threat(), Threat(norm="l2", eps=0.5, step_size=0.1)


def only(text: str) -> AutoAttack:
    (attack,) = parse_attacks(text)
    assert isinstance(attack, AutoAttack)
    return attack


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("AutoAttack", "autoattack"),
        ("autoattack()", "autoattack"),
        ("autoattack(version=standard)", "autoattack"),
        ("autoattack(version=Plus)", "autoattack(version=plus)"),
        ("APGD_CE", "apgd-ce"),
        ("apgd-ce(restarts=1, steps=100)", "apgd-ce"),
        ("apgd-dlr(steps=50, restarts=3)", "apgd-dlr(steps=50, restarts=3)"),
        ("apgd-t(targets=9)", "apgd-t"),
        ("fab(restarts=5)", "fab(restarts=5)"),
        ("fab-t(targets=3)", "fab-t(targets=3)"),
        ("square(p-init=0.8, queries=5000)", "square"),
        ("square(per-image-windows=true, p_init=0.05)", "square(p_init=0.05, per_image_windows=true)"),
        ("square(rescale_schedule=true)", "square(rescale_schedule=true)"),
    ],
)
def test_name_is_canonical(text: str, name: str) -> None:
    assert only(text).name == name
    assert only(name) == only(text)
    assert only(text).describe(LINF).startswith(f"{name}: ")


MEMBERS = st.builds(
    Member,
    kind=st.sampled_from(sorted(OPTIONS)),
    steps=st.integers(1, 500),
    restarts=st.integers(1, 20),
    targets=st.integers(1, 20),
    queries=st.integers(1, 10_000),
    p_init=st.floats(0.001, 1),
    per_image_windows=st.booleans(),
    rescale_schedule=st.booleans(),
)


@given(member=MEMBERS)
@settings(max_examples=60, deadline=None)
def test_name_reads_back_as_the_same_attack(member: Member) -> None:
    (found,) = only(member.name).members
    assert found.kind == member.kind
    assert all(getattr(found, key) == getattr(member, key) for key in OPTIONS[member.kind])
    assert found.name == only(member.name).name == member.name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("autoatack", "did you mean autoattack"),
        ("apgd", "apgd-ce"),
        ("fabt", "did you mean fab-t"),
        ("sqare", "did you mean square"),
        ("autoattack(version=foo)", "unknown version of autoattack 'foo': known: plus, standard"),
        ("autoattack(version=standart)", "did you mean standard"),
        ("autoattack(steps=5)", "option of autoattack 'steps': known: version"),
        ("apgd-ce(targets=3)", "option of apgd-ce 'targets'"),
        ("apgd-t(restarts=2)", "option of apgd-t 'restarts'"),
        ("square(steps=3)", "option of square 'steps'"),
        ("square(querys=3)", "did you mean queries"),
        ("fab(kind=square)", "option of fab 'kind'"),
    ],
)
def test_unknown_names_show_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_attacks(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("apgd-ce(restarts=0)", "restarts"),
        ("apgd-ce(steps=0)", "steps"),
        ("apgd-ce(steps=2.5)", "steps"),
        ("apgd-t(targets=0)", "targets"),
        ("fab(restarts=true)", "restarts"),
        ("square(queries=0)", "queries"),
        ("square(p_init=2)", "p_init"),
        ("square(p_init=0)", "p_init"),
        ("square(p_init=nan)", "p_init"),
        ("square(per_image_windows=1)", "per_image_windows"),
        ("autoattack, AutoAttack(version=standard)", "list"),
    ],
)
def test_bad_values_name_their_field(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_attacks(text)
    assert caught.value.field == field


def test_broken_grammar_is_one_error() -> None:
    with pytest.raises(RecipeError):
        parse_attacks("autoattack + square")


@pytest.mark.parametrize("version", ["standard", "plus"])
@pytest.mark.parametrize(("threat", "norm"), [(LINF, "Linf"), (L2, "L2")])
def test_versions_are_those_of_the_reference_engine(version: str, threat: Threat, norm: str) -> None:
    engine = pyautoattack.AutoAttack(lambda x: x, norm=norm, eps=threat.eps, version=version, device="cpu")
    members = only(f"autoattack(version={version})").members
    assert [member.kind for member in members] == engine.attacks_to_run
    for member in members:
        search: Any = member.search(threat, 100, 0)
        assert (search.eps, search.norm) == (threat.eps, threat.norm)
        if member.kind in ("apgd-ce", "apgd-dlr"):
            assert (search.steps, search.restarts) == (engine.apgd.n_iter, engine.apgd.n_restarts)
            assert search.loss == member.kind.removeprefix("apgd-")
            assert search.rho == engine.apgd.thr_decr
        elif member.kind == "apgd-t":
            targeted = engine.apgd_targeted
            assert (search.steps, search.restarts) == (targeted.n_iter, targeted.n_target_classes)
            assert (targeted.n_restarts, search.loss) == (1, "dlr-targeted")
        elif member.kind in ("fab", "fab-t"):
            restarts = engine.fab.n_target_classes if member.kind == "fab-t" else engine.fab.n_restarts
            assert (search.steps, search.restarts) == (engine.fab.n_iter, restarts)
            assert (search.alpha, search.eta, search.beta) == (engine.fab.alpha_max, engine.fab.eta, engine.fab.beta)
            assert search.targeted == (member.kind == "fab-t")
        else:
            assert (search.queries, search.restarts) == (engine.square.n_queries, engine.square.n_restarts)
            assert (search.p_init, search.rescale_schedule) == (engine.square.p_init, engine.square.rescale_schedule)
            assert not search.per_image_windows


@pytest.mark.parametrize(
    ("kind", "classes", "loss", "restarts"),
    [
        ("apgd-ce", 2, "ce", 1),
        ("apgd-dlr", 2, "ce", 1),
        ("apgd-dlr", 3, "dlr", 1),
        ("apgd-t", 2, "ce-targeted", 1),
        ("apgd-t", 3, "ce-targeted", 2),
        ("apgd-t", 4, "dlr-targeted", 3),
        ("apgd-t", 10, "dlr-targeted", 9),
        ("apgd-t", 100, "dlr-targeted", 9),
    ],
)
def test_few_classes_fall_back_to_the_cross_entropy_and_say_so(
    kind: Any, classes: int, loss: str, restarts: int
) -> None:
    member = Member(kind=kind)
    search = member.search(LINF, classes, 0)
    assert isinstance(search, Apgd)
    assert (search.loss, search.restarts) == (loss, restarts)
    assert search.targeted == (kind == "apgd-t")
    said = member.warning(classes)
    if loss in ("dlr", "dlr-targeted") or kind == "apgd-ce":
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"{kind}: ")
        assert f"there are {classes}" in said


def test_other_members_need_no_warning() -> None:
    for kind in ("fab", "fab-t", "square"):
        assert Member(kind=kind).warning(2) is None
    assert Member(kind="fab-t").search(LINF, 2, 0).restarts == 1
    assert Member(kind="fab", restarts=4).search(LINF, 2, 0).restarts == 4


def test_searches_carry_every_setting() -> None:
    options = {"queries": 7, "p_init": 0.1, "per_image_windows": True, "rescale_schedule": True}
    square = Member(kind="square", restarts=3, **options).search(L2, 10, 42)
    assert isinstance(square, Square)
    assert (square.iterations, square.restarts, square.seed, square.norm, square.eps) == (8, 3, 42, "l2", 0.5)
    assert all(getattr(square, key) == value for key, value in options.items())
    fab = Member(kind="fab-t", steps=6, targets=2).search(L2, 10, 0)
    assert isinstance(fab, Fab)
    assert (fab.iterations, fab.restarts, fab.targeted) == (6, 2, True)


def test_settings_are_json_values_and_hold_everything() -> None:
    assert only("apgd-t(steps=50)").settings(LINF) == {
        "norm": "linf",
        "eps": 8 / 255,
        "attack": "apgd-t",
        "goal": "targeted dlr",
        "steps": 50,
        "targets": 9,
    }
    for text in ("autoattack", "autoattack(version=plus)", "square(p_init=0.1)", "fab"):
        found = only(text).settings(L2)
        assert json.loads(json.dumps(found)) == found
        assert (found["norm"], found["eps"]) == ("l2", 0.5)
    assert [member["attack"] for member in only("autoattack").settings(LINF)["members"]] == [
        *("apgd-ce", "apgd-t", "fab-t", "square")
    ]


def test_cheaper_changes_only_what_a_member_has() -> None:
    quick = cheaper(only("autoattack"), steps=3, queries=4, targets=2)
    assert [(member.kind, member.steps, member.targets, member.queries) for member in quick.members] == [
        ("apgd-ce", 3, 9, 5000),
        ("apgd-t", 3, 2, 5000),
        ("fab-t", 3, 2, 5000),
        ("square", 100, 9, 4),
    ]
    assert only("autoattack").members == VERSIONS["standard"]
