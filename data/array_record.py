"""ArrayRecord shards of JSON records, read at random, with the indexes and the manifest that `data convert` leaves.

    NAME.array_record   a record is the UTF-8 JSON of {"text": ..., "domain": ..., ...}
    NAME.index.npz      hash uint64 [N], size int64 [N] (bytes of UTF-8), domain int32 [N] into names str; "" is none
    manifest.json       {"version": 1, "documents": N, "bytes": N, "shards": [{"file": ...,
                        "documents": N, "bytes": N (of text), "size": N (of the file),
                        "hash": blake2b of 16 bytes in hexadecimal, "index_hash": ...}]}

A shard with both is not walked through. Every chunk of a shard carries checksums, which its reader verifies.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from etils import epath

from data.cache import fingerprint
from data.formats import Files, json_item, json_object
from data.index import Item, one_line

MANIFEST, MANIFEST_VERSION = "manifest.json", 1
OPEN_SHARDS = 256
BATCH = 256  # records read at once on a pass
_ERRORS = (RuntimeError, ValueError, IndexError, OSError, MemoryError)  # what the native reader raises


class ArrayRecords(Files):
    """An .array_record file, or every one in a folder; a record's place is its number.

    The native reader opens local files only, so a remote shard is copied into the cache first. It has threads of its
    own: a process that was forked after the first read cannot read.
    """

    kind = "array_record"

    def __init__(self, place: str, cache: epath.Path):
        super().__init__(place, cache)
        self._cache = cache
        self._lock = Lock()
        self._listed: dict[epath.Path, dict[str, Any]] = {}
        for file in self.files:
            if file.parent not in self._listed:
                self._listed[file.parent] = read_manifest(file.parent)
        self._reader = lru_cache(OPEN_SHARDS)(self._open)

    def known(self, shard: int, log: Callable[[str], object]) -> Mapping[str, np.ndarray] | None:
        file = self.files[shard]
        listed = self._listed[file.parent].get(file.name)
        beside = index_of(file)
        if listed is None or not beside.exists():
            return None
        if (size := self.size(shard)) != listed.get("size", size):
            log(
                f"data: {file} has {size:,} bytes where {MANIFEST} has {listed['size']:,}, so it is damaged: "
                f"reading all of its records (llama4 data verify {file.parent} looks at all shards)"
            )
            return None
        try:
            index = load_index(beside, listed["documents"])
            found = len(index["hash"]) if _remote(file) else self._reader(shard).num_records()
            if found != len(index["hash"]):
                raise ValueError(f"{len(index['hash']):,} documents where the shard has {found:,}")
        except _ERRORS as error:
            log(f"data: {beside} is of no use ({one_line(error)}): reading the records of the shard")
            return None
        return index

    def scan(self, shard: int) -> Iterator[Item]:
        file = self.files[shard]
        listed = self._listed[file.parent].get(file.name, {}).get("documents", 0)
        try:
            reader = self._reader(shard)
        except _ERRORS as error:
            yield Item(0, 0, 0, {}, f"cannot be opened ({one_line(error)})", listed)
            return
        records = reader.num_records()
        for begin in range(0, records, BATCH):
            places = list(range(begin, min(begin + BATCH, records)))
            try:
                found: Sequence[bytes | Exception] = reader.read(places)
            except _ERRORS:  # of a batch with damage every record by itself
                found = [_one(reader, place) for place in places]
            for place, raw in zip(places, found, strict=True):
                yield _item(place, raw)
        if listed > records:
            yield Item(0, 0, 0, {}, f"{records:,} records where {MANIFEST} has {listed:,}", listed - records)

    def read(self, shard: int, start: int, length: int) -> Mapping[str, Any]:
        raw = _one(self._reader(shard), start)
        if isinstance(raw, Exception):
            raise ValueError(f"damaged ({one_line(raw)})") from raw
        return json_object(raw)

    def _open(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        path = str(self._local(shard))
        # No read-ahead: made for random access, and such a reader may be shared by threads.
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15)
        if not reader.ok():
            reader.close()  # raises what is wrong
            raise ValueError("damaged")
        return reader

    def _local(self, shard: int) -> Path:
        """The shard as a local file, copied once."""
        file = self.files[shard]
        if not _remote(file):
            return Path(file)
        if _remote(self._cache):
            raise ValueError(f"{file} has to be copied, and the cache {self._cache} is no local folder")
        stat = self.stats[shard]
        folder = Path(self._cache) / "shards"
        copy = folder / f"{fingerprint([file, stat.length, stat.mtime])}-{file.name}"
        with self._lock:
            if not copy.exists() or copy.stat().st_size != stat.length:
                folder.mkdir(parents=True, exist_ok=True)
                handle, partial = tempfile.mkstemp(dir=folder)
                with os.fdopen(handle, "wb") as to, file.open("rb") as source:
                    shutil.copyfileobj(source, to, 1 << 20)
                os.replace(partial, copy)  # the cache is local
        return copy


def _remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _one(reader: Any, place: int) -> bytes | Exception:
    try:
        (raw,) = reader.read([place])
        return raw
    except _ERRORS as error:
        return error


def _item(place: int, raw: bytes | Exception) -> Item:
    if isinstance(raw, Exception):
        return Item(place + 1, place, 1, {}, f"damaged ({one_line(raw)})")
    return json_item(place + 1, place, 1, raw)


def index_of(shard: epath.Path) -> epath.Path:
    """The index that lies beside a shard."""
    return shard.with_suffix(".index.npz")


def read_manifest(folder: epath.Path, missing_ok: bool = False) -> dict[str, Any]:
    """The manifest's shards by file name; empty where there is none. FileNotFoundError names a shard that is not there,
    unless `missing_ok`."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        listed = json.loads(path.read_bytes())
        shards = {shard["file"]: shard for shard in listed["shards"]} if listed["version"] == MANIFEST_VERSION else None
        if shards is None or not all(isinstance(shard["documents"], int) for shard in shards.values()):
            raise ValueError(f"expected version {MANIFEST_VERSION}, with a number of documents for every shard")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of shards: {one_line(error)}") from error
    gone = [] if missing_ok else [name for name in shards if not (folder / name).exists()]
    if gone:
        raise FileNotFoundError(f"{path} lists {len(gone)} shard(s) that are not there, the first {gone[0]}")
    return shards


def load_index(path: epath.Path, documents: int) -> dict[str, np.ndarray]:
    """hash, size, domain and names of an index of so many documents; ValueError where it is none."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            index = {name: arrays[name] for name in ("hash", "size", "domain", "names")}
    except (*_ERRORS, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"no index, or damaged ({one_line(error)})") from error
    lengths = {len(index[name]) for name in ("hash", "size", "domain")} | {documents}
    if len(lengths) != 1:
        raise ValueError(f"arrays of {sorted(lengths)} documents")
    domain = index["domain"]
    if len(domain) and (domain.min() < 0 or domain.max() >= len(index["names"])):
        raise ValueError("a domain without a name")
    return index
