"""Audits of trained models, what their numbers do not say, and how they stand against one another and against gates."""

from robustfair.evaluate.compare import Comparison, compare, compare_many
from robustfair.evaluate.diagnostics.diagnostic import Finding
from robustfair.evaluate.diagnostics.inputs import (
    random_output,
    suspect_mode,
    suspect_model,
    suspect_normalisation,
    suspect_outputs,
    suspect_pixels,
)
from robustfair.evaluate.diagnostics.masking import thorough_findings
from robustfair.evaluate.diagnostics.results import compare_findings, findings
from robustfair.evaluate.gates import GateResult, check, parse_gate
from robustfair.evaluate.groups import GroupRates, read_groups, regroup
from robustfair.evaluate.plan import threat
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import Audit, load_audit
from robustfair.evaluate.run import audit

__all__ = [
    "Audit",
    "Comparison",
    "Finding",
    "GateResult",
    "GroupRates",
    "WorstClass",
    "audit",
    "check",
    "compare",
    "compare_findings",
    "compare_many",
    "findings",
    "load_audit",
    "parse_gate",
    "random_output",
    "read_groups",
    "regroup",
    "suspect_mode",
    "suspect_model",
    "suspect_normalisation",
    "suspect_outputs",
    "suspect_pixels",
    "thorough_findings",
    "threat",
]
