"""Does the fast path train models as robust as the reference path? Several seeds of each, audited on test images.

Every way starts from the same weights, order, augmentation and starting points of a seed and differs in rounding alone.
Training amplifies rounding, so two ways of one seed may end as far apart as two seeds do; what must agree is the mean
over seeds. The reference is the deterministic run: eager, float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks import measure
from benchmarks.measure import Report, Row, Table
from benchmarks.workload import default_data, initialised, load
from robustfair.data import ImageDataset
from robustfair.evaluate.run import audit
from robustfair.objectives import PGDAT
from robustfair.training.fit import fit
from robustfair.training.schedule import Schedule

WAYS: dict[str, dict[str, Any]] = {
    "reference: fp32 eager": {"deterministic": True},
    "fp32 on kernels": {},
    "fp32 compiled": {"compile": True},
    "bf16 eager": {"precision": "bf16"},
    "bf16 compiled": {"precision": "bf16", "compile": True},
}
REFERENCE = next(iter(WAYS))
COLUMNS = {
    "way": "{way}",
    "clean": "{clean:.2f}",
    "PGD-20": "{robust:.2f}",
    "over seeds": "{lowest:.2f} to {highest:.2f}",
    "- reference": "{difference:+.2f}",
    "its standard error": "{error:.2f}",
    "worst class": "{worst:.2f}",
    "- ref.": "{worst_difference:+.2f}",
    "its std. error": "{worst_error:.2f}",
    "seconds": "{seconds:.0f}",
}


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the comparison from the command line."""
    options = measure.parser("equivalence", __doc__, batch_size=128, precision=("fp32", "bf16"), width=16)
    measure.add_compile(options)
    options.add_argument("--data", default=default_data(), help="name or path of images, or synthetic")
    options.add_argument("--images", type=int, default=2560, help="training images")
    options.add_argument("--test-images", type=int, default=2000, help="audited images")
    options.add_argument("--epochs", type=int, default=8, help="of each run, one-cycle to 0.2")
    options.add_argument("--seeds", type=int, default=3, help="runs of each way")
    return measure.run(options, report, argv)


def report(args: argparse.Namespace) -> Report:
    """One line a way: means over seeds, and the mean difference to the reference, seed by seed."""
    train, test = load(args.data, "train", args.images), load(args.data, "test", args.test_images)
    names = [name for name, how in WAYS.items() if _asked(how, args)]
    runs: dict[str, list[Row]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names:
            found = trained(train, test, seed, WAYS[name], args)
            runs[name].append(found)
            measure.say(f"seed {seed}, {name}: {found['robust']:.2f} under PGD-20 in {found['seconds']:.0f} s")
    data = {"data": args.data, "images": len(train), "test_images": len(test), "epochs": args.epochs}
    return Report(
        name="equivalence",
        settings={**measure.settings(args), **data, "seeds": args.seeds, "batch_size": args.batch_size},
        tables=[Table("Accuracy in percent after training, mean over seeds", COLUMNS, compared(runs))],
        notes=["Small scale: few images, few epochs and a narrow network. It compares paths, not methods."],
    )


def compared(runs: dict[str, list[Row]]) -> list[Row]:
    """A row per way from its runs, in the order of seeds; the reference's are the first."""
    base = runs[REFERENCE]
    rows = []
    for name, found in runs.items():
        row: Row = {"way": name, "runs": found}
        for key in ("clean", "robust", "worst", "seconds"):
            row[key] = mean(run[key] for run in found)
        row["lowest"], row["highest"] = (pick(run["robust"] for run in found) for pick in (min, max))
        for key, difference, error in (
            ("robust", "difference", "error"),
            ("worst", "worst_difference", "worst_error"),
        ):
            apart = [run[key] - ours[key] for run, ours in zip(found, base, strict=True)]
            row[difference] = None if name == REFERENCE else mean(apart)
            row[error] = None if name == REFERENCE or len(apart) < 2 else stdev(apart) / len(apart) ** 0.5
        rows.append(row)
    return rows


def trained(train: ImageDataset, test: ImageDataset, seed: int, how: dict[str, Any], args: argparse.Namespace) -> Row:
    """Train one model and audit it in float32; rates in percent."""
    model = initialised(args.model, args.width, train, seed)
    schedule = Schedule(epochs=args.epochs, kind="one-cycle", lr=0.2, batch_size=args.batch_size)
    options: dict[str, Any] = {"schedule": schedule, "seed": seed, "validation": 0, "select": "last"}
    fitted = fit(model, train, PGDAT(), device=args.device, **options, **how)
    result = audit(fitted.model, test, attacks=["clean", "pgd-20"], device=args.device)
    return {
        "seed": seed,
        "clean": 100 * result.average("clean"),
        "robust": 100 * result.average("pgd-20"),
        "worst": 100 * result.worst("pgd-20").value,
        "seconds": sum(record["seconds"] for record in fitted.history),
    }


def _asked(how: dict[str, Any], args: argparse.Namespace) -> bool:
    return how.get("precision", "fp32") in args.precision and (args.compile or not how.get("compile"))


if __name__ == "__main__":
    main()
