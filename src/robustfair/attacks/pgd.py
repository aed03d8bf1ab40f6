"""Projected gradient ascent: the only inner loop of the library. FGSM, PGD-k, CW-k and training attacks are settings.

Gradients are taken with respect to the input alone: parameters are frozen while the attack runs, so no weight gradient
is computed or stored, and nothing in the loop waits for the device.

Source: Madry et al. 2018 (PGD); TRADES `trades.py` for its start, its KL goal and its l2 order of clips; Rice et al.
2020 `train_cifar.py` for l2 steps and restarts. A point stays in the ball up to rounding (1e-6) and in [0, 1] exactly,
unless the attack is told to leave one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robustfair.config import Norm
from robustfair.errors import ConfigError, ModelError
from robustfair.models.modes import attacking
from robustfair.values import Attack, Goal, Model


class StepInputs(NamedTuple):
    """What a gradient step needs beside the point: the goal and what it reads, images, step size, ball and box.

    `y` is what the goal reads: the labels, or the attack's target. `step_size` and `eps` are (B, 1, ..., 1), to meet
    the pixels; `noise` (B, C, H, W) is the noise of this step.
    """

    goal: Goal
    x: Tensor
    y: Tensor
    clean: Tensor | None
    step_size: Tensor
    eps: Tensor
    norm: Norm
    box_first: bool = False
    box: bool = True
    ball: bool = True
    noise: Tensor | None = None

    @staticmethod
    def of(attack: Attack, x: Tensor, y: Tensor, clean: Tensor | None) -> StepInputs:
        step_size, eps = per_pixel(attack.step_size, x), per_pixel(attack.eps, x)
        y = y if attack.target is None else attack.target
        kept_in = (attack.box_first, attack.box, attack.ball)
        return StepInputs(attack.goal, x, y, clean, step_size, eps, attack.norm, *kept_in)


Step = Callable[[Model, Tensor, StepInputs], tuple[Tensor, Tensor, Tensor]]
"""One gradient step from `x_adv`: the moved images, and goal values (B,) and logits at `x_adv`, all detached."""


class Climbed(NamedTuple):
    """What one restart came to: the last iterate, the best point where points compare, what was watched (B,)."""

    x_adv: Tensor
    best: Best
    watched: Tensor | None = None


class Ascent(Protocol):
    """All steps of one restart, from the start `x_adv`. `rng` is for attacks that add noise to their steps."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        clean: Tensor | None,
        x_adv: Tensor,
        attack: Attack,
        best: Best,
        rng: torch.Generator,
    ) -> Climbed: ...


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    rng: torch.Generator,
    *,
    x_init: Tensor | None = None,
    clean: Tensor | None = None,
    ascent: Ascent | None = None,
) -> Tensor:
    """Attack `x` and return the attacked images, detached.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K). A module leaves with the modes and flags it came with.
        x: (B, C, H, W) in [0, 1]; not modified.
        y: (B,) labels.
        attack: the settings; `eps` and `step_size` are per example.
        rng: stream of the random start, on the device of `x`.
        x_init: start here instead (first restart only); lets a reference share the start.
        clean: logits at `x` in the attack's mode, detached, where the caller has them and the goal reads them.
        ascent: how the steps are run; None runs them as they stand here.

    Returns:
        (B, C, H, W), in [0, 1] unless `attack.box` is off. With `keep="best"` or restarts, per example the point of the
        largest goal among those compared; under a stop rule a misclassified point beats every correctly classified one.
    """
    return watched_pgd(model, x, y, attack, rng, x_init=x_init, clean=clean, ascent=ascent)[0]


def watched_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    rng: torch.Generator,
    *,
    x_init: Tensor | None = None,
    clean: Tensor | None = None,
    ascent: Ascent | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `pgd`, and what `attack.watch` saw (B,): None without one."""
    starts = (*STARTS, GRADIENT_START)
    if attack.start not in starts:
        raise ConfigError("attack", "start", allowed=f"one of {', '.join(starts)}", got=attack.start)
    if attack.keep == "inside" and (attack.stop is None or attack.restarts > 1):
        raise ConfigError("attack", "keep", allowed="inside only under a stop rule, with one start", got="inside")
    ascent = ascend if ascent is None else ascent
    with attacking(model, attack.mode):
        if clean is None and attack.goal.needs_clean:
            with torch.no_grad():
                clean = model(x)
        best = Best.nothing(x)
        for restart in range(attack.restarts):
            if x_init is not None and restart == 0:
                start = x_init
            elif attack.start == GRADIENT_START:
                start = _one_gradient_up(model, x, y, clean, attack)
            else:
                start = STARTS[attack.start](x, attack, rng)
            x_adv, best, watched = ascent(model, x, y, clean, start.detach(), attack, best, rng)
        found = best.x_adv if compares(attack) else x_adv
        return (found.clamp(0, 1) if attack.box else found).detach(), watched


def eager_step(model: Model, x_adv: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """A `Step` operator by operator: the reference that every other way of running it is compared with."""
    x_adv = x_adv.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x_adv)
        value = inputs.goal(logits, inputs.clean, inputs.y)
        gradient = input_gradient(value, x_adv)
    return _move(x_adv.detach(), gradient, inputs), value.detach(), logits.detach()


def functional_step(model: Model, x_adv: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """A `Step` as one pure function, forward, backward and update, for a compiler to see whole."""

    def total(z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = model(z)
        value = inputs.goal(logits, inputs.clean, inputs.y)
        return value.sum(), (value, logits)

    gradient, (value, logits) = torch.func.grad(total, has_aux=True)(x_adv)
    return _move(x_adv, gradient, inputs), value, logits


def ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    clean: Tensor | None,
    x_adv: Tensor,
    attack: Attack,
    best: Best,
    rng: torch.Generator,
    *,
    step: Step = eager_step,
) -> Climbed:
    """The `Ascent` that takes its steps one by one."""
    inputs = StepInputs.of(attack, x, y, clean)
    stop_state = attack.stop.start(y) if attack.stop else y
    watched = attack.watch.start(y) if attack.watch else y
    if attack.steps and (attack.stop or attack.keep == "best"):
        x_adv = _project(x_adv, inputs)  # only then may the start itself be returned
    previous = x_adv
    for _ in range(attack.steps):
        if attack.noise:
            inputs = inputs._replace(noise=attack.noise * torch.empty_like(x).normal_(generator=rng))
        moved, value, logits = step(model, x_adv, inputs)
        if attack.keep == "best":
            best = best.update(x_adv, value, logits, y, attack)
        if attack.stop:
            stop_state, steps = attack.stop(stop_state, logits, y)
            active = per_pixel(steps, x)
            if attack.keep == "inside":
                moved, previous = torch.where(active, moved, previous), torch.where(active, x_adv, previous)
            else:
                moved = torch.where(active, moved, x_adv)
        if attack.watch:
            seen = attack.watch(watched, logits, y)
            watched = torch.where(steps, seen, watched) if attack.stop else seen
        x_adv = moved
        if attack.stop and x.device.type == "cpu" and not active.any():  # elsewhere the question would cost a wait
            break
    if compares(attack):
        with torch.no_grad():
            logits = model(x_adv)
            best = best.update(x_adv, attack.goal(logits, clean, inputs.y), logits, y, attack)
    return Climbed(x_adv, best, watched if attack.watch else None)


def input_gradient(value: Tensor, x: Tensor) -> Tensor:
    """Gradient of a goal (B,) with respect to the images alone.

    Raises:
        ModelError: the model cut the graph between its input and its output.
    """
    require_graph(value)
    return torch.autograd.grad(value.sum(), x)[0]


def require_graph(value: Tensor) -> None:
    """Refuse what a model gives where the graph between its input and its output is cut.

    Raises:
        ModelError: as it says.
    """
    if not value.requires_grad:
        raise ModelError(
            "the model gives no gradient to its input: it runs under no_grad, or detaches what it is given"
        )


def require_input_gradient(model: nn.Module, x: Tensor) -> None:
    """Refuse a model that no gradient attack can move: compiled steps would see zeros where eager ones see an error.

    Raises:
        ModelError: as `input_gradient`.
    """
    with attacking(model, "eval"), torch.enable_grad():
        z = x.detach().clone().requires_grad_(True)
        input_gradient(model(z).sum(1), z)


def predicted(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) classes of logits (B, K): where they are no finite numbers there is none, and the one after `y` counts."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), (y + 1) % logits.shape[1])


def compares(attack: Attack) -> bool:
    """Whether the attack returns the best of several points rather than the last one."""
    return attack.keep == "best" or attack.restarts > 1


@dataclass(frozen=True)
class Best:
    """The best point per example so far: its pixels, goal value (B,) and whether it is misclassified (B,)."""

    x_adv: Tensor
    value: Tensor
    fooled: Tensor

    @staticmethod
    def nothing(x: Tensor) -> Best:
        value = torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
        return Best(x, value, torch.zeros_like(value, dtype=torch.bool))

    def update(self, x_adv: Tensor, value: Tensor, logits: Tensor, y: Tensor, attack: Attack) -> Best:
        fooled = predicted(logits, y) != y if attack.stop else torch.zeros_like(self.fooled)
        value = torch.where(value.isnan(), torch.inf, value)  # a model without logits fails
        better = (fooled & ~self.fooled) | ((fooled == self.fooled) & (value >= self.value))
        return Best(
            torch.where(per_pixel(better, x_adv), x_adv, self.x_adv),
            torch.where(better, value.to(self.value.dtype), self.value),
            fooled | self.fooled,
        )


def _move(x_adv: Tensor, gradient: Tensor, inputs: StepInputs) -> Tensor:
    """One step uphill, back into the ball and the box. Where the gradient is zero or nan nothing moves."""
    gradient = gradient.nan_to_num(0.0)
    if inputs.norm == "linf":
        direction = gradient.sign()
    elif inputs.box_first:
        norm = _l2(gradient)
        direction = torch.where(norm > 0, gradient / norm, gradient)
    else:
        direction = gradient / (_l2(gradient) + 1e-10)
    moved = x_adv + inputs.step_size * direction
    return _project(moved if inputs.noise is None else moved + inputs.noise, inputs)


def _project(x_adv: Tensor, inputs: StepInputs) -> Tensor:
    """Into the ball and the box, in the attack's order; only into those that it keeps to."""
    x, eps = inputs.x, inputs.eps
    if not inputs.ball:
        return x_adv.clamp(0, 1) if inputs.box else x_adv
    if inputs.norm == "l2" and inputs.box_first:
        return x + _into_l2_ball((x_adv.clamp(0, 1) if inputs.box else x_adv) - x, eps)
    if inputs.norm == "linf":
        inside = torch.minimum(torch.maximum(x_adv, x - eps), x + eps)
    else:
        inside = x + _into_l2_ball(x_adv - x, eps)
    return inside.clamp(0, 1) if inputs.box else inside


def _into_l2_ball(delta: Tensor, eps: Tensor) -> Tensor:
    """Shrink where too long, by the factor eps / (norm + 1e-7) that both TRADES and Rice et al. use."""
    norm = _l2(delta)
    return torch.where(norm > eps, delta * (eps / (norm + 1e-7)), delta)


def _l2(v: Tensor) -> Tensor:
    """(B, 1, ...) Euclidean norm per example."""
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def per_pixel(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to meet the pixels of `x`."""
    return value.view(-1, *[1] * (x.ndim - 1))


def _start_zero(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return x.clone()


def _start_uniform(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    return _start_uniform_unclipped(x, attack, rng).clamp(0, 1)


def _start_uniform_unclipped(x: Tensor, attack: Attack, rng: torch.Generator) -> Tensor:
    farthest = attack.eps * attack.start_radius
    if attack.norm == "linf":
        return x + torch.empty_like(x).uniform_(-1, 1, generator=rng) * per_pixel(farthest, x)
    direction = torch.empty_like(x).normal_(generator=rng)
    radius = torch.empty_like(attack.eps).uniform_(0, 1, generator=rng) * farthest
    return x + direction * (per_pixel(radius, x) / _l2(direction))


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

GRADIENT_START = "input-gradient"
"""The start that is no draw: x plus the gradient of the batch's mean goal there, clipped to [0, 1]. The public code of
IDBH trains from it."""


def _one_gradient_up(model: Model, x: Tensor, y: Tensor, clean: Tensor | None, attack: Attack) -> Tensor:
    z = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        gradient = input_gradient(attack.goal(model(z), clean, y if attack.target is None else attack.target), z)
    return (x + gradient / x.shape[0]).clamp(0, 1)


@dataclass(frozen=True)
class FreezeFooled:
    """Stop rule of evaluation: an example that was misclassified once stays at that point."""

    def start(self, y: Tensor) -> Tensor:
        return torch.ones_like(y, dtype=torch.bool)

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        active = state & (predicted(logits, y) == y)
        return active, active
