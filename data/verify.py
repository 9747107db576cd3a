"""Whether shards are still what their conversion wrote: sizes, hashes and counts against the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from data.array_record import MANIFEST, index_of, load_index, read_manifest
from data.shards import digest

EVERY = 5.0  # seconds between two lines of progress


def verify(folder: epath.PathLike, threads: int = 8, log: Callable[[str], object] = print) -> dict[str, Any]:
    """Reads every shard and index that the manifest of `folder` lists; JSON-able: counts, and `damaged`, of each file
    that is not what was written its name and why.

    FileNotFoundError where there is no manifest, ValueError where it is none.
    """
    path = epath.Path(folder)
    if not (path / MANIFEST).exists():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}: give a folder that llama4 data convert made")
    shards = list(read_manifest(path, missing_ok=True).values())
    total, done = sum(shard.get("size", 0) for shard in shards), 0
    damaged: list[dict[str, str]] = []
    began = reported = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter free
        for shard, found in zip(shards, pool.map(lambda shard: list(_faults(path, shard)), shards), strict=True):
            damaged += [dict(file=file, why=why) for file, why in found]
            done += shard.get("size", 0)
            if time.monotonic() - reported > EVERY:
                reported = time.monotonic()
                rate = done / (reported - began) / 1e6
                log(f"verify {done / max(total, 1):.0%} of {total / 1e6:,.0f} MB  {rate:.0f} MB/s")
    unhashed = sum(not shard.get("hash") for shard in shards)
    return dict(
        folder=str(folder), shards=len(shards), documents=sum(shard["documents"] for shard in shards), bytes=total,
        unhashed=unhashed, damaged=damaged,
    )  # fmt: skip


def _faults(folder: epath.Path, shard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, why) of a shard and of its index."""
    file = folder / shard["file"]
    index = index_of(file)
    if not file.exists():
        yield file.name, "is not there"
    elif "size" in shard and (size := file.stat().length) != shard["size"]:
        yield file.name, f"has {size:,} bytes, not {shard['size']:,}"
    elif shard.get("hash") and digest(file) != shard["hash"]:
        yield file.name, "has other content (its hash differs)"
    if not index.exists():
        yield index.name, "is not there"
    elif shard.get("index_hash") and digest(index) != shard["index_hash"]:
        yield index.name, "has other content (its hash differs)"
    else:
        try:
            load_index(index, shard["documents"])
        except ValueError as error:
            yield index.name, str(error)
