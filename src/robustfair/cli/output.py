"""Lines that several commands print."""

from __future__ import annotations

import shlex
from pathlib import Path


def audit_next(run: Path) -> str:
    """The command that audits a run, as a shell takes it."""
    return f'next: robustfair audit {shlex.quote(str(run))} --attacks "clean,pgd-20,cw-50(restarts=5)"'
