"""Audits of trained models, what their numbers do not say, and how they stand against one another and against gates."""

from robustfair.evaluate.audit import Audit, WorstClass, audit, load_audit, threat
from robustfair.evaluate.compare import Comparison, compare, compare_many
from robustfair.evaluate.diagnostics.base import Diagnostic
from robustfair.evaluate.diagnostics.inputs import (
    diagnose_mode,
    diagnose_model,
    diagnose_normalisation,
    diagnose_outputs,
    diagnose_pixels,
    diagnose_randomness,
)
from robustfair.evaluate.diagnostics.masking import diagnose_gradients
from robustfair.evaluate.diagnostics.results import diagnose, diagnose_change
from robustfair.evaluate.gates import GateResult, check, parse_gate
from robustfair.evaluate.groups import GroupRates, read_groups, regroup
from robustfair.evaluate.sequential import audit_until, parse_until

__all__ = [
    "Audit",
    "Comparison",
    "Diagnostic",
    "GateResult",
    "GroupRates",
    "WorstClass",
    "audit",
    "audit_until",
    "check",
    "compare",
    "compare_many",
    "diagnose",
    "diagnose_change",
    "diagnose_gradients",
    "diagnose_mode",
    "diagnose_model",
    "diagnose_normalisation",
    "diagnose_outputs",
    "diagnose_pixels",
    "diagnose_randomness",
    "load_audit",
    "parse_gate",
    "parse_until",
    "read_groups",
    "regroup",
    "threat",
]
