"""Repairs: a trained model in, a new model with a fairer head out."""

from robustfair.repairs.base import Repair, repair
from robustfair.repairs.head_norm import HWNwB

__all__ = ["HWNwB", "Repair", "repair"]
