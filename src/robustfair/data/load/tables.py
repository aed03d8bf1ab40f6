"""Images in tables: parquet files, saved Arrow data sets, and what the Hugging Face hub gives.

Files are read batch by batch with pyarrow alone: importing `datasets` and its own Arrow copy of a parquet folder would
cost more memory than CIFAR-10's pixels leave. The hub's column types stand as JSON in the schema of either file format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustfair.data.catalog import CatalogEntry
from robustfair.data.load.decode import (
    Decoded,
    Picture,
    conversion_notes,
    decode_parts,
    numbered_names,
    super_classes,
)
from robustfair.data.load.parts import as_parts, text_order
from robustfair.errors import DataError, UnknownNameError, needed
from robustfair.registry import canonical

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 256
_IMAGE_NAMES = ("image", "img", "images", "x", "pixels", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "y", "target", "class")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One piece of a table: its schema, its number of rows, and how to read some of its columns in batches."""

    where: str
    schema: pa.Schema
    rows: int
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]

    @property
    def features(self) -> Mapping[str, Any]:
        """Column -> the hub's description of its type; empty for files that the hub's library has not written."""
        raw = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(raw).get("info", {}).get("features")
        return features if isinstance(features, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns to read, and the names behind the indices where the table knows them."""

    image: str
    label: str
    coarse: str | None
    names: tuple[str, ...] | None
    coarse_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Selection:
    """Rows whose columns have one of these combinations of values, as canonical text; no columns select every row.

    Attributes:
        columns: names of the columns.
        wanted: combinations, a value a column; where a column holds class indices, their names are compared.
    """

    columns: tuple[str, ...] = ()
    wanted: tuple[tuple[str, ...], ...] = ()

    def mask(self, shard: Shard, batch: pa.RecordBatch) -> np.ndarray:
        """(rows,) bool."""
        if not self.columns:
            return np.ones(batch.num_rows, dtype=bool)
        return np.array([tuple(map(canonical, row)) in self.wanted for row in self._values(shard, batch)], dtype=bool)

    def count(self, owner: str, shards: Sequence[Shard]) -> int:
        """Rows of `shards` that are selected; some of each combination, or an error that shows the nearest ones."""
        if not self.columns:
            return sum(shard.rows for shard in shards)
        seen: Counter[tuple[str, ...]] = Counter()
        for shard in shards:
            _require(owner, shard, self.columns)
            for batch in shard.read(self.columns):
                seen.update(self._values(shard, batch))
        found: Counter[tuple[str, ...]] = Counter()
        for values, rows in seen.items():
            found[tuple(map(canonical, values))] += rows
        for values in self.wanted:
            if values not in found:
                raise UnknownNameError(f"part of {owner}", "/".join(values), {"/".join(known) for known in seen})
        return sum(found[values] for values in self.wanted)

    def _values(self, shard: Shard, batch: pa.RecordBatch) -> Iterator[tuple[str, ...]]:
        columns = []
        for column in self.columns:
            names, cells = _label_names(shard, column), batch.column(column).to_pylist()
            columns.append([names[cell] if names and cell in range(len(names)) else str(cell) for cell in cells])
        return zip(*columns, strict=True)


def open_file(path: Path) -> Shard:
    """A `.parquet` file, or an `.arrow` file of a saved data set.

    Raises:
        DataError: not a readable file of that kind.
    """
    with _readable(path):
        schema, rows = _describe(path)
    return Shard(where=str(path), schema=schema, rows=rows, read=lambda columns: _batches(path, columns))


def open_hub(entry: CatalogEntry) -> dict[str, list[Shard]]:
    """The data set on the hub, downloaded by `datasets` where its own cache does not hold it: split name -> shards.

    Raises:
        DataError: the hub cannot be reached, or refuses.
    """
    with needed("datasets", f"{entry.name} from the Hugging Face hub"):
        import datasets

    try:
        loaded = datasets.load_dataset(entry.hub, entry.config)
    except Exception as error:  # four libraries stand between here and the hub, each with errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data set {entry.name!r} cannot be had from the Hugging Face hub ({entry.hub}: {reason}); "
            f"set ROBUSTFAIR_DATA to a folder that holds {entry.name}/, or pass a folder"
        ) from error
    return {str(name): [_hub_shard(entry, str(name), part)] for name, part in loaded.items()}


def decode_tables(
    owner: str,
    roles: Mapping[str, Sequence[Shard]],
    *,
    entry: CatalogEntry | None,
    selection: Selection,
    image_size: int | None,
) -> Decoded:
    """Read labels and decode images of the parts that have labels ("train", "test"; "validation" in its place).

    Raises:
        DataError: a column is missing, differs between files or holds no value; an image is corrupt or of another size.
    """
    parts, notes = as_parts(roles, _unlabelled(owner, roles, entry))
    columns = _find_columns(owner, [shard for shards in parts.values() for shard in shards], entry)
    converted: Counter[str] = Counter()
    tables = {part: _PartReader(owner, shards, columns, selection) for part, shards in parts.items()}
    pictures = {part: (tables[part].pictures(), selection.count(owner, shards)) for part, shards in parts.items()}
    images = decode_parts(owner, pictures, image_size, converted)
    labels = {part: table.labels for part, table in tables.items()}
    coarse = {part: table.coarse for part, table in tables.items()}
    indices, names = _indexed(owner, labels, columns.names or (entry.class_names if entry else ()))
    groups, group_names = None, tuple[str, ...]()
    if columns.coarse is not None:
        of_images, group_names = _indexed(owner, coarse, columns.coarse_names or ())
        groups = super_classes(owner, indices, of_images, len(names))
    order = text_order(names) if names != columns.names else ""
    return Decoded(
        parts={part: (images[part], indices[part]) for part in parts},
        class_names=names,
        groups=groups,
        group_names=group_names if groups is not None else (),
        notes=(*notes, *([order] if order else []), *conversion_notes(converted)),
    )


class _PartReader:
    """Streams the pictures of one part and keeps the labels that come along, in the same order."""

    def __init__(self, owner: str, shards: Sequence[Shard], columns: Columns, selection: Selection) -> None:
        self._owner, self._shards, self._columns, self._selection = owner, shards, columns, selection
        self.labels: list[int | str] = []
        self.coarse: list[int | str] = []

    def pictures(self) -> Iterator[list[Picture]]:
        columns = self._columns
        wanted = dict.fromkeys([columns.image, columns.label, columns.coarse, *self._selection.columns])
        for shard in self._shards:
            start = 0
            for batch in shard.read([column for column in wanted if column is not None]):
                rows = np.flatnonzero(self._selection.mask(shard, batch))
                chosen = batch.take(rows)
                where = [f"{shard.where} row {start + row}" for row in rows.tolist()]
                self.labels += _filled(self._owner, chosen, columns.label, where)
                if columns.coarse is not None:
                    self.coarse += _filled(self._owner, chosen, columns.coarse, where)
                yield [_picture(*cell) for cell in zip(where, chosen.column(columns.image).to_pylist(), strict=True)]
                start += batch.num_rows


def _unlabelled(owner: str, roles: Mapping[str, Sequence[Shard]], entry: CatalogEntry | None) -> set[str]:
    """Parts beside the train part whose labels are all null, -1 or empty, or whose columns are some of its columns."""
    if len(roles) < 2:
        return set()
    first = next(iter(roles.values()))[0]
    label = _find(owner, first, "label", entry.label if entry else "", "ClassLabel", _LABEL_NAMES)
    return {role for role, shards in roles.items() if role != "train" and _has_no_labels(shards, label, first)}


def _has_no_labels(shards: Sequence[Shard], label: str, first: Shard) -> bool:
    columns = [set(shard.schema.names) for shard in shards]
    if not any(label in names for names in columns):
        return all(names < set(first.schema.names) for names in columns)
    if not all(label in names for names in columns):
        return False
    cells = {cell for shard in shards for batch in shard.read([label]) for cell in batch.column(label).to_pylist()}
    return bool(cells) and cells <= {None, -1, ""}


def _find_columns(owner: str, shards: Sequence[Shard], entry: CatalogEntry | None) -> Columns:
    first = shards[0]
    image = _find(owner, first, "image", entry.image if entry else "", "Image", _IMAGE_NAMES)
    label = _find(owner, first, "label", entry.label if entry else "", "ClassLabel", _LABEL_NAMES)
    coarse: str | None = (entry.coarse if entry else "") or "coarse_label"
    if coarse == label or coarse not in first.schema.names:
        coarse = None
    for shard in shards[1:]:
        _require(owner, shard, (image, label) if coarse is None else (image, label, coarse))
        if _label_names(shard, label) != _label_names(first, label):
            raise DataError(f"{owner}: class names of column {label!r} in {shard.where} differ from {first.where}")
    return Columns(
        image=image,
        label=label,
        coarse=coarse,
        names=_label_names(first, label),
        coarse_names=_label_names(first, coarse) if coarse else None,
    )


def _find(owner: str, shard: Shard, what: str, named: str, kind: str, usual: Sequence[str]) -> str:
    """The column called `named`, else the only one of the hub's type `kind`, else the first with a usual name."""
    present = shard.schema.names
    if named in present:
        return named
    typed = [column for column, feature in shard.features.items() if _kind(feature) == kind and column in present]
    if len(typed) == 1:
        return typed[0]
    for column in usual:
        if column in (typed or present):
            return column
    raise DataError(f"{owner}: no {what} column among {', '.join(map(repr, present))} in {shard.where}")


def _require(owner: str, shard: Shard, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in shard.schema.names:
            present = ", ".join(map(repr, shard.schema.names))
            raise DataError(f"{owner}: no column {column!r} among {present} in {shard.where}")


def _kind(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _label_names(shard: Shard, column: str) -> tuple[str, ...] | None:
    feature = shard.features.get(column)
    return tuple(feature["names"]) if feature and _kind(feature) == "ClassLabel" and feature.get("names") else None


def _filled(owner: str, batch: pa.RecordBatch, column: str, where: Sequence[str]) -> list[int | str]:
    """The cells of a label column, all of them whole numbers or all text."""
    cells = batch.column(column).to_pylist()
    for place, cell in zip(where, cells, strict=True):
        if not isinstance(cell, (int, str)):
            raise DataError(f"{owner}: {place} has no usable {column!r}, got {cell!r}")
    return cells


def _picture(where: str, cell: Any) -> Picture:
    if isinstance(cell, bytes):
        return Picture(where, cell)
    if isinstance(cell, dict) and (cell.get("bytes") is not None or cell.get("path")):
        return Picture(where, cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]))
    raise DataError(f"{where} holds no encoded image, got {type(cell).__name__}")


def _indexed(
    owner: str, labels: Mapping[str, Sequence[int | str]], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels as class indices, and the names: those given, else the texts in order, else the numbers."""
    texts = {cell for part in labels.values() for cell in part if isinstance(cell, str)}
    if texts:
        if any(isinstance(cell, int) for part in labels.values() for cell in part):
            raise DataError(f"{owner}: labels are part text, part numbers")
        known = tuple(names) if texts <= set(names) else tuple(sorted(texts))
        index: dict[int | str, int] = {name: position for position, name in enumerate(known)}
        return {part: np.array([index[cell] for cell in cells], np.int64) for part, cells in labels.items()}, known
    numbers = {part: np.array(cells, dtype=np.int64) for part, cells in labels.items()}
    return numbers, tuple(names) or numbered_names(owner, numbers.values())


def _describe(path: Path) -> tuple[pa.Schema, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            return reader.schema, sum(batch.num_rows for batch in reader)
    with pq.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(path):
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    yield from _slices(batch.select(list(columns)))
        else:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_BATCH, columns=list(columns))


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _hub_shard(entry: CatalogEntry, split: str, part: Any) -> Shard:
    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        tables: Iterable[pa.Table] = part.select_columns(list(columns)).with_format("arrow").iter(batch_size=_BATCH)
        for table in tables:
            yield from table.to_batches()

    return Shard(where=f"{entry.hub} {split}", schema=part.features.arrow_schema, rows=part.num_rows, read=read)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    with needed("pyarrow", f"{path}"):
        import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from error
