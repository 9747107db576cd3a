"""Conversion: every format to the same documents, bad records counted, restarts, and the same bytes each time."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from etils.epath import backend

from data import convert as conversion
from data import records, shards
from data.convert import convert, make_plan
from data.shards import Options, run_task
from data.sources import content_hash, open_sources

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def ignore(line: str) -> None:
    pass


def documents(count: int, size: int = 100, first: int = 0) -> list[dict[str, Any]]:
    words = "größte 漢字 alpha beta\ngamma "
    return [
        {"text": f"{n} {words * (1 + size * (1 + n % 3) // 40)}", "domain": "ab"[n % 2], "n": n}
        for n in range(first, first + count)
    ]


def lines(found: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(d, ensure_ascii=bool(i % 2)).encode() + b"\n" for i, d in enumerate(found))


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def halves(content: bytes) -> tuple[bytes, bytes]:
    """Two members or frames of one compressed file, with the seam within a line."""
    return content[:999], content[999:]


def tar(members: list[tuple[str, bytes]]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return output.getvalue()


def parquet(path: Path, found: list[dict[str, Any]], rows: int, schema: pa.Schema | None = None) -> None:
    pq.write_table(pa.Table.from_pylist(found, schema), path, row_group_size=rows)


def run(
    paths: list[Path], to: Path | str, *, workers: int = 1, budget: float = 0.0, again: bool = False, **options: Any
):
    return convert(paths, to, Options(**options), workers=workers, budget=budget, again=again, log=ignore)


def read(folder: Path | epath.Path) -> list[dict[str, Any]]:
    """All records through the manifest, held against the indices and the manifest's sums."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        assert shards.digest(epath.Path(path)) == shard["hash"]
        with tempfile.NamedTemporaryFile() as copy:  # the reader knows no stores
            Path(copy.name).write_bytes(path.read_bytes())
            reader = ArrayRecordReader(copy.name)
            inside = [json.loads(record) for record in reader.read_all()]
            reader.close()
        name = shard["file"].removesuffix(".array_record") + ".index.npz"
        index = np.load(io.BytesIO((folder / name).read_bytes()))
        raw = [record["text"].encode() for record in inside]
        assert index["hash"].dtype == np.uint64 and index["size"].dtype == np.int64
        assert index["hash"].tolist() == [content_hash(text) for text in raw]
        assert index["size"].tolist() == [len(text) for text in raw]
        assert [str(index["names"][d]) for d in index["domain"]] == [record.get("domain", "") for record in inside]
        assert (shard["documents"], shard["bytes"]) == (len(raw), sum(map(len, raw)))
        found += inside
    assert manifest["documents"] == len(found)
    assert manifest["bytes"] == sum(len(record["text"].encode()) for record in found)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "plan.json"
    }


def write_lines(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_bytes(lines(found))


def write_tar(path: Path, found: list[dict[str, Any]]) -> None:
    members = []
    for d in found:
        rest = json.dumps({k: v for k, v in d.items() if k != "text"})
        members += [(f"x/{d['n']:06d}.json", rest.encode()), (f"x/{d['n']:06d}.txt", d["text"].encode())]
        members += [(f"x/{d['n']:06d}.jpg", b"\xff\xd8")]
    path.write_bytes(gzip.compress(tar(members)) if path.name.endswith("gz") else tar(members))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "d.jsonl": write_lines,
    "d.jsonl.gz": lambda path, found: path.write_bytes(b"".join(map(gzip.compress, halves(lines(found))))),
    "d.json.gz": lambda path, found: path.write_bytes(gzip.compress(lines(found))),
    "d.jsonl.zst": lambda path, found: path.write_bytes(b"".join(map(zstd, halves(lines(found))))),
    "d.parquet": lambda path, found: parquet(path, found, 7),
    "d.tar": write_tar,
    "d.tar.gz": write_tar,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str):
    wanted = documents(40)
    (tmp_path / "in").mkdir()
    WRITERS[name](tmp_path / "in" / name, wanted)
    manifest, fresh = run([tmp_path / "in"], tmp_path / "out")
    found = read(tmp_path / "out")
    assert fresh and manifest["skipped"] == {}
    assert [{k: v for k, v in d.items() if k != "__key__"} for d in found] == wanted
    if "tar" in name:
        assert found[3]["__key__"] == "x/000003"
        assert manifest["left_out"]["fields"] == {"jpg": 40}


def test_a_tree_of_text_and_what_is_left_out(tmp_path: Path):
    tree = tmp_path / "tree"
    (tree / "b").mkdir(parents=True)
    (tree / "b" / "two.md").write_text("second")
    (tree / "a.TXT").write_bytes(b"\xef\xbb\xbffirst\r\n")
    (tree / "c.py").write_text("third")
    (tree / "c.png").write_bytes(b"png")
    manifest, _ = run([tree], tree / "out", domain="tree", plain=(".txt", ".md", ".py"))
    assert read(tree / "out") == [{"text": text, "domain": "tree"} for text in ("first\r\n", "second", "third")]
    assert manifest["left_out"]["files"] == {".png": 1}
    assert not run([tree], tree / "out", domain="tree", plain=(".txt", ".md", ".py"))[1]


def test_scalars_stay_under_their_names(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [
        {"body": "one", "text": "summary", "url": "u", "n": 1, "x": 0.5, "ok": True, "meta": {"a": 1}, "none": None},
        {"body": "two", "x": float("nan"), "tags": ["t"], "content": "kept", "domain": "own"},
    ])  # fmt: skip
    manifest, _ = run([tmp_path / "a.jsonl"], tmp_path / "out", text_field="body", domain="given")
    assert read(tmp_path / "out") == [
        {"text": "one", "domain": "given", "url": "u", "n": 1, "x": 0.5, "ok": True},
        {"text": "two", "domain": "given", "content": "kept"},
    ]
    assert manifest["left_out"]["fields"] == {"meta": 1, "tags": 1, "text": 1, "x": 1}


def test_parquet_columns(tmp_path: Path):
    schema = pa.schema([
        ("content", pa.binary()), ("at", pa.timestamp("ns")), ("price", pa.decimal128(5, 2)), ("image", pa.binary()),
        ("tags", pa.list_(pa.string())), ("kind", pa.dictionary(pa.int8(), pa.string())), ("none", pa.int64()),
    ])  # fmt: skip
    row = {"content": "größe".encode(), "at": datetime.datetime(2026, 1, 2, 3), "price": decimal.Decimal("1.50"),
           "image": b"\xff", "tags": ["a"], "kind": "k", "none": None}  # fmt: skip
    parquet(tmp_path / "a.parquet", [row, row | {"content": b"\xff"}], 10, schema)
    manifest, _ = run([tmp_path / "a.parquet"], tmp_path / "out", budget=0.5)
    (found,) = read(tmp_path / "out")
    assert found == {"text": "größe", "at": "2026-01-02 03:00:00.000000000", "price": "1.50", "kind": "k"}
    assert manifest["skipped"] == {"invalid UTF-8": 1}
    assert manifest["examples"][0]["record"] == 2
    assert manifest["left_out"]["fields"] == {"image": 1, "tags": 1}
    with pytest.raises(ValueError, match=r"a.parquet has no column 'body'; it has content, at, .*--text-field"):
        run([tmp_path / "a.parquet"], tmp_path / "out2", text_field="body")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut.parquet is not Parquet, or cut short"):
        run([tmp_path / "cut.parquet"], tmp_path / "out3")


def test_a_large_file_is_cut_at_lines(tmp_path: Path):
    """Whatever the bytes at which it is cut, every line comes once."""
    raw = lines(wanted := documents(30)) + b"\n" + lines(more := documents(3, first=30)).rstrip()
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    starts = [i for i, byte in enumerate(raw) if byte == 10]
    for cut in [1, 50, len(raw) - 1, *(s + d for s in starts[:5] for d in (-1, 0, 1, 2))]:
        parts = [
            records.InputPart(str(path), "lines", 0, 0, 0, cut),
            records.InputPart(str(path), "lines", 0, 0, cut, len(raw)),
        ]
        assert [load() for part in parts for _, load in records.records(part, "", lambda read: None)] == wanted + more


def test_shards_keep_their_size_and_their_bytes_whatever_the_workers(tmp_path: Path):
    wanted = documents(1200, 3000)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "in" / "a.jsonl", wanted[:700])
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(zstd(lines(wanted[700:1100])))
    parquet(tmp_path / "in" / "deep" / "c.parquet", wanted[1100:], 30)
    one, fresh = run([tmp_path / "in"], tmp_path / "one", shard_mb=1)
    assert fresh and read(tmp_path / "one") == wanted
    assert len(one["shards"]) >= 6 and all(shard["bytes"] <= MIB for shard in one["shards"])
    assert "documents-00004-00001.array_record" in {s["file"] for s in one["shards"]}  # of one compressed file
    assert one["inputs"] == [
        dict(file=str(path), size=path.stat().st_size) for path in sorted((tmp_path / "in").rglob("*.*"))
    ]
    two, _ = run([tmp_path / "in"], tmp_path / "two", shard_mb=1, workers=2)
    assert two == one
    assert content(tmp_path / "one") == content(tmp_path / "two")


BAD = [
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "cut', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["text"]', "not an object"),
    (b'{"txt": "a"}', 'no string "text" or "content"'),
    (b'{"text": 3}', 'no string "text" or "content"'),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text": "\\ud800"}', "not Unicode"),
    (b'{"text": "a", "domain": 7}', '"domain" is no string'),
    (b'{"text": "' + b"a" * 200_000 + b'"}', "longer than 0 MiB"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_records_are_counted_with_where_they_are(tmp_path: Path, monkeypatch, line: bytes, reason: str):
    monkeypatch.setattr(records, "LIMIT", 150_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(documents(2)) + b"\n" + line + b"\n" + lines(documents(7, first=2)))
    with pytest.raises(ValueError, match=r"1 of 10 records are bad, above the share 0.05 .* 1 .*a.jsonl, record 4"):
        run([path], tmp_path / "out", budget=0.05)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest, _ = run([path], tmp_path / "out", budget=0.1)
    assert manifest["skipped"] == {reason: 1}
    assert [d["n"] for d in read(tmp_path / "out")] == list(range(9))


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, "cut") for name in ("a.jsonl.gz", "a.jsonl.zst", "a.tar", "a.tar.gz")), ("a.tar", "corrupt")],
)
def test_a_stream_cut_short_is_one_bad_record(tmp_path: Path, name: str, damage: str):
    rng = np.random.default_rng(0)
    found = [{"text": rng.bytes(300).hex(), "n": n} for n in range(3000)]
    path = tmp_path / name
    (WRITERS["d" + name.removeprefix("a")] if "tar" in name else WRITERS["d.jsonl"])(path, found)
    if "tar" not in name:
        path.write_bytes((gzip.compress if name.endswith("gz") else zstd)(lines(found)))
    raw = path.read_bytes()
    half = len(raw) // 2 // 512 * 512
    path.write_bytes(raw[:half] if damage == "cut" else raw[:half] + b"\x55" * 5000 + raw[half + 5000 :])
    manifest, _ = run([path], tmp_path / "out", budget=0.01)
    assert manifest["skipped"] == {"cut short or corrupt: the rest of the file is lost": 1}
    kept = read(tmp_path / "out")
    assert 500 < len(kept) < 2000 and [d["n"] for d in kept] == list(range(len(kept)))
    assert manifest["examples"][0]["record"] == len(kept) + 1


def test_a_failing_store_is_no_bad_record(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(lines(documents(5))))

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("the network is gone")

    # A decompressor's errors are OSErrors too.
    part = records.InputPart(str(path), "lines", 0, 0)
    monkeypatch.setattr(backend._OsPathBackend, "open", lambda self, path, mode: Failing())
    with pytest.raises(OSError, match="the network is gone"):
        list(records.records(part, "", lambda read: None))


def test_the_wrong_field_ends_soon_unless_all_is_borne(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"body": "x"}] * 1500)
    write_lines(tmp_path / "b.jsonl", documents(1))
    with pytest.raises(ValueError, match=r"none of the first 1000 records from .*a.jsonl on .*\(fields: body\)"):
        run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", budget=0.5)
    manifest, _ = run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", budget=1.0)
    assert manifest["documents"] == 1 and manifest["skipped"].popitem()[1] == 1500
    with pytest.raises(ValueError, match="no documents in the inputs"):
        run([tmp_path / "a.jsonl"], tmp_path / "none", budget=1.0)


def test_wrong_inputs_are_said(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", documents(1))
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"nothing to convert at .*gone"):
        run([tmp_path / "gone"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.xml is none of .jsonl, .*--plain"):
        run([tmp_path / "a.xml"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.jsonl comes twice"):
        run([tmp_path, tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty and holds no conversion"):
        run([tmp_path / "a.jsonl"], tmp_path)
    with pytest.raises(ValueError, match="is no share"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", budget=2.0)
    with pytest.raises(ValueError, match="part of a file's name"):
        Options(name="a/b")


def test_twice_does_nothing_and_a_changed_input_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_lines(path, documents(20))
    first, fresh = run([path], tmp_path / "out")
    before = content(tmp_path / "out")
    assert fresh and run([path], tmp_path / "out") == (first, False)
    write_lines(path, documents(5))
    with pytest.raises(ValueError, match=r"a.jsonl changed; --again"):
        run([path], tmp_path / "out")
    with pytest.raises(ValueError, match=r"shard_mb 256, now 1, .*a.jsonl changed"):
        run([path], tmp_path / "out", shard_mb=1)
    assert content(tmp_path / "out") == before
    second, fresh = run([path], tmp_path / "out", again=True)
    assert fresh and second["documents"] == 5 and read(tmp_path / "out") == documents(5)


def test_a_damaged_shard_is_made_again_and_the_rest_kept(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(documents(900, 3000)), 1))
    first, _ = run([path], tmp_path / "out", shard_mb=1)
    whole, names = content(tmp_path / "out"), [shard["file"] for shard in first["shards"]]
    assert len(names) > 3
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names}
    damaged = tmp_path / "out" / names[2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run([path], tmp_path / "out", shard_mb=1) == (first, True)
    assert content(tmp_path / "out") == whole
    kept = [name for name in names if (tmp_path / "out" / name).stat().st_mtime_ns == written[name]]
    assert kept == names[:2]
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])  # of the same size: found where the manifest is gone
    (tmp_path / "out" / "manifest.json").write_text('{"version": 1, "doc')
    assert run([path], tmp_path / "out", shard_mb=1) == (first, True)
    assert content(tmp_path / "out") == whole


def sealed_in(folder: Path) -> list[Path]:
    found = sorted((folder / shards.STATE).glob("documents-*.json"))
    return [path for path in found if shards.read_json(epath.Path(path))]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_goes_on(tmp_path: Path, workers: int):
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(documents(4000, 3000)), 1))
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    wanted, _ = run(paths, tmp_path / "whole", shard_mb=1)
    out = tmp_path / "out"
    program = (
        "import sys; from data.convert import convert; from data.shards import Options\n"
        "if __name__ == '__main__':\n"
        "    convert(sys.argv[3:], sys.argv[1], Options(shard_mb=1), workers=int(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(out), str(workers), *map(str, paths)], cwd=ROOT)
    until = time.monotonic() + 120
    while len(seals := sorted((out / shards.STATE).glob("documents-*.json"))) < 4 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers leave with their parent
    sealed = sealed_in(out)
    assert len(seals) >= 4 and not (out / "manifest.json").exists()
    assert len(sealed) < len(wanted["shards"]), "it had ended before the kill"
    time.sleep(0.5)
    assert sealed == sealed_in(out)
    shard = out / f"{sealed[0].stem}.array_record"
    before = shard.stat().st_mtime_ns
    assert run(paths, out, shard_mb=1) == (wanted, True)
    assert content(out) == content(tmp_path / "whole")
    assert shard.stat().st_mtime_ns == before


def test_a_store_without_rename_and_append(tmp_path: Path, store: epath.Path):
    wanted = documents(600, 3000)
    folder = store / "in"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(lines(wanted[:400]))
    (folder / "b.jsonl.zst").write_bytes(zstd(lines(wanted[400:])))
    first, fresh = run([folder], "s3://bucket/out", shard_mb=1)
    assert fresh and read(store / "out") == wanted
    assert run([folder], "s3://bucket/out", shard_mb=1) == (first, False)
    (store / "out" / first["shards"][1]["file"]).write_bytes(b"torn")
    assert run([folder], "s3://bucket/out", shard_mb=1) == (first, True)
    assert read(store / "out") == wanted
    (folder / "b.jsonl.zst").unlink()
    with pytest.raises(ValueError, match=r"b.jsonl.zst is gone"):
        run([folder], "s3://bucket/out", shard_mb=1)
    assert run([folder], "s3://bucket/out", shard_mb=1, again=True)[0]["documents"] == 400
    assert read(store / "out") == wanted[:400]


def test_tasks_may_run_anywhere_and_twice(tmp_path: Path):
    """As a pipeline runs them: pickled, in any order, more than once."""
    write_lines(tmp_path / "a.jsonl", documents(900, 3000))
    wanted, _ = run([tmp_path / "a.jsonl"], tmp_path / "one", shard_mb=1)
    tasks = make_plan([tmp_path / "a.jsonl"], tmp_path / "two", Options(shard_mb=1)).tasks
    assert len(tasks) > 2
    for task in [*reversed(tasks), tasks[0]]:
        run_task(pickle.loads(pickle.dumps(task)))
    seals = [seal for task in tasks for seal in shards.read_seals(task)]
    plan = make_plan([tmp_path / "a.jsonl"], tmp_path / "two", Options(shard_mb=1))
    assert conversion.manifest(plan, seals, 0.0) == wanted


def test_what_was_converted_is_a_source(tmp_path, monkeypatch):
    """The shards are read through the indexes beside them, with no pass over the records; domains are kept."""
    texts = [f"document {n}: " + "some words " * (n % 7) for n in range(90)]
    lines = [json.dumps(dict(text=text, domain=("a", "b")[n % 3 == 0])) for n, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    convert([tmp_path / "in.jsonl"], tmp_path / "out", Options(), log=lambda _: None)
    monkeypatch.setattr("data.array_record.ArrayRecords.scan", lambda *_: pytest.fail("a pass over the records"))
    found = open_sources({"text": str(tmp_path / "out")}, epath.Path(tmp_path / "cache"))
    assert [source.name for source in found] == ["a", "b"]
    read = {source.name: [source[n] for n in range(len(source))] for source in found}
    assert read == {"a": [t for n, t in enumerate(texts) if n % 3], "b": texts[::3]}
    assert [list(source.sizes) for source in found] == [[len(t) for t in read[name]] for name in ("a", "b")]
