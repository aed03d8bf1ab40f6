"""The classes of ImageNet's validation images, which its authors ship in one folder, from the files that name them.

The development kit numbers the classes (`ILSVRC2012_validation_ground_truth.txt`, a number an image in the order of
their names) and names the numbers (`meta.mat`); Kaggle's copy has a table of names (`LOC_val_solution.csv`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from robustfair.errors import DataError

NUMBERS, META, TABLE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
_IMAGE = "ILSVRC2012_val_{:08d}"


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Class of every validation image.

    Attributes:
        file: that names them.
        classes: name of the image, without its suffix -> wnid.
    """

    file: Path
    classes: Mapping[str, str]


def read_ground_truth(owner: str, files: Mapping[str, Path]) -> GroundTruth | None:
    """From the files of a data set by name; None where none of them tells.

    Raises:
        DataError: a file is damaged, or the names of the numbers are missing.
    """
    if TABLE in files:
        return GroundTruth(file=files[TABLE], classes=_of_table(files[TABLE]))
    if NUMBERS not in files:
        return None
    if META not in files:
        raise DataError(
            f"{owner}: {files[NUMBERS]} numbers the classes and {META}, which names the numbers, is missing: unpack "
            "ILSVRC2012_devkit_t12/data/ whole"
        )
    wnids = _numbered(files[META])
    classes = {}
    for number, line in enumerate(_lines(files[NUMBERS]), start=1):
        if not line.strip().isdecimal() or int(line) not in wnids:
            raise DataError(f"{files[NUMBERS]} line {number} is {line.strip()!r}, no number of a class in {META}")
        classes[_IMAGE.format(number)] = wnids[int(line)]
    return GroundTruth(file=files[NUMBERS], classes=classes)


def _of_table(file: Path) -> dict[str, str]:
    """Kaggle's table: a header, then the name of an image and the class and box of each object in it."""
    found = {}
    for number, line in enumerate(_lines(file)[1:], start=2):
        image, _, objects = line.partition(",")
        if not objects.split():
            raise DataError(f"{file} line {number} names no class: get the original file again")
        found[image] = objects.split()[0]
    return found


def _numbered(file: Path) -> dict[int, str]:
    """Number -> wnid of the classes that have no class below them."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(file, squeeze_me=True, variable_names=["synsets"])["synsets"].ravel()
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        return {int(number): str(wnid) for number, wnid, children in rows if int(children) == 0}
    except Exception as error:  # a damaged file raises whatever its reader stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} cannot be read as the development kit's table of classes: {reason}") from error


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
