"""Audits of trained models, and what their numbers do not say."""

from robustfair.evaluate.audit import Audit, WorstClass, audit, load_audit, threat
from robustfair.evaluate.sanity import Finding, compare_findings, findings

__all__ = ["Audit", "Finding", "WorstClass", "audit", "compare_findings", "findings", "load_audit", "threat"]
