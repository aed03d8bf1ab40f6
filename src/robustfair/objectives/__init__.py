"""Training objectives: each turns a batch into a loss and names the attack it trains on."""

from robustfair.objectives.ard import ARD
from robustfair.objectives.arow import ARoW
from robustfair.objectives.at import PGDAT
from robustfair.objectives.base import AdversarialObjective, Objective
from robustfair.objectives.bat import BAT
from robustfair.objectives.fgsm import FGSMAT
from robustfair.objectives.mart import MART
from robustfair.objectives.n_fgsm import NFGSM
from robustfair.objectives.rslad import RSLAD
from robustfair.objectives.standard import Standard
from robustfair.objectives.trades import Trades

__all__ = [
    "ARD",
    "BAT",
    "FGSMAT",
    "MART",
    "NFGSM",
    "PGDAT",
    "RSLAD",
    "ARoW",
    "AdversarialObjective",
    "Objective",
    "Standard",
    "Trades",
]
