"""A teacher's soft targets on disk: written once, read by any number of students, hosts and runs.

A record holds the targets of one *piece*: a document, or a part of one, as a row holds it. Rows are chunk-aligned
(`data/packing.py`), so what a teacher says of a piece depends on the piece's own tokens and positions, and on nothing
beside it in the row (unless the dispatch of its experts drops tokens). A record is found by a hash of just these
(`pieces`): whatever the batch, the order, the length of rows, the mesh, the hosts. Only where a longer document is cut
elsewhere, into other pieces, are there none for it.

A folder holds shards, each of three files: NAME.array_record, the records (`training/target_record.py`); NAME.npy,
the sorted keys with the records' numbers, uint64 [3, pieces]; NAME.json, the manifest, written last: a shard without it
does not count. Files are made on a local disk and copied, so the folder may be `gs://` or `s3://`: nothing is renamed
or appended to. A shard of such a folder is copied to the local disk before its first record is read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from data.batch import Batch
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training import target_record as record_format
from training.manifest import digest
from training.safetensors_header import read_json
from training.target_record import KEY_BYTES, UNUSED, VERSION, Form

SHARD_BYTES = 2**28
SHARD_SECONDS = 300  # of work that a kill may lose
_RANDOM = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class Identity:
    """What a store's targets are, alike in all its shards; at temperature 1."""

    tokenizer: str
    """Hash of the tokenizer that the ids are of."""
    vocab_size: int
    """V of the teacher's distribution."""
    teacher: str
    """Names the teacher's weights and architecture."""
    teacher_step: int = 0
    """Its optimizer steps, where known."""
    form: Form = field(default_factory=Form)
    """What of its distribution is kept."""
    source: str = ""
    """Where the weights came from, for the reader's eyes alone."""

    def __post_init__(self):
        if self.vocab_size > UNUSED:
            raise ValueError(f"ids are of 18 bits: a vocabulary of {self.vocab_size} is above {UNUSED}")

    def to_json(self) -> dict[str, Any]:
        rest = {name: value for name, value in asdict(self).items() if name != "form"}
        return dict(version=VERSION, **asdict(self.form), temperature=1.0, **rest)

    @classmethod
    def from_json(cls, manifest: dict[str, Any], where: str) -> Identity:
        """ValueError for another version of the format, and for what is none."""
        if manifest.get("version") != VERSION:
            raise ValueError(f"{where} is of version {manifest.get('version')!r:.100} of the format, not {VERSION}")
        own = dict(tokenizer=str, vocab_size=int, teacher=str, teacher_step=int, source=str)
        for name, kind in (own | dict(kind=str, top=int, draws=int)).items():
            if type(manifest.get(name)) is not kind:
                raise ValueError(f"{where}: {name!r} must be {kind.__name__}, not {manifest.get(name)!r:.100}")
        form = Form(manifest["kind"], manifest["top"], manifest["draws"])
        return cls(**{name: manifest[name] for name in own}, form=form)


_NAMED = dict(tokenizer="tokenizer", vocab_size="a vocabulary of", teacher="teacher", teacher_step="teacher's step",
              kind="kind", top="top", draws="draws")  # fmt: skip


def _check(where: Any, have: dict[str, Any], want: dict[str, Any], whose: str) -> None:
    """ValueError, in a line that names both sides, for the first of the wanted facts that is another."""
    for name, value in want.items():
        if value is not None and have[name] != value:
            raise ValueError(f"{where} holds targets of {_NAMED[name]} {have[name]}, but {whose} has {value}")


# --- Pieces of a batch


class Pieces(NamedTuple):
    """The pieces of a batch, in its order; places are those of the flattened [B, T]."""

    keys: list[bytes]  # content hashes, 16 bytes each
    starts: np.ndarray  # [P]
    stops: np.ndarray  # [P]

    @property
    def places(self) -> np.ndarray:
        """Every place of a piece, piece by piece."""
        lengths = self.stops - self.starts
        return np.repeat(self.starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def pieces(batch: Batch) -> Pieces:
    """What targets depend on, hashed piece by piece: tokens, the first position, and the last one's label.

    The other labels are the tokens, shifted. 128 bits of blake2b: any two of 10^15 pieces are alike with a chance
    below 10^-8.
    """
    segments = np.asarray(batch.segment_ids)
    flat, length = segments.reshape(-1), segments.shape[1]
    first = np.concatenate([[True], flat[1:] != flat[:-1]])
    first[::length] = True
    starts = np.flatnonzero(first)
    stops = np.append(starts[1:], len(flat))
    inside = flat[starts] > 0
    starts, stops = starts[inside], stops[inside]
    tokens = np.ascontiguousarray(np.asarray(batch.tokens).reshape(-1), "<i4")
    labelled = np.asarray(batch.loss_mask).reshape(-1)[stops - 1] > 0
    label = np.where(labelled, np.asarray(batch.labels).reshape(-1)[stops - 1], -1)
    ends = np.stack([np.asarray(batch.positions).reshape(-1)[starts], label], axis=1).astype("<i4")
    raw, ends = tokens.data.cast("B"), ends.tobytes()
    keys = [
        blake2b(raw[4 * start : 4 * stop], digest_size=KEY_BYTES, salt=ends[8 * i : 8 * i + 8]).digest()
        for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))
    ]
    return Pieces(keys, starts, stops)


def names(found: Pieces, shape: tuple[int, ...]) -> np.ndarray:
    """uint32 [B, T]: a name of each token of a piece, from its content and place, for `sparse.uniforms`."""
    lengths = found.stops - found.starts
    of_piece = np.frombuffer(b"".join(found.keys), "<u4").reshape(-1, KEY_BYTES // 4)[:, 0]
    within = found.places - np.repeat(found.starts, lengths)
    out = np.zeros(shape, np.uint32)
    out.reshape(-1)[found.places] = np.repeat(of_piece, lengths) + within.astype(np.uint32) * np.uint32(2654435761)
    return out


def _halves(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as pairs of numbers [P, 2]."""
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)


# --- Shards


class _Scratch:
    """A folder on the local disk, made when it is first used, and gone with this object."""

    def __init__(self):
        self.close: Callable[[], object] = lambda: None

    @cached_property
    def folder(self) -> str:
        made = tempfile.mkdtemp(prefix="targets-")
        self.close = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made


class _Shard:
    """A complete shard: its manifest, its index, its records."""

    def __init__(self, manifest: epath.Path, scratch: _Scratch):
        self.path, self._scratch = manifest, scratch
        self.facts = read_json(manifest)
        self.identity = Identity.from_json(self.facts, str(manifest))
        if wrong := [n for n in ("pieces", "tokens", "bytes") if type(self.facts.get(n)) is not int]:
            raise ValueError(f"{manifest}: {wrong[0]!r} must be int, not {self.facts.get(wrong[0])!r:.100}")
        self._index = self._open_index()
        self._reader: Any = None

    def _open_index(self) -> np.ndarray:
        """ValueError names a file that is not what was written; FileNotFoundError one that is missing."""
        file, pieces = self.path.with_suffix(".npy"), self.facts["pieces"]
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; {self.path.name} stands for it")
        local = epath.Path(self._local(".npy"))
        if self.facts.get("index", digest(local)) != digest(local):  # shards of before do not say
            raise ValueError(f"{file} is not what was written")
        try:
            index = np.load(local, mmap_mode="r")
        except Exception as error:  # whatever numpy's parser of headers meets
            raise ValueError(f"{file} is no index of targets: {type(error).__name__}") from None
        if index.dtype != np.uint64 or index.shape != (3, pieces) or (index[2] >= pieces).any():
            raise ValueError(f"{file} is no index of {pieces} pieces")
        return index

    def find(self, halves: np.ndarray) -> np.ndarray:
        """Numbers of the records of these keys [P, 2], -1 where there is none."""
        high, low, record = self._index
        at = np.minimum(np.searchsorted(high, halves[:, 0]), len(high) - 1)
        # Of two keys with the first 64 bits in common the second is not found: no target is better than a wrong one.
        hit = (high[at] == halves[:, 0]) & (low[at] == halves[:, 1])
        return np.where(hit, record[at].astype(np.int64), -1)

    def read(self, records: list[int]) -> list[bytes]:
        """ValueError names the shard and the record that cannot be read."""
        if self._reader is None:
            if not (file := self.path.with_suffix(".array_record")).exists():
                raise FileNotFoundError(f"{file} is missing; {self.path.name} stands for it")
            try:
                self._reader = ArrayRecordReader(self._local(".array_record"), _RANDOM, file_reader_buffer_size=2**15)
            except RuntimeError as error:
                raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        try:
            return self._reader.read(records)
        except Exception:
            for number in records:
                try:
                    self._reader.read([number])
                except Exception as error:
                    raise ValueError(f"{self.where(number)}: {str(error).splitlines()[0]}") from error
            raise

    def where(self, number: int) -> str:
        return f"{self.path.with_suffix('.array_record')}, record {number}"

    def _local(self, suffix: str) -> str:
        source = self.path.with_suffix(suffix)
        if not _is_remote(source):
            return os.fspath(source)
        target = epath.Path(self._scratch.folder) / source.name
        _copy(source, target)
        return os.fspath(target)

    def close(self) -> None:
        if self._reader is not None:
            with suppress(RuntimeError):  # of a damaged file, as reading it has said
                self._reader.close()
            self._reader = None


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 2**22)


def _open(path: epath.PathLike, scratch: _Scratch) -> list[_Shard]:
    """The complete shards of a folder, or the one of a manifest."""
    path = epath.Path(path)
    if path.suffix == ".json":
        return [_Shard(path, scratch)]
    found = sorted(path.glob("*.json")) if path.exists() else []
    return [_Shard(manifest, scratch) for manifest in found]


def _find(shards: Sequence[_Shard], keys: Sequence[bytes], begin: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(number of the shard, number of the record) of each key, -1 where there is none; the shard `begin` is tried
    first, as batches that follow one another mostly were written so."""
    shard, record = (np.full(len(keys), -1, np.int64) for _ in range(2))
    halves, left = _halves(keys), np.arange(len(keys))
    for i in (*range(begin, len(shards)), *range(min(begin, len(shards)))):
        if not len(left):
            break
        found = shards[i].find(halves[left])
        hit = found >= 0
        shard[left[hit]], record[left[hit]] = i, found[hit]
        left = left[~hit]
    return shard, record


class Writer:
    """Adds pieces to a folder, in shards of its own process. What complete shards hold already is not written again.

    A `with` statement: leaving it, by whatever exception, completes the shard under way.
    """

    def __init__(self, folder: epath.PathLike, identity: Identity, process: int = 0, shard_bytes: int = SHARD_BYTES,
                 shard_seconds: float = SHARD_SECONDS):  # fmt: skip
        """ValueError, naming both sides, if the folder holds targets of another tokenizer, teacher or form."""
        self.folder, self.identity, self.process = epath.Path(folder), identity, process
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._scratch = _Scratch()
        self._shards = _open(self.folder, self._scratch)
        for shard in self._shards:
            have, want = (_facts(of) for of in (shard.identity, identity))
            _check(self.folder, have, want, "what is to be written")
        own = [int(s.path.stem[6:]) for s in self._shards if s.path.stem.startswith(f"{process:05d}-")]
        self._next = max(own, default=-1) + 1
        self._file: Any = None  # of the shard under way, as are these:
        self._records: dict[bytes, None] = {}  # their keys, in their order
        self._tokens = self._bytes = 0
        self._since = 0.0
        self.written = dict(pieces=0, tokens=0, bytes=0)  # by this object

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self, found: Pieces) -> np.ndarray:
        """bool [P]: the pieces that are not here yet."""
        known = np.fromiter((key in self._records for key in found.keys), bool, len(found.keys))
        return ~known & (_find(self._shards, found.keys)[1] < 0)

    def add(self, found: Pieces, targets: SparseTargets) -> None:
        """Write what is missing of a batch's pieces; `targets` are numpy arrays [B, T, K] and [B, T] of that batch."""
        flat = SparseTargets._make(x.reshape(-1, *x.shape[2:]) for x in map(np.asarray, targets))
        for i in np.flatnonzero(self.missing(found)):
            key = found.keys[i]
            if key in self._records:  # twice in this batch
                continue
            part = slice(found.starts[i], found.stops[i])
            self._write(key, int(found.stops[i] - found.starts[i]), SparseTargets._make(x[part] for x in flat))
        old = time.monotonic() - self._since >= self._shard_seconds
        if self._file and (old or self._bytes >= self._shard_bytes):
            self._complete()

    def close(self) -> None:
        """Complete the shard under way."""
        if self._file:
            self._complete()
        for shard in self._shards:
            shard.close()
        self._scratch.close()

    def _write(self, key: bytes, tokens: int, targets: SparseTargets) -> None:
        if self._file is None:
            # Codes are as good as random: to compress them costs time and saves nothing.
            self._file = ArrayRecordWriter(self._local(".array_record"), "group_size:1,uncompressed")
            self._since = time.monotonic()
        record = record_format.encode(self.identity.form, key, targets)
        self._file.write(record)
        self._records[key] = None
        self._tokens += tokens
        self._bytes += len(record)
        for name, value in dict(pieces=1, tokens=tokens, bytes=len(record)).items():
            self.written[name] += value

    def _complete(self) -> None:
        self._file.close()
        high, low = _halves(self._records).T
        order = np.lexsort((low, high))  # also the records' numbers, as keys lie in the order of records
        np.save(self._local(".npy"), np.stack([high[order], low[order], order.astype("<u8")]))
        counts = dict(pieces=len(order), tokens=self._tokens, bytes=self._bytes)
        made = dict(index=digest(epath.Path(self._local(".npy"))))
        self.folder.mkdir(parents=True, exist_ok=True)
        for suffix in (".array_record", ".npy"):
            _copy(epath.Path(self._local(suffix)), self.folder / f"{self._name}{suffix}")
            os.remove(self._local(suffix))
        manifest = self.folder / f"{self._name}.json"
        manifest.write_text(json.dumps(self.identity.to_json() | counts | made, indent=1) + "\n")
        self._shards.append(_Shard(manifest, self._scratch))
        self._next += 1
        self._file, self._records, self._tokens, self._bytes = None, {}, 0, 0

    @property
    def _name(self) -> str:
        return f"{self.process:05d}-{self._next:05d}"

    def _local(self, suffix: str) -> str:
        return os.path.join(self._scratch.folder, self._name + suffix)


class Reader:
    """Finds the targets of batches, in whatever way these are packed."""

    def __init__(self, paths: epath.PathLike | Sequence[epath.PathLike], *, tokenizer: str | None = None,
                 vocab_size: int | None = None, teacher: str | None = None):  # fmt: skip
        """`paths`: folders, or manifests of single shards. FileNotFoundError if there is no complete shard;
        ValueError, naming both sides, if shards differ, or are not of what is expected of them."""
        paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self._scratch = _Scratch()
        self._shards: list[_Shard] = []
        for path in paths:
            if not (found := _open(path, self._scratch)):
                raise FileNotFoundError(f"no targets in {path}: it holds no complete shard")
            self._shards += found
        first = self._shards[0]
        self.identity, self.form = first.identity, first.identity.form
        for shard in self._shards:
            _check(shard.path, _facts(shard.identity), _facts(self.identity), str(first.path))
        expected = dict(tokenizer=tokenizer, vocab_size=vocab_size, teacher=teacher)
        _check(", ".join(map(str, paths)), _facts(self.identity), expected, "this run")
        self._last = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
        self._scratch.close()

    def counts(self) -> dict[str, int]:
        """Shards, pieces, tokens, and bytes of records; a piece that two processes wrote counts twice."""
        names = ("pieces", "tokens", "bytes")
        return dict(shards=len(self._shards)) | {n: sum(shard.facts[n] for shard in self._shards) for n in names}

    ahead = 0  # it answers at once

    def ask(self, batch: Batch) -> None:
        """Nothing to prepare."""

    def look_up(self, batch: Batch) -> SparseTargets:
        """The targets of a batch, numpy arrays [B, T, K] and [B, T]; where there is none, and in padding, `present` is
        False, ids are -1, and all else is 0.

        Each record is checked against its checksum, and against the hash and number of the batch's own tokens:
        ValueError names the shard and the record that fails.
        """
        found = pieces(batch)
        shards, records = _find(self._shards, found.keys, self._last)
        have, parts = [], []
        for i in np.unique(shards[shards >= 0]).tolist():
            mine = np.flatnonzero(shards == i)
            numbers = records[mine].tolist()
            for piece, number, record in zip(mine, numbers, self._shards[i].read(numbers), strict=True):
                try:
                    tokens = int(found.stops[piece] - found.starts[piece])
                    parts.append(record_format.payload(self.form, found.keys[piece], tokens, record))
                except ValueError as error:
                    raise ValueError(f"{self._shards[i].where(number)}: {error}") from None
            have.append(mine)
            self._last = i
        chosen = np.concatenate(have) if have else np.zeros(0, int)
        there = Pieces([], found.starts[chosen], found.stops[chosen])
        return unpacked(self.form, np.shape(batch.tokens), there, parts)


def unpacked(form: Form, shape: tuple[int, ...], there: Pieces, payloads: Sequence[memoryview]) -> SparseTargets:
    """The targets [B, T, K] and [B, T] of a batch of that shape, from the records' payloads of its pieces `there`."""
    out = _absent(shape, form.entries)
    if payloads:
        places = there.places
        for into, values in zip(out, record_format.decode(form, b"".join(payloads)), strict=True):
            into.reshape(-1, *into.shape[2:])[places] = values
    return out


def _absent(shape: tuple[int, ...], entries: int) -> SparseTargets:
    ids, mass = np.full((*shape, entries), -1, np.int32), np.zeros((*shape, entries), np.float32)
    scalars = (np.zeros(shape, np.float32) for _ in range(4))
    return SparseTargets._make((ids, mass, *scalars, np.zeros(shape, bool)))


def _facts(identity: Identity) -> dict[str, Any]:
    return {name: value for name, value in identity.to_json().items() if name in _NAMED}
