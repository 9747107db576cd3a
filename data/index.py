"""The index of a source: hash, size and place of every document, from one pass over its records, and what was bad.

A record that cannot be read, or holds no document, is skipped and counted; how many may be is `data.bad_records`.
"""

from __future__ import annotations

import io
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from data.cache import cached, fingerprint
from data.content import MARK, Illustrated, has_images, illustrated

MAX_DOCUMENT = 64 << 20  # bytes of a line or a document; a longer one is a bad record
TEXT_FIELDS = ("text", "content")
SHOWN = 3  # of the bad records
REPORT_EVERY = 10.0  # seconds
VERSION = 2  # of the index's own form
_TYPES = {"Q": np.uint64, "q": np.int64, "i": np.int32}  # of the columns of a pass, by their arrays' typecodes


def content_hash(text: bytes) -> int:
    """64 bits of blake2b of a document's UTF-8: it decides what is held out, whatever the order of the documents."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class Item(NamedTuple):
    """A record as a pass finds it; `why` it is bad, else "", and then there are no fields.

    `count` records are bad at once where a part of a shard cannot be read. 0: as many as the shard's share of the
    bytes suggests, which is all that is known of a shard that does not open.
    """

    number: int  # from 1, or 0 for a shard as a whole
    start: int  # with `length`, how the reader finds it again
    length: int
    fields: Mapping[str, Any]
    why: str = ""
    count: int = 1


@runtime_checkable
class Reader(Protocol):
    """Records of one kind in shards, in a fixed order. All methods may be called by several threads."""

    shards: list[str]
    """Names, for messages."""
    unit: str
    """What an `Item`'s number counts: line, record, row; empty where a shard is one document."""

    def stamp(self) -> Iterable[object]:
        """What the index depends on: names, sizes and dates."""
        ...

    def size(self, shard: int) -> int:
        """Bytes, for progress and estimates; 0: not known."""
        ...

    def known(self, shard: int, log: Callable[[str], object]) -> Mapping[str, np.ndarray] | None:
        """hash, size, domain and names of an index that lies beside the shard, if one does."""
        ...

    def scan(self, shard: int) -> Iterator[Item]:
        """Every record once, in order."""
        ...

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        """A record's fields."""
        ...


@dataclass(frozen=True)
class Index:
    """A row for every document; `domain` counts in `names`, in which "" stands for none given."""

    hash: np.ndarray  # uint64 [N]
    size: np.ndarray  # int64 [N], bytes of UTF-8
    shard: np.ndarray  # int32 [N]
    start: np.ndarray  # int64 [N]
    length: np.ndarray  # int64 [N]
    domain: np.ndarray  # int32 [N]
    names: np.ndarray  # str
    bad: np.ndarray  # int64 [], records skipped
    first_bad: np.ndarray  # str, where the first few are and why


def one_line(error: object) -> str:
    """An error's message on one line, of bounded length; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


class BadRecord(ValueError):
    """A record that is skipped: `reason` is counted, `detail` is its own and shown for the first few."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, str(detail)

    def __str__(self) -> str:
        return f"{self.reason} ({one_line(self.detail)})" if self.detail else self.reason


def text_names(text_field: str = "") -> tuple[str, ...]:
    """The fields that may hold a record's text: `text_field`, or "text" and "content"."""
    return (text_field,) if text_field else TEXT_FIELDS


def text_name(record: Mapping[str, Any], text_field: str = "") -> str:
    """The field that holds a record's text, the first string among `text_names`; BadRecord where there is none."""
    names = text_names(text_field)
    name = next((n for n in names if isinstance(record.get(n), str | bytes)), None)
    if name is None:
        raise BadRecord("no string " + " or ".join(f'"{n}"' for n in names), f"fields: {', '.join(record) or 'none'}")
    return name


def document(record: Mapping[str, Any], text_field: str = "", domain: str = "") -> tuple[bytes, str]:
    """Text (UTF-8) and domain of a record: `domain`, or its own "domain", in which "" is none; or BadRecord."""
    raw = _utf8(record[text_name(record, text_field)])
    if len(raw) > MAX_DOCUMENT:
        raise BadRecord(f"longer than {MAX_DOCUMENT >> 20} MiB", f"{len(raw):,} bytes")
    if not raw.strip():
        raise BadRecord("empty")
    own = domain or record.get("domain") or ""
    if not isinstance(own, str | bytes):
        raise BadRecord('"domain" is no string', repr(own))
    return raw, _utf8(own).decode()


def pictured(record: Mapping[str, Any], check: bool = False) -> tuple[str, str]:
    """Text and domain of a record as `document` has them, with images where there are any (`data/content.py`); `check`:
    they are looked at."""
    if not has_images(record):
        raw, domain = document(record)
        return raw.decode(), domain
    names = [name for name in (*TEXT_FIELDS, "caption") if record.get(name) is not None]
    if not names or not record[names[0]]:  # images alone
        _, domain = document(dict(record) | {"text": MARK}, "text")
        return illustrated("", record, check), domain
    raw, domain = document(record, names[0])
    return illustrated(raw.decode(), record, check), domain


def raw_bytes(text: str) -> bytes:
    """What the content hash of a document is of."""
    return text.raw if isinstance(text, Illustrated) else text.encode()


def _utf8(text: str | bytes) -> bytes:
    try:
        if isinstance(text, str):
            return text.encode()
        text.decode()
        return text
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"{error.reason} at {error.start}") from error
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise BadRecord("not Unicode", error.reason) from error


def where(reader: Reader, shard: int, number: int) -> str:
    return f"{reader.shards[shard]}, {reader.unit} {number:,}" if number and reader.unit else reader.shards[shard]


def open_index(
    reader: Reader, what: str, cache: epath.Path, budget: float, log: Callable[[str], object] | None = None
) -> Index:
    """The index of a reader's records, from `cache` where it was built before.

    Args:
      what: the source, for messages
      budget: the share of the records that may be bad; ValueError names the first ones beyond it. 0 stops at the first
      log: told how far a long pass is
    """
    say = log or (lambda _: None)
    key = fingerprint([VERSION, *reader.stamp()])
    content = cached(cache / f"index-{key}.npz", lambda: _save(_Pass(reader, what, budget, say).run()))
    with np.load(io.BytesIO(content)) as arrays:
        index = Index(**{field.name: arrays[field.name] for field in fields(Index)})
    records = len(index.hash) + int(index.bad)
    if int(index.bad) > budget * records:
        raise ValueError(_over(int(index.bad), records, what, budget, index.first_bad.tolist()))
    return index


def _over(bad: int, records: int, what: str, budget: float, first: list[str]) -> str:
    more = "; ..." * (len(first) < bad)
    return (
        f"{what}: {bad:,} of {records:,} records are bad, above data.bad_records ({budget:g} of them): "
        f"{'; '.join(first)}{more}"
    )


def _save(index: Index) -> bytes:
    return npz(**{field.name: getattr(index, field.name) for field in fields(Index)})


def npz(**arrays: np.ndarray) -> bytes:
    """The content of an .npz file of these arrays."""
    output = io.BytesIO()
    np.savez(output, **arrays)  # type: ignore
    return output.getvalue()


class _Pass:
    """One walk over all records. Only the columns of the index grow with the corpus."""

    def __init__(self, reader: Reader, what: str, budget: float, log: Callable[[str], object]):
        self.reader, self.what, self.budget, self.log = reader, what, budget, log
        self.columns = {"hash": array("Q"), "size": array("q"), "shard": array("i"), "start": array("q"),
                        "length": array("q"), "domain": array("i")}  # fmt: skip
        self.names: dict[str, int] = {}
        self.bad, self.first_bad = 0, []
        self.lost: list[int] = []  # shards of unknown records

    def run(self) -> Index:
        self.reported = time.monotonic()
        total, done = sum(map(self.reader.size, range(len(self.reader.shards)))), 0
        for shard in range(len(self.reader.shards)):
            known = self.reader.known(shard, self.log)
            if known is not None:
                self._take(shard, known)
            for item in () if known is not None else self.reader.scan(shard):
                self._add(shard, item)
                if time.monotonic() - self.reported > REPORT_EVERY:
                    self._report(done, total)
            done += self.reader.size(shard)
        self._estimate(total)
        return Index(
            **{name: np.array(column, _TYPES[column.typecode]) for name, column in self.columns.items()},
            names=np.array(list(self.names), np.str_),
            bad=np.array(self.bad, np.int64),
            first_bad=np.array(self.first_bad, np.str_),
        )

    def _take(self, shard: int, known: Mapping[str, np.ndarray]) -> None:
        count = len(known["hash"])
        numbers = np.array([self.names.setdefault(str(name), len(self.names)) for name in known["names"]], np.int32)
        new = dict(hash=known["hash"], size=known["size"], shard=np.full(count, shard, np.int32),
                   start=np.arange(count), length=np.ones(count, np.int64),
                   domain=numbers[known["domain"]] if count else numbers[:0])  # fmt: skip
        for name, column in self.columns.items():
            column.frombytes(np.ascontiguousarray(new[name], _TYPES[column.typecode]).tobytes())

    def _add(self, shard: int, item: Item) -> None:
        why = item.why
        if not why:
            try:
                text, domain = pictured(item.fields, check=True)
            except ValueError as error:
                why = str(error)
            else:
                number = self.names.setdefault(domain, len(self.names))
                raw = raw_bytes(text)
                size = text.size if isinstance(text, Illustrated) else len(raw)
                row = (content_hash(raw), size, shard, item.start, item.length, number)
                for column, value in zip(self.columns.values(), row, strict=True):
                    column.append(value)
                return
        self.bad += item.count
        if not item.count:
            self.lost.append(shard)
        if len(self.first_bad) < SHOWN:
            self.first_bad.append(f"{where(self.reader, shard, item.number)}: {why}")
        if self.budget == 0:
            seen = len(self.columns["hash"]) + max(self.bad, 1)
            raise ValueError(_over(max(self.bad, 1), seen, self.what, 0.0, self.first_bad))

    def _estimate(self, total: int) -> None:
        """Count as bad what shards that do not open would hold if they were like the others."""
        lost = sum(map(self.reader.size, self.lost))
        records = len(self.columns["hash"]) + self.bad
        self.bad += max(len(self.lost), round(records * lost / (total - lost)) if total > lost else 0)

    def _report(self, done: int, total: int) -> None:
        self.reported = time.monotonic()
        of = f", {done / 1e9:.1f} of {total / 1e9:.1f} GB" if total else ""
        self.log(f"data: indexing {self.what}: {len(self.columns['hash']):,} documents{of}")
