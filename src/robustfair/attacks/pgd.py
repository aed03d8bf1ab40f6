"""Projected gradient ascent: the only inner loop of the library. FGSM, PGD-k, CW-k and training attacks are settings.

Gradients are taken with respect to the input alone: parameters are frozen while the attack runs, so no weight gradient
is computed or stored, and nothing in the loop waits for the device.

Source: Madry et al. 2018 (PGD); TRADES `trades.py` for its start, its KL goal and its l2 order of clips; Rice et al.
2020 `train_cifar.py` for l2 steps and restarts. A point stays in the ball up to rounding (1e-6) and in [0, 1] exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfair.errors import ConfigError, ModelError
from robustfair.values import BATCH_NORM, Attack, Mode, Model


def pgd(
    model: Model, x: Tensor, y: Tensor, attack: Attack, rng: torch.Generator, *, x_init: Tensor | None = None
) -> Tensor:
    """Attack `x` and return the attacked images, detached.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K). A module leaves with the modes and flags it came with.
        x: (B, C, H, W) in [0, 1]; not modified.
        y: (B,) labels.
        attack: the settings; `eps` and `step_size` are per example.
        rng: stream of the random start, on the device of `x`.
        x_init: start here instead (first restart only); lets a reference share the start.

    Returns:
        (B, C, H, W). With `keep="best"` or restarts, per example the point of the largest goal among those compared;
        under a stop rule a misclassified point beats every correctly classified one.
    """
    if attack.start not in STARTS:
        raise ConfigError("attack", "start", allowed=f"one of {', '.join(STARTS)}", got=attack.start)
    with attacking(model, attack.mode):
        clean = None
        if attack.goal.needs_clean:
            with torch.no_grad():
                clean = model(x)
        best = _Best.nothing(x)
        for restart in range(attack.restarts):
            start = x_init if x_init is not None and restart == 0 else STARTS[attack.start](x, attack, rng)
            x_adv, best = _ascend(model, x, y, clean, start, attack, best)
        return (best.x_adv if _compares(attack) else x_adv).clamp(0, 1).detach()


def _ascend(
    model: Model, x: Tensor, y: Tensor, clean: Tensor | None, x_adv: Tensor, attack: Attack, best: _Best
) -> tuple[Tensor, _Best]:
    """All steps of one restart: the last iterate, and the best point so far where the attack compares points."""
    step_size, eps = _per_pixel(attack.step_size, x), _per_pixel(attack.eps, x)
    stop_state = attack.stop.start(y) if attack.stop else y
    x_adv = x_adv.detach()
    if attack.steps and (attack.stop or attack.keep == "best"):
        x_adv = _project(x_adv, x, eps, attack)  # only then may the start itself be returned
    for _ in range(attack.steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            logits = model(x_adv)
            value = attack.goal(logits, clean, y)
            gradient = input_gradient(value, x_adv)
        x_adv = x_adv.detach()
        if attack.keep == "best":
            best = best.update(x_adv, value.detach(), logits, y, attack)
        moved = _move(x_adv, gradient, x, step_size, eps, attack)
        if attack.stop:
            stop_state, active = attack.stop(stop_state, logits.detach(), y)
            moved = torch.where(_per_pixel(active, x), moved, x_adv)
        x_adv = moved
    if _compares(attack):
        with torch.no_grad():
            logits = model(x_adv)
            best = best.update(x_adv, attack.goal(logits, clean, y), logits, y, attack)
    return x_adv, best


def input_gradient(value: Tensor, x: Tensor) -> Tensor:
    """Gradient of a goal (B,) with respect to the images alone.

    Raises:
        ModelError: the model cut the graph between its input and its output.
    """
    if not value.requires_grad:
        raise ModelError(
            "the model gives no gradient to its input: it runs under no_grad, or detaches what it is given"
        )
    return torch.autograd.grad(value.sum(), x)[0]


def _compares(attack: Attack) -> bool:
    return attack.keep == "best" or attack.restarts > 1


@dataclass(frozen=True)
class _Best:
    """The best point per example so far: its pixels, goal value (B,) and whether it is misclassified (B,)."""

    x_adv: Tensor
    value: Tensor
    fooled: Tensor

    @staticmethod
    def nothing(x: Tensor) -> _Best:
        value = torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
        return _Best(x, value, torch.zeros_like(value, dtype=torch.bool))

    def update(self, x_adv: Tensor, value: Tensor, logits: Tensor, y: Tensor, attack: Attack) -> _Best:
        fooled = logits.argmax(1) != y if attack.stop else torch.zeros_like(self.fooled)
        better = (fooled & ~self.fooled) | ((fooled == self.fooled) & (value >= self.value))
        return _Best(
            torch.where(_per_pixel(better, x_adv), x_adv, self.x_adv),
            torch.where(better, value.to(self.value.dtype), self.value),
            fooled | self.fooled,
        )


def _move(x_adv: Tensor, gradient: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, attack: Attack) -> Tensor:
    """One step uphill, back into the ball and the box. Where the gradient is zero or nan nothing moves."""
    gradient = gradient.nan_to_num(0.0)
    if attack.norm == "linf":
        direction = gradient.sign()
    elif attack.box_first:
        norm = _l2(gradient)
        direction = torch.where(norm > 0, gradient / norm, gradient)
    else:
        direction = gradient / (_l2(gradient) + 1e-10)
    return _project(x_adv + step_size * direction, x, eps, attack)


def _project(x_adv: Tensor, x: Tensor, eps: Tensor, attack: Attack) -> Tensor:
    """Into the ball and the box, in the attack's order."""
    if attack.norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    if attack.box_first:
        return x + _into_l2_ball(x_adv.clamp(0, 1) - x, eps)
    return (x + _into_l2_ball(x_adv - x, eps)).clamp(0, 1)


def _into_l2_ball(delta: Tensor, eps: Tensor) -> Tensor:
    """Shrink where too long, by the factor eps / (norm + 1e-7) that both TRADES and Rice et al. use."""
    norm = _l2(delta)
    return torch.where(norm > eps, delta * (eps / (norm + 1e-7)), delta)


def _l2(v: Tensor) -> Tensor:
    """(B, 1, ...) Euclidean norm per example."""
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def _per_pixel(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to meet the pixels of `x`."""
    return value.view(-1, *[1] * (x.ndim - 1))


def _start_zero(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return x.clone()


def _start_uniform(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return _start_uniform_unclipped(x, attack, rng).clamp(0, 1)


def _start_uniform_unclipped(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    if attack.norm == "linf":
        return x + torch.empty_like(x).uniform_(-1, 1, generator=rng) * _per_pixel(attack.eps, x)
    direction = torch.empty_like(x).normal_(generator=rng)
    radius = torch.empty_like(attack.eps).uniform_(0, 1, generator=rng) * attack.eps
    return x + direction * (_per_pixel(radius, x) / _l2(direction))


def _start_gauss(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return x + 0.001 * torch.empty_like(x).normal_(generator=rng)


def _start_gauss_clipped(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return _start_gauss(x, attack, rng).clamp(0, 1)


STARTS: dict[str, Callable[[Tensor, Attack, torch.Generator], Tensor]] = {
    "zero": _start_zero,
    "uniform": _start_uniform,
    "uniform-unclipped": _start_uniform_unclipped,
    "gauss001": _start_gauss,
    "gauss001-clipped": _start_gauss_clipped,
}
"""Random starts. `uniform` is uniform per pixel for linf; for l2 a random direction with a uniform radius.
`gauss001` (TRADES) is neither projected nor clipped before the first gradient."""


@dataclass(frozen=True)
class FreezeFooled:
    """Stop rule of evaluation: an example that was misclassified once stays at that point."""

    def start(self, y: Tensor) -> Tensor:
        return torch.ones_like(y, dtype=torch.bool)

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        active = state & (logits.argmax(1) == y)
        return active, active


@contextmanager
def attacking(model: Model, mode: Mode) -> Iterator[None]:
    """Put a module into the attack's batch-norm mode with its parameters frozen; restore every flag on leaving.

    "train_frozen" uses batch statistics and leaves the running ones untouched. Modules that are in eval mode while the
    model trains are frozen, and stay so. A plain function passes through.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    frozen = [module for module, training in modes if model.training and not training]
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    grads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.train(mode != "eval")
        for module in frozen:
            module.training = False
        for parameter in grads:
            parameter.requires_grad_(False)
        if mode == "train_frozen":
            for norm in norms:
                norm.track_running_stats = False
        yield
    finally:
        for parameter in grads:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        for norm in norms:
            norm.track_running_stats = True
