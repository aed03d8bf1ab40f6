"""Audits of trained models, what their numbers do not say, and how they stand against one another and against gates."""

from robustfair.evaluate.audit import Audit, WorstClass, audit, load_audit, threat
from robustfair.evaluate.compare import Comparison, compare, compare_many
from robustfair.evaluate.gates import GateResult, check, parse_gate
from robustfair.evaluate.grouping import GroupRates, read_groups, regroup
from robustfair.evaluate.sanity import Finding, compare_findings, findings

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
    "read_groups",
    "regroup",
    "threat",
]
