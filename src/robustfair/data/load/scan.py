"""What lies in a folder and below it, read once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustfair.data.load.parts import listed
from robustfair.errors import DataError

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"})
_SYSTEM = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin"})


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What lies in a folder, hidden files and those of operating systems apart.

    Attributes:
        key: device and inode: the same for every path to it.
        folders: in it, by name.
        pictures: image files directly in it, by name.
        others: further files directly in it.
        hidden: names in it that begin with a dot, or that an operating system leaves.
        loops: links in it that lead to a folder above it.
    """

    path: Path
    key: tuple[int, int]
    folders: Mapping[str, Folder]
    pictures: Sequence[Path]
    others: Sequence[Path]
    hidden: Sequence[str]
    loops: Sequence[Path]

    def walk(self) -> Iterator[Folder]:
        """This folder and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def all_pictures(self) -> list[Path]:
        """Image files in it and below, sorted."""
        return sorted(file for folder in self.walk() for file in folder.pictures)

    def by_name(self) -> dict[str, Path]:
        """The files in it and below that are no images, the topmost of each name."""
        found: dict[str, Path] = {}
        for folder in self.walk():
            for file in folder.others:
                found.setdefault(file.name, file)
        return found

    def with_pictures(self) -> dict[str, Folder]:
        """The folders in it that hold an image somewhere."""
        return {name: folder for name, folder in self.folders.items() if any(f.pictures for f in folder.walk())}


def scan(path: Path, above: frozenset[tuple[int, int]] | None = None) -> Folder:
    """Read a folder and all below it; a link that leads to a folder above it is left out.

    Raises:
        DataError: a link leads nowhere, or a folder cannot be read.
    """
    key = _key(path)
    above = frozenset(map(_key, path.parents)) if above is None else above
    folders: dict[str, Folder] = {}
    pictures: list[Path] = []
    others: list[Path] = []
    hidden: list[str] = []
    loops: list[Path] = []
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for entry in entries:
        file = path / entry.name
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            hidden.append(entry.name)
        elif entry.is_symlink() and not file.exists():
            raise DataError(f"{file} is a link that leads nowhere ({os.readlink(file)}): mend the link, or remove it")
        elif not entry.is_dir():
            (pictures if file.suffix.lower() in _PICTURES else others).append(file)
        elif _key(file) in above | {key}:
            loops.append(file)
        else:
            folders[entry.name] = scan(file, above | {key})
    return Folder(path=path, key=key, folders=folders, pictures=pictures, others=others, hidden=hidden, loops=loops)


def _key(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def kinds_of(files: Sequence[Path]) -> str:
    """Files by suffix.

    >>> kinds_of([Path("a.txt"), Path("b.txt"), Path("c")])
    '2 .txt, 1 without suffix'
    """
    counts = Counter(file.suffix.lower() or "without suffix" for file in files)
    return listed([f"{count:,} {suffix}" for suffix, count in sorted(counts.items())])
