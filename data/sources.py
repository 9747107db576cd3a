"""Where documents come from, and which of them are held out.

A source is named by a path whose suffix, or whose content if it is a folder, says its kind, or by KIND:PLACE:

    embedded:code, embedded:prose, embedded:digits
                                         no download (data/embedded.py); digits are images with captions
    jsonl:PATH, parquet:PATH, array_record:PATH
                                         a file, or a folder with such files in it or below it
    text:FOLDER                          every plain-text file in it or below it is a document (formats.TEXT_SUFFIXES)
    tfds:NAME[/CONFIG][@DATA_DIR][:SPLIT], tfds:FOLDER[:SPLIT]
                                         TensorFlow Datasets in ArrayRecord form, without TensorFlow; split train
    hf:NAME_OR_FOLDER[:SPLIT]            Hugging Face datasets (the extra `hf`); split train
    images:FOLDER, webdataset:PATH, video:FOLDER
                                         images and videos with captions (data/image_sources.py)

The document is a record's "text" (or "content"), with its images if it has any (data/content.py), and its domain the
record's "domain", or else the name that the source was given under.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from data import embedded, formats, libraries
from data.array_record import ArrayRecords
from data.image_sources import Captioned, Videos, WebDataset
from data.index import Index, Reader, content_hash, one_line, open_index, pictured, raw_bytes

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

__all__ = ["EMBEDDED", "KINDS", "Source", "content_hash", "from_texts", "open_sources", "split"]

EMBEDDED = {name: f"embedded:{name}" for name in embedded.NAMES if name != "digits"}
KINDS: dict[str, Callable[[str, epath.Path], Reader]] = {
    **{
        reader.kind: reader
        for reader in (formats.JsonLines, formats.Parquet, ArrayRecords, formats.Text, Captioned, WebDataset, Videos)
    },
    "tfds": libraries.tfds,
    "hf": libraries.hf,
}
"""Kind -> what opens its records, of (place, cache); "embedded" has none."""


@dataclass(frozen=True)
class Source:
    """The documents of one domain, read at random by index, by any number of threads."""

    name: str
    hashes: np.ndarray  # uint64 [N], `content_hash` of every document
    sizes: np.ndarray  # int64 [N], bytes of UTF-8
    read: Callable[[int], str]
    skipped: int = 0  # bad records where it was read; those of a place with several domains stand with its first
    ids: Callable[[int], np.ndarray] | None = None  # bos, tokens, eos, of documents that are no text to be encoded

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, index: int) -> str:
        return self.read(index)

    def document(self, index: int, tokens: Tokenizer) -> np.ndarray:
        """Its token ids, int32 [T], bos first and eos last."""
        return tokens.document(self.read(index)) if self.ids is None else self.ids(index)


def from_texts(name: str, texts: Sequence[str]) -> Source:
    """A source over texts in memory; empty and repeated ones are dropped."""
    unique = {content_hash(raw): (text, len(raw)) for text in texts if (raw := raw_bytes(text)).strip()}
    kept, sizes = [text for text, _ in unique.values()], [size for _, size in unique.values()]
    return Source(name, np.fromiter(unique, np.uint64, len(unique)), np.array(sizes, np.int64), kept.__getitem__)


def open_sources(places: Mapping[str, str], cache: epath.Path, bad_records: float = 0.001,
                 log: Callable[[str], object] | None = None) -> list[Source]:  # fmt: skip
    """The domains of a mixture, by name; ValueError or FileNotFoundError, in one line, where one cannot be read.

    Args:
      places: name -> place, as above; empty: the embedded corpora
      cache: where indexes are kept, and copies of remote ArrayRecord shards
      bad_records: share of the records of each place that are skipped if they are bad
      log: told how far a long pass over the records is
    """
    parts: dict[str, list[Source]] = {}
    for name, place in sorted((places or EMBEDDED).items()):
        for source in _open(name, place, cache, bad_records, log):
            parts.setdefault(source.name, []).append(source)
    return [_joined(same) for _, same in sorted(parts.items())]


def _open(name: str, place: str, cache: epath.Path, bad_records: float,
          log: Callable[[str], object] | None) -> list[Source]:  # fmt: skip
    what = f"data.sources {name}"
    kind, rest = _kind(place, what)
    if kind == "embedded":
        if rest not in embedded.NAMES:
            near = difflib.get_close_matches(rest, embedded.NAMES, n=1, cutoff=0)[0]
            raise ValueError(f"{what}: no embedded corpus {rest!r}; the nearest is embedded:{near}")
        return [from_texts(name, embedded.texts(rest, cache))]
    try:
        reader = KINDS[kind](rest, cache)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{what}: {one_line(error)}") from error
    index = open_index(reader, f"{what}: {rest}", cache, bad_records, log)
    if not len(index.hash):
        raise ValueError(f"{what}: no documents in {rest}")
    found = []
    for domain in range(len(index.names)):
        rows = np.flatnonzero(index.domain == domain)
        read = partial(_read, reader, index, rows)
        skipped = 0 if found else int(index.bad)
        found.append(Source(str(index.names[domain]) or name, index.hash[rows], index.size[rows], read, skipped))
    return found


def _read(reader: Reader, index: Index, rows: np.ndarray, i: int) -> str:
    row = int(rows[i])
    try:
        text, _ = pictured(reader.read(int(index.shard[row]), int(index.start[row]), int(index.length[row])))
    except ValueError as error:
        raise ValueError(f"{_where(reader, index, row)}: cannot be read any more: {one_line(error)}") from error
    if content_hash(raw_bytes(text)) != index.hash[row]:
        raise ValueError(
            f"{_where(reader, index, row)}: is not what its index says; it was changed since it was indexed"
        )
    return text


def _where(reader: Reader, index: Index, row: int) -> str:
    """A document's file and number, for messages."""
    shard = index.shard[row]  # of the array's own type: for an int of Python's all of it would be converted
    return f"{reader.shards[shard]}, document {row - int(np.searchsorted(index.shard, shard)) + 1:,}"


def _joined(parts: Sequence[Source]) -> Source:
    """Sources of one domain as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part) for part in parts])

    def read(index: int) -> str:
        part = int(np.searchsorted(ends, index, side="right"))
        return parts[part][index - int(ends[part]) + len(parts[part])]

    hashes, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "sizes"))
    return Source(parts[0].name, hashes, sizes, read, sum(part.skipped for part in parts))


def _kind(place: str, what: str) -> tuple[str, str]:
    """(kind, the rest) of a place; a path without a kind is taken by its suffix, a folder by what it holds."""
    known = ("embedded", *KINDS)
    if (prefixed := re.fullmatch(r"(\w+):(?!//)(.*)", place, re.DOTALL)) and not os.path.exists(place):
        kind, rest = prefixed.groups()
        if kind not in known:
            near = difflib.get_close_matches(kind, known, n=1, cutoff=0)[0]
            raise ValueError(f"{what}: no kind {kind!r}; the nearest is {near!r} (of {', '.join(known)})")
        if not rest:
            raise ValueError(f"{what}: {place!r} names no place")
        return kind, rest
    try:
        path = formats.path_of(place)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{what}: {error}") from error
    found = formats.kinds_in(path) if path.is_dir() else {kind} if (kind := formats.kind_of(path.name)) else set()
    if len(found) == 1:
        return found.pop(), place
    holds = f"holds {' and '.join(sorted(found))} side by side" if found else "is none of the kinds"
    raise ValueError(
        f"{what}: {place} {holds}; supported are {', '.join(f'*{s}' for s in formats.SUFFIXES)}, folders of one of "
        "them, plain text, TFDS and Hugging Face datasets: say which as KIND:PATH"
    )


def split(sources: Sequence[Source], share: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Indices of (training, held-out) documents of every source.

    A document is held out when its content hash lies in the lowest `share` of the hash range, so copies of it go the
    same way in every domain and on every machine, in any order. A domain of which nothing fell there gives its
    smallest hash. Held-out indices come in the order of their hashes, which is a fixed random order.
    """
    threshold = np.uint64(int(share * 2.0**64))
    heldout = [np.unique(source.hashes[source.hashes < threshold]) for source in sources]
    chosen = np.concatenate(
        [h if len(h) else s.hashes.min(keepdims=True) for h, s in zip(heldout, sources, strict=True)]
    )
    train, held = [], []
    for source in sources:
        out = np.isin(source.hashes, chosen)
        if out.all():
            raise ValueError(
                f"domain {source.name!r} has {len(np.unique(source.hashes))} distinct document(s), all held out: "
                "give it more documents"
            )
        train.append(np.flatnonzero(~out))
        _, first = np.unique(source.hashes[out], return_index=True)  # one copy of each, by hash
        held.append(np.flatnonzero(out)[first])
    return train, held
