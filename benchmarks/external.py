r"""Libraries of others, and their PGD as their users call it. One that does not import is reported, never required.

`pip install -e ".[bench]"` brings both into an environment of their own. torchattacks asks for a `requests` of 2021,
which does not go with constraints.txt, and for torchvision, which it does not import; beside an existing environment:

    pip install --no-deps --target bench torchattacks foolbox eagerpy GitPython gitdb smmap requests urllib3 certifi \
        charset-normalizer
    PYTHONPATH=bench python -m benchmarks.attack
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import Tensor, nn

from benchmarks.naive import EPS, STEP_SIZE
from robustfair.values import Batch

Attacker = Callable[[Batch, int], Tensor]
"""From a batch and a number of steps to the attacked images (B, C, H, W)."""


def external_attackers(model: nn.Module, device: str) -> dict[str, Attacker | str]:
    """Library -> its PGD on `model`, or the reason why it cannot be had."""
    found: dict[str, Attacker | str] = {}
    for name, adapt in (("torchattacks", _torchattacks), ("foolbox", _foolbox)):
        library = imported(name)
        found[name] = library if isinstance(library, str) else adapt(library, model, device)
    return found


def imported(name: str) -> ModuleType | str:
    """A library, or the reason why it cannot be had."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, "name", None)
        return "not installed" if missing == name else f"does not import: no {missing}"


def _torchattacks(library: ModuleType, model: nn.Module, device: str) -> Attacker:
    def attack(batch: Batch, steps: int) -> Tensor:
        pgd = library.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=True)
        return pgd(batch.x, batch.y)

    return attack


def _foolbox(library: ModuleType, model: nn.Module, device: str) -> Attacker:
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=device)

    def attack(batch: Batch, steps: int) -> Tensor:
        pgd = library.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=True)
        return pgd.run(wrapped, batch.x, batch.y, epsilon=EPS)

    return attack
