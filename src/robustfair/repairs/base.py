"""What every repair is: a frozen value that turns a trained model into a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from robustfair.data import ImageDataset
from robustfair.registry import REPAIRS


class Repair(Protocol):
    """An edit of a trained model, after averaging and before the audit. Frozen dataclass: the fields are its config.

    `needs_data` says whether it wants training images; one that does has them as a field of its own.
    """

    name: ClassVar[str]

    @property
    def needs_data(self) -> bool: ...

    def __call__(self, model: nn.Module, *, example: Tensor | None = None) -> nn.Module:
        """A new model; `model` stays as it is. `example` (B, ...) is an input of a foreign model, see `find_head`."""
        ...

    def describe(self) -> str:
        """One line that says what changes, for logs and reports."""
        ...


@runtime_checkable
class ReadsRun(Protocol):
    """A repair that reads something of the run whose model it repairs."""

    def of_run(self, counts: Sequence[int] | None, held: Callable[[], ImageDataset | None]) -> Repair:
        """The same repair with what it reads filled in, where the user has not given it.

        Args:
            counts: (C,) images of each class that the run trained on; None where it did not record them.
            held: gives its validation images; None where it held none out.

        Raises:
            ConfigError: the run lacks what it needs.
        """
        ...


@runtime_checkable
class ChecksClasses(Protocol):
    """A repair that can refuse classes before a model of them is trained."""

    def check_classes(self, num_classes: int) -> None:
        """Raise ConfigError where its settings are for another number of classes."""
        ...


def repair(model: nn.Module, method: str | Repair = "hwnwb", *, example: Tensor | None = None) -> nn.Module:
    """Repair `model` with a repair, or with the registered one of that name in its defaults.

    Raises:
        UnknownNameError: no repair of that name.
        ModelError: the model has no head that can be edited.
    """
    chosen: Repair = REPAIRS.get(method)() if isinstance(method, str) else method
    return chosen(model, example=example)
