"""Repairs: a trained model in, a new model with a fairer head out."""

from robustfair.repairs.base import ChecksClasses, ReadsRun, Repair, repair
from robustfair.repairs.head_norm import HWNwB
from robustfair.repairs.logit_adjustment import PostHocLogitAdjustment

__all__ = ["ChecksClasses", "HWNwB", "PostHocLogitAdjustment", "ReadsRun", "Repair", "repair"]
