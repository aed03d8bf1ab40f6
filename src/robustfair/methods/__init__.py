"""Methods that act on an objective through hooks; each is one file readable beside its paper."""

from robustfair.methods.averaging import EMA, SWA
from robustfair.methods.avmixup import AVmixup
from robustfair.methods.awp import AWP
from robustfair.methods.base import Method, Run
from robustfair.methods.cfa import CCM, CCR
from robustfair.methods.compose import Plan, compose
from robustfair.methods.csr import CSR
from robustfair.methods.friendly_at import FriendlyAT
from robustfair.methods.label_smoothing import LabelSmoothing

__all__ = [
    "AWP",
    "CCM",
    "CCR",
    "CSR",
    "EMA",
    "SWA",
    "AVmixup",
    "FriendlyAT",
    "LabelSmoothing",
    "Method",
    "Plan",
    "Run",
    "compose",
]
