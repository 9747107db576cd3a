"""Damage shard files in many ways and read them as a run would: `python -m tools.fuzz_sources [CASES] [SEED]`.

A case is one of jsonl, parquet, array_record and array_record with its manifest, with bits flipped, an end cut off, a
range zeroed or bytes put in. It must end in intact documents and counted bad records, or in one line of ValueError.
How many records there were is known from what was written, not from the damaged file: of Parquet and ArrayRecord all
must be read or counted, and of JSONL and Parquet every document must be read intact whose bytes were not touched.
(JSON lines say nothing of how many they are: those of the damaged file must be read or counted.)
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from data import sources
from data.index import content_hash
from data.shards import digest

FORMATS = ("jsonl", "parquet", "array_record", "manifest")
DAMAGES = ("bits", "cut", "zeros", "bytes")
DOCUMENTS = 60
BUDGET = 0.999  # all outcomes but the loss of everything are looked at


class Outcome(NamedTuple):
    """Documents read intact, read with a visible change, and counted as bad; or the line that refused the file."""

    intact: int
    changed: int
    bad: int
    refused: str = ""
    records: int = -1  # that the file holds
    lost: tuple[str, ...] = ()  # documents that were not touched, and not read


def documents(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"document {i} größe " + "".join(rng.choices("abcdef gh\n", k=rng.randrange(20, 400))) for i in range(DOCUMENTS)
    ]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    """A shard of the texts; with an index and a manifest beside it for "manifest"."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"text": text, "domain": "ab"[i % 2]} for i, text in enumerate(texts)]
    if kind == "jsonl":
        file = folder / "d.jsonl"
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        file = folder / "d.parquet"
        compression = "zstd" if len(texts) % 2 else "none"
        parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=16, compression=compression)
    else:
        file = write_array_record(folder, records, manifest=kind == "manifest")
    return file


def write_array_record(folder: Path, records: list[dict[str, str]], manifest: bool) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    file = folder / "d-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1,zstd:3")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    if manifest:
        raw = [record["text"].encode() for record in records]
        names = sorted({record.get("domain", "") for record in records})
        np.savez(
            folder / "d-00000-of-00001.index.npz",
            hash=np.array([content_hash(r) for r in raw], np.uint64),
            size=np.array([len(r) for r in raw], np.int64),
            domain=np.array([names.index(record.get("domain", "")) for record in records], np.int32),
            names=np.array(names, np.str_),
        )
        size = sum(map(len, raw))
        index = file.with_suffix(".index.npz")
        shard = {"file": file.name, "documents": len(raw), "bytes": size, "size": file.stat().st_size,
                 "hash": digest(file), "index_hash": digest(index)}  # fmt: skip
        listed = {"version": 1, "documents": len(raw), "bytes": size, "shards": [shard]}
        (folder / "manifest.json").write_text(json.dumps(listed))
    return file


def damage(raw: bytes, how: str, rng: random.Random) -> tuple[bytes, list[range]]:
    """The damaged bytes, and where the original was touched; behind bytes that were put in nothing is where it was."""
    new, at = bytearray(raw), rng.randrange(len(raw))
    touched = [range(at, len(raw))]
    if how == "bits":
        places = [rng.randrange(len(new)) for _ in range(rng.choice((1, 1, 3, 20)))]
        for place in places:
            new[place] ^= 1 << rng.randrange(8)
        touched = [range(place, place + 1) for place in places]
    elif how == "cut":
        del new[at:]
    elif how == "zeros":
        end = min(len(new), at + rng.choice((1, 8, 100, 2000)))
        new[at:end] = bytes(end - at)
        touched = [range(at, end)]
    else:
        new[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    return bytes(new), touched


def untouched(file: Path, kind: str, texts: list[str], how: str, touched: list[range]) -> list[str]:
    """Documents of the file, which is not damaged yet, that any reader should find again."""
    if kind == "jsonl":
        ends = np.cumsum([len(line) for line in file.read_bytes().splitlines(keepends=True)]).tolist()
        if how == "bytes":  # lines behind are as they were
            touched = [range(touched[0].start, touched[0].start + 1)]
        spans = [range(max(start - 1, 0), end) for start, end in pairwise([0, *ends])]  # with the newlines at both ends
    elif kind == "parquet":
        from pyarrow import parquet

        found = parquet.read_metadata(file)
        spans: list[range] = []
        for group in map(found.row_group, range(found.num_row_groups)):
            columns = [group.column(i) for i in range(group.num_columns)]
            first = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
            last = max((c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size for c in columns)
            spans += [range(first, last)] * group.num_rows
        if any(t.stop > spans[-1].stop or t.start < spans[0].start for t in touched):  # the footer, the first bytes
            return []
    else:
        return []
    return [text for text, span in zip(texts, spans, strict=True)
            if not any(max(t.start, span.start) < min(t.stop, span.stop) for t in touched)]  # fmt: skip


def outcome(file: Path, kind: str, texts: list[str], cache: Path, wanted: Sequence[str] = ()) -> Outcome:
    """Read all documents; anything but a ValueError of one line goes up. `wanted` should be among them."""
    try:
        found = sources.open_sources({"x": str(file)}, epath.Path(cache), BUDGET)
        read = [source[i] for source in found for i in range(len(source))]
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
        return Outcome(0, 0, 0, str(error))
    known = set(texts)
    intact = sum(text in known for text in read)
    bad = sum(source.skipped for source in found)
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()] if kind == "jsonl" else texts
    lost = tuple((Counter(wanted) - Counter(read)).elements())
    return Outcome(intact, len(read) - intact, bad, records=len(lines), lost=lost)


def case(number: int, seed: int, kind: str, folder: Path) -> tuple[str, Outcome]:
    """(the damage, what came of it) of one case in a fresh folder."""
    rng = random.Random(f"{seed}/{number}")
    texts = documents()[: DOCUMENTS - (number // 16) % 2 * (kind == "parquet")]
    how = DAMAGES[number // len(FORMATS) % len(DAMAGES)]
    shutil.rmtree(folder, ignore_errors=True)
    file = write(folder / "shards", kind, texts)
    raw, touched = damage(file.read_bytes(), how, rng)
    wanted = untouched(file, kind, texts, how, touched)
    file.write_bytes(raw)
    return how, outcome(file, kind, texts, folder / "cache", wanted)


def check(kind: str, how: str, got: Outcome) -> str:
    """The outcome in a word; AssertionError where a record was lost without a word."""
    if got.refused:
        return "refused"
    assert got.intact + got.changed + got.bad == got.records, (kind, how, got)
    assert not got.lost, (kind, how, got)
    if kind in ("array_record", "manifest"):
        assert not got.changed, (kind, how, got)  # its checksums see every change
    return "changed" if got.changed else "skipped" if got.bad else "intact"


def run(first: int, last: int, seed: int) -> None:
    """Print a line for every case, before it and after it, so that the parent knows where a crash was."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            kind = FORMATS[number % len(FORMATS)]
            print("case", number, kind, flush=True)
            how, got = case(number, seed, kind, Path(folder) / "case")
            print("done", how, check(kind, how, got), flush=True)


def main(cases: int = 2000, seed: int = 0) -> int:
    """A table of outcomes; 1 where a case crashed the process or lost records. Processes are begun anew after one."""
    table: Counter[tuple[str, str, str]] = Counter()
    number, failed = 0, 0
    while number < cases:
        command = [sys.executable, "-m", "tools.fuzz_sources", "--run", str(number), str(cases), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            word, *rest = line.split()
            if word == "case":
                number, kind = int(rest[0]), rest[1]
            else:
                table[kind, rest[0], rest[1]] += 1
        number += 1
        if done.returncode:
            failed += 1
            print(f"case {number - 1} ({kind}): exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    words = ("intact", "changed", "skipped", "refused")
    print(f"{'format':14}{'damage':8}" + "".join(f"{word:>9}" for word in words))
    for kind in FORMATS:
        for how in DAMAGES:
            print(f"{kind:14}{how:8}" + "".join(f"{table[kind, how, word]:9}" for word in words))
    print(f"{sum(table.values())} of {cases} cases read, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*map(int, sys.argv[2:]))
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
