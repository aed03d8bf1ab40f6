"""Name -> class or factory, one registry a kind, with nearest-name errors.

Names are lower case with hyphens; underscores and capitals are accepted on reading (`PGD_AT` is `pgd-at`).
A registry imports the modules that fill it on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from robustfair.errors import RobustFairError, UnknownNameError

T = TypeVar("T")


def canonical(name: str) -> str:
    """The registered spelling of `name`: lower case, hyphens for underscores and spaces.

    >>> canonical("PreAct_ResNet18")
    'preact-resnet18'
    """
    return name.strip().lower().replace("_", "-").replace(" ", "-")


class Registry(Generic[T]):
    """Entries of one kind, filled by the `register` decorator in `modules`."""

    def __init__(self, kind: str, modules: tuple[str, ...]) -> None:
        self.kind = kind
        self._modules = modules
        self._entries: dict[str, T] = {}
        self.reserved: tuple[str, ...] = ()
        """Names that stand for something else."""
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an entry under `name`.

        Raises:
            RobustFairError: another entry has the name, or it is not written as names are.
        """

        def file(entry: T) -> T:
            if name != canonical(name):
                raise RobustFairError(f"{self.kind} {name!r} must be written {canonical(name)!r}")
            if name in self._entries or name in self.reserved:
                raise RobustFairError(f"{self.kind} {name!r} is registered twice: give the new one another name")
            self._entries[name] = entry
            return entry

        return file

    def get(self, name: str) -> T:
        """The entry called `name` in any spelling.

        Raises:
            UnknownNameError: no such entry; shows the nearest names.
        """
        self._load()
        try:
            return self._entries[canonical(name)]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __contains__(self, name: str) -> bool:
        self._load()
        return canonical(name) in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if not self._loaded:
            for module in self._modules:
                importlib.import_module(module)
            self._loaded = True


def load_plugin(path: Path | str) -> None:
    """Run a Python file of the user's own, which registers what it adds; once, however often asked.

    It is code and runs as such: load only what you would run.

    Raises:
        RobustFairError: no such file, or an error in it, with its line.
    """
    file = Path(path).expanduser().resolve()
    name = f"robustfair_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise RobustFairError(f"plugin {path} is no Python file: name one that registers what you add")
    open_ones = (OBJECTIVES, METHODS, BUNDLES, MODELS, REPAIRS, EDITS, ATTACKS)
    for registry in open_ones:
        registry._load()  # so that a name that is taken shows in the line of the plugin that takes it again
    before = [dict(registry._entries) for registry in open_ones]
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is the user's code
        del sys.modules[name]
        for registry, entries in zip(open_ones, before, strict=True):
            registry._entries = entries
        at = error.__traceback__
        while at is not None and at.tb_next is not None and at.tb_frame.f_code.co_filename != str(file):
            at = at.tb_next
        line = getattr(error, "lineno", None) or (at.tb_lineno if at is not None else "?")
        text = str(error) if isinstance(error, RobustFairError) else f"{type(error).__name__}: {error}"
        raise RobustFairError(f"plugin {path}, line {line}: {text}") from error


OBJECTIVES: Registry[Any] = Registry("objective", ("robustfair.objectives",))
METHODS: Registry[Any] = Registry("method", ("robustfair.methods",))
BUNDLES: Registry[Any] = Registry("bundle", ("robustfair.methods",))
MODELS: Registry[Any] = Registry("model", ("robustfair.models",))
REPAIRS: Registry[Any] = Registry("repair", ("robustfair.repairs",))
ATTACKS: Registry[Any] = Registry("attack", ("robustfair.attacks.named",))
REPORTS: Registry[Any] = Registry("report", ("robustfair.report.html",))
EDITS: Registry[Any] = Registry("edit", ("robustfair.data.edits",))
