from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robustfair.errors import RobustFairError, UnknownNameError
from robustfair.registry import METHODS, MODELS, OBJECTIVES, REPAIRS, Registry, canonical, load_plugin


def filled() -> Registry[int]:
    registry: Registry[int] = Registry("fruit", ())
    registry.register("red-apple")(1)
    registry.register("pear")(2)
    return registry


@pytest.mark.parametrize("name", ["red-apple", "Red_Apple", " RED apple ", "red apple"])
def test_any_spelling_finds_the_entry(name: str) -> None:
    assert filled().get(name) == 1
    assert name in filled()


@pytest.mark.parametrize("name", ["PreAct_ResNet18", "PGD AT", "  trades "])
def test_canonical_names_are_fixed_points(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)


def test_an_unknown_name_shows_the_nearest_or_else_all() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown fruit 'peer': did you mean pear\?"):
        filled().get("peer")
    with pytest.raises(UnknownNameError, match=r"unknown fruit 'zzz': known: pear, red-apple"):
        filled().get("zzz")


def test_iteration_is_sorted() -> None:
    assert list(filled()) == ["pear", "red-apple"]


@pytest.mark.parametrize("name", ["Pear", "red_apple", "pear"])
def test_a_second_or_misspelt_entry_is_refused(name: str) -> None:
    with pytest.raises(RobustFairError):
        filled().register(name)(3)


def test_modules_are_imported_on_first_use_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fills_a_registry.py").write_text("LOADED = True\n")
    registry: Registry[int] = Registry("fruit", ("fills_a_registry",))
    assert "fills_a_registry" not in sys.modules
    assert "pear" not in registry
    assert sys.modules.pop("fills_a_registry").LOADED
    assert list(registry) == []
    assert "fills_a_registry" not in sys.modules


def test_what_ships_is_there() -> None:
    assert {"standard", "pgd-at", "trades"} <= set(OBJECTIVES)
    assert {"ccm", "ccr", "ema"} <= set(METHODS)
    assert {"small-cnn", "resnet9", "preact-resnet18"} <= set(MODELS)
    assert "hwnwb" in REPAIRS


@pytest.mark.parametrize("registry", [OBJECTIVES, METHODS, REPAIRS], ids=lambda r: r.kind)
def test_entries_bear_the_name_they_are_filed_under(registry: Registry[type]) -> None:
    assert all(registry.get(name).name == name for name in registry)


PLUGIN = """
from dataclasses import dataclass
from robustfair.methods import Method
from robustfair.registry import METHODS

@METHODS.register("{name}")
@dataclass(frozen=True, kw_only=True)
class Idle(Method):
    name = "{name}"
"""


def test_a_file_of_the_users_own_registers_and_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    path = tmp_path / "my_method.py"
    path.write_text(PLUGIN.format(name="idle-of-a-plugin"))
    load_plugin(path)
    load_plugin(str(path))
    assert METHODS.get("idle_of_a_plugin")().name == "idle-of-a-plugin"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no Python file"),
        ("x = (\n", "line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("a = 1\nb = a / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_does_not_run_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RobustFairError, match=message):
        load_plugin(path)


def test_files_of_one_name_in_two_folders_are_two_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    paths = [tmp_path / folder / "mine.py" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(PLUGIN.format(name=f"idle-{path.parent.name}"))
    for path in (*paths, *paths):
        load_plugin(path)
    assert {"idle-a", "idle-b"} <= {*METHODS}


def test_a_name_of_ours_that_a_plugin_takes_shows_in_its_own_line(tmp_path: Path) -> None:
    """In a fresh process too, where nothing of ours is registered yet."""
    path = tmp_path / "mine.py"
    path.write_text("from robustfair.registry import REPAIRS\n\nREPAIRS.register('hwnwb')(int)\n")
    code = f"from robustfair.registry import load_plugin; load_plugin({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "mine.py, line 3: repair 'hwnwb' is registered twice" in done.stderr
