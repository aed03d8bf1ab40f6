"""Folders of images: what lies in them, which folders are parts and which are classes, and what is left out.

A folder whose names can be read in two ways is refused with both; `class_names.txt` in it, a name a line, chooses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robustfair.data.load.ground_truth import META, GroundTruth, read_ground_truth
from robustfair.data.load.parts import as_parts, by_role, is_role, listed, role_of, text_order
from robustfair.data.load.scan import Folder, kinds_of
from robustfair.errors import DataError

CLASS_NAMES = "class_names.txt"
ANNOTATIONS = "val_annotations.txt"
"""Of the original Tiny-ImageNet: image, class and box of every image of a part, tab-separated."""

_OTHER_PICTURES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".tga", ".svg", ".psd", ".dcm", ".nii", ".exr", ".npy"}
    | {".raw", ".cr2", ".nef", ".arw", ".dng"}
)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """An image folder, read: files of every class and part.

    Attributes:
        class_names: names of all parts, as sorted text or as `class_names.txt` has them.
        files: "train" and/or "test" -> (class index, file), classes in order, files of a class sorted by path.
        notes: what was left out, and what the names were taken to mean, a line each.
    """

    class_names: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[int, Path]]]
    notes: tuple[str, ...]


def list_images(
    owner: str,
    root: Folder,
    single: str | None,
    *,
    layout: str = "",
    given: Sequence[str] = (),
    domains: Sequence[str] = (),
    known_domains: Sequence[str] = (),
) -> Listing:
    """Classes and parts of an image folder.

    `root/<class>/...` or `root/<split>/<class>/...`; one folder around all is entered, and the images below a class
    folder are of that class. A test part without class folders, or with one that is no class, has no labels, unless a
    file that authors of benchmarks ship tells them.

    Args:
        single: the part that a source without splits is.
        layout: what a named data set is expected to hold; its images to test on must have labels.
        given: the classes that are meant, in their order; those of all folders if empty.
        domains: folders that hold class folders and are read together; a source without them if empty.
        known_domains: names that such folders can have.

    Raises:
        DataError: there are no images in class folders; or the names can mean two things; or a domain is missing.
    """
    reader = _Reader(owner, root, layout=layout, given=tuple(given))
    if known_domains and (held := _domain_folders(owner, root, domains, known_domains, layout)):
        parts = {single or "train": reader.classes("", held)}
    else:
        parts = reader.parts(single)
    chosen = reader.chosen
    names = list(chosen) if chosen else sorted({name for classes in parts.values() for name in classes})
    for part, classes in parts.items():
        if not classes:
            raise DataError(f"{owner}: no images in the {part} part of {root.path}; expected <class>/<image> below it")
    if not set(names).intersection(*parts.values()):
        raise DataError(f"{owner}: the parts {', '.join(parts)} of {root.path} have no class folder in common")
    index = {name: position for position, name in enumerate(names)}
    files = {
        part: [(index[name], file) for name in sorted(classes, key=index.__getitem__) for file in sorted(classes[name])]
        for part, classes in parts.items()
    }
    used = {file for rows in files.values() for _, file in rows}
    read = {ANNOTATIONS, *([CLASS_NAMES] if chosen else []), *([reader.truth.file.name, META] if reader.truth else [])}
    own = bool(chosen) and not given
    notes = [*reader.notes, *_notes_on_classes(root, names, own), *_left_out(root, used, read)]
    return Listing(class_names=tuple(names), files=files, notes=tuple(notes))


Classes = dict[str, list[Path]]
"""Class name -> image files."""


@dataclass
class _Reader:
    """Decides what the folders below `root` are, and keeps notes of it."""

    owner: str
    root: Folder
    layout: str = ""
    given: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    truth: GroundTruth | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.truth = read_ground_truth(self.owner, self.root.by_name())

    def parts(self, single: str | None) -> dict[str, Classes]:
        """Part -> its classes."""
        self.chosen = _class_names(self.root)
        top = self.root if self.chosen else self._entered(self.root)
        if top is not self.root:
            self.chosen = _class_names(top)
        self.chosen = self.given or self.chosen
        held = top.with_pictures()
        splits = {name: folder for name, folder in held.items() if role_of(name) and self._is_split(folder)}
        if not set(splits).isdisjoint(self.chosen):
            splits = {}
        self._require_labels(top, held, splits)
        if not splits:
            self._require_classes(top, held)
            return {single or "train": self.classes("", [top])}
        rest = [name for name in held if name not in splits]
        flat = [name for name in rest if role_of(name)]
        doubtful = [name for name in splits if not is_role(name)]
        if doubtful and len(flat) < len(rest):
            raise DataError(
                f"{self.owner}: {listed(doubtful)} can be the name of a part, and images lie beside it in "
                f"{listed([name for name in rest if name not in flat])}: a part, beside which the others are left "
                f"out, or classes. {self._choice(list(held))}, for the first move the others away"
            )
        pieces, notes = by_role(self.owner, splits.items(), ("train", "test"))
        self.notes += notes
        self.notes += [f"left out: {name} (its images lie in no class folder: they have no labels)" for name in flat]
        others = [name for name in rest if name not in flat]
        self.notes += [f"left out: {listed(others)} (beside the parts, and no part by name)"] if others else []
        entered = {
            role: [self._entered(folder, in_part=True) for folder in folders] for role, folders in pieces.items()
        }
        classes = {role: self.classes(role, folders) for role, folders in entered.items()}
        known = set().union(*(names for role, names in classes.items() if role != "test"))
        test = classes.get("test", {})
        unlabelled = {"test"} if known and len(test) <= 1 and known.isdisjoint(test) else set()
        found, notes = as_parts(classes, unlabelled)
        self.notes += notes
        keys = [{inner.key for folder in folders for inner in folder.walk()} for folders in entered.values()]
        if len(set().union(*keys)) < sum(map(len, keys)):
            self.notes.append(f"{' and '.join(entered)} share a folder by a link: some images are in both")
        return found

    def _is_split(self, folder: Folder) -> bool:
        annotated = any(file.name == ANNOTATIONS for file in folder.others)
        return bool(folder.with_pictures()) or annotated or self._annotation(folder) is not None

    def _annotation(self, folder: Folder) -> Path | None:
        """The file that names the class of every image of a part, unless its images lie in class folders since."""
        held = set(folder.with_pictures())
        file = next((file for file in folder.others if file.name == ANNOTATIONS), None)
        if file is not None and held <= {"images"}:
            return file
        if self.truth is None or held or not folder.pictures:
            return None
        return self.truth.file if folder.pictures[0].stem in self.truth.classes else None

    def _require_labels(self, top: Folder, held: Mapping[str, Folder], splits: Mapping[str, Folder]) -> None:
        """Refuse a named data set whose images to test on are there, and nothing that tells their classes."""
        flat = [name for name in held if role_of(name) and name not in splits and name not in self.chosen]
        tested = [name for name in splits if role_of(name) != "train"]
        if self.layout and flat and not tested:
            raise DataError(
                f"{self.owner}: the images of {listed(flat)} in {top.path} lie in no class folder, and no file tells "
                f"their classes: expected {self.layout}"
            )

    def _entered(self, folder: Folder, *, in_part: bool = False) -> Folder:
        """The folder that holds parts or classes: below folders that hold nothing but one folder around all."""
        held = folder.with_pictures()
        if folder.pictures or len(held) != 1 or self._annotation(folder):
            return folder
        ((name, inner),) = held.items()
        if is_role(name) and self._is_split(inner) and not in_part:
            return folder
        below = self._entered(inner, in_part=in_part)
        held = below.with_pictures()
        split = not in_part and any(is_role(below_name) and self._is_split(part) for below_name, part in held.items())
        if below.pictures or not (len(held) > 1 or split):
            return folder
        self.notes.append(f"read from {name}, the one folder in {folder.path.name}")
        return below

    def _require_classes(self, top: Folder, held: Mapping[str, Folder]) -> None:
        """Refuse folders that may be classes or something else, and class folders whose images cannot be read."""
        if not held:
            raise DataError(_no_images(self.root))
        if self.chosen:
            return
        if all(map(role_of, held)):
            raise DataError(
                f"{self.owner}: {listed(list(held))} hold images and no class folders: parts without labels, or "
                f"classes of these names. {self._choice(list(held))}, for the first put the images into class folders"
            )
        inner = [set(folder.with_pictures()) for folder in held.values()]
        common = sorted(set.intersection(*inner))
        if common and all(map(is_role, common)):
            raise DataError(
                f"{self.owner}: the parts {listed(common)} lie in the class folders {listed(list(held))}: only "
                f"<split>/<class>/<image> is read, put the class folders into folders of the parts"
            )
        if len(held) > 1 and len(common) > 1 and not any(folder.pictures for folder in held.values()):
            raise DataError(
                f"{self.owner}: each of {listed(list(held))} holds the folders {listed(common)}: the classes are "
                f"{listed(list(held))}, or they are {listed(common)}. List the ones that are meant, a name a line, in "
                f"{top.path / CLASS_NAMES}"
            )

    def _choice(self, names: Sequence[str]) -> str:
        return f"For the second list the class names, a line each ({listed(names)}), in {self.root.path / CLASS_NAMES}"

    def classes(self, role: str, folders: Sequence[Folder]) -> Classes:
        """Class name -> images of one part, which may lie in several folders."""
        found: Classes = {}
        seen: dict[tuple[int, int], Path] = {}
        for folder in folders:
            for inner in folder.walk():
                if inner.key in seen:
                    raise DataError(
                        f"{self.owner}: {inner.path} and {seen[inner.key]} are one folder by a link: its images would "
                        "count twice. Remove one of the two"
                    )
                seen[inner.key] = inner.path
            if annotated := self._annotation(folder):
                self.notes.append(f"the classes of the {role} part are those in {annotated.name}")
                pieces = self._annotated(role, annotated, folder)
            elif self.chosen:
                pieces = _by_chosen(folder, self.chosen)
            else:
                pieces = {name: inner.all_pictures() for name, inner in folder.with_pictures().items()}
                self._require_readable(folder)
            for name, files in pieces.items():
                found.setdefault(name, []).extend(files)
            if not self.chosen and not annotated:
                self._note_nested(folder)
        return found

    def _annotated(self, role: str, file: Path, folder: Folder) -> Classes:
        """The images of a part by the classes that a file names; of all classes, those that are meant."""
        if self.truth is not None and file == self.truth.file:
            pieces, missing = _by_ground_truth(self.truth, folder)
            if missing:
                total = len(self.truth.classes)
                self.notes.append(f"the {role} part is not whole: {missing:,} of its {total:,} images are missing")
        else:
            pieces = _read_annotations(file, folder)
        return {name: files for name, files in pieces.items() if not self.chosen or name in self.chosen}

    def _require_readable(self, folder: Folder) -> None:
        for name, inner in folder.folders.items():
            files = [file for below in inner.walk() for file in (*below.pictures, *below.others)]
            if files and all(file.suffix.lower() in _OTHER_PICTURES for file in files):
                raise DataError(
                    f"{self.owner}: {inner.path} holds no image that can be read ({kinds_of(files)}): a class without "
                    f"images, or no class. Convert the files to PNG or JPEG, or move {name} away"
                )

    def _note_nested(self, folder: Folder) -> None:
        nested = {name: inner.with_pictures() for name, inner in folder.with_pictures().items()}
        several = [f"{name} ({listed(list(inner))})" for name, inner in nested.items() if len(inner) > 1]
        if several:
            self.notes.append(f"images in sub-folders count for the class folder above: {listed(several)}")


def _domain_folders(
    owner: str, root: Folder, domains: Sequence[str], known: Sequence[str], layout: str
) -> list[Folder] | None:
    """The folders of these domains, however their names are spaced; None where no folder bears the name of any.

    Raises:
        DataError: some domains have a folder, and one of these has none; or one of them alone is asked for.
    """
    for folder in root.walk():
        held = {_plain(name): inner for name, inner in folder.with_pictures().items()}
        if held.keys().isdisjoint(map(_plain, known)):
            continue
        missing = [domain for domain in domains if _plain(domain) not in held]
        if missing:
            raise DataError(
                f"{owner}: {folder.path} lacks {listed(missing)}, it has {listed(list(folder.with_pictures()))}: "
                f"expected {layout}"
            )
        return [held[_plain(domain)] for domain in domains]
    if len(domains) < len(known):
        raise DataError(f"{owner}: {root.path} holds no folder {listed(domains)}: expected {layout}")
    return None


def _plain(name: str) -> str:
    """A name without what is neither letter nor digit: "Real World", "real_world" and "RealWorld" are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _by_ground_truth(truth: GroundTruth, folder: Folder) -> tuple[Classes, int]:
    """Class -> images, and how many images that have a class are missing.

    Raises:
        DataError: an image has none.
    """
    found: Classes = {}
    for picture in folder.pictures:
        if picture.stem not in truth.classes:
            raise DataError(f"{truth.file} names no class of {picture}: unpack the original files again")
        found.setdefault(truth.classes[picture.stem], []).append(picture)
    return found, len(truth.classes) - len(folder.pictures)


def _read_annotations(file: Path, folder: Folder) -> Classes:
    found: Classes = {}
    files = {picture.name: picture for picture in folder.all_pictures()}
    for number, line in enumerate(_lines(file), start=1):
        name, *rest = line.split("\t")
        if not rest or name not in files:
            problem = f"names {name}, which is missing" if rest else "has no class"
            raise DataError(f"{file} line {number} {problem}: unpack the original files again")
        found.setdefault(rest[0], []).append(files[name])
    return found


def _by_chosen(folder: Folder, chosen: Sequence[str]) -> Classes:
    """Images below the first folder on the way to them that bears the name of a class."""
    found: Classes = {}
    for name, inner in folder.folders.items():
        pieces = {name: inner.all_pictures()} if name in chosen else _by_chosen(inner, chosen)
        for label, files in pieces.items():
            if files:
                found.setdefault(label, []).extend(files)
    return found


def _class_names(folder: Folder) -> tuple[str, ...]:
    """The names in `class_names.txt`; none without the file."""
    file = next((file for file in folder.others if file.name == CLASS_NAMES), None)
    if file is None:
        return ()
    names = [line.strip() for line in _lines(file)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    known = {name for inner in folder.walk() for name in inner.folders}
    if not names or twice or known.isdisjoint(names):
        problem = f"names {listed(twice)} twice" if twice else f"names no folder of {folder.path}"
        raise DataError(f"{file} {problem}: write the name of a class folder a line, or remove the file")
    return tuple(names)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    return [line for line in text.splitlines() if line.strip()]


def _no_images(root: Folder) -> str:
    files = [file for folder in root.walk() for file in (*folder.pictures, *folder.others)]
    found = f"{kinds_of(files)} in no class folder" if root.pictures else kinds_of(files) if files else "no file"
    hint = "; name the .npz itself" if any(file.suffix == ".npz" for file in files) else ""
    return (
        f"{root.path} holds no images that can be read: expected <class>/<image> or <split>/<class>/<image>, parquet "
        f"files, a saved data set, or the original files of CIFAR, MNIST, STL-10 or ImageNet; found {found}{hint}. "
        "Bring the images into one of these layouts, or store them in an .npz (images, labels)"
    )


def _notes_on_classes(root: Folder, names: Sequence[str], chosen: bool) -> list[str]:
    notes = []
    if chosen:
        notes.append(f"the classes are those in {CLASS_NAMES}, in its order")
    elif order := text_order(names):
        notes.append(f"{order}; another order can be given in {root.path / CLASS_NAMES}, a name a line")
    folded = Counter(name.strip().casefold() for name in names)
    alike = [name for name in names if folded[name.strip().casefold()] > 1]
    if alike:
        notes.append(f"names that differ in upper case or spaces alone are classes of their own: {listed(alike)}")
    return notes


def _left_out(root: Folder, used: set[Path], read: set[str]) -> list[str]:
    """What lies below `root` and is no image that is read, a line a reason."""
    empty = [str(folder.path.relative_to(root.path)) for folder in _without_pictures(root) if not _has(folder, read)]
    hidden = sorted({name for folder in root.walk() for name in folder.hidden})
    loops = [str(path.relative_to(root.path)) for folder in root.walk() for path in folder.loops]
    unused = Counter(
        next(iter(picture.parent.relative_to(root.path).parts), root.path.name)
        for folder in root.walk()
        for picture in folder.pictures
        if picture not in used
    )
    others = [file for folder in root.walk() for file in folder.others if file.name not in read]
    found = {
        "no image in it": [f"{name}/" for name in empty],
        "hidden, or of an operating system": hidden,
        "a link to a folder above it": loops,
        "images of no class and part that is read": [f"{count:,} in {where}" for where, count in unused.items()],
        "no images": [kinds_of(others)] if others else [],
    }
    return [f"left out: {listed(names)} ({reason})" for reason, names in found.items() if names]


def _has(folder: Folder, names: set[str]) -> bool:
    return not names.isdisjoint(file.name for inner in folder.walk() for file in inner.others)


def _without_pictures(folder: Folder) -> Iterator[Folder]:
    """The topmost folders that hold no image."""
    held = folder.with_pictures()
    for name, inner in folder.folders.items():
        if name in held:
            yield from _without_pictures(inner)
        else:
            yield inner
