"""Tables of recipes: what their files may hold, and how their rows are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from robustfair.errors import ConfigError, RecipeError, RobustFairError, RobustFairWarning, UnknownNameError
from robustfair.runs import shipped
from robustfair.runs.composition import plans_of
from robustfair.runs.recipe import read_recipe
from robustfair.runs.shipped import Protocol, Table, find_row, shipped_recipes, tables

# Names


@pytest.mark.parametrize("name", ["CFA/Table-1/TRADES + CFA", "cfa/table_1/trades+cfa", " cfa/table-1/trades +cfa"])
def test_a_row_in_any_spelling(name: str) -> None:
    assert read_recipe(name, {}) == read_recipe("cfa/table-1/trades+cfa", {})


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "cfa/table-1/trades+cf",
            UnknownNameError,
            r"unknown row of cfa/table-1 'trades\+cf': did you mean trades\+cfa",
        ),
        ("cfa/table-1", RecipeError, "cfa/table-1 is a table: name one of its 11 rows, such as cfa/table-1/at"),
        ("cfa/table-9/at", UnknownNameError, "unknown recipe 'cfa/table-9/at': did you mean cfa/table-"),
        ("hwnwb-decosam/table-2/trades", UnknownNameError, "did you mean wrn-28-./trades"),
        ("cfa", RecipeError, "needs exactly one objective"),
    ],
)
def test_a_wrong_name_shows_the_nearest(name: str, error: type[RobustFairError], message: str) -> None:
    with pytest.raises(error, match=message):
        plans_of(name)


def test_what_is_no_row_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("trades", "trades(eps=8/255)", "official/trades", "runs/x", "cfa/table-1/mine.yaml"):
        assert find_row(what) is None
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "cfa" / "table-1" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("train: trades\ndata: digits\n")
    assert read_recipe("cfa/table-1/mine.yaml", {}).data == "digits"


def test_flags_win_over_a_row_but_not_over_its_stages() -> None:
    assert read_recipe("cfa/table-1/at", {"epochs": 3, "eps": "4/255"}).epochs == 3
    with pytest.warns(RobustFairWarning, match="stage 2 keeps its own epochs, 80"):
        recipe = read_recipe("cfa/table-1/frl", {"epochs": 3})
    assert [recipe.of_stage(number).epochs for number in (0, 1)] == [3, 80]


# The format


def table(**entries: Any) -> Table:
    """A table that stands in no file."""
    protocol = Protocol(attacks=("clean",), checkpoints=("last",))
    return Table(**{"name": "a/b", "source": "here", "protocol": protocol, "keys": {"data": "digits"}, **entries})


def test_settings_hold_for_a_word_wherever_it_has_none_of_its_own() -> None:
    made = table(
        settings={"trades": {"beta": 6, "eps": "8/255"}, "ema": {"decay": 0.5}},
        stages={"tune": {"train": "trades(beta=2) + ema", "epochs": 1}},
        rows={"one": "trades + ema", "two": "trades(beta=1)", "three": ["trades", "tune"]},
    )
    assert made.row("a/b/one").values == {"data": "digits", "train": "trades(beta=6, eps=8/255) + ema(decay=0.5)"}
    assert made.row("a/b/two").values["train"] == "trades(beta=1, eps=8/255)"
    assert made.row("a/b/three").values["stages"][1] == {
        "train": "trades(beta=2, eps=8/255) + ema(decay=0.5)",
        "epochs": 1,
    }
    assert made.row("a/b/three").said == "trades, then tune"


def test_a_stage_takes_settings_and_more_methods_and_the_objective_before_it() -> None:
    made = table(
        stages={"tune": {"train": "{objective} + tune(a=1)", "only": ["head"]}, "fix": {"repair": "fix(a=1)"}},
        rows={"one": ["trades(beta=2) + ccm", "tune(a=2, b=3) + ema", "fix(a=5)"]},
    )
    assert made.row("a/b/one").values["stages"] == [
        {"train": "trades(beta=2) + ccm"},
        {"train": "trades(beta=2) + tune(a=2, b=3) + ema", "only": ["head"]},
        {"repair": "fix(a=5)"},
    ]


def test_a_composition_in_a_list_trains_from_new_weights_and_a_stage_goes_on() -> None:
    made = table(
        first=("teacher", "labels"),
        stages={"teacher": {"train": "standard"}, "labels": {"edit": "long-tail"}, "tune": {"train": "pgd-at"}},
        rows={"one": "trades", "two": ["trades", "tune"], "three": ["cfa/table-1/frl", "tune"]},
    )
    before = [{"train": "standard"}, {"edit": "long-tail"}]
    assert made.row("a/b/one").values["stages"] == [*before, {"train": "trades", "start": "scratch"}]
    assert made.row("a/b/two").values["stages"][2:] == [{"train": "trades", "start": "scratch"}, {"train": "pgd-at"}]
    spliced = made.row("a/b/three").values
    assert [stage.get("start") for stage in spliced["stages"]] == [None, None, "scratch", "scratch", None]
    assert spliced["validation"] == 0.06


def test_parts_have_keys_and_rows_of_their_own() -> None:
    made = table(parts={"x": {"model": "m"}, "y": {"rows": {"two": "mart"}}}, rows={"one": "trades"})
    assert made.names() == ["a/b/x/one", "a/b/y/two"]
    assert made.row("a/b/x/one").values == {"data": "digits", "model": "m", "train": "trades"}
    assert made.row("a/b/y/two").values == {"data": "digits", "train": "mart"}


def test_a_row_stops_before_the_first_stage_that_is_awaited() -> None:
    made = table(
        awaits={"later": "is not there"},
        stages={"tune": {"train": "{objective} + later"}},
        rows={"one": ["trades", "tune", "pgd-at"], "two": "trades + later", "three": {"train": "trades", "lr": 1.0}},
    )
    one, two = made.row("a/b/one"), made.row("a/b/two")
    assert one.values["stages"] == [{"train": "trades"}]
    assert one.stops == (
        "a/b/one cannot run yet: its stage 2, train: trades + later, needs later, which is not there; "
        "what comes before that is a/b/three"
    )
    assert two.values == {}
    assert two.stops == "a/b/two cannot run yet: its stage 1, train: trades + later, needs later, which is not there"


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("lines", {}, UnknownNameError, "unknown key of table a/b 'lines': did you mean like"),
        ("rows", ["at"], ConfigError, "table a/b: rows must be"),
        ("protocol", {"attacks": ["clean"], "checkpoints": ["first"]}, ConfigError, "protocol: checkpoints"),
        ("protocol", {"attacks": ["clean"], "checkpoints": ["last"], "seeds": 0}, ConfigError, "seeds must be"),
        ("schema", "robustfair.recipe/1", RecipeError, "schema must be 'robustfair.table/1'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    key: str, value: Any, error: type[RobustFairError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: dict[str, Any] = {
        "schema": "robustfair.table/1",
        "source": "here",
        "protocol": {"attacks": ["clean"], "checkpoints": ["last"]},
        "rows": {"at": "pgd-at"},
    }
    file = tmp_path / "b.yaml"
    monkeypatch.setattr(shipped, "_files", lambda: {"a/b": file})
    file.write_text(yaml.safe_dump(good))
    assert shipped.read_table.__wrapped__("a/b").names() == ["a/b/at"]
    file.write_text(yaml.safe_dump({**good, key: value}))
    with pytest.raises(error, match=message):
        shipped.read_table.__wrapped__("a/b")


def test_a_table_is_no_recipe_and_a_recipe_no_table() -> None:
    assert not set(shipped_recipes()) & set(tables())
    assert {"demo", "official/trades"} <= set(shipped_recipes())
