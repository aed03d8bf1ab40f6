"""Write what was measured of objectives, methods and augmentations into their cards, from the results that are kept.

A card's section "Measured" has two marks. What stands between them is made of

- `results/objectives-cpu/objectives.json` (`python -m benchmarks.objectives`): does it train,
- `results/methods-cpu/cost*.json` (`python -m benchmarks.method_cost`): what an epoch costs beside its base's,
- `results/fairness-cpu/*.json` (`python -m benchmarks.fairness`): what it does for the worst class at small scale;

what stands around them is written by hand and stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fairness import ENTRIES, PLAIN, SCALES
from benchmarks.measure import ROOT, SCHEMA, Row, Table
from benchmarks.objectives import RATES
from robustfair.errors import DataError, RobustFairError
from robustfair.files import read_json, write_bytes
from robustfair.runs.composition import plans_of

CARDS, RESULTS = ROOT / "docs" / "methods", ROOT / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Write all cards that something was measured for, or, on an error, none."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of reports")
    options.add_argument("--cards", type=Path, default=CARDS, help="folder of cards")
    args = options.parse_args(argv)
    try:
        write_cards(args.cards, args.results)
    except RobustFairError as error:
        options.error(str(error))


def write_cards(folder: Path, results: Path) -> None:
    """Write what the results say of every card between its marks.

    Raises:
        DataError: a card is missing, or has not one begin and one end in this order.
    """
    said = {name: text for name in sorted(concerned(results)) if (text := measured(name, results))}
    paths = {name: folder / f"{name}.md" for name in said}
    absent = [str(path) for path in paths.values() if not path.is_file()]
    if absent:
        raise DataError(f"no card {', '.join(absent)}: write it, with {BEGIN} and {END}")
    cards = {path: inserted(path.read_bytes(), said[name], path) for name, path in paths.items()}
    for path, content in cards.items():
        write_bytes(path, content)


def concerned(results: Path) -> set[str]:
    """Names of the cards that the results may say something of."""
    costs = {row["method"].partition(", ")[0] for _, row in _cost_rows(results)}
    trained = {name for line in _trained(results)[1] for name in _cards_of(line)}
    return costs | trained | {name for entry in ENTRIES for name in terms(entry)}


def measured(name: str, results: Path) -> str:
    """What the results say of a card; empty where they say nothing."""
    return "\n\n".join([*training(name, results), *cost(name, results), *small_scale(name, results)])


def inserted(card: bytes, text: str, path: Path) -> bytes:
    """A card with `text` between its marks.

    Raises:
        DataError: it has not one begin and one end in this order; names `path`.
    """
    begin, end = BEGIN.encode(), END.encode()
    if card.count(begin) != 1 or card.count(end) != 1 or card.index(begin) > card.index(end):
        raise DataError(f"{path} needs one {BEGIN} and after it one {END}: what was measured goes between them")
    before, after = card[: card.index(begin) + len(begin)], card[card.index(end) :]
    return before + f"\n{text}\n".encode() + after


# Does it train


BASELINE = {"what": "pgd-at", "norm": "linf"}
"""The line that every card shows."""
SHARED = {"idbh-strong": "idbh", "idbh-svhn": "idbh"}
"""Name -> the card that it shares."""
TRAINED = {"what": "{what}", "norm, radius": "{norm}, {eps}", **RATES, "commit": "{commit}"}


def training(name: str, results: Path) -> Iterator[str]:
    """Its lines of the report of objectives, beside the baseline, and how they were measured."""
    settings, lines = _trained(results)
    if not any(name in _cards_of(line) for line in lines):
        return
    shown = [line for line in lines if name in _cards_of(line) or all(line[key] == BASELINE[key] for key in BASELINE)]
    yield Table("", TRAINED, shown).markdown()
    yield (
        f"`python -m benchmarks.objectives`: {settings['images']:,} images of {settings['data']}, "
        f"{settings['epochs']} epochs, {settings['model']} of width {settings['width']}, seed {settings['seed']}; "
        f"percent of {settings['test_images']:,} test images, with 95 % intervals over test images and not over seeds. "
        "At this scale it shows that the objective trains, and not which is best."
    )


def _trained(results: Path) -> tuple[Mapping[str, Any], list[Row]]:
    path = results / "objectives-cpu" / "objectives.json"
    if not path.exists():
        return {}, []
    report = read_json(path, SCHEMA)
    return report["settings"], [row for table in report["tables"] for row in table["rows"]]


def _cards_of(line: Row) -> set[str]:
    return {SHARED.get(name, name) for name in line["names"]}


# What it costs


def cost(name: str, results: Path) -> Iterator[str]:
    """A paragraph for every case of the method: an epoch beside the base's."""
    for path, row in _cost_rows(results):
        method, _, how = row["method"].partition(", ")
        if method == name:
            case = f" ({how})" if how else ""
            yield (
                f"Cost: an epoch{case} takes {row['ratio']:.2f} times one of `{row['base']}`, turn by turn "
                f"{row['low']:.2f} to {row['high']:.2f} (`python -m benchmarks.method_cost`, "
                f"`results/methods-cpu/{path.name}`)."
            )


def _cost_rows(results: Path) -> list[tuple[Path, Row]]:
    paths = sorted((results / "methods-cpu").glob("cost*.json"))
    return [(path, row) for path in paths for row in read_json(path, SCHEMA)["tables"][0]["rows"]]


# What it does at small scale


CHANGES = {
    "data": "{data}",
    "composition": "`{train}`",
    "base": "`{base}`",
    "average": "{average:+.1f}",
    "worst class": "{worst:+.1f} ({worst_low:+.1f} to {worst_high:+.1f})",
    "worst class, against the plain baseline": "{plain:+.1f} ({plain_low:+.1f} to {plain_high:+.1f})",
}


def small_scale(name: str, results: Path) -> Iterator[str]:
    """What the method changes at small scale, in a table, and what of it holds in words."""
    rows = [row for scale in SCALES for row in changes(name, scale, results)]
    if not rows:
        return
    yield (
        "Small scale: points of robust accuracy, on long tails of clean accuracy, over the base, and of the worst "
        f"class also over the plain baseline, `{ENTRIES[PLAIN].train}`; means with 95 % intervals over seeds and test "
        "images (`python -m benchmarks.fairness`, `results/fairness-cpu/`)."
    )
    yield Table("", CHANGES, rows).markdown()
    better = sum((row["worst_low"] or 0) > 0 for row in rows)
    told = f"Its worst class is above the base's beyond chance in {better} of {len(rows)} rows"
    against = [row for row in rows if row["plain"] is not None]
    if against:
        beats = sum((row["plain_low"] or 0) > 0 for row in against)
        told += f", and above the plain baseline's in {beats} of {len(against)}"
    yield f"{told}."


def changes(name: str, scale: str, results: Path) -> Iterator[Row]:
    """The rows of a scale that have the method while their base has not, once two seeds give them an interval."""
    path = results / "fairness-cpu" / f"{scale}.json"
    if not path.exists():
        return
    judged = SCALES[scale].judged
    tables = {table["title"]: table["rows"] for table in read_json(path, SCHEMA)["tables"]}
    for row in tables.get("Changes, seed by seed, against the base", ()):
        told = row.get(f"{judged}_worst_low") is not None
        if told and name in terms(row["row"]) - terms(row["base"]):
            entry, base = ENTRIES[row["row"]], ENTRIES[row["base"]]
            ends = {
                f"{to}{end}": row.get(f"{key}{end}")
                for to, key in (("average", judged), ("worst", f"{judged}_worst"), ("plain", "plain"))
                for end in ("", "_low", "_high")
            }
            longer = ", trained on" if base.start else ""
            yield {"data": scale, "train": entry.train, "base": f"{base.train}{longer}", **ends}


def terms(name: str) -> set[str]:
    """Names of the objective, methods and bundles of a row of `benchmarks.fairness`, and of its recipe."""
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
