"""Class-wise metrics: counts that add up over batches, then rates, then one number with its error bar. All pure.

Counts are confusion counts (C, C), rows predicted, columns true; rates are fractions in float64. A class without images
is nan in every vector and left out of every summary: it never shifts another class. Vectors come back as tensors on the
device of their input, single numbers as Python floats.

Sources. Worst class, range, standard deviation, NSD (std / mean, as ABSLD reports it) and mean of the worst q: usage of
the robust-fairness papers, with class counts where their codes assume a balanced set. Zero-diagonal confusion with
row = predicted and its spectral norm: "Enhancing robust fairness via confusional spectral regularization" (CSR).
False-positive score and one-vs-rest accuracy: FAIR-TAT (eq. 7 for the latter). Natural and boundary error: FRL. Head
norm against class accuracy: "Class-wise disparity in adversarial training: implicit bias perspective" (HWNwB).
Intervals: Wilson (1927); the bootstrap is described at `bootstrap_statistic`, for pairs at `bootstrap_difference`.
Paired tests: McNemar (1947) in its exact form, Holm (1979), Agresti and Min (2005). Several seeds: see `over_seeds`.
"""

from robustfair.metrics.counts import confusion_pred_true, correct_per_class, sums_per_class
from robustfair.metrics.intervals import FEW_IMAGES, Interval, bootstrap_statistic, stratified_wilson, wilson
from robustfair.metrics.paired import (
    bootstrap_difference,
    bootstrap_differences,
    holm,
    mcnemar,
    paired_interval,
    paired_table,
    stratified_paired_interval,
)
from robustfair.metrics.rates import (
    Shots,
    Thirds,
    accuracy_range,
    average,
    best,
    best_class,
    boundary_error,
    cfns,
    cfps,
    class_accuracy,
    class_mean,
    confusion_rates_pred_true,
    head_norm_correlation,
    head_norm_ratio,
    kendall,
    l1_norm_confusion,
    natural_error,
    nsd,
    one_vs_rest_accuracy,
    shot_of_class,
    shots,
    spectral_norm_confusion,
    std,
    summarise,
    third_of_class,
    thirds,
    worst,
    worst_class,
    worst_q,
)
from robustfair.metrics.seeds import OverSeeds, difference_over_seeds, over_seeds

__all__ = [
    "FEW_IMAGES",
    "Interval",
    "OverSeeds",
    "Shots",
    "Thirds",
    "accuracy_range",
    "average",
    "best",
    "best_class",
    "bootstrap_difference",
    "bootstrap_differences",
    "bootstrap_statistic",
    "boundary_error",
    "cfns",
    "cfps",
    "class_accuracy",
    "class_mean",
    "confusion_pred_true",
    "confusion_rates_pred_true",
    "correct_per_class",
    "difference_over_seeds",
    "head_norm_correlation",
    "head_norm_ratio",
    "holm",
    "kendall",
    "l1_norm_confusion",
    "mcnemar",
    "natural_error",
    "nsd",
    "one_vs_rest_accuracy",
    "over_seeds",
    "paired_interval",
    "paired_table",
    "shot_of_class",
    "shots",
    "spectral_norm_confusion",
    "std",
    "stratified_paired_interval",
    "stratified_wilson",
    "summarise",
    "sums_per_class",
    "third_of_class",
    "thirds",
    "wilson",
    "worst",
    "worst_class",
    "worst_q",
]
