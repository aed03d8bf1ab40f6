"""AWP (Wu et al. 2020): adversarial weight perturbation, the loss taken where the weights hurt most nearby.

    v_l = gamma ||w_l|| g_l / ||g_l||   per tensor l, g the gradient of the batch's loss at w and the attacked images
    the step is taken with the gradient at w + v, weight decay included; then v is taken off again

Source: `train_cifar10.py` of AT-AWP and `train_trades_cifar.py` of TRADES-AWP. v comes from the gradient itself, where
theirs subtracts two copies of the weights, which rounds (`proxy_lr` does as they do). Weights are restored from a copy,
bit for bit; theirs come back by subtraction. Only tensors of two dimensions or more that are called "weight" move; the
paper's formula moves all layers (`include_1d`) and allows less than the full length, which neither code uses.

The pass that finds v leaves the running statistics of batch norm alone, as their proxy does; `mode="inplace"` is their
class in `awp.py`, which does not, and which goes by dimensions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from robustfair.config import Bounds, Count, NonNegative, Whole, config, require
from robustfair.errors import ModelError
from robustfair.methods.base import LossAt, Method, Run
from robustfair.models.modes import still_statistics
from robustfair.registry import METHODS
from robustfair.values import Batch, State

GAMMA = {"pgd-at": 0.01}
OTHER_GAMMA = 0.005
"""Of TRADES-AWP, and of every AWP variant of the fairness papers."""


@METHODS.register("awp")
@config
class AWP(Method):
    """Adversarial weight perturbation of relative size gamma per tensor, around forward and backward pass.

    Attributes:
        gamma: relative size, >= 0; 0 does nothing, None takes 0.01 on pgd-at and 0.005 on other objectives.
        begin: first epoch (0-based) that is perturbed; TRADES-AWP's code has 9, AT-AWP's 0 (5 on SVHN).
        direction: the loss that v ascends: "objective" as it is, or "edited" by the other methods, as the step's is.
            The codes of FAAL and CSR ascend the unweighted one.
        mode: "proxy" or "inplace", see above.
        steps: gradient steps to v, each of gamma / steps.
        include_1d: perturb biases and the scales of batch norm too.
        proxy_lr: form v from weights that moved by this rate and back, as the codes do (0.01 in AT-AWP, 0.1 in
            TRADES-AWP); None takes the gradient.
    """

    name: ClassVar[str] = "awp"
    claims: ClassVar[frozenset[str]] = frozenset({"gradient"})
    gamma: NonNegative | None = None
    begin: Whole = 0
    direction: Literal["objective", "edited"] = "objective"
    mode: Literal["proxy", "inplace"] = "proxy"
    steps: Count = 1
    include_1d: bool = False
    proxy_lr: Annotated[float, Bounds(gt=0)] | None = None

    def __post_init__(self) -> None:
        usable = self.mode == "proxy" or self.proxy_lr is None
        allowed = "none in mode inplace, which has no proxy"
        require(usable, self.name, "proxy_lr", allowed=allowed, got=self.proxy_lr)

    def at_epoch(self, state: State, run: Run) -> State:
        if not self._perturbed(run.model):
            raise ModelError(
                "awp: the model has no trained tensor of two dimensions or more that is called weight: "
                "set awp(include_1d=true), or drop awp"
            )
        return state

    @contextmanager
    def around_gradient(self, run: Run, batch: Batch, loss_at: LossAt, state: State) -> Iterator[None]:
        gamma = GAMMA.get(run.objective.name, OTHER_GAMMA) if self.gamma is None else self.gamma
        if gamma == 0 or run.epoch < self.begin:
            yield
            return
        weights = self._perturbed(run.model)
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for _ in range(self.steps):
                with nullcontext() if self.mode == "inplace" else still_statistics(run.model):
                    value = loss_at(run.model, edited=self.direction == "edited").total()
                    gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                with torch.no_grad():
                    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                        if gradient is not None:
                            moved = self._ascended(weight, gradient)
                            weight.add_(perturbation(kept[name], moved, gamma / self.steps))
            yield
            with torch.no_grad():
                for name, weight in weights.items():
                    if weight.grad is not None:  # the optimizer's decay will be that of w, and is meant at w + v
                        weight.grad += run.weight_decay * (weight - kept[name])
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])

    def _perturbed(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """The tensors that move, by name."""
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and (self.include_1d or (parameter.ndim > 1 and (self.mode == "inplace" or "weight" in name)))
        }

    def _ascended(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The direction of v, of any length."""
        return gradient if self.proxy_lr is None else (weight + self.proxy_lr * gradient) - weight


def perturbation(weight: Tensor, direction: Tensor, gamma: float) -> Tensor:
    """gamma ||weight|| along `direction`, zero where that is zero; Frobenius norms, shapes as given.

    >>> perturbation(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 9.0]]), 0.1).tolist()
    [[0.0, 0.5]]
    """
    return direction * (gamma * weight.norm() / (direction.norm() + 1e-20))
