from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import pytest

from robustfair.config import Bounds, Count, NonNegative, Norm, Share, Whole, build, config
from robustfair.data.augment.idbh import IDBH
from robustfair.errors import ConfigError, RecipeError, UnknownNameError
from robustfair.grammar import parse_composition
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


@config
class Bounded:
    name: ClassVar[str] = "bounded"
    weight: NonNegative = 0.0
    share: Share = 0.0
    begin: Whole = 0
    count: Count | None = None
    rate: Annotated[float, Bounds(gt=0)] = 1.0
    part: Annotated[float, Bounds(gt=0, lt=1)] = 0.5
    level: Annotated[int, Bounds(ge=0, le=255)] = 0
    turns: Annotated[int | str, Bounds(ge=0, allowed="a number of turns, or text")] = 0
    foreign: Annotated[float, "help", SimpleNamespace(lt=2)] = 0.0
    kind: Literal["one", "two"] = "one"
    flag: bool = False
    text: str = ""
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    table: Mapping[str, int] | None = None
    norm: Norm = "linf"
    eps: float | None = None


WRONG: list[tuple[str, Any, str]] = [
    *(("weight", wrong, "a finite number >= 0") for wrong in (-0.1, math.nan, math.inf, 10**400, True, None, "1")),
    *(("share", wrong, "in [0, 1]") for wrong in (-0.1, 1.1, math.nan)),
    *(("begin", wrong, "a whole number >= 0") for wrong in (-1, 1.0, False)),
    *(("count", wrong, "a whole number >= 1, or none") for wrong in (0, 1.5, "1")),
    *(("rate", wrong, "a finite number above 0") for wrong in (0.0, -1.0, math.inf)),
    *(("part", wrong, "in (0, 1)") for wrong in (0.0, 1.0)),
    *(("level", wrong, "a whole number in [0, 255]") for wrong in (-1, 256, 0.5)),
    *(("turns", wrong, "a number of turns, or text") for wrong in (-1, 0.5, None)),
    ("foreign", 2.0, "a finite number below 2"),
    *(("kind", wrong, "'one' or 'two'") for wrong in ("One", None, [])),
    *(("flag", wrong, "true or false") for wrong in (1, "yes", None)),
    ("text", 5, "a valid string"),
    *(("pair", wrong, "a list of 2, each entry a finite number") for wrong in ((0.5,), (0, 1, 2), (0, "1"), 0.5)),
    *(("names", wrong, "a list, each entry a valid string") for wrong in ("head", ("head", 1))),
    ("table", 3, "a Mapping, or none"),
    ("norm", "l1", "linf or l2"),
    ("eps", "8", "a fraction like 8/255 or a decimal, in units of pixels scaled to [0, 1]"),
]


@pytest.mark.parametrize(("field", "wrong", "allowed"), WRONG)
def test_a_config_checks_every_field_against_its_annotation(field: str, wrong: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Bounded(**{field: wrong})
    assert str(refused.value).startswith(f"bounded: {field} must be {allowed}, got {wrong!r}")
    assert (refused.value.owner, refused.value.field) == ("bounded", field)
    if field != "kind":
        with pytest.raises(ConfigError, match=f"^theirs: {field} must be "):
            build(Bounded, {field: wrong}, owner="theirs")


def test_every_field_of_the_example_is_tried() -> None:
    assert {field for field, *_ in WRONG} == {field.name for field in fields(Bounded)}


def test_a_config_takes_what_its_annotation_allows_as_it_is() -> None:
    ends = Bounded(weight=3, share=1, begin=0, count=1, level=255, turns="four", table={}, pair=(0, 1), names=("a",))
    assert (ends.weight, ends.share, ends.turns, ends.pair) == (3, 1, "four", (0, 1))
    assert type(ends.weight) is int
    read = Bounded(eps="128/255", norm="L_2", names=["a", "b"], pair=[0.5, 1.0])  # type: ignore[arg-type]
    assert read == Bounded(eps=128 / 255, norm="l2", names=("a", "b"), pair=(0.5, 1.0))
    assert hash(read) == hash(replace(read))


def test_a_config_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Bounded().weight = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Bounded(1.0)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="bounded: share must be"):
        replace(Bounded(), share=2)


def test_what_a_class_checks_of_its_own_comes_after_its_fields() -> None:
    seen = []

    @config
    class Between:
        low: Share = 0.0
        high: Share = 1.0

        def __post_init__(self) -> None:
            seen.append((self.low, self.high))

    @config
    class Further(Between):
        more: Count = 1

    @dataclass(frozen=True, kw_only=True)
    class Plain(Between):
        more: Whole = 0

    Between(low=0.5)
    Further(high=0.5)
    assert seen == [(0.5, 1.0), (0.0, 0.5)]
    for cls, wrong in ((Between, {"low": 2}), (Further, {"low": 2}), (Further, {"more": 0}), (Plain, {"more": -1})):
        with pytest.raises(ConfigError, match=f"^{cls.__name__.lower()}: {next(iter(wrong))} must be"):
            cls(**wrong)
    assert len(seen) == 2


def test_whole_numbers_and_lists_are_read_as_what_a_field_holds() -> None:
    built = build(Bounded, {"weight": 3, "pair": [0, 1], "kind": "Two", "count": 2, "names": ["a"]}, owner="bounded")
    assert [type(value) for value in (built.weight, *built.pair, built.count)] == [float, float, float, int]
    assert (built.kind, built.names) == ("two", ("a",))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"weight": 1e39}, {"weight": 3.4e38}),
        ({"weight": 2**128}, {"weight": 2**127}),
        ({"begin": 2**63}, {"begin": 2**63 - 1}),
        ({"pair": (-1e300, 1.0)}, {"pair": (-3.4e38, 1.0)}),
    ],
)
def test_numbers_that_no_tensor_holds_are_refused_and_the_longest_that_one_does_are_kept(
    given: dict[str, Any], kept: dict[str, Any]
) -> None:
    """A coefficient of 1e39 is no float32, and 2**63 no int64: torch fails on them in the middle of a step."""
    (field,) = given
    for make in (lambda: Bounded(**given), lambda: build(Bounded, given, owner="bounded")):
        hint = "" if field == "pair" else ". Numbers are held in float32, whole ones in 64 bits"
        with pytest.raises(ConfigError, match=rf"^bounded: {field} must be .*, got .*{hint}$"):
            make()
    assert getattr(Bounded(**kept), field) == kept[field]
