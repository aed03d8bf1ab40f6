"""The package as a whole: its public names, its README, what importing it costs, and the recipes it ships."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import robustfair
from robustfair.cli.app import app, main
from robustfair.data import CATALOG
from robustfair.data.augment.crops import parse_augmentation
from robustfair.grammar import parse_composition
from robustfair.methods.base import Method
from robustfair.models.build import create_model
from robustfair.objectives.base import Objective
from robustfair.registry import BUNDLES, METHODS, OBJECTIVES
from robustfair.runs.composition import plan_of
from robustfair.runs.recipe import Recipe, read_recipe, shipped_recipes
from robustfair.training.schedule import Schedule

ROOT = Path(robustfair.__file__).parent
README = Path(__file__).parents[1] / "README.md"
FILES = sorted(ROOT.rglob("*.py"))


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


# Public names


@pytest.mark.parametrize("name", robustfair.__all__)
def test_every_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(robustfair, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert value.__module__.startswith("robustfair.")
    assert value.__name__ == name
    assert len(inspect.getdoc(value) or "") > 20
    assert inspect.isclass(value) or inspect.isfunction(value)


def test_public_names_are_sorted_listed_and_no_more() -> None:
    assert list(robustfair.__all__) == sorted(set(robustfair.__all__))
    assert dir(robustfair) == robustfair.__all__
    with pytest.raises(AttributeError, match="module 'robustfair' has no attribute 'Tradez'"):
        _ = robustfair.Tradez


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("trades", "Trades"),
        ("pgd-at", "PGDAT"),
        ("standard", "Standard"),
        ("ccm", "CCM"),
        ("ccr", "CCR"),
        ("ema", "EMA"),
        ("fawa", "FAWA"),
        ("fair-tat", "FairTAT"),
    ],
)
def test_a_name_in_a_composition_is_the_class_of_that_name(name: str, entry: str) -> None:
    registry, base = (OBJECTIVES, Objective) if name in OBJECTIVES else (METHODS, Method)
    cls = getattr(robustfair, entry)
    assert registry.get(name) is cls
    assert cls.name == name
    assert issubclass(cls, base)


def test_every_objective_and_method_is_public() -> None:
    public = {getattr(robustfair, name) for name in robustfair.__all__}
    for registry in (OBJECTIVES, METHODS, BUNDLES):
        assert {registry.get(name) for name in registry} <= public


# Importing


def test_importing_the_package_does_not_load_torch() -> None:
    assert python("import sys, robustfair; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["audit", "--help"],
        ["trian"],
        ["train", "trades", "--dta", "digits"],
    ],
    ids=" ".join,
)
def test_help_and_mistyped_commands_answer_without_torch(tmp_path: Path, argv: list[str]) -> None:
    lines = python(
        f"import os, sys; os.chdir({str(tmp_path)!r}); from robustfair.cli.app import main; code = main({argv!r}); "
        "print(code, 'torch' in sys.modules)"
    ).splitlines()
    assert lines[-1] == f"{0 if '--help' in argv else 2} False"


def test_help_answers_at_once() -> None:
    command = Path(sys.executable).with_name("robustfair")

    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([command, "--help"], check=True, capture_output=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 1.2


def test_heavy_packages_wait_until_they_are_needed() -> None:
    heavy = ("datasets", "pyarrow", "matplotlib", "sklearn", "jinja2", "torchvision")
    loaded = python(
        "import sys, robustfair; [getattr(robustfair, name) for name in robustfair.__all__]; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert loaded == "[]\n"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_torchvision_is_never_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "torchvision" for name in names)


# Recipes


def trains(name: str) -> list[Recipe]:
    """What a shipped recipe trains: itself, or each of its stages that trains."""
    recipe = read_recipe(name, {})
    stages = [number for number, stage in enumerate(recipe.stages) if stage.does == "train"]
    return [recipe.of_stage(number) for number in stages] if recipe.stages else [recipe]


@pytest.mark.parametrize(
    ("name", "recipe"), [pytest.param(name, recipe, id=name) for name in shipped_recipes() for recipe in trains(name)]
)
def test_shipped_recipes_compose_and_name_what_there_is(name: str, recipe: Recipe) -> None:
    plan = plan_of(recipe.train, recipe.allow)
    assert [term.name for term in parse_composition(recipe.train)] == [
        plan.objective.name,
        *(method.name for method in plan.methods),
    ]
    assert [method.remark(recipe.epochs) for method in plan.methods] == [None] * len(plan.methods)
    assert recipe.data in CATALOG
    create_model(recipe.model, num_classes=CATALOG[recipe.data].num_classes, width=recipe.width)
    fields = {name: getattr(recipe, name) for name in ("epochs", "lr", "batch_size", "milestones", "gamma", "warmup")}
    Schedule(kind=recipe.schedule, momentum=recipe.momentum, nesterov=recipe.nesterov, **fields)
    parse_augmentation(recipe.augment or CATALOG[recipe.data].augment)
    assert recipe.validation > 0 or recipe.select == "last"


DROPS = {
    "pgd-at": [100, 150],
    "trades": [74],
    "mart": [74, 89, 99],
    "mart-wrn": [74, 89],
    "arow": [70, 120],
    "arow-swa": [60, 100],
    "friendly-at": [59, 89],
    "friendly-trades": [74],
    "friendly-mart": [59, 89],
    "pgd-at-awp": [100, 150],
    "trades-awp": [99, 149],
    "avmixup": [103, 154],
    "idbh": [100, 150],
}
"""0-based epochs from which on the rate is lower in the authors' codes."""


@pytest.mark.parametrize("name", list(DROPS))
def test_official_recipes_lower_the_rate_where_the_codes_do(name: str) -> None:
    recipe = read_recipe(f"official/{name}", {})
    schedule = Schedule(epochs=recipe.epochs, lr=recipe.lr, kind=recipe.curve, milestones=recipe.milestones)
    rates = [schedule.lr_at(epoch, 0, 1) for epoch in range(recipe.epochs)]
    assert [epoch for epoch in range(1, recipe.epochs) if rates[epoch] != rates[epoch - 1]] == DROPS[name]
    assert rates[-1] == pytest.approx(recipe.lr * 0.1 ** len(DROPS[name]))


def test_every_official_recipe_is_checked() -> None:
    shipped = {name.removeprefix("official/") for name in shipped_recipes() if name.startswith("official/")}
    assert shipped - DROPS.keys() == {"fgsm-at"}


def test_the_recipe_of_the_demo_ships() -> None:
    assert "demo" in shipped_recipes()
    assert read_recipe("demo", {}).data == "digits"


# The README

TEXT = README.read_text(encoding="utf-8").replace("\\\n", " ")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL += re.findall(r"^ {4}(.*)$", TEXT, re.MULTILINE)
COMMANDS = re.findall(r"^(?:\$ )?(?:\w+=\S+ )*robustfair (.*)$", "\n".join(SHELL), re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {number}" for number in range(1, len(BLOCKS) + 1)])
def test_python_in_the_readme_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    assert ("print(" in block) == bool(capsys.readouterr().out)


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_in_the_readme_are_commands(words: str) -> None:
    argv = shlex.split(words, comments=True)
    command, *_ = app.parse_args(argv, exit_on_error=False, print_error=False)
    assert command.__name__.rstrip("_") == argv[0]
    if argv[0] in ("train", "explain"):
        plan_of(argv[1], ())


def test_the_first_commands_of_the_readme_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = TEXT.partition("## Three minutes\n")[2].lstrip("\n").partition("\n\n")[0]
    assert block.count("--epochs 10 ") == 1
    block = block.replace("--epochs 10 ", "--epochs 4 ")  # all but this: ccm and ccr begin at 3, and act in the last
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]
    assert len(lines) > 1
    for program, *argv in lines:
        assert program == "robustfair"
        assert main(argv) == 0, (argv, capsys.readouterr().err)
        named = [word for word in argv if word.startswith("runs/")]
        assert all((tmp_path / word).is_dir() for word in named), "every path is made by this line or one before it"
    assert "weights are selected on" not in capsys.readouterr().err


def test_the_docstring_of_the_package_runs_as_it_is_written() -> None:
    lines = (robustfair.__doc__ or "").splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    assert code[0] == "import robustfair as rf"
    short = "\n".join(code).replace("epochs=40", "epochs=1")
    names: dict[str, object] = {}
    exec(compile(short, "robustfair.__doc__", "exec"), names)
    assert names["audit"].attacks == ("clean", "pgd-20")


def test_names_that_the_readme_uses_are_public() -> None:
    used = set(re.findall(r"\brf\.(\w+)", TEXT))
    assert used <= set(robustfair.__all__)
