"""Records out of what people have, as streams: JSON lines, Parquet, plain text, WebDataset tars, compressed or not.

A reader yields (number, load) for every record, good or bad, and `load()` gives its fields or raises `BadRecord`: so a
restarted conversion passes over records for the price of reading them. Nothing holds more than one record or one
batch of Parquet rows.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from tarfile import EOFHeaderError, HeaderError, ReadError, TarError, TarFile, TarInfo  # type: ignore
from typing import IO, Any, NamedTuple, NoReturn

from etils import epath

from data.formats import json_object
from data.index import MAX_DOCUMENT, BadRecord, document, text_name, text_names

LIMIT = MAX_DOCUMENT  # bytes of one record: a line, a file of text, a member of a tar
BUFFER = 1 << 17
PARQUET_ROWS = 256  # decoded at once
FORMATS = {
    ".jsonl": "lines", ".jsonl.gz": "lines", ".jsonl.zst": "lines", ".json.gz": "lines", ".json.zst": "lines",
    ".parquet": "parquet",
    ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.zst": "tar",
}  # fmt: skip

Load = Callable[[], dict[str, Any]]
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class InputError(ValueError):
    """What the user gave cannot be converted; the message names the file."""


@dataclass(frozen=True)
class InputPart:
    """A file, or the part of one that a task reads.

    `start` and `stop` are bytes of uncompressed lines (a line belongs where it begins) and row groups of Parquet.
    """

    file: str
    format: str  # lines, parquet, tar or text
    size: int  # bytes of the input, for the progress
    weight: int  # bytes of text to expect
    start: int = 0
    stop: int = 0

    @property
    def unit(self) -> str:
        """What the reader's numbers count: lines cannot be numbered from the middle of a file."""
        return "byte" if self.format == "lines" and self.start else "record"


class Converted(NamedTuple):
    """What a conversion writes for a record."""

    record: bytes  # JSON, UTF-8
    text: bytes  # UTF-8
    domain: str  # "" where none is given
    left_out: list[str]  # names of fields that are no scalars


def suffix_of(name: str, suffixes: Iterable[str]) -> str:
    """The longest of the suffixes that a file's name ends with, in either case; "" for none."""
    return max((s for s in suffixes if name.lower().endswith(s)), key=len, default="")


def converted(fields: Mapping[str, Any], text_field: str = "", domain: str = "") -> Converted:
    """The record that is written for a source record, or BadRecord.

    Text and domain are as `data.index.document` finds them. Other strings, finite numbers and booleans stay under their
    names; null fields are dropped, and what is none of these (lists, objects, bytes, NaN) is left out, and so is a
    "text" where another field is the text.
    """
    raw, domain = document(fields, text_field, domain)
    name = text_name(fields, text_field)
    record: dict[str, Any] = {"text": raw.decode()} | ({"domain": domain} if domain else {})
    left_out = []
    for key, value in fields.items():
        if key in (name, "domain") or value is None:
            continue
        finite = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        if finite and key != "text":
            record[key] = value
        else:
            left_out.append(key)
    try:
        return Converted(_to_json(record).encode(), raw, domain, left_out)
    except UnicodeEncodeError as error:
        raise BadRecord("not Unicode", error.reason) from error


def records(part: InputPart, text_field: str, report: Callable[[int], None]) -> Iterator[tuple[int, Load]]:
    """The records of a part, numbered from 1 (or by their byte, see `InputPart.unit`).

    A stream that is cut short or corrupt ends with one bad record. Errors of the store itself are raised.

    Args:
      text_field: as for `converted`: a Parquet column of bytes is read only if it is the text
      report: told of the bytes of input as they are read
    """
    number = 0
    with _Counted(epath.Path(part.file), report) as file:
        try:
            for number, load in _READERS[part.format](part, file, text_field):
                yield number, load
        except (EOFError, OSError, zlib.error, TarError) as error:
            if file.error is not None:
                raise
            yield number + 1, partial(_refuse, "cut short or corrupt: the rest of the file is lost", error)


class _Counted(io.RawIOBase):
    """A file that tells how much was read, and whether it was the store that failed."""

    def __init__(self, path: epath.Path, report: Callable[[int], None]):
        super().__init__()
        self._file: IO[Any] = path.open("rb")
        self._report = report
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            self.error = error
            raise
        buffer[: len(data)] = data
        self._report(len(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _stream(name: str, file: _Counted) -> io.BufferedReader:
    """The file's content, decompressed by what its name ends with."""
    if name.lower().endswith((".gz", ".tgz")):
        return io.BufferedReader(gzip.GzipFile(fileobj=io.BufferedReader(file, BUFFER)), BUFFER)  # type: ignore
    if name.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), BUFFER)  # type: ignore
    return io.BufferedReader(file, BUFFER)


def _lines(part: InputPart, file: _Counted, text_field: str) -> Iterator[tuple[int, Load]]:
    stream = _stream(part.file, file)
    position = part.start
    if part.start:  # the line that begins before this part is another's
        stream.seek(part.start - 1)
        position += _pass_line(stream) - 1
    number = 0
    while not part.stop or position < part.stop:
        line = stream.readline(LIMIT + 1)
        if not line:
            return
        number, at = number + 1, position
        position += len(line)
        if len(line) > LIMIT:
            position += 0 if line.endswith(b"\n") else _pass_line(stream)
            load = partial(_refuse, f"longer than {LIMIT >> 20} MiB")
        elif not line.strip():
            continue
        else:
            load = partial(json_object, line)
        yield at if part.start else number, load


def _pass_line(stream: io.BufferedReader) -> int:
    """Reads up to the next line's begin; returns how many bytes that was."""
    passed = 0
    while part := stream.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _text(part: InputPart, file: _Counted, text_field: str) -> Iterator[tuple[int, Load]]:
    def load() -> dict[str, Any]:
        content = io.BufferedReader(file, BUFFER).read(LIMIT + 1)
        if len(content) > LIMIT:
            raise BadRecord(f"longer than {LIMIT >> 20} MiB")
        return {"text": content.removeprefix(codecs.BOM_UTF8)}

    yield 1, load


class _StrictTarInfo(TarInfo):
    """tarfile takes a broken header behind the first member for the archive's end: here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(str(error)) from error


def _tar(part: InputPart, file: _Counted, text_field: str) -> Iterator[tuple[int, Load]]:
    """Members whose names agree up to the first dot of their base name are one record, as WebDataset has it."""
    stream = _stream(part.file, file)
    with tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER, tarinfo=_StrictTarInfo) as tar:
        for number, (key, group) in enumerate(itertools.groupby(_members(tar), lambda member: member[0]), 1):
            yield number, partial(_sample, key, [(extension, content) for _, extension, content in group])


def _members(tar: TarFile) -> Iterator[tuple[str, str, bytes | BadRecord | None]]:
    """(key, extension, content) of the files; None for the content of what is neither text nor JSON."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore  # it would remember every one
        found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
        if not member.isfile() or not found:
            continue
        key, extension = found[1], found[2].lower()
        content = None
        if extension in ("txt", "json"):
            too_long = member.size > LIMIT
            content = BadRecord(f"longer than {LIMIT >> 20} MiB") if too_long else _content(tar, member)
        yield key, extension, content


def _content(tar: TarFile, member: TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None
    return content.read()


def _sample(key: str, members: list[tuple[str, bytes | BadRecord | None]]) -> dict[str, Any]:
    fields: dict[str, Any] = {"__key__": key}
    for _, content in members:
        if isinstance(content, BadRecord):
            raise content
    for extension, content in sorted(members, key=lambda member: member[0]):  # json before txt, which prevails
        if extension == "json" and isinstance(content, bytes):
            fields |= json_object(content)
        else:
            fields["text" if extension == "txt" else extension] = b"" if content is None else content
    return fields


def _parquet(part: InputPart, file: _Counted, text_field: str) -> Iterator[tuple[int, Load]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    parquet = ParquetFile(pa.PythonFile(file, "r"))
    columns, fixed = _columns(parquet.schema_arrow, text_field)
    counts = [parquet.metadata.row_group(g).num_rows for g in range(part.stop)]
    number = sum(counts[: part.start])
    for group in range(part.start, part.stop):
        first = number
        try:
            for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                values = [_plain(column) for column in batch.columns]
                for row in range(batch.num_rows):
                    number += 1
                    yield number, partial(_row, columns, values, row, fixed)
        except (OSError, pa.ArrowException) as error:
            if file.error is not None:
                raise
            number += 1
            yield number, partial(_refuse, "corrupt Parquet: the rest of the row group is lost", error)
        number = first + counts[group]


def _columns(schema: Any, text_field: str) -> tuple[list[str], dict[str, bytes]]:
    """The columns to read, and those left out, with a value that `converted` leaves out."""
    from pyarrow import types

    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean, types.is_integer,
             types.is_floating, types.is_decimal, types.is_timestamp, types.is_date, types.is_time)  # fmt: skip

    def scalar(kind: Any) -> bool:
        return any(test(kind.value_type if types.is_dictionary(kind) else kind) for test in kinds)

    # Text is often written as plain bytes; other bytes, such as images, are not read.
    names = text_names(text_field)
    read = [f.name for f in schema if scalar(f.type) or (types.is_binary(f.type) and f.name in names)]
    return read, {f.name: b"" for f in schema if f.name not in read}


def _plain(column: Any) -> Any:
    """Dates, times and decimals as strings, which is what JSON can hold."""
    import pyarrow as pa

    kind = column.type
    return column.cast(pa.string()) if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else column


def _row(columns: list[str], values: list[Any], row: int, fixed: dict[str, bytes]) -> dict[str, Any]:
    try:
        return {name: column[row].as_py() for name, column in zip(columns, values, strict=True)} | fixed
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", error.reason) from error


def _refuse(reason: str, detail: object = "") -> NoReturn:
    raise BadRecord(reason, detail)


_READERS: dict[str, Callable[[InputPart, _Counted, str], Iterator[tuple[int, Load]]]] = {
    "lines": _lines, "text": _text, "tar": _tar, "parquet": _parquet,
}  # fmt: skip
