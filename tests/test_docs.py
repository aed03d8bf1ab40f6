"""The pages of documentation: their commands are commands, their recipes can run, their examples work as printed."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from robustfair.cli.app import app, main
from robustfair.methods.base import HOOKS, Method, Run
from robustfair.objectives.base import Objective
from robustfair.registry import ATTACKS, METHODS, OBJECTIVES, REPAIRS
from robustfair.runs.composition import plan_of
from robustfair.runs.recipe import read_recipe, shipped_recipes
from robustfair.runs.shipped import read_table, tables
from robustfair.runs.stages import require_runnable

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = (METHODS, OBJECTIVES, REPAIRS, ATTACKS)
EXTENDING = ROOT / "docs" / "extending.md"
LONGEST_EXAMPLE = 60
_BLOCK = re.compile(
    r"(?:`(?P<file>[\w.]+)`:\n\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$|^(?P<shell>(?: {4}[^\n]*\n)+)",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Something on a page to be done: a file to write, a Python program, or a command."""

    file: str | None
    kind: str
    body: str


def blocks(text: str) -> list[Block]:
    """Files, Python programs and commands, in their order; results that are shown are left out."""
    found = []
    for match in _BLOCK.finditer(text):
        if match["shell"] is None:
            found.append(Block(match["file"], match["kind"], match["body"]))
            continue
        lines = match["shell"].replace("\\\n", " ").splitlines()
        found += [Block(None, "command", line.strip()) for line in lines]
    return [block for block in found if block.kind]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page."""
    text = page.read_text(encoding="utf-8")
    return [shlex.split(block.body, comments=True) for block in blocks(text) if block.kind == "command"]


def section(name: str) -> str:
    """A part of docs/extending.md."""
    return EXTENDING.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@contextmanager
def as_a_new_process(place: Path) -> Iterator[None]:
    """In the folder `place`, with nothing registered or imported from it before or after."""
    kept = [(registry, list(registry) and dict(registry._entries)) for registry in ROOMS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        for registry, entries in kept:
            patch.setattr(registry, "_entries", entries)
        known = set(sys.modules)
        try:
            yield
        finally:
            for name in set(sys.modules) - known:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == place.resolve():
                    del sys.modules[name]


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", text)}
    assert set(PAGES[1:]) <= linked


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "methods").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|src|tests|results|benchmarks)/[\w./-]+\w)/?`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page: Path) -> None:
    ours = [argv for program, *argv in commands(page) if program == "robustfair"]
    assert ours
    for argv in ours:
        command, *_ = app.parse_args(argv, exit_on_error=False, print_error=False)
        assert command.__name__.rstrip("_") in argv[:2]
        own = "--plugin" in argv or argv[1].endswith(".yaml")
        if argv[0] in ("train", "explain") and not own:
            plan_of(argv[1], ())


def test_the_recipes_of_a_page_can_run(tmp_path: Path) -> None:
    page = ROOT / "docs" / "recipes.md"
    written = [block for block in blocks(page.read_text(encoding="utf-8")) if block.kind == "yaml"]
    assert len(written) == 2
    named = {argv[2] for argv in commands(page) if argv[1] == "train" and "/" not in argv[2] and "." in argv[2]}
    assert named == {block.file for block in written} == {"mine.yaml", "stages.yaml"}
    for block in written:
        path = tmp_path / str(block.file)
        path.write_text(block.body)
        recipe = read_recipe(str(path), {})
        if recipe.stages:
            assert len(require_runnable(recipe)) == len(recipe.stages)
        else:
            plan_of(str(path), ())


@pytest.mark.parametrize(("page", "tables"), [("README.md", 1), ("docs/measurements.md", 3)])
def test_tables_of_stored_audits_are_what_their_commands_print(
    page: str, tables: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^ {4}robustfair (.* results/.*)\n\n(?:```\n([^`]*)```|((?:\|.*\n)+))", text, re.MULTILINE)
    assert len(shown) == tables
    for words, block, table in shown:
        assert main(shlex.split(words)) == 0
        printed = capsys.readouterr().out
        assert (block or table).strip() in printed


def test_exit_codes_are_those_that_the_command_line_has() -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    said = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    given = {int(code) for code in re.findall(r"(?:, |return )(\d+)\)?$", inspect.getsource(main), re.MULTILINE)}
    assert said == given | {0}


@pytest.mark.parametrize("name", ["A method", "An objective", "A repair", "An attack"])
def test_what_a_user_adds_works_as_it_is_printed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(section(name))
    files = [block for block in found if block.file and block.file.endswith(".py")]
    assert len(files) == 1
    assert len(files[0].body.splitlines()) <= LONGEST_EXAMPLE
    assert {block.kind for block in found} >= {"python", "command"}
    for block in found:
        if block.file:
            (tmp_path / block.file).write_text(block.body)
            continue
        with as_a_new_process(tmp_path):
            capsys.readouterr()
            if block.kind == "python":
                exec(compile(block.body, str(EXTENDING), "exec"), {"__name__": "__main__"})
            else:
                program, *argv = shlex.split(block.body)
                assert program == "robustfair"
                assert main(argv) == 0, (argv, capsys.readouterr().err)
                assert "--out" not in argv or (tmp_path / argv[argv.index("--out") + 1] / "recipe.yaml").is_file()
            assert capsys.readouterr().out
    assert not {"hard-classes", "to-nearest", "pairing", "temper-head", "true-logit"} & {
        *METHODS,
        *OBJECTIVES,
        *REPAIRS,
        *ATTACKS,
    }


def rows(text: str, head: str) -> list[str]:
    """Names in the first column of the table under `head`."""
    table = text.partition(f"\n| {head} | ")[2].partition("\n\n")[0]
    return re.findall(r"`(\w+)(?:\([^)]*\))?`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))


def test_the_protocol_is_told_whole() -> None:
    text = section("The protocol")
    about_method, about_objective = text.split("What an objective says of itself:")
    assert rows(text, "hook") == list(HOOKS)
    for hook in HOOKS:
        arguments = ", ".join(list(inspect.signature(getattr(Method, hook)).parameters)[1:])
        assert f"| `{hook}({arguments})` |" in text
    own = {key for key in vars(Run) if not key.startswith("_")} | set(Run.__annotations__)
    assert sorted(rows(text, "of the run")) == sorted(own)
    assert set(rows(about_method, "attribute")) == set(Method.__annotations__) - {"name"}
    assert set(rows(about_objective, "attribute")) == set(Objective.__annotations__) - {"name"}


def test_every_shipped_folder_of_recipes_is_named() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in (*shipped_recipes(), *tables()):
        assert f"`{name.rpartition('/')[0] + '/' if '/' in name else name}`" in text


def test_the_python_of_the_page_on_recipes_prints_what_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    [program] = [block.body for block in blocks(text) if block.kind == "python"]
    exec(compile(program, "docs/recipes.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[0] == "best average 0.496 0.002"


def test_the_table_on_the_page_on_recipes_is_part_of_the_one_that_ships() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(text.partition("here part of `cfa/table-1`:\n\n```\n")[2].partition("```")[0])
    whole = read_table("cfa/table-1")
    assert list(shown) == ["keys", "settings", "stages", "rows"]
    for key, entries in shown.items():
        for name, entry in entries.items():
            of = getattr(whole, key)[name]
            assert of == entry or entry.items() <= of.items(), name
