"""Subsets of ImageNet that files name: ImageNet-LT by images, of train, val and test part; ImageNet-100 by classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from robustfair.data.load.folders import Listing, list_images
from robustfair.data.load.parts import as_parts, listed
from robustfair.data.load.scan import Folder
from robustfair.errors import DataError


def list_named(owner: str, lists: Mapping[str, Path], roots: Sequence[Path], layout: str) -> Listing:
    """The images that the lists of "train", "test" and "validation" name, a line each: path, space, class index.

    A path is looked for below each of `roots` in turn, and there without its class folder too, as ImageNet's validation
    images may lie in one folder. The name of a class is the folder in the paths of its images.

    Raises:
        DataError: a line cannot be read, a class has two names, or images are missing (the first is named).
    """
    rows = {part: _rows(file) for part, file in lists.items()}
    names: dict[int, str] = {}
    for part, found in rows.items():
        for label, path in found:
            name = Path(path).parent.name or str(label)
            if names.setdefault(label, name) != name:
                raise DataError(
                    f"{lists[part]}: class {label} lies in two folders, {names[label]} and {name}: the lists are not "
                    "of one data set"
                )
    kept, notes = as_parts(rows)
    places = [root for root in roots if root.is_dir()]
    files = {part: _located(owner, found, places, layout) for part, found in kept.items()}
    class_names = tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    read = f"read as {listed([lists[part].name for part in kept])} list it"
    return Listing(class_names=class_names, files=files, notes=(read, *notes))


def list_chosen(owner: str, file: Path, images: Folder, layout: str) -> Listing:
    """The images of the classes that a file names, a wnid at the begin of each line, sorted as their folders would be.

    Args:
        images: folder of the whole data set.
        layout: what it is expected to hold.

    Raises:
        DataError: a class is named twice or has no images, or the folder is not as it is expected.
    """
    given = [line.split()[0] for line in _lines(file)]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise DataError(f"{file} names {listed(twice)} twice: write each class once, a line each")
    found = list_images(owner, images, None, layout=layout, given=sorted(given))
    for part, rows in found.files.items():
        held = {label for label, _ in rows}
        absent = [name for label, name in enumerate(found.class_names) if label not in held]
        if absent:
            raise DataError(f"{owner}: {images.path} has no {part} images of {listed(absent)}, which {file} names")
    notes = (f"the classes are the {len(given)} in {file.name}, images from {images.path}", *found.notes)
    return Listing(class_names=found.class_names, files=found.files, notes=notes)


def _rows(file: Path) -> list[tuple[int, str]]:
    """(class index, path) a line."""
    found = []
    for number, line in enumerate(_lines(file), start=1):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(f"{file} line {number} is {line.strip()!r}: expected the path of an image and its class")
        found.append((int(label), path.strip()))
    if not found:
        raise DataError(f"{file} is empty: get the original file again")
    return found


def _located(owner: str, rows: Sequence[tuple[int, str]], roots: Sequence[Path], layout: str) -> list[tuple[int, Path]]:
    """(class index, file) of each image, by class and path."""
    found, missing = [], []
    for label, path in rows:
        flat = Path(path).parent.parent / Path(path).name
        places = [place for root in roots for place in (root / path, root / flat)]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            missing.append(path)
        else:
            found.append((label, file))
    if missing:
        where = " and ".join(map(str, roots))
        raise DataError(
            f"{owner}: {len(missing):,} of {len(rows):,} images are missing, the first is {missing[0]}, looked for in "
            f"{where}: expected {layout}"
        )
    return sorted(found)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
