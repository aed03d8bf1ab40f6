"""Methods that act on an objective through hooks; each is one file readable beside its paper."""

from robustfair.methods.absld import ABSLD
from robustfair.methods.averaging import EMA, SWA
from robustfair.methods.avmixup import AVmixup
from robustfair.methods.awp import AWP
from robustfair.methods.base import Bundle, Method, Run
from robustfair.methods.cfa import CCM, CCR, CFA, FAWA
from robustfair.methods.class_balanced import ClassBalanced
from robustfair.methods.compose import Plan, compose
from robustfair.methods.csr import CSR
from robustfair.methods.dafa import DAFA
from robustfair.methods.faal import FAAL
from robustfair.methods.fair_ard import FairARD
from robustfair.methods.fair_tat import FairTAT
from robustfair.methods.friendly_at import FriendlyAT
from robustfair.methods.frl import FRL
from robustfair.methods.label_smoothing import LabelSmoothing
from robustfair.methods.lff import LfF
from robustfair.methods.logit_adjustment import LogitAdjustment
from robustfair.methods.variance_fat import VarianceFAT
from robustfair.methods.wat import WAT

__all__ = [
    "ABSLD",
    "AWP",
    "CCM",
    "CCR",
    "CFA",
    "CSR",
    "DAFA",
    "EMA",
    "FAAL",
    "FAWA",
    "FRL",
    "SWA",
    "WAT",
    "AVmixup",
    "Bundle",
    "ClassBalanced",
    "FairARD",
    "FairTAT",
    "FriendlyAT",
    "LabelSmoothing",
    "LfF",
    "LogitAdjustment",
    "Method",
    "Plan",
    "Run",
    "VarianceFAT",
    "compose",
]
