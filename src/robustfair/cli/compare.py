"""`robustfair compare`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from robustfair.cli.flags import FormatFlag, JsonSwitch, PathFlag, Switch
from robustfair.report.console import Screen, say, screen

if TYPE_CHECKING:
    from robustfair.evaluate.compare import Comparison


def compare(
    *targets: str,
    attacks: str | None = None,
    paired: Switch = False,
    group_by: str | None = None,
    format_: FormatFlag = "table",
    json_: JsonSwitch = False,
    out: PathFlag | None = None,
) -> int:
    """Compare stored audits on the same images, class by class; attacks nothing.

    Parameters
    ----------
    targets
        Two or more run folders, whose newest audits that fit each other are taken, or audit files. Every later one is
        compared with the first.
    attacks
        Only these attacks of the audits, comma-separated.
    paired
        Exact McNemar tests per class with Holm's correction, and paired intervals for the average, the worst class and
        the range.
    group_by
        Compare groups too: superclass, shot (many, medium and few training images), difficulty (thirds of the classes
        by accuracy of the first), or a CSV file of class,group or index,group.
    format_
        Of what is printed.
    json_
        The same as --format json.
    out
        Write it into this file instead.
    """
    from robustfair.attacks.named import parse_attacks
    from robustfair.config import require
    from robustfair.evaluate.compare import _OUTER_COMMA, compare_many
    from robustfair.evaluate.find import comparable_audits
    from robustfair.evaluate.groups import read_groups
    from robustfair.evaluate.result import ROBUST
    from robustfair.files import write_text
    from robustfair.registry import canonical
    from robustfair.report.forms import before_after_lines, comparison_text

    require(len(targets) >= 2, "compare", "targets", allowed="at least two runs or audits", got=len(targets))
    hint = f"Try {out}/comparison.txt"
    require(out is None or not out.is_dir(), "compare", "out", allowed="a file name", got=str(out), hint=hint)
    form = "json" if json_ else format_
    named = [name for name in _OUTER_COMMA.split(attacks) if canonical(name) != ROBUST] if attacks else []
    wanted = [attack.name for attack in parse_attacks(named)] if named else []
    stored = comparable_audits(targets, wanted)
    audits, shown = [audit for _, audit in stored], Screen() if out else screen()
    compared = compare_many(audits, attacks=attacks)
    grouped: tuple[Comparison, ...] = ()
    if group_by is not None:
        groups = read_groups(group_by, audits[0], baseline=audits[0], also=audits[1:])
        grouped = compare_many(audits, attacks=attacks, groups=groups)
    for path, _ in stored:
        print(f"note: {path}", file=sys.stderr)
    if paired or attacks or form != "table":
        text = comparison_text(compared, form, shown, grouped)
    else:
        lines = [line for later in audits[1:] for line in before_after_lines(audits[0], later, shown)]
        text = "\n".join([*lines, *([comparison_text((), form, shown, grouped)] if grouped else [])])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text + "\n")
    say(text if out is None else f"wrote {out}")
    return 0
