"""Recipes: what is written reads back, what is not a recipe is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustfair.config import FAST_SCHEDULE
from robustfair.errors import ConfigError, RecipeError, RobustFairWarning, UnknownNameError
from robustfair.runs.recipe import Recipe, Stage, read_recipe, shipped_recipes
from robustfair.runs.recipe_yaml import SCHEMA
from robustfair.training import Schedule


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_composition_is_a_recipe_of_defaults() -> None:
    assert read_recipe("trades + ccm", {"data": "digits"}) == Recipe(train="trades + ccm", data="digits")


def test_defaults_stand_for_the_papers_schedule() -> None:
    recipe = Recipe(train="trades", data="cifar10")
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (200, 128, 0.1)
    assert (recipe.schedule, recipe.milestones, recipe.gamma) == ("multistep", (0.5, 0.75), 0.1)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "train: trades + ema\ndata: cifar10\nbatch-size: 64\nalpha: 2/255\nnorm: L_2\nlr: 1\n")
    recipe = read_recipe(path, {})
    assert recipe == Recipe(train="trades + ema", data="cifar10", batch_size=64, step_size=2 / 255, norm="l2", lr=1.0)
    assert isinstance(recipe.lr, float)
    assert read_recipe(path, {"data": "digits", "eps": "8/255"}) == dataclasses.replace(
        recipe, data="digits", eps=8 / 255
    )


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("batch-size: 64", {"batch_size": 32}),
        ("alpha: 0.1", {"step_size": "0.2"}),
        ("step-size: 0.1", {"step_size": "0.2"}),
    ],
)
def test_a_flag_overrides_a_key_in_any_spelling(tmp_path: Path, line: str, flags: dict[str, Any]) -> None:
    path = write(tmp_path, f"train: trades\ndata: digits\n{line}\n")
    assert read_recipe(path, flags) == read_recipe("trades", {"data": "digits"} | flags)


def test_fast_stands_for_its_keys_and_yields_to_those_beside_it(tmp_path: Path) -> None:
    fast = read_recipe("pgd-at", {"data": "digits", "schedule": "fast"})
    assert {key: getattr(fast, key) for key in FAST_SCHEDULE} == dict(FAST_SCHEDULE)
    assert read_recipe(write(tmp_path, fast.to_yaml()), {}) == fast
    given = {"data": "digits", "schedule": "fast", "epochs": 7, "batch_size": 64}
    assert read_recipe("pgd-at", given) == dataclasses.replace(fast, epochs=7, batch_size=64)


def test_fast_as_a_flag_replaces_the_keys_of_a_file_and_as_a_key_yields_to_flags(tmp_path: Path) -> None:
    slow = write(tmp_path, "train: pgd-at\ndata: digits\nepochs: 200\nbatch-size: 16\n")
    assert read_recipe(slow, {"schedule": "fast"}) == read_recipe("pgd-at", {"data": "digits", "schedule": "fast"})
    quick = write(tmp_path, "train: pgd-at\ndata: digits\nschedule: fast\nbatch-size: 16\n")
    recipe = read_recipe(quick, {"lr": 0.1})
    assert (recipe.schedule, recipe.batch_size, recipe.lr) == (FAST_SCHEDULE["schedule"], 16, 0.1)
    assert recipe.epochs == FAST_SCHEDULE["epochs"]


def test_a_recipe_in_python_names_a_curve() -> None:
    with pytest.raises(ConfigError, match="read_recipe"):
        Recipe(train="pgd-at", data="digits", schedule="fast")


def test_the_reference_path_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="deterministic"):
        Recipe(train="pgd-at", data="digits", compile=True, deterministic=True)


@pytest.mark.parametrize("asked", [{"compile": "auto"}, {"precision": "auto"}, {"compile": True, "precision": "auto"}])
def test_what_is_fastest_may_be_left_to_the_machine(tmp_path: Path, asked: dict[str, Any]) -> None:
    recipe = read_recipe("pgd-at", {"data": "digits", **asked})
    assert {key: getattr(recipe, key) for key in asked} == asked
    assert read_recipe(write(tmp_path, recipe.to_yaml()), {}) == recipe
    with pytest.raises(ConfigError, match="beside deterministic"):
        read_recipe("pgd-at", {"data": "digits", "deterministic": True, **asked})


@pytest.mark.parametrize("asked", ["always", 1])
def test_compile_is_true_false_or_auto(asked: object) -> None:
    with pytest.raises(ConfigError, match=r"compile must be .*'auto'"):
        read_recipe("pgd-at", {"data": "digits", "compile": asked})


def test_data_may_come_with_the_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "train: trades\n")
    assert read_recipe(path, {"data": "digits"}).data == "digits"
    with pytest.raises(RecipeError, match=r"data is missing: add --data"):
        read_recipe(path, {})


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "0.0005", "5.0e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert read_recipe(write(tmp_path, f"train: trades\ndata: digits\nlr: {text}\n"), {}).lr == 5e-4


UNITS = st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False)
PRINTABLE = st.characters(exclude_categories=("C", "Zl", "Zp"))
WORDS = st.text(PRINTABLE, min_size=1, max_size=12) | st.sampled_from(
    ["null", "yes", "1e3", "8/255", "~", "- a", "a: b", "ä ö"]
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type that every recipe accepts."""
    if hint == tuple[float, ...]:
        return st.lists(UNITS, max_size=3).map(tuple)
    if hint == tuple[str, ...]:
        return st.lists(WORDS, max_size=3).map(tuple)
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(1, 10**6),
        float: UNITS,
        str: WORDS,
        bool: st.booleans(),
        type(None): st.none(),
    }
    if hint in by_type:
        return by_type[hint]
    choices = get_args(hint)
    return st.sampled_from(choices) if isinstance(choices[0], str) else st.one_of([values_of(one) for one in choices])


KEYS = {key: hint for key, hint in get_type_hints(Recipe).items() if key != "stages"}
RECIPES = st.fixed_dictionaries({key: values_of(hint) for key, hint in KEYS.items()}).map(
    lambda values: Recipe(
        **values
        | ({"compile": False, "precision": "fp32"} if values["deterministic"] else {})
        | {"schedule": values["schedule"].replace("fast", "cosine")}
    )
)


@pytest.mark.filterwarnings("ignore::robustfair.errors.RobustFairWarning")
@given(RECIPES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_recipe_reads_back_from_its_yaml(tmp_path: Path, recipe: Recipe) -> None:
    assert read_recipe(write(tmp_path, recipe.to_yaml()), {}) == recipe


def test_yaml_holds_every_key_under_its_schema() -> None:
    recipe = Recipe(train="trades", data="digits", eps=8 / 255, step_size=0.1, allow=("attack.eps",))
    written = yaml.safe_load(recipe.to_yaml())
    assert list(written) == ["schema", *(field.name for field in dataclasses.fields(Recipe) if field.name != "stages")]
    assert written["schema"] == SCHEMA
    assert (written["eps"], written["allow"], written["milestones"]) == ("8/255", ["attack.eps"], [0.5, 0.75])
    assert written == {"schema": SCHEMA, **recipe.values()}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("train: [a\n", RecipeError, "is not YAML at line 2"),
        ("train: !!python/name:os.system\n", RecipeError, "is not YAML at line 1"),
        ("train: trades\0", RecipeError, "is not YAML"),
        ("", RecipeError, "holds no keys"),
        ("trades", RecipeError, "holds no keys"),
        ("- trades\n- digits\n", RecipeError, "holds no keys"),
        ("schema: robustfair.recipe/2\ntrain: trades\n", RecipeError, "schema must be 'robustfair.recipe/1'"),
        ("schema: null\ntrain: trades\n", RecipeError, "schema must be 'robustfair.recipe/1'"),
        ("train: trades\ndata: digits\nmomentun: 0.9\n", UnknownNameError, "'momentun': did you mean momentum"),
        ("train: trades\ndata: digits\n1: 2\n", (RecipeError, UnknownNameError), "1"),
        ("data: digits\n", (RecipeError, ConfigError), "train"),
        ("train: null\ndata: digits\n", ConfigError, "recipe: train must be a valid string, got None"),
        ("train: trades\ndata: digits\nepochs: 2.5\n", ConfigError, "recipe: epochs must be"),
        ("train: trades\ndata: digits\nepochs: '2'\n", ConfigError, "recipe: epochs must be"),
        ("train: trades\ndata: digits\nnesterov: 1\n", ConfigError, "recipe: nesterov must be"),
        ("train: trades\ndata: digits\nselect: best\n", ConfigError, "recipe: select must be"),
        ("train: trades\ndata: digits\nallow: attack.eps\n", ConfigError, "recipe: allow must be"),
        ("train: trades\ndata: digits\neps: 8\n", ConfigError, r"eps must be .* Did you mean 8/255\?"),
        ("train: trades\ndata: digits\neps: '8'\n", ConfigError, r"eps must be .* Did you mean 8/255\?"),
        ("train: trades\ndata: digits\nlimit_per_class: 0\n", ConfigError, "limit_per_class must be >= 1, got 0"),
        ("train: trades\ndata: digits\nepochs: 3\nepochs: 4\n", RecipeError, "epochs"),
        ("train: trades\ndata: digits\nbatch_size: 3\nbatch-size: 4\n", (RecipeError, ConfigError), "batch_size"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        read_recipe(write(tmp_path, text), {})


STAGES = """
data: digits
epochs: 5
step-size: 0.1
stages:
- train: trades(beta=6)
- edit: upweight(times=5)
  seed: 3
- Train: pgd-at + ccm
  Batch-Size: 16
  alpha: 0.05
  schedule: fast
  only: [head]
- repair: hwnwb
  start: runs/at
"""


def test_stages_are_read_each_with_keys_of_its_own(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, STAGES), {"seed": 7})
    assert [(stage.does, stage.what) for stage in recipe.stages] == [
        ("train", "trades(beta=6)"),
        ("edit", "upweight(times=5)"),
        ("train", "pgd-at + ccm"),
        ("repair", "hwnwb"),
    ]
    first, third = recipe.of_stage(0), recipe.of_stage(2, start="runs/x")
    assert first == Recipe(train="trades(beta=6)", data="digits", epochs=5, step_size=0.1, seed=7)
    assert third.epochs == FAST_SCHEDULE["epochs"]
    assert (third.batch_size, third.step_size, third.only, third.start) == (16, 0.05, ("head",), "runs/x")
    assert third.seed == 7
    assert recipe.stages[1].keys == {"seed": 3}
    assert read_recipe(write(tmp_path, recipe.to_yaml()), {}) == recipe
    assert read_recipe(write(tmp_path, recipe.up_to(1).to_yaml()), {}).stages == recipe.stages[:2]


def test_a_repair_after_a_run_is_a_stage(tmp_path: Path) -> None:
    """Also as earlier versions wrote it: a key beside `train`, null where there was none."""
    plain = read_recipe("trades", {"data": "digits"})
    repaired = plain.then(Stage(does="repair", what="hwnwb"))
    assert read_recipe(write(tmp_path, "train: trades\ndata: digits\nrepair: null\n"), {}) == plain
    assert read_recipe(write(tmp_path, "train: trades\ndata: digits\nrepair: hwnwb\n"), {}) == repaired
    assert repaired.then(Stage(does="repair", what="hwnwb")).stages[1:] == repaired.stages[1:] * 2


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("pgd-at", "stages is 'pgd-at': write a list of stages"),
        ("[]", "write a list of stages"),
        ("[trades]", "stage 1 is 'trades': write train, repair or edit"),
        ("[{epochs: 3}]", "stage 1 needs one of train, repair and edit, as text; it has none of them"),
        ("[{train: trades, repair: hwnwb}]", "it has train and repair"),
        ("[{train: [trades]}]", "stage 1 needs one of train, repair and edit, as text"),
        (
            "[{train: trades}, {train: trades, data: cifar10}]",
            r"stage 2 \(train\) has data: it takes no data, image_size",
        ),
        ("[{train: trades, validation: 0.5}]", r"has validation: it takes no"),
        ("[{repair: hwnwb, epochs: 3}]", r"stage 1 \(repair\) has epochs: it takes only start"),
        ("[{edit: add, start: x}]", r"stage 1 \(edit\) has start: it takes only seed"),
    ],
)
def test_what_is_no_stage_is_refused_by_its_number(tmp_path: Path, stages: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, f"data: digits\nstages: {stages}\n"), {})


def test_a_stage_has_known_keys_and_good_values_only(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, "data: digits\nstages:\n- train: trades\n  epoch: 3\n- train: a\n  epochs: x\n"), {}
    )
    with pytest.raises(UnknownNameError, match="unknown key of stage 1 'epoch': did you mean epochs"):
        recipe.of_stage(0)
    with pytest.raises(ConfigError, match="stage 2: epochs must be"):
        recipe.of_stage(1)


@pytest.mark.parametrize("text", ["train: trades\nstages: [{train: trades}]", "train: trades\nstart: previous"])
def test_a_run_is_of_stages_or_not(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe: (train|start)"):
        read_recipe(write(tmp_path, f"data: digits\n{text}\n"), {})


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_recipe(str(tmp_path / "recipe.yaml"), {})


@pytest.mark.parametrize("name", ["absent.yaml", "absent.yml", "a folder/absent.yaml"])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe {name} does not exist"):
        read_recipe(name, {"data": "digits"})


def test_an_unknown_shipped_recipe_shows_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'demo/table1': did you mean cfa/table-1"):
        read_recipe("demo/table1", {"data": "digits"})


def test_a_slash_inside_brackets_is_no_recipe_name() -> None:
    assert read_recipe("trades(eps=8/255)", {"data": "digits"}).train == "trades(eps=8/255)"
    assert read_recipe("ema + trades(eps=8/255)", {"data": "digits"}).train == "ema + trades(eps=8/255)"


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_read_back_and_take_overrides(tmp_path: Path, name: str) -> None:
    recipe = read_recipe(name, {"data": "digits", "seed": 7})
    assert recipe.seed == 7
    assert read_recipe(write(tmp_path, recipe.to_yaml()), {}) == recipe


def test_a_recipe_warns_of_the_almost_8_over_255() -> None:
    with pytest.warns(RobustFairWarning, match="not 8/255"):
        read_recipe("trades", {"data": "digits", "eps": "0.031"})


def test_the_keys_of_a_schedule_have_the_same_types_and_defaults_in_a_recipe() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    hints, keys = get_type_hints(Schedule), get_type_hints(Recipe)
    assert keys.pop("schedule") == Literal["fast", hints.pop("kind")]
    assert defaults["schedule"] == Schedule.kind
    for name, hint in hints.items():
        assert (keys[name], defaults[name]) == (hint, getattr(Schedule, name))
