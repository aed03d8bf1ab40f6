"""How a training run executes its model: precision, compilation, and attacks on our kernels or as one CUDA graph.

Nothing here changes what is computed, only how: `compile=False` in float32 without kernels is the reference path, and
every other one is tested against it. What was tried, what it should have brought and what it brought is in
benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import Ascent, StepInputs, ascend, functional_step, require_input_gradient, watched_pgd
from robustfair.config import Precision
from robustfair.errors import ConfigError, ModelError
from robustfair.execution.live import hooked
from robustfair.execution.precision import InPrecision
from robustfair.execution.program import Program
from robustfair.losses import MaximiseCE
from robustfair.models.modes import attacking
from robustfair.training.capture import CapturedAscent
from robustfair.values import Attack, Batch, Model


class Engine:
    """A model as training runs it: `engine(x)` for its logits, `engine.attack` for attacked images.

    Args:
        model: shared, not copied: weights, modes and flags stay where they are.
        precision: of forward and backward passes.
        device: where the model and its images are.
        compile: compile the training pass, and the attack step as one function.
        program: the model for attacks in eval mode, as `live_program` made it of this one; unused where the precision
            is not "fp32". None attacks the model itself.
        graphs: record all steps of an attack as one CUDA graph and replay it; None does so on CUDA where compiled.
        batch_size: what to compile for; batches of another size, such as the last of an epoch, run uncompiled. None
            compiles for every size that comes, up to torch's limit of recompilations.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        compile: bool = False,
        program: Program | None = None,
        graphs: bool | None = None,
        batch_size: int | None = None,
    ) -> None:
        device = torch.device(device)
        self.model = model
        self.eager = InPrecision(model, precision, device.type, bundled=True if compile else None)
        self.batch_size = batch_size
        self.compiled = compile
        self.program = program if precision == "fp32" else None
        self._compiled: Callable[[Model, Tensor], Tensor] | None = None
        self._ascent: Ascent = ascend
        if compile:
            require_compiler(device.type)
            self._compiled = torch.compile(_own_copy(_logits), dynamic=False)
            self._ascent = partial(ascend, step=torch.compile(_own_copy(functional_step), dynamic=False))
        if graphs or (graphs is None and compile and device.type == "cuda"):
            self._ascent = CapturedAscent(self._ascent, model)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K), float32 at least, differentiable in the weights."""
        if self._compiled is None or not self._fits(x) or not self.model.training:
            return self.eager(x)
        return self._compiled(self.eager, x)

    def beside(self, network: nn.Module) -> InPrecision:
        """Another network as this engine runs its own: in the same precision, uncompiled."""
        return InPrecision(network, "bf16" if self.eager.bf16 else "fp32", self.eager.device_type)

    def shares_clean_pass(self, attack: Attack) -> bool:
        """Whether the attack reads the same clean logits as a loss in training mode, so that one pass serves both."""
        return attack.goal.needs_clean and attack.mode == "train_frozen" and self.model.training

    def attack(self, batch: Batch, attack: Attack, *, clean: Tensor | None = None, stream: str = "attack") -> Tensor:
        """The attacked images of a batch, (B, C, H, W); arguments as for `watched_attack`."""
        return self.watched_attack(batch, attack, clean=clean, stream=stream)[0]

    def watched_attack(
        self, batch: Batch, attack: Attack, *, clean: Tensor | None = None, stream: str = "attack"
    ) -> tuple[Tensor, Tensor | None]:
        """The attacked images of a batch, (B, C, H, W), and what `attack.watch` saw (B,).

        Args:
            clean: logits of this engine at `batch.x`, where `shares_clean_pass` and the caller has them.
            stream: name of the random stream of the batch that it draws from.
        """
        if attack.mode == "eval" and batch.x.dtype == torch.float32 and self._standing() is not None:
            with self.searched() as program:
                return watched_pgd(program, batch.x, batch.y, attack, batch.rng(stream))
        pure = self._fits(batch.x) and attack.mode != "train"  # a pure function writes no running statistics
        ascent = self._ascent if pure else ascend
        known = None if clean is None else clean.detach()
        rng = batch.rng(stream)
        return watched_pgd(self.eager, batch.x, batch.y, attack, rng, clean=known, ascent=ascent)

    @contextmanager
    def searched(self) -> Iterator[Model]:
        """The model as attacks in eval mode may see it: as a program of its weights as they are now, if any.

        The layers that a program calls are in eval mode, and their parameters frozen, until the context is left.
        """
        program = self._standing()
        if program is None:
            yield self.eager
            return
        with attacking(self.eager, "eval"):
            program.refresh()
            yield program

    def _standing(self) -> Program | None:
        """The program, where it may stand for the model: while nothing hooks into it."""
        return self.program if not hooked(self.model) else None

    def _fits(self, x: Tensor) -> bool:
        return self.batch_size is None or x.shape[0] == self.batch_size


def _logits(model: Model, x: Tensor) -> Tensor:
    return model(x)


def _own_copy(function: Callable[..., Any]) -> Any:
    """The same function with code of its own.

    torch counts recompilations per code object for the whole process and runs eager, with no more than a warning, once
    they are spent: without this the third or fourth compiled run of a process would not be compiled.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy


def require_pure(model: nn.Module, x: Tensor) -> None:
    """Refuse a model that gives its input no gradient, or whose gradient cannot be taken as a pure function.

    Raises:
        ModelError: a model that cuts its graph, writes its buffers in eval mode, checkpoints, or has backward hooks.
    """
    require_input_gradient(model, x)
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    none = torch.zeros_like(x[:, :1, :1, :1])
    try:
        with attacking(model, "eval"):
            functional_step(model, x, StepInputs(MaximiseCE(), x, y, None, none, none, "linf"))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"the model cannot be compiled, train it without compile: {reason}") from error


@cache
def require_compiler(device_type: str) -> None:
    """Compile two operators, so that a machine that cannot compile says so before a run begins.

    Raises:
        ConfigError: with the compiler's own first line.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device_type))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        needs = "a C++ compiler such as g++" if device_type == "cpu" else "Triton and a C compiler"
        hint = f"torch.compile needs {needs} here and failed: {reason}"
        raise ConfigError("fit", "compile", allowed="false on this machine", got=True, hint=hint) from None
