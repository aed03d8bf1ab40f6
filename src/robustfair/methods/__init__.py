"""Methods that act on an objective through hooks; each is one file readable beside its paper."""

from robustfair.methods.averaging import EMA, SWA
from robustfair.methods.avmixup import AVmixup
from robustfair.methods.awp import AWP
from robustfair.methods.base import Method, Run
from robustfair.methods.cfa import CCM, CCR
from robustfair.methods.class_balanced import ClassBalanced
from robustfair.methods.compose import Plan, compose
from robustfair.methods.friendly_at import FriendlyAT
from robustfair.methods.label_smoothing import LabelSmoothing
from robustfair.methods.lff import LfF
from robustfair.methods.logit_adjustment import LogitAdjustment

__all__ = [
    "AWP",
    "CCM",
    "CCR",
    "EMA",
    "SWA",
    "AVmixup",
    "ClassBalanced",
    "FriendlyAT",
    "LabelSmoothing",
    "LfF",
    "LogitAdjustment",
    "Method",
    "Plan",
    "Run",
    "compose",
]
