"""The training loop, its schedule and its progress display."""

from robustfair.training.fit import Fitted, fit
from robustfair.training.schedule import Schedule

__all__ = ["Fitted", "Schedule", "fit"]
