"""Name -> class or factory, one registry a kind, with nearest-name errors.

Names are lower case with hyphens; underscores and capitals are accepted on reading (`PGD_AT` is `pgd-at`).
A registry imports the modules that fill it on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from robustfair.errors import UnknownNameError

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
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an entry under `name` (already canonical; a second entry of that name is a defect)."""

        def file(entry: T) -> T:
            assert name == canonical(name), f"{self.kind} name {name!r} is not canonical"
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
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


OBJECTIVES: Registry[Any] = Registry("objective", ("robustfair.objectives",))
METHODS: Registry[Any] = Registry("method", ("robustfair.methods",))
MODELS: Registry[Any] = Registry("model", ("robustfair.models",))
REPAIRS: Registry[Any] = Registry("repair", ("robustfair.repairs",))
REPORTS: Registry[Any] = Registry("report", ("robustfair.report.html",))
EDITS: Registry[Any] = Registry("edit", ("robustfair.data.edits",))
