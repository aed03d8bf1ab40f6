"""Methods that act on an objective through hooks; each is one file readable beside its paper."""

from robustfair.methods.averaging import EMA
from robustfair.methods.base import Method, Plan, Run, compose
from robustfair.methods.cfa import CCM, CCR

__all__ = ["CCM", "CCR", "EMA", "Method", "Plan", "Run", "compose"]
