"""Training objectives: each turns a batch into a loss and names the attack it trains on."""

from robustfair.objectives.at import PGDAT
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.objectives.standard import Standard
from robustfair.objectives.trades import Trades

__all__ = ["PGDAT", "AdversarialObjective", "Objective", "Standard", "Trades"]
