from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.errors import ConfigError, RecipeError, RobustFairWarning
from robustfair.grammar import (
    Term,
    format_eps,
    format_value,
    parse_composition,
    parse_eps,
    parse_norm,
    read_path,
    read_value,
)

NAMES = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True)
KEYS = st.from_regex(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", fullmatch=True)
TEXTS = st.text(st.characters(exclude_characters="\"'", exclude_categories=["Cs", "Cc"]), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
DECIMALS = NUMBERS.filter(lambda value: (value * 255) % 1 != 0)
VALUES = st.one_of(st.integers(-1000, 1000), DECIMALS, st.booleans(), st.none(), TEXTS)


@given(st.lists(st.builds(Term, NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_what_is_printed_reads_back(terms: list[Term]) -> None:
    assert parse_composition(" + ".join(str(term) for term in terms)) == terms


@given(NUMBERS)
@settings(max_examples=100, deadline=None)
def test_any_number_reads_back(value: float) -> None:
    (term,) = parse_composition(f"a(b={format_value(value)})")
    read = term.args["b"]
    assert float(read) == value if "/" not in str(read) else parse_eps(str(read)) == value


@given(st.integers(1, 254))
@settings(max_examples=60, deadline=None)
def test_radii_in_grey_levels_survive_exactly(levels: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustFairWarning)
        assert parse_eps(format_eps(levels / 255)) == levels / 255
        assert parse_eps(f"{levels}/255") == levels / 255


@pytest.mark.parametrize("text", ["trades(beta=6) + ccm", " TRADES( beta = 6 ,)+CCM() ", "trades(beta=6)+\nccm"])
def test_spelling_and_spaces_do_not_matter(text: str) -> None:
    assert [str(term) for term in parse_composition(text)] == ["trades(beta=6)", "ccm"]


def test_values_and_keys_are_read_by_their_form() -> None:
    (term,) = parse_composition("fat-tat/x(step-size=2/255, a=-1, b=1e-3, c=TRUE, d=None, e=\"8\", f='a + b')")
    assert term.name == "fat-tat/x"
    assert term.args == {"step_size": "2/255", "a": -1, "b": 0.001, "c": True, "d": None, "e": "8", "f": "a + b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "position 1: expected a name"),
        ("trades +", "expected a name"),
        ("+ trades", "position 1: expected a name"),
        ("trades ccm", "position 8: expected '\\+'"),
        ("trades(beta", "expected '='"),
        ("trades(beta=", "expected a value"),
        ("trades(beta=6", "expected ',' or '\\)'"),
        ("trades(beta=6 7)", "expected ',' or '\\)'"),
        ("trades(=6)", "expected a key"),
        ("trades)", "expected '\\+'"),
        ("trades(a=1, a=2)", "a is given twice"),
        ("trades(step-size=1, step_size=2)", "step_size is given twice"),
        ("trades(a='x)", "quotation mark is not closed"),
    ],
)
def test_bad_compositions_name_the_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_composition(text)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused_and_never_run(text: str) -> None:
    with contextlib.suppress(RecipeError):
        assert all(term.name for term in parse_composition(text))


def test_a_call_is_only_text() -> None:
    with pytest.raises(RecipeError):
        parse_composition("trades(beta=__import__('os').getcwd())")
    assert read_value("__import__") == "__import__"


@pytest.mark.parametrize("value", ["8", 8, "255", "-1/255", "-0.1", "1.5", "1/0", "eps", "", "nan", "inf", True, None])
def test_bad_radii_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="8/255"):
        parse_eps(value)


@pytest.mark.parametrize("value", ["8", "nan", "inf", "-1"])
def test_bad_l2_radii_are_refused(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_eps(value, norm="l2")


def test_a_bare_8_is_answered_with_the_fraction() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 8/255\?"):
        parse_eps("8")


def test_the_almost_8_over_255_is_warned_about() -> None:
    with pytest.warns(RobustFairWarning, match="not 8/255"):
        assert parse_eps("0.031") == 0.031
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_eps("8/255"), parse_eps("0.2"), parse_eps("1.5", norm="l2")
        parse_eps("0.03", norm="l2"), parse_eps("0.03", field="step_size")


@pytest.mark.parametrize("value", ["2", "3", "5", 3, 3.0, "8.0", "128.0"])
def test_radii_above_one_are_usual_under_l2(value: Any) -> None:
    assert parse_eps(value, norm="l2") == float(value)


@pytest.mark.parametrize(
    ("value", "norm", "hint"),
    [
        ("8", "linf", "Did you mean 8/255? Lengths above 1 are for norm l2"),
        (8.0, "linf", "Did you mean 8/255? Lengths above 1 are for norm l2"),
        ("300", "linf", "Lengths above 1 are for norm l2"),
        ("128", "l2", "Did you mean 128/255? Under l2, 128.0 is taken as it is"),
        ("300", "l2", "Under l2, 300.0 is taken as it is"),
        ("3", "any", "Did you mean 3/255? Under l2, 3.0 is taken as it is"),
        ("1.5", "linf", None),
        ("nan", "l2", None),
    ],
)
def test_the_hint_on_a_radius_fits_the_norm(value: Any, norm: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_eps(value, norm=norm)
    assert str(refused.value).endswith(f". {hint}" if hint else f"got {value!r}")
    assert ("128/255 or" in str(refused.value)) == (norm == "l2")


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    assert read_path("~/runs/x") == read_path(Path("~/runs/x")) == Path("/home/ada/runs/x")
    for kept in ("runs/~", "runs/x~", "~no such user/x", "./a b"):
        assert read_path(kept) == Path(kept)


@pytest.mark.parametrize(("text", "norm"), [("Linf", "linf"), ("l_inf", "linf"), ("L-inf", "linf"), ("L2", "l2")])
def test_norms(text: str, norm: str) -> None:
    assert parse_norm(text) == norm


@pytest.mark.parametrize("text", ["l1", "", "inf", "8"])
def test_unknown_norms(text: str) -> None:
    with pytest.raises(ConfigError, match="linf or l2"):
        parse_norm(text)
