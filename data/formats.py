"""Documents in files: JSON lines, Parquet, plain text, and (data/array_record.py) ArrayRecord, read at random."""

from __future__ import annotations

import codecs
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
from etils import epath

from data.content import FIELDS as IMAGE_FIELDS
from data.index import MAX_DOCUMENT, TEXT_FIELDS, BadRecord, Item, one_line

PROSE = ".txt .text .md .markdown .rst .tex .org .adoc"
CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .cs .swift .jl .r .lua "
    ".pl .hs .ml .sh .sql"
)
TEXT_SUFFIXES = tuple(f"{PROSE} {CODE}".split())
SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".array_record": "array_record"}
CACHED_GROUPS = 4  # row groups of Parquet


def kind_of(name: str) -> str:
    """The kind that a file's suffix says, "" for none."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return SUFFIXES[suffix] if suffix else "text" if name.lower().endswith(TEXT_SUFFIXES) else ""


def kinds_in(folder: epath.Path) -> set[str]:
    """The kinds of what a folder holds. Text beside records (a README) does not count."""
    names = {path.name for path in folder.iterdir()}
    if {"dataset_info.json", "features.json"} <= names:
        return {"tfds"}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return {"hf"}
    kinds = {kind_of(file.name) for file in walk(folder)} - {""}
    return kinds - {"text"} or kinds


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """All files of a recognised kind below a folder, hidden ones (. or _ in front) left out, in no fixed order."""
    for path in folder.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from walk(path)
        elif kind_of(path.name):
            yield path


def path_of(place: str) -> epath.Path:
    """What lies at a place; ValueError for a store that is not known, FileNotFoundError for nothing."""
    try:
        path = epath.Path(place)
    except KeyError as error:
        raise ValueError(f"{place} is in no store that can be read (local, gs://, s3://, az://)") from error
    if not path.exists():
        raise FileNotFoundError(f"nothing at {place}")
    return path


def files_of(place: str, kind: str) -> list[epath.Path]:
    """The files of a kind at or below a place, by name; any file that is named itself."""
    path = path_of(place)
    if not path.is_dir():
        return [path]
    files = sorted((file for file in walk(path) if kind_of(file.name) == kind), key=str)
    if not files:
        suffixes = TEXT_SUFFIXES if kind == "text" else [s for s, of in SUFFIXES.items() if of == kind]
        raise ValueError(f"no {' or '.join(suffixes)} file in the folder {place}")
    return files


class Files:
    """What all readers of files share: a shard is a file, of those of a kind at or below a place."""

    kind: str
    unit = "record"

    def __init__(self, place: str, cache: epath.Path):
        self.files = self.find(place)
        self.shards = [str(file) for file in self.files]
        self.stats = [file.stat() for file in self.files]

    def find(self, place: str) -> list[epath.Path]:
        return files_of(place, self.kind)

    def stamp(self) -> Iterable[object]:
        yield type(self).__name__
        yield from (f"{file}:{stat.length}:{stat.mtime}" for file, stat in zip(self.files, self.stats, strict=True))

    def size(self, shard: int) -> int:
        return self.stats[shard].length

    def known(self, shard: int, log: Callable[[str], object]) -> Mapping[str, np.ndarray] | None:
        return None


class JsonLines(Files):
    """A .jsonl file, or every one in a folder: {"text": ..., "domain": ...} a line ("domain" is optional).

    Blank lines are no records. A line's place is its first byte and its bytes.
    """

    kind, unit = "jsonl", "line"

    def scan(self, shard: int) -> Iterator[Item]:
        start = number = 0
        with self.files[shard].open("rb") as lines:
            while line := lines.readline(MAX_DOCUMENT + 1):
                number, length = number + 1, len(line)
                if length > MAX_DOCUMENT and not line.endswith(b"\n"):
                    while not line.endswith(b"\n") and (line := lines.readline(1 << 20)):
                        length += len(line)
                    yield Item(number, start, length, {}, f"a line of {length:,} bytes, above {MAX_DOCUMENT:,}")
                elif line.strip():
                    yield json_item(number, start, length, line)
                start += length

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        with self.files[shard].open("rb") as lines:
            lines.seek(start)
            return json_object(lines.read(length))


def json_object(raw: bytes) -> dict[str, Any]:
    """The object that JSON in UTF-8 spells, a byte order mark before it or not; BadRecord where it does not."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))  # json's own guess would take a zeroed byte for UTF-16
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"{error.reason} at {error.start}") from error
    except RecursionError as error:
        raise BadRecord("not JSON", "nested too deeply") from error
    except ValueError as error:
        raise BadRecord("not JSON", error) from error
    if not isinstance(record, dict):
        raise BadRecord("not an object", type(record).__name__)
    return record


def json_item(number: int, start: int, length: int, raw: bytes) -> Item:
    """The item of a record that is spelled in JSON."""
    try:
        return Item(number, start, length, json_object(raw))
    except ValueError as error:
        return Item(number, start, length, {}, str(error))


class Text(Files):
    """A tree of plain-text files (`TEXT_SUFFIXES`) in UTF-8, each one document."""

    kind, unit = "text", ""

    def scan(self, shard: int) -> Iterator[Item]:
        size = self.size(shard)
        if size > MAX_DOCUMENT:
            yield Item(1, 0, size, {}, f"a file of {size:,} bytes, above {MAX_DOCUMENT:,}")
        else:
            yield Item(1, 0, size, self.read(shard, 0, size))

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        return {"text": self.files[shard].read_bytes().removeprefix(codecs.BOM_UTF8)}


class Parquet(Files):
    """A .parquet file, or every one in a folder: a column "text" (or "content") of strings, and "domain" if any.

    A row's place is its row group and its number in that. A read decodes a whole row group and keeps the last few, so
    large groups read at random are slow: `llama4 data convert` makes ArrayRecord of them.
    """

    kind, unit = "parquet", "row"

    def __init__(self, place: str, cache: epath.Path):
        super().__init__(place, cache)
        self._groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        self._lock = Lock()

    def scan(self, shard: int) -> Iterator[Item]:
        try:
            counts = self._with_file(shard, _row_counts)
        except ValueError as error:
            yield Item(0, 0, 0, {}, str(error), 0)
            return
        number = 0
        for group, count in enumerate(counts):
            try:
                rows = self._decoded(shard, group, count)
            except ValueError as error:
                yield Item(number + 1, group, 0, {}, f"{count:,} rows from here on cannot be read: {error}", count)
            else:
                yield from (Item(number + i + 1, group, i, row) for i, row in enumerate(rows))
            number += count

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        with self._lock:
            if (shard, start) not in self._groups:
                self._groups[shard, start] = list(self._decoded(shard, start, None))
            self._groups.move_to_end((shard, start))
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
            return self._groups[shard, start][length]

    def _decoded(self, shard: int, group: int, count: int | None) -> Sequence[dict[str, Any]]:
        rows = self._with_file(shard, lambda file: _rows(file, group))
        if count is not None and len(rows) != count:
            raise ValueError(f"{len(rows):,} rows where the footer has {count:,}")
        return rows

    def _with_file(self, shard: int, use: Callable[[Any], Any]) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            with (
                self.files[shard].open("rb") as raw,
                parquet.ParquetFile(raw, page_checksum_verification=True) as file,
            ):
                return use(file)
        except (pyarrow.ArrowException, OSError, MemoryError, UnicodeError, OverflowError) as error:
            raise ValueError(f"not Parquet, or damaged ({one_line(error)})") from error


def _row_counts(file: Any) -> list[int]:
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
        raise ValueError(f"the footer has {file.metadata.num_rows:,} rows, its row groups {sum(groups):,}")
    return groups


def _rows(file: Any, group: int) -> Sequence[dict[str, Any]]:
    """The text and domain of a row group's rows; strings as bytes, so that each is checked by itself."""
    wanted = (*TEXT_FIELDS, "domain", *IMAGE_FIELDS, "caption")
    present = file.schema_arrow.names
    pictured = any(name in present for name in IMAGE_FIELDS)
    names = [name for name in wanted if name in present and (pictured or name != "caption")]
    table = file.read_row_group(group, columns=names, use_threads=False)
    columns = {name: _values(table.column(name)) for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [{}] * len(table)


def _values(column: Any) -> list[Any]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    elif pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    column.validate(full=True)
    return column.to_pylist()
