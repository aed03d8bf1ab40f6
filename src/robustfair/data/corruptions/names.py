"""The 19 common corruptions by name, and the sets of them that benchmarks and papers average over.

Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations"
(ICLR 2019); FAIR-TAT, tables 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping

STANDARD = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 of the standard benchmark, over which mean corruption errors are taken."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
CORRUPTIONS = STANDARD + EXTRA
FAIR_TAT = tuple(name for name in CORRUPTIONS if name != "glass_blur")
"""The 18 of FAIR-TAT's tables."""
ALL = "all"
SETS: Mapping[str, tuple[str, ...]] = {"standard": STANDARD, "fair_tat": FAIR_TAT, "extra": EXTRA, ALL: CORRUPTIONS}
"""Names for several corruptions at once. In an audit of some corruptions, "all" is all of those."""
SEVERITIES = (1, 2, 3, 4, 5)
