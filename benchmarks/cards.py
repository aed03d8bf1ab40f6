"""Write what was measured of each method into its card, from the results that are kept.

A card ends with its section "Measured". What stands there below the mark is made of `results/methods-cpu/cost*.json`
(`python -m benchmarks.method_cost`) and `results/fairness-cpu/*.json` (`python -m benchmarks.fairness`); what stands
above it is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fairness import ENTRIES, PLAIN, SCALES
from benchmarks.measure import ROOT, Row, Table
from robustfair.files import write_text
from robustfair.runs.composition import plans_of

CARDS = ROOT / "docs" / "methods"
RESULTS = ROOT / "results"
NOTHING = "Not measured yet."
MARK = "<!-- From here on by `python -m benchmarks.cards`. -->"
COLUMNS = {
    "data": "{data}",
    "composition": "`{train}`",
    "base": "`{base}`",
    "robust": "{average:+.1f}",
    "worst class": "{worst:+.1f} ({worst_low:+.1f} to {worst_high:+.1f})",
    "against the plain baseline": "{plain:+.1f} ({plain_low:+.1f} to {plain_high:+.1f})",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write all cards that something was measured for."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.cards", description=(__doc__ or "").partition("\n")[0]
    ).parse_args(argv)
    for path in sorted(CARDS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := written(path.stem, text)) != text:
            write_text(path, new)


def written(name: str, text: str, results: Path = RESULTS) -> str:
    """A card with what `results` say of it."""
    above = text.partition(MARK)[0].rstrip()
    found = "\n\n".join([*cost(name, results), *small_scale(name, results)])
    if not found:
        return f"{above}\n"
    return f"{above.removesuffix(NOTHING).rstrip()}\n\n{MARK}\n\n{found}\n"


def cost(name: str, results: Path) -> Iterator[str]:
    """A paragraph with what an epoch costs beside the base's, of every case of the method."""
    for path in sorted((results / "methods-cpu").glob("cost*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["tables"][0]["rows"]:
            method, _, how = row["method"].partition(", ")
            if method == name:
                over = f"turn by turn {row['low']:.2f} to {row['high']:.2f}"
                where = f"{path.relative_to(results.parent).with_suffix('.md')}"
                yield (
                    f"Cost: an epoch{f' ({how})' * bool(how)} takes {row['ratio']:.2f} times one of `{row['base']}`\n"
                    f"({over}; `{where}`)."
                )


def small_scale(name: str, results: Path) -> Iterator[str]:
    """What the method changes at small scale, in a table, and what of it holds in words."""
    rows = [row for scale in SCALES for row in changes(name, scale, results)]
    if not rows:
        return
    yield (
        "Small scale: points over the base, and of the worst class also over the plain baseline\n"
        f"`{ENTRIES[PLAIN].train}`, with 95 % intervals over seeds and test images\n"
        "(`python -m benchmarks.fairness`, `results/fairness-cpu/`)."
    )
    yield Table("", COLUMNS, rows).markdown()
    better = [row for row in rows if (row.get("worst_low") or 0) > 0]
    told = f"Its worst class is above the base's beyond chance in {len(better)} of {len(rows)} rows"
    against = [row for row in rows if row.get("plain") is not None]
    if against:
        beats = [row for row in against if (row.get("plain_low") or 0) > 0]
        told += f",\nabove the plain baseline's in {len(beats)} of {len(against)}"
    yield f"{told}."


def changes(name: str, scale: str, results: Path) -> Iterator[Row]:
    """The rows of a scale that have the method while their base has not."""
    path = results / "fairness-cpu" / f"{scale}.json"
    if not path.exists():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    judged = SCALES[scale].judged
    found = next((table["rows"] for table in report["tables"] if table["title"].startswith("Changes")), ())
    for row in found:
        if name in terms(row["row"]) - terms(row["base"]):
            base, worst = base_of(row), f"{judged}_worst"
            ends: dict[str, Any] = {f"worst{end}": row.get(f"{worst}{end}") for end in ("", "_low", "_high")}
            ends |= {f"plain{end}": row.get(f"plain{end}") for end in ("", "_low", "_high")}
            yield {"data": scale, "train": ENTRIES[row["row"]].train, "base": base, "average": row[judged], **ends}


def base_of(row: Row) -> str:
    """The composition of a row's base, with what it went on from."""
    entry = ENTRIES[row["base"]]
    return f"{entry.train}, trained on" if entry.start else entry.train


def terms(name: str) -> set[str]:
    """Names of the objective, methods and bundles of a row, and of its recipe."""
    entry = ENTRIES[name]
    found = {name} if "stages" in entry.keys else set()
    for _, plan in plans_of(entry.train.format(**dict.fromkeys(entry.asks, "runs/x"))):
        if plan is not None:
            parts = {part.name for became in plan.bundles for part in became.parts}
            own = {method.name for method in plan.methods} - parts
            found |= {plan.objective.name, *own, *(became.bundle.name for became in plan.bundles)}
    return found


if __name__ == "__main__":
    main()
