"""A recording of operators on a CPU that is as strict as a CUDA graph, for checks of what is recorded without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustfair.training.capture import Tensors


class Tape(TorchDispatchMode):
    """Records every operator with the tensors it ran on, as a graph does its kernels.

    What Python decided, and the values of tensors that no operator made, are those of the recording ever after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Run all operators again, each result into the memory of the first one."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


def taped(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """A `robustfair.training.capture.Record` for a CPU."""
    with Tape() as tape:
        found = run()
    return tape.replay, found
