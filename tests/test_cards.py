"""The method cards: one for everything that can be composed, with the parameters and defaults that the code has."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from robustfair.cli.app import app
from robustfair.data.augment.crops import AUGMENTATIONS, parse_augmentation
from robustfair.data.edits import read_edit
from robustfair.errors import ConflictError
from robustfair.grammar import format_value
from robustfair.methods import compose
from robustfair.registry import BUNDLES, EDITS, METHODS, OBJECTIVES
from robustfair.runs.composition import plans_of, read_repair
from robustfair.runs.recipe import read_recipe

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
CARDS = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
EDITED = {"long-tail": "long-tail", "jtt": "upweight"}
"""Cards of edits, and the edit that each is about."""
SECTIONS = ["Formula", "Use", "Parameters", "Where paper, code and this library differ", "Composes with", "Measured"]


def settings(name: str) -> dict[str, str]:
    """Parameter -> default of what a card is about, as a composition string would have it."""
    registry = next((r for r in (OBJECTIVES, METHODS, BUNDLES) if name in r), EDITS)
    described: Any = AUGMENTATIONS[name] if name in AUGMENTATIONS else registry.get(EDITED.get(name, name))
    found = {field.name: field.default for field in dataclasses.fields(described)}
    return {key: str(value) if isinstance(value, tuple) else format_value(value) for key, value in found.items()}


def test_everything_that_composes_has_a_card_and_nothing_else() -> None:
    assert set(CARDS) == {*OBJECTIVES, *METHODS, *BUNDLES, *EDITED, "crop-flip", "crop-shift", "idbh"}


def test_the_index_links_every_card_and_says_what_acts_on_what() -> None:
    def acts(base: str, *names: str) -> bool:
        try:
            compose(OBJECTIVES.get(base)(), [(METHODS if name in METHODS else BUNDLES).get(name)() for name in names])
        except ConflictError:
            return False
        return True

    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\[([\w-]+)\]\(\1\.md\)", text)) == CARDS
    heading, _, *rows = [line.split(" | ") for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)]
    said = {(base.strip("`"), row[0].strip("`")): row[at] for row in rows for at, base in enumerate(heading) if at}
    assert said == {
        (base, name): "yes" if acts(base, name) else "no" for base in OBJECTIVES for name in [*METHODS, *BUNDLES]
    }
    together = [(base, pair) for pair in itertools.combinations(sorted(METHODS), 2) for base in OBJECTIVES]
    apart = {pair for base, pair in together if all(acts(base, name) for name in pair) and not acts(base, *pair)}
    owned = [re.findall(r"`([\w-]+)`", line) for line in re.findall(r"^- [a-z ]+: (`.*)$", text, re.MULTILINE)]
    assert apart == {pair for names in owned for pair in itertools.combinations(sorted(names), 2)}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_names_every_parameter_with_its_default(name: str) -> None:
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert f"\n`{name}`. " in text
    table = text.partition("## Parameters")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", table, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == table.count("\n| ") - 2 * bool(rows)
    assert dict(rows) == settings(name)


@pytest.mark.parametrize("name", CARDS)
def test_the_commands_of_a_card_are_commands(name: str) -> None:
    use = (FOLDER / f"{name}.md").read_text(encoding="utf-8").partition("## Use")[2].partition("## ")[0]
    commands = re.findall(r"^ {4}robustfair (.*)$", use, re.MULTILINE)
    assert commands
    used: set[str] = set()
    for words in commands:
        argv = shlex.split(words)
        command, *_ = app.parse_args(argv, exit_on_error=False, print_error=False)
        assert command.__name__ == argv[0]
        if argv[0] == "train":
            own = read_recipe(argv[1], {"data": "cifar10"}).augment
            augment = argv[argv.index("--augment") + 1] if "--augment" in argv else own
            parse_augmentation(augment or "none")
            plans = [plan for _, plan in plans_of(argv[1]) if plan is not None]
            for plan in plans:
                acting = [*plan.methods, *(became.bundle for became in plan.bundles)]
                used |= {plan.objective.name, *(entry.name for entry in acting)}
            used |= {augment or "none", argv[1]}
            if "--edit" in argv:
                used.add(read_edit(argv[argv.index("--edit") + 1]).name)
        if argv[0] == "repair":
            read_repair(argv[argv.index("--method") + 1])
    assert name in used | {word.removesuffix("-strong") for word in used}
