from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from robustfair.config import build
from robustfair.data.augment.idbh import IDBH
from robustfair.errors import ConfigError, RecipeError, UnknownNameError
from robustfair.grammar import (
    parse_composition,
)
from robustfair.methods import AWP, CCM, CCR, EMA, AVmixup, FriendlyAT, LabelSmoothing
from robustfair.objectives import FGSMAT, MART, PGDAT, Trades
from robustfair.training import Schedule


@dataclass(frozen=True, kw_only=True)
class Example:
    eps: float = 0.1
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    lam: float | None = None
    flag: bool = False
    milestones: tuple[float, ...] = ()


def test_build_reads_plain_values() -> None:
    built = build(
        Example, {"eps": "8/255", "alpha": "2/255", "norm": "L_2", "milestones": [0.5], "lam": 1}, owner="example"
    )
    assert built == Example(eps=8 / 255, step_size=2 / 255, norm="l2", milestones=(0.5,), lam=1.0)
    assert build(Example, {"step-size": 0.1}, owner="example").step_size == 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 2.5),
        ("steps", "10"),
        ("steps", True),
        ("steps", None),
        ("lam", "0.5"),
        ("lam", True),
        ("flag", 1),
        ("flag", "yes"),
        ("norm", "l1"),
        ("eps", "8"),
        ("milestones", 0.5),
        ("milestones", ["half"]),
    ],
)
def test_build_coerces_nothing(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"example: {key} must be|norm must be"):
        build(Example, {key: value}, owner="example")


def test_build_shows_the_nearest_key() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown key of example 'stepz': did you mean steps"):
        build(Example, {"stepz": 1}, owner="example")


@pytest.mark.parametrize("args", [{"step_size": 0.1, "alpha": 0.2}, {"step_size": 0.1, "step-size": 0.2}])
def test_build_refuses_one_field_under_two_keys(args: dict[str, float]) -> None:
    with pytest.raises((ConfigError, RecipeError)):
        build(Example, args, owner="example")


@pytest.mark.parametrize(
    ("cls", "args"),
    [
        (Trades, {"beta": -1.0}),
        (Trades, {"beta": math.nan}),
        (Trades, {"beta": math.inf}),
        (PGDAT, {"steps": -1}),
        (PGDAT, {"eps": 8.0}),
        (PGDAT, {"eps": math.nan}),
        (PGDAT, {"eps": math.inf, "norm": "l2"}),
        (PGDAT, {"step_size": -0.1}),
        (PGDAT, {"step_size": math.inf}),
        (CCM, {"lam": -0.1}),
        (CCM, {"lam": math.inf}),
        (CCM, {"begin": 0}),
        (CCR, {"lam": math.nan}),
        (CCR, {"begin": 0}),
        (EMA, {"decay": 1.1}),
        (EMA, {"decay": math.nan}),
        (EMA, {"begin": -1}),
        (Schedule, {"epochs": 0}),
        (Schedule, {"lr": math.nan}),
        (Schedule, {"lr": -0.1}),
        (Schedule, {"gamma": math.nan}),
        (Schedule, {"gamma": -0.1}),
        (Schedule, {"milestones": (1.5,)}),
        (Schedule, {"warmup": 0.0}),
        (Schedule, {"batch_size": 0}),
        (Schedule, {"momentum": 0.0, "nesterov": True}),
        (Schedule, {"weight_decay": math.inf}),
        (Schedule, {"cycle_momentum": True}),
        (Schedule, {"cycle_momentum": True, "kind": "one-cycle", "optimizer": "adam"}),
        (Schedule, {"cycle_momentum": True, "kind": "one-cycle", "momentum": 0.05}),
        (Schedule, {"cycle_momentum": True, "kind": "one-cycle", "lr": 0.0}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_numbers_without_a_meaning_are_refused(cls: type, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        cls(**args)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("label-smoothing(kind=off_class)", LabelSmoothing(kind="off-class")),
        ("awp(direction=Edited)", AWP(direction="edited")),
    ],
)
def test_words_are_read_in_any_spelling(text: str, read: object) -> None:
    (term,) = parse_composition(text)
    assert build(type(read), term.args, owner=term.name) == read


@pytest.mark.parametrize(
    ("cls", "args"),
    [
        (AWP, {"include_1d": "false"}),
        (AWP, {"gamma": "0.1"}),
        (AWP, {"mode": "inplace", "proxy_lr": 0.01}),
        (AVmixup, {"clip_vertex": "false"}),
        (AVmixup, {"lambda1": None}),
        (EMA, {"ramp": "no"}),
        (EMA, {"decay": None}),
        (FGSMAT, {"clip_to_box": 1}),
        (FriendlyAT, {"tau": 10**20}),
        (FriendlyAT, {"tau": f"0, {10**20}@1"}),
        (IDBH, {"erase_area": (0.1,)}),
        (IDBH, {"shift": (0, 11, 3)}),
        (MART, {"beta": None}),
        (PGDAT, {"step_size": "two"}),
        (PGDAT, {"steps": 2.5}),
        (Trades, {"detach_clean": "no"}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_values_of_another_type_are_refused(cls: type, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args if len(args) == 1 else [*args][1:]))):
        cls(**args)


def test_a_step_is_read_as_a_radius_is() -> None:
    assert PGDAT(step_size="2/255").step == 2 / 255  # type: ignore[arg-type]
