"""The audit in one place: what it is asked, how it runs, what comes of it."""

from robustfair.evaluate.plan import BATCH_SIZE, AuditPlan, threat
from robustfair.evaluate.rates import WorstClass
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, load_audit
from robustfair.evaluate.run import audit

__all__ = ["BATCH_SIZE", "CLEAN", "ROBUST", "Audit", "AuditPlan", "WorstClass", "audit", "load_audit", "threat"]
