"""Friendly adversarial training (Zhang et al. 2020, "FAT"): stop the attack of an image soon after it has crossed.

Each image has a budget tau. Before every step its prediction is looked at:

    official:  a correct image steps; a wrong one steps and pays 1 while it has budget, and stops for good at 0
    cfa:       an image steps while it has budget; a wrong one pays 1. At 0 it stops for good, correct or not

so that tau = 0 attacks until the first error under the first rule, and not at all under the second, which is the one in
the code of CFA (and of FAIR-TAT, which builds on it). With tau at least the number of steps both are plain PGD, from a
start that is clipped to ball and box first, as the official scripts on TRADES and MART clip theirs.

Source: `earlystop.py` and its three scripts (the rule is `values.StopWhenWrong`); `attack.py` of CFA. Their budget
grows along training, by objective; the switch of their command line that should turn this off does not. Where their
attack returns images in the order they stopped, ours keeps the batch's. Stopped images are passed through the network
with the others: the points are the same, and time is saved only on a CPU once all of a batch have stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from robustfair.config import Bounds, NonNegative, config
from robustfair.errors import ConfigError
from robustfair.methods.base import Method, Run
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, State, Stop, StopWhenWrong

Budgets = tuple[tuple[float, int], ...]
"""(share of the run from which on it holds, budget), rising."""

OFFICIAL: dict[str, Budgets] = {
    "trades": ((0, 0), (30 / 85, 1), (50 / 85, 2), (70 / 85, 3)),
    "mart": ((0, 0), (20 / 90, 1), (40 / 90, 2), (60 / 90, 3), (80 / 90, 4)),
    "arow": ((0, 2),),
}
OFFICIAL_AT: Budgets = ((0, 0), (50 / 120, 1), (90 / 120, 2))
CFA_TAU = 3
LARGEST_TAU = 1_000_000
ALLOWED_TAU = (
    f"a whole number from 0 to {LARGEST_TAU:,}, or budgets with their first epochs rising from 0, "
    'such as "0, 1@50, 2@90"'
)


@dataclass(frozen=True, eq=False)
class CFAStop:
    """Stop rule of CFA's code. State (B,): budget left."""

    tau: Tensor

    def start(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y) + self.tau

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        active = state > 0
        return state - (active & (logits.argmax(1) != y)).to(state.dtype), active


@METHODS.register("friendly-at")
@config
class FriendlyAT(Method):
    """Attack every image only until it has been misclassified for a budget of tau steps.

    Attributes:
        tau: the budget, >= 0, or text such as "0, 1@50, 2@90": 0, from epoch 50 (0-based) on 1, from 90 on 2. None
            takes the objective's official schedule as shares of the run (0, 1, 2 on pgd-at), or 3 under variant "cfa".
        variant: "official" or "cfa", see above.
        omega: standard deviation of the noise added to every step, pixel units; the authors' script for pgd-at has
            0.001.
    """

    name: ClassVar[str] = "friendly-at"
    tau: Annotated[int | str | None, Bounds(ge=0, le=LARGEST_TAU, allowed=ALLOWED_TAU)] = None
    variant: Literal["official", "cfa"] = "official"
    omega: NonNegative = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.tau, str):
            read_budgets(self.tau)

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"attack.stop"} | ({"attack.noise"} if self.omega else set()))

    def at_epoch(self, state: State, run: Run) -> State:
        return {"tau": torch.tensor(self.budget(run.objective.name, run.epoch, run.epochs), device=run.device)}

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        stop: Stop = StopWhenWrong(state["tau"]) if self.variant == "official" else CFAStop(state["tau"])
        return replace(attack, stop=stop, noise=self.omega) if self.omega else replace(attack, stop=stop)

    def budget(self, objective: str, epoch: int, epochs: int) -> int:
        """tau in 0-based `epoch` of a run of `epochs`."""
        if isinstance(self.tau, int):
            return self.tau
        if isinstance(self.tau, str):
            return [tau for begin, tau in read_budgets(self.tau) if begin <= epoch][-1]
        if self.variant == "cfa":
            return CFA_TAU
        rounding = 1e-9
        budgets = OFFICIAL.get(objective, OFFICIAL_AT)
        return [tau for share, tau in budgets if share * epochs <= epoch + rounding][-1]

    def remark(self, epochs: int) -> str | None:
        budgets = read_budgets(self.tau) if isinstance(self.tau, str) else []
        last = max((begin for begin, _ in budgets), default=0)
        if last >= epochs:
            return f"friendly-at: the budget of epoch {last} never holds in a run of {epochs}"
        none_left = self.tau == 0 or (bool(budgets) and all(budget == 0 for _, budget in budgets))
        if self.variant == "cfa" and none_left:
            return "friendly-at(variant=cfa, tau=0) takes no attack step at all: it trains on the random start"
        return None


def read_budgets(text: str) -> list[tuple[int, int]]:
    """(first epoch, budget) of `"0, 1@50, 2@90"`, in order.

    >>> read_budgets("0, 1@50, 2@90")
    [(0, 0), (50, 1), (90, 2)]

    Raises:
        ConfigError: no such text, epochs that do not rise, or a negative number.
    """
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        budget, _, epoch = part.strip().partition("@")
        if not (budget.isdecimal() and (epoch.isdecimal() or (not found and epoch == ""))):
            raise ConfigError("friendly-at", "tau", allowed=ALLOWED_TAU, got=text)
        found.append((int(epoch or 0), int(budget)))
    epochs = [epoch for epoch, _ in found]
    if epochs[0] != 0 or sorted(set(epochs)) != epochs or max(budget for _, budget in found) > LARGEST_TAU:
        raise ConfigError("friendly-at", "tau", allowed=ALLOWED_TAU, got=text)
    return found
