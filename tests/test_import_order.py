"""The order of the modules, read off the syntax tree of every file: each imports only what stands left of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustfair

ROOT = Path(robustfair.__file__).parent
ORDER = (
    "errors",
    "registry",
    "grammar",
    "config",
    "files",
    "values",
    "losses",
    "metrics",
    "data",
    "models",
    "execution",
    "attacks",
    "objectives",
    "methods",
    "training",
    "repairs",
    "runs",
    "evaluate",
    "report",
    "cli",
)
"""Left to right; a module may import its own package too."""

METHOD_MAY_IMPORT = {
    "values",
    "losses",
    "metrics",
    "config",
    "registry",
    "errors",
    "models.modes",
    "models.averages",
    "methods.base",
}
CENTRE = ("methods.base", "methods.compose")
HEAVY = {"datasets", "pyarrow", "matplotlib", "sklearn", "scipy", "jinja2"}
"""Third-party packages that are slow to import."""

FILES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """`robustfair/data/loader.py` is "data.loader"; a package's `__init__` bears the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, absolute, and whether the import stands inside a function."""
    package = ("robustfair", *path.relative_to(ROOT).parts[:-1])

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                source = ".".join((*base, *([child.module] if child.module else [])))
                for alias in child.names:
                    full = f"{source}.{alias.name}"
                    yield (full if full.removeprefix("robustfair.") in MODULES else source), lazy
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def ours(path: Path) -> list[tuple[str, bool]]:
    """What a file imports of the package, without the leading `robustfair.`."""
    found = [(name, lazy) for name, lazy in imports(path) if name.split(".")[0] == "robustfair"]
    return [(name.removeprefix("robustfair").removeprefix("."), lazy) for name, lazy in found]


def rank(name: str) -> int:
    return ORDER.index(name.split(".")[0])


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[0] for name in MODULES if name} <= set(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_each_imports_only_what_stands_left(name: str) -> None:
    for imported, _ in ours(MODULES[name]):
        package = imported.split(".")[0]
        assert imported, f"{name} imports the whole package robustfair: name the module"
        same_package = name.split(".")[0] == package
        assert same_package or rank(imported) < rank(name), f"{name} imports {imported}, which stands right of it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("methods.") and name not in CENTRE])
def test_a_method_imports_values_and_its_base_and_no_other_method(name: str) -> None:
    imported = {module for module, _ in ours(MODULES[name])}
    assert imported <= METHOD_MAY_IMPORT


@pytest.mark.parametrize("name", CENTRE)
def test_the_centre_of_methods_adds_the_base_of_objectives_only(name: str) -> None:
    imported = {module for module, _ in ours(MODULES[name])}
    assert imported - {name} <= METHOD_MAY_IMPORT | {"objectives.base"}


def test_no_module_imports_itself_in_a_circle() -> None:
    """Also through imports inside functions; a package's `__init__` only gathers what its modules hold."""
    graph = {name: {other for other, _ in ours(path) if other in MODULES} for name, path in MODULES.items()}
    left = {name: others for name, others in graph.items() if MODULES[name].name != "__init__.py"}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f"in or behind a circle: {', '.join(sorted(left))}"


def test_the_trainer_does_not_know_the_checkpoint() -> None:
    for name in MODULES:
        if name.startswith("training"):
            assert "checkpoint" not in {module.split(".")[0] for module, _ in ours(MODULES[name])}


def test_heavy_packages_are_imported_where_they_are_needed() -> None:
    """A module may import one at its head only if every import of that module stands inside a function."""
    found = {name: [*imports(path)] for name, path in MODULES.items()}
    lazy = {module.removeprefix("robustfair.") for uses in found.values() for module, inside in uses if inside}
    eager = {module.removeprefix("robustfair.") for uses in found.values() for module, inside in uses if not inside}
    for name in MODULES.keys() - (lazy - eager):
        at_import = {module.split(".")[0] for module, inside in found[name] if not inside}
        assert not at_import & HEAVY, f"{name} imports {', '.join(at_import & HEAVY)} at its head"


@pytest.mark.parametrize("name", MODULES)
def test_torchvision_is_never_imported(name: str) -> None:
    assert "torchvision" not in {module.split(".")[0] for module, _ in imports(MODULES[name])}


def test_the_walk_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "data" / "loader.py"
    path.parent.mkdir()
    path.write_text(
        "import robustfair.cli\nfrom robustfair import metrics\nfrom robustfair.values import Batch\n"
        "from . import split\nfrom .pack import pack\nfrom ..losses import margin\n"
        "def f():\n    import matplotlib.pyplot as plt\n    from robustfair.report import html\n"
        "if True:\n    import torch\n"
    )
    assert list(imports(path)) == [
        ("robustfair.cli", False),
        ("robustfair.metrics", False),
        ("robustfair.values", False),
        ("robustfair.data.split", False),
        ("robustfair.data.pack", False),
        ("robustfair.losses", False),
        ("matplotlib.pyplot", True),
        ("robustfair.report.html", True),
        ("torch", False),
    ]
