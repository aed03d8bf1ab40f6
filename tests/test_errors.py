"""Messages name options that exist where they are read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustfair
from robustfair.cli.audit import audit
from robustfair.cli.corruptions import corruptions
from robustfair.cli.flags import TargetFlags
from robustfair.errors import as_flags
from robustfair.runs.recipe import Recipe

ROOT = Path(robustfair.__file__).parent
READ_IN_BOTH = [
    path
    for room in ("models", "data", "methods", "objectives", "attacks", "training", "repairs", "runs/load.py")
    for path in sorted([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
]
"""What Python and the command line call alike. The rest speaks to one of them."""

FLAGS = {field.name for kind in (Recipe, TargetFlags) for field in dataclasses.fields(kind)}
FLAGS |= {name for command in (audit, corruptions) for name in inspect.signature(command).parameters}


def messages(path: Path) -> Iterator[str]:
    """The texts in a file that are no docstrings; in an f-string a brace stands for each value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("add `arch`, such as resnet18", "add --arch, such as resnet18"),
        ("leave `select_weights` out", "leave --select-weights out"),
        ("Or `select='last'`", "Or --select last"),
        ("pass `allow={'attack.eps'}` to", "pass --allow attack.eps to"),
        ("`image_size=224` resizes them", "--image-size 224 resizes them"),
        ("no option, `not one!` and `A.b`", "no option, `not one!` and `A.b`"),
    ],
)
def test_options_are_flags_on_the_command_line(text: str, shown: str) -> None:
    assert as_flags(text) == shown


def test_a_message_for_both_names_no_flag_and_no_option_that_is_none() -> None:
    named = set()
    for path in READ_IN_BOTH:
        for text in messages(path):
            assert not re.search(r"(^|[\s(])--[a-z]", text), f"{path}: {text}"
            assert not re.search(r"\b(pass|Pass|Or|or|give|set) [a-z_]+=(\w|\.\.\.|['\"])", text), f"{path}: {text}"
            named |= set(re.findall(r"`([a-z][a-z0-9_]*)(?:=[^`]*)?`", text))
    assert {"arch", "select_weights", "select", "allow", "image_size"} <= named <= FLAGS
