"""Where a user's word leads: a name of the catalogue or a path, to a source of images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from robustfair.data.catalog import CATALOG, DOMAINS, CatalogEntry
from robustfair.data.corruptions.names import SETS, SEVERITIES
from robustfair.data.load.lists import list_chosen, list_named
from robustfair.data.load.originals import Files, find_originals, find_unlabelled
from robustfair.data.load.parts import by_role, listed, role_of
from robustfair.data.load.scan import Folder, kinds_of, scan
from robustfair.data.load.sources import (
    ALL_ROWS,
    CorruptionFiles,
    Digits,
    Hub,
    ImageFolder,
    Npz,
    Originals,
    Packed,
    Rows,
    Source,
    TableFiles,
)
from robustfair.data.pack import find_pack, pack_stem
from robustfair.errors import DataError, UnknownNameError
from robustfair.grammar import canonical_key, read_path
from robustfair.registry import canonical

_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"})
_BELOW = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
"""Where in a folder of ImageNet the folders of its parts may lie: in it, or as Kaggle's archive has them."""


def find_source(name_or_path: str | Path) -> Source:
    """The source that a user means: a name of the catalogue first, then a path (`./cifar10` is always a path).

    Raises:
        UnknownNameError: neither a name nor an existing path, but written like a name; shows the nearest ones.
        DataError: the path does not exist or holds no images.
    """
    if not str(name_or_path).strip():
        raise DataError("data: the name is empty: give a name such as cifar10, or a path")
    if isinstance(name_or_path, str) and canonical(name_or_path) in CATALOG:
        return _named(CATALOG[canonical(name_or_path)], [])
    head, *rest = str(name_or_path).split("/")
    entry = CATALOG.get(canonical(head)) if isinstance(name_or_path, str) else None
    if entry is not None and entry.selectors and rest != [""]:
        return _named(entry, rest)
    path = read_path(name_or_path)
    if path.exists():
        return _at(path.resolve(), path.resolve().stem if path.is_file() else path.resolve().name, None)
    is_part = entry is not None and rest != [""] and any(name.startswith(f"{entry.name}/") for name in CATALOG)
    if isinstance(name_or_path, str) and ((not rest and not path.suffix) or is_part):
        raise UnknownNameError("data set", name_or_path, CATALOG)
    raise DataError(f"data path {str(path)!r} does not exist")


def _named(entry: CatalogEntry, values: Sequence[str]) -> Source:
    if entry.name == Digits.name:
        return Digits(entry=entry)
    name = "/".join([entry.name, *values])
    rows = _selected(entry, values)
    folder = _local_folder(entry)
    if folder is not None:
        return _at(folder, name, entry, rows)
    if entry.hub:
        return Hub(name=name, entry=entry, rows=rows)
    where = os.environ.get("ROBUSTFAIR_DATA")
    found = f"{where} holds no folder of it" if where else "ROBUSTFAIR_DATA, whose folder of it is read, is not set"
    raise DataError(f"{name} is read from local files alone, and {found}: expected {_own_folder(entry)}")


def _own_folder(entry: CatalogEntry) -> str:
    """The folder that a data set is looked for in, and what it is to hold."""
    own = entry.name if "/" not in entry.name else entry.folders[0]
    return entry.layout if entry.layout.startswith(f"{own}") else f"{own}/ with {entry.layout}"


def _selected(entry: CatalogEntry, values: Sequence[str]) -> Rows:
    """Which rows of a table are meant: by what follows the name in `cifar10-c/gaussian_noise/3`, or by domain."""
    if 0 < len(entry.domains) < len(DOMAINS):
        return ("domain",), tuple((canonical(domain),) for domain in entry.domains)
    if not entry.selectors:
        return ALL_ROWS
    if len(values) != len(entry.selectors) or values[-1] not in map(str, SEVERITIES):
        got = "/".join([entry.name, *values])
        raise DataError(
            f"{got}: name a corruption or a set ({', '.join(map(canonical, SETS))}) and a severity of 1 to "
            f"{len(SEVERITIES)}, as in {entry.name}/gaussian_noise/3"
        )
    corruptions = SETS.get(canonical_key(values[0]), values[:1])
    return entry.selectors, tuple((canonical(name), values[1]) for name in corruptions)


def _local_folder(entry: CatalogEntry) -> Path | None:
    """The folder of a named data set under ROBUSTFAIR_DATA in any spelling; None if there is none."""
    root = os.environ.get("ROBUSTFAIR_DATA")
    if not root:
        return None
    path = read_path(root)
    if not path.is_dir():
        raise DataError(f"ROBUSTFAIR_DATA is {root!r}, which is not a folder")
    found = [folder for folder in sorted(path.iterdir()) if canonical(folder.name) in entry.folder_names]
    for folder in sorted((folder for folder in found if folder.is_dir()), key=lambda folder: entry.rank(folder.name)):
        inner = folder / entry.config if entry.config else folder
        return (inner if inner.is_dir() else folder).resolve()
    return None


def _at(path: Path, name: str, entry: CatalogEntry | None, rows: Rows = ALL_ROWS) -> Source:
    """The source at an existing path, by what lies there; `rows` are those of a table that are meant."""
    pack = find_pack(path, pack_stem(name) if entry is not None and entry.shares_folder else None)
    if pack is not None:
        return Packed.open(pack, name, entry)
    if path.is_file():
        if path.suffix == ".npz":
            return Npz.open(path, name)
        if path.suffix == ".parquet":
            return TableFiles(name=name, entry=entry, files={"train": [path]}, rows=rows)
        hint = "unpack it and name the folder" if path.suffix.lower() in _ARCHIVES else "name the folder it lies in"
        raise DataError(f"{path} is a file of unknown kind; expected .npz, .parquet or a folder of images: {hint}")
    if entry is not None and entry.selectors and (path / "labels.npy").is_file():
        _, wanted = rows
        corruptions = tuple(corruption for corruption, _ in wanted)
        severity = int(wanted[0][1])
        return CorruptionFiles(folder=path, name=name, corruptions=corruptions, severity=severity, entry=entry)
    parts = entry.parts if entry is not None else ("train", "test")
    if saved := _saved_files(path):
        return _tables(name, entry, saved, parts, rows)
    root = scan(path)
    if entry is not None and (found := _by_lists(root, name, entry)):
        return found
    originals = find_originals(name, root)
    tables = sorted(file for folder in root.walk() for file in folder.others if file.suffix.lower() == ".parquet")
    _require_one_layout(name, root, originals, tables)
    if originals is not None:
        return Originals(name=name, entry=entry, files=originals)
    if tables:
        read = set(tables)
        rest = [file for folder in root.walk() for file in (*folder.pictures, *folder.others) if file not in read]
        left = (f"left out: {kinds_of(rest)} (no tables)",) if rest else ()
        return _tables(name, entry, [(str(file.relative_to(path)), file) for file in tables], parts, rows, left)
    if entry is not None and entry.layout and not root.all_pictures():
        raise DataError(f"{name}: {path} holds no images: expected {entry.layout}")
    return ImageFolder.open(root, name, entry)


def _tables(
    name: str,
    entry: CatalogEntry | None,
    named: Sequence[tuple[str, Path]],
    parts: Sequence[str],
    rows: Rows,
    left: tuple[str, ...] = (),
) -> TableFiles:
    """Tables by the part that their names mean."""
    files, notes = by_role(name, named, parts)
    if entry is not None and entry.only:
        files = {part: found for part, found in files.items() if part != "train"}
        if not files:
            raise DataError(f"{name}: there is no {entry.only} part among {listed([where for where, _ in named])}")
    return TableFiles(name=name, entry=entry, files=files, rows=rows, notes=(*notes, *left))


def _by_lists(root: Folder, name: str, entry: CatalogEntry) -> Source | None:
    """What is not read by the layout of its folder alone: images without labels, or those that lists in it name."""
    if entry.unlabelled:
        return Originals(name=name, entry=entry, files=find_unlabelled(name, root, entry.unlabelled, entry.layout))
    held = root.by_name()
    if entry.part_lists:
        lists = {part: held[file] for part, file in entry.part_lists.items() if file in held}
        missing = [entry.part_lists[part] for part in ("train", "test") if part not in lists]
        if missing:
            raise DataError(f"{name}: {root.path} lacks {listed(missing)}: expected {entry.layout}")
        other = _local_folder(CATALOG[entry.images_of])
        roots = [folder / below for folder in (root.path, other) if folder is not None for below in _BELOW]
        return ImageFolder.of(list_named(name, lists, roots, entry.layout), name, entry)
    named = next((held[file] for file in entry.class_lists if file in held), None)
    if named is None or root.all_pictures():
        return None
    other = _local_folder(CATALOG[entry.images_of])
    if other is None:
        raise DataError(
            f"{name}: {named} names classes, and ROBUSTFAIR_DATA holds no {entry.images_of}/ with their images: "
            f"expected {entry.layout}"
        )
    return ImageFolder.of(list_chosen(name, named, scan(other), CATALOG[entry.images_of].layout), name, entry)


def _require_one_layout(name: str, root: Folder, originals: Files | None, tables: Sequence[Path]) -> None:
    """Refuse a folder that is a data set in two ways."""
    held = root.with_pictures()
    found = {
        "original files": [] if originals is None else [str(originals.all[0].relative_to(root.path))],
        "parquet files": [str(file.relative_to(root.path)) for file in tables],
        "image folders": list(held) if len(held) > 1 or any(map(role_of, held)) else [],
    }
    kinds = [f"{kind} ({listed(names)})" for kind, names in found.items() if names]
    if len(kinds) > 1:
        raise DataError(
            f"{name}: {root.path} holds {' and '.join(kinds)}, and either can be the data set: move away what is not "
            "meant, or name a folder or file that holds one of them alone"
        )


def _saved_files(root: Path) -> list[tuple[str, Path]]:
    """(split, file) of a folder written by `save_to_disk`; empty if it is none."""
    if (root / "dataset_dict.json").is_file():
        splits = [root / split for split in _json(root / "dataset_dict.json").get("splits", [])]
    elif (root / "state.json").is_file():
        splits = [root]
    else:
        return []
    files = []
    for folder in splits:
        state = _json(folder / "state.json")
        split = folder.name if folder != root else str(state.get("_split") or "train")
        files += [(split, folder / item["filename"]) for item in state.get("_data_files", [])]
    for _, file in files:
        if not file.is_file():
            raise DataError(f"saved data set {root} is not whole, {file} is missing")
    return files


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return value if isinstance(value, dict) else {}
