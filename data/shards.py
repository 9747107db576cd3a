"""Shards of ArrayRecord: the options of a conversion, its tasks, and `run_task`, which writes the shards of one.

Of a shard NAME-00003-00000.array_record and the index beside it (`data/array_record.py` has the form of both) the file
.convert/NAME-00003-00000.json is the seal, written last: what the shard holds, and the hashes of both files.

Object stores know neither rename nor append nor locks: a shard counts only when its seal agrees with its files.
ArrayRecord and the index are written deterministically, so concurrent or repeated writers of a shard agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from data.array_record import index_of
from data.index import content_hash, npz
from data.records import FORMATS, BadRecord, Converted, InputError, InputPart, converted, records

WRITER = "group_size:1,zstd:3"
STATE = ".convert"
EXAMPLES = 5  # of skipped records, kept with where they are
NAMES = 100  # of fields left out, told apart in the counts
PATIENCE = 1000  # records of a task without one document among them: the wrong field, not bad records
Seal = dict[str, Any]


@runtime_checkable
class Report(Protocol):
    """Told of the progress of a task, in amounts since the last time; with none at its end.

    Args:
      read: bytes of input read
      documents: documents written
      text: bytes of their text
      kept: bytes of input that were not read, their shards being there
    """

    def __call__(self, read: int = 0, documents: int = 0, text: int = 0, kept: int = 0) -> None: ...


def silent(read: int = 0, documents: int = 0, text: int = 0, kept: int = 0) -> None:
    """The report to nobody."""


@dataclass(frozen=True)
class Options:
    """What the output depends on, beside the inputs.

    Args:
      name: that the shards' names begin with
      shard_mb: MiB of text, about, in a shard
      text_field: where a record's text is; "" for "text" or "content"
      domain: of every document; "" for the record's own "domain"
      plain: suffixes of the files that are one document each
    """

    name: str = "documents"
    shard_mb: int = 256
    text_field: str = ""
    domain: str = ""
    plain: tuple[str, ...] = (".txt", ".md", ".rst")

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"the shards' name {self.name!r} must be part of a file's name")
        if self.shard_mb < 1:
            raise ValueError(f"shards of {self.shard_mb} MiB: at least 1 is needed")
        if wrong := [s for s in self.plain if not s.startswith(".") or s in FORMATS]:
            raise ValueError(f"{wrong[0]!r} is no suffix of plain text: give one as in .txt")


@dataclass(frozen=True)
class Task:
    """What one worker does in one go: `parts` into the shards NAME-00000, NAME-00001, ... of `folder`."""

    folder: str
    name: str
    parts: tuple[InputPart, ...]
    options: Options
    plan: str  # the plan's key, which its seals carry
    patience: int = PATIENCE  # 0: any number of bad records is borne

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def run_task(task: Task, report: Report = silent) -> list[Seal]:
    """Writes the shards of a task that are not there yet, each with its index and its seal; returns all its seals.

    It depends on the task and its files alone, and may run on any machine that reaches them, any number of times.

    Raises:
      InputError: the first `task.patience` records hold no document
    """
    seals = list(_verified(task))
    if seals and seals[-1]["last"]:
        report(kept=task.size)
        return seals
    options, passed = task.options, sum(seal["records"] for seal in seals)
    every = ((p, n, load) for p in task.parts for n, load in records(p, options.text_field, lambda n: report(read=n)))
    shard = _Shard(task, len(seals))
    try:
        for part, number, load in itertools.islice(every, passed, None):
            try:
                found = converted(load(), options.text_field, options.domain)
            except BadRecord as bad:
                shard.skip(bad, part, number)
            else:
                if shard.documents and shard.bytes + len(found.text) > options.shard_mb << 20:
                    seals.append(shard.seal(last=False))
                    shard = _Shard(task, len(seals))
                shard.add(found)
                report(documents=1, text=len(found.text))
            shard.records += 1
        seals.append(shard.seal(last=True))
    finally:
        shard.close()
        report()
    return seals


def seal_path(task: Task, number: int) -> epath.Path:
    return epath.Path(task.folder) / STATE / f"{task.name}-{number:05d}.json"


def read_seals(task: Task) -> list[Seal]:
    """The seals of a task from its first shard on, as far as they are there, whole and of this plan."""
    seals: list[Seal] = []
    for number in itertools.count():
        seal = read_json(seal_path(task, number))
        if not isinstance(seal, dict) or seal.get("plan") != task.plan:
            break
        seals.append(seal)
        if seal["last"]:
            break
    return seals


def _verified(task: Task) -> Iterator[Seal]:
    """As `read_seals`, up to the first whose files do not agree with it."""
    folder = epath.Path(task.folder)
    for seal in read_seals(task):
        for name, size, wanted in seal["files"]:
            path = folder / name
            if not path.exists() or path.stat().length != size or digest(path) != wanted:
                return
        yield seal


def read_json(path: epath.Path) -> Any:
    """None for a file that is not there or was cut off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def digest(path: epath.Path | Path) -> str:
    """blake2b of a file's content, 16 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()  # type: ignore


class _Shard:
    """A shard that is being written, and what came between the one before and its end.

    ArrayRecord is written to files of this machine: a remote shard is written beside, and its bytes are copied.
    """

    def __init__(self, task: Task, number: int):
        self._task, self._number = task, number
        self._folder = epath.Path(task.folder)
        self._stem = f"{task.name}-{number:05d}"
        self._writer: Any = None
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._file = Path()
        self._hashes, self._sizes, self._domains = array("Q"), array("q"), array("i")
        self._names: dict[str, int] = {}
        self._skipped: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []
        self.records = self.bytes = 0

    @property
    def documents(self) -> int:
        return len(self._sizes)

    def add(self, found: Converted) -> None:
        if not self.documents:
            self._open()
        self._writer.write(found.record)
        self._hashes.append(content_hash(found.text))
        self._sizes.append(len(found.text))
        self._domains.append(self._names.setdefault(found.domain, len(self._names)))
        self.bytes += len(found.text)
        for name in found.left_out:
            self._left_out[name if name in self._left_out or len(self._left_out) < NAMES else "others"] += 1

    def skip(self, bad: BadRecord, part: InputPart, number: int) -> None:
        self._skipped[bad.reason] += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append({"file": part.file, part.unit: number, "reason": bad.reason, "detail": bad.detail})
        count = self._skipped.total()
        if count == self._task.patience and not self.documents and not self._number:
            (reason, _), example = self._skipped.most_common(1)[0], self._examples[0]
            raise InputError(
                f"none of the first {count} records from {example['file']} on is a document: {reason}"
                f" ({example['detail'][:200]}); --text-field names the text's field, --bad-records 1 bears anything"
            )

    def _open(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        if "://" in str(self._folder):
            self._scratch = tempfile.TemporaryDirectory()
        self._file = Path(self._scratch.name if self._scratch else self._folder) / f"{self._stem}.array_record"
        self._writer = ArrayRecordWriter(str(self._file), WRITER)

    def close(self) -> None:
        """Ends the writing; what is not sealed does not count."""
        if self._writer is not None and self._writer.is_open():
            self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def seal(self, last: bool) -> Seal:
        """Ends the shard: its file, its index, then the seal that makes both count."""
        files = self._finish() if self.documents else []
        seal = dict(plan=self._task.plan, last=last, records=self.records, documents=self.documents, bytes=self.bytes,
                    files=files, skipped=dict(self._skipped), left_out=dict(self._left_out),
                    examples=self._examples)  # fmt: skip
        path = seal_path(self._task, self._number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(seal))
        return seal

    def _finish(self) -> list[tuple[str, int, str]]:
        from array_record.python.array_record_module import ArrayRecordReader

        self._writer.close()
        reader = ArrayRecordReader(str(self._file))
        if (count := reader.num_records()) != self.documents:  # the writer says nothing of some failures
            raise OSError(f"{self._file}: {count} of {self.documents} documents arrived: is the disk full?")
        reader.close()
        shard = (self._file.name, self._file.stat().st_size, digest(self._file))
        if self._scratch is not None:
            with self._file.open("rb") as source, (self._folder / self._file.name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        index = index_of(self._folder / self._file.name)
        content = self._index()
        index.write_bytes(content)
        self.close()
        return [shard, (index.name, len(content), hashlib.blake2b(content, digest_size=16).hexdigest())]

    def _index(self) -> bytes:
        return npz(
            hash=np.array(self._hashes, np.uint64),
            size=np.array(self._sizes, np.int64),
            domain=np.array(self._domains, np.int32),
            names=np.array(list(self._names), np.str_),
        )
