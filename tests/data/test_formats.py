"""Every kind of source: the same documents by index, bad records counted, and what refuses says why in one line."""

from __future__ import annotations

import json
import sys
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
from etils import epath
from pyarrow import parquet

from data import array_record, formats, index, sources
from data.config import DataConfig
from data.loader import Corpus
from tools import fuzz_sources as fuzz

TEXTS = [f"text {i} größe 漢字\nline" for i in range(40)]
RECORDS = [{"text": text, "domain": "odd", "more": [i]} if i % 2 else {"text": text} for i, text in enumerate(TEXTS)]
EXPECTED = {"mine": TEXTS[::2], "odd": TEXTS[1::2]}


def lines(file, records) -> None:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def read(place, cache, name="mine", **how) -> dict[str, list[str]]:
    opened = sources.open_sources({name: str(place)}, epath.Path(cache), **how)
    for source in opened:
        raw = [text.encode() for text in (source[i] for i in range(len(source)))]
        assert source.hashes.tolist() == [sources.content_hash(r) for r in raw]
        assert source.sizes.tolist() == [len(r) for r in raw]
    return {source.name: [source[i] for i in range(len(source))] for source in opened}


def write(folder, kind, name="d"):
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        lines(folder / f"{name}.jsonl", RECORDS)
    elif kind == "parquet":
        table = {"content": [r["text"] for r in RECORDS], "domain": [r.get("domain") for r in RECORDS], "n": TEXTS}
        dictionary = pyarrow.array(table["domain"]).dictionary_encode()
        parquet.write_table(pyarrow.table(table | {"domain": dictionary}), folder / f"{name}.parquet", row_group_size=7)
    else:
        fuzz.write_array_record(folder, RECORDS, manifest=kind == "manifest")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record", "manifest"])
def test_a_format_is_read_by_index_under_its_records_domains(tmp_path, kind):
    write(tmp_path / "in", kind)
    (tmp_path / "in" / "README.md").write_text("beside records text is no document")
    assert read(tmp_path / "in", tmp_path / "cache") == EXPECTED
    (file,) = [f for f in (tmp_path / "in").iterdir() if f.suffix in formats.SUFFIXES]
    assert read(file, tmp_path / "cache") == EXPECTED
    (mine, _) = sources.open_sources({"mine": str(file)}, epath.Path(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(len(mine), size=400).tolist()
        assert list(pool.map(mine.__getitem__, order)) == [EXPECTED["mine"][i] for i in order]


def test_an_index_beside_a_shard_saves_the_pass(tmp_path, monkeypatch):
    write(tmp_path / "in", "manifest")
    scanned = []
    scan = array_record.ArrayRecords.scan
    monkeypatch.setattr(array_record.ArrayRecords, "scan", lambda self, s: scanned.append(s) or scan(self, s))
    assert read(tmp_path / "in", tmp_path / "cache") == EXPECTED and not scanned
    beside = tmp_path / "in" / "d-00000-of-00001.index.npz"
    beside.write_bytes(beside.read_bytes()[:300])
    said = []
    assert read(tmp_path / "in", tmp_path / "other", log=said.append) == EXPECTED and scanned == [0]
    assert len(said) == 1 and "index.npz is of no use" in said[0]
    (tmp_path / "in" / "d-00000-of-00001.array_record").unlink()
    lines(tmp_path / "in" / "x.jsonl", RECORDS)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json lists 1 shard\(s\) that are not there, the first d-"):
        read(f"array_record:{tmp_path}/in/x.jsonl", tmp_path / "third")


def test_a_tree_of_text_is_a_document_a_file(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("\ufeffB")
    (tmp_path / "in" / "deep" / "a.py").write_text("a = 1\n")
    (tmp_path / "in" / "deep" / "C.MD").write_text("# C")
    for ignored in (".hidden.txt", "_SUCCESS", "picture.png"):
        (tmp_path / "in" / ignored).write_text("no")
    assert read(tmp_path / "in", tmp_path / "cache") == {"mine": ["B", "# C", "a = 1\n"]}
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"1 of 3 records are bad.*b\.txt: invalid UTF-8"):
        read(tmp_path / "in", tmp_path / "cache")


def test_places_of_one_domain_are_joined_whatever_their_order(tmp_path):
    lines(tmp_path / "a.jsonl", [{"text": "a1", "domain": "web"}, {"text": "a2"}])
    lines(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2", "domain": "a"}])
    places = {"web": str(tmp_path / "b.jsonl"), "a": str(tmp_path / "a.jsonl")}
    for given in (places, dict(reversed(places.items()))):
        found = sources.open_sources(given, epath.Path(tmp_path / "cache"))
        assert {s.name: [s[i] for i in range(len(s))] for s in found} == {"a": ["a2", "b2"], "web": ["a1", "b1"]}
    with_code = sources.open_sources({"py": "embedded:code"} | places, epath.Path(tmp_path / "cache"))
    assert [source.name for source in with_code] == ["a", "py", "web"] and len(with_code[1]) > 300


BAD = {
    "invalid UTF-8": b'{"text": "\xff"}',
    "nested too deeply": b"[" * 100_000,
    "not JSON": b'{"text": "cut',
    'no string "text" or "content"': b'{"text": ["a"]}',
    "empty": b'{"text": " \\n"}',
    "a line of 3,0": b'{"text": "' + b"x" * 2990 + b'"}' + b" " * 30,
}


@pytest.mark.parametrize("what", BAD)
def test_bad_lines_are_counted_within_the_budget(tmp_path, monkeypatch, what):
    monkeypatch.setattr(formats, "MAX_DOCUMENT", 3000 if what.startswith("a line") else formats.MAX_DOCUMENT)
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*good[:2], BAD[what], *good[2:], b""]))
    (found,) = sources.open_sources({"x": str(tmp_path / "d.jsonl")}, epath.Path(tmp_path / "cache"), 1 / 41)
    assert [found[i] for i in range(len(found))] == TEXTS and found.skipped == 1
    for budget, of in ((0.024, 41), (0.0, 3)):  # from the cached index, and at the first
        cache = epath.Path(tmp_path / ("cache" if budget else "none"))
        with pytest.raises(ValueError, match=rf"1 of {of} records are bad.*d\.jsonl, line 3: .*{what}"):
            sources.open_sources({"x": str(tmp_path / "d.jsonl")}, cache, budget)


def test_a_shard_that_does_not_open_counts_by_its_bytes(tmp_path):
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", RECORDS)
        write(tmp_path / "p", "parquet", name)
    whole = (tmp_path / "p" / "b.parquet").read_bytes()
    (tmp_path / "p" / "b.parquet").write_bytes(b"\0" * len(whole))
    with pytest.raises(ValueError, match=r"40 of 120 records are bad.*b\.parquet: not Parquet, or damaged"):
        read(tmp_path / "p", tmp_path / "cache")
    assert sum(map(len, read(tmp_path / "p", tmp_path / "cache", bad_records=0.4).values())) == 80


def test_a_changed_file_is_not_read_by_its_old_index(tmp_path):
    lines(tmp_path / "d.jsonl", [{"text": "one"}, {"text": "two"}])
    (found,) = sources.open_sources({"x": str(tmp_path / "d.jsonl")}, epath.Path(tmp_path / "cache"))
    lines(tmp_path / "d.jsonl", [{"text": "one"}, {"text": "2.0"}])
    assert found[0] == "one"
    with pytest.raises(ValueError, match=r"d\.jsonl, document 2: is not what its index says"):
        found[1]


def test_a_document_is_read_without_a_look_at_all_of_the_index(tmp_path):
    """One of a million rows: what a read takes does not grow with them."""
    lines(tmp_path / "d.jsonl", [{"text": "one"}])
    rows, length = 10**6, (tmp_path / "d.jsonl").stat().st_size
    hashes, none = np.full(rows, index.content_hash(b"one")), np.zeros(rows, np.int32)
    found = index.Index(hashes, np.full(rows, 3), none, np.zeros(rows, np.int64), np.full(rows, length), none,
                        np.array([""]), np.array(0), np.array([]))  # fmt: skip
    reader, places = formats.JsonLines(str(tmp_path / "d.jsonl"), epath.Path(tmp_path)), np.arange(rows)
    tracemalloc.start()
    try:
        assert sources._read(reader, found, places, rows - 1) == "one"
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_long_pass_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "REPORT_EVERY", -1.0)
    lines(tmp_path / "d.jsonl", RECORDS)
    said: list[str] = []
    read(tmp_path / "d.jsonl", tmp_path / "cache", log=said.append)
    assert len(said) == 40 and said[-1].startswith("data: indexing data.sources mine: ") and "40 documents" in said[-1]


def test_the_corpus_says_what_was_skipped(tmp_path):
    lines(tmp_path / "d.jsonl", [*({"text": f"{t} {i}" * 20} for i in range(8) for t in TEXTS), "{"])
    said: list[str] = []
    cfg = DataConfig({"x": str(tmp_path / "d.jsonl")}, vocab_size=305, heldout=0.1, bad_records=0.01)
    corpus = Corpus.open(cfg, tmp_path / "cache", said.append)
    assert "held out, 1 bad records skipped, " in said[-1]
    other = DataConfig({"x": str(tmp_path / "d.jsonl")}, vocab_size=305, heldout=0.1)
    with pytest.raises(ValueError, match="1 of 321 records are bad"):
        corpus.of(other)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("jsnl:x", "no kind 'jsnl'; the nearest is 'jsonl' (of embedded, jsonl, parquet,"),
        ("embedded:cod", "no embedded corpus 'cod'; the nearest is embedded:code"),
        ("ftp://x/y.jsonl", "data.sources x: ftp://x/y.jsonl is in no store that can be read"),
        ("jsonl:", "'jsonl:' names no place"),
        ("jsonl:gone", "data.sources x: nothing at gone"),
        ("gone/d.parquet", "data.sources x: nothing at gone/d.parquet"),
        ("parquet:{}/a", "no .parquet file in the folder"),
        ("{}", "holds jsonl and parquet side by side; supported are *.jsonl, *.parquet, *.array_record,"),
        ("{}/none", "is none of the kinds; supported are *.jsonl"),
        ("tfds:no_such_set", "data.sources x: tfds cannot open no_such_set"),
        ("tfds:/gone/a", "data.sources x: tfds cannot open /gone/a: nothing at /gone/a"),
        ("array_record:{}/a/d.jsonl", "cannot be opened (ArrayRecord file should be at least 64KB big)"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(tmp_path, place, message):
    write(tmp_path / "a", "jsonl")
    write(tmp_path / "b", "parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(place.format(tmp_path), tmp_path / "none", "x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_configuration_refuses_places_without_names():
    for wrong in ({"": "a"}, {"a": ""}):
        with pytest.raises(ValueError, match=r"data\.sources needs a domain and a place"):
            DataConfig(wrong)
    with pytest.raises(ValueError, match=r"data\.bad_records is a share"):
        DataConfig(bad_records=1.0)


def test_tensorflow_datasets_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Demo(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "domain": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["one", "two"])}

        def _generate_examples(self, texts):
            yield from ((i, {"text": text, "domain": "d"}) for i, text in enumerate(texts))

    builder = Demo(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    for place in (f"tfds:{builder.data_path}", str(builder.data_path)):
        (texts,) = read(place, tmp_path / "cache").values()
        assert sorted(texts) == sorted(TEXTS)
    assert sorted(read(f"tfds:demo@{tmp_path}/tfds:test", tmp_path / "cache")["d"]) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no split 'dev'; it has "):
        read(f"tfds:{builder.data_path}:dev", tmp_path / "cache")
    assert "tensorflow" not in sys.modules


def test_hugging_face_datasets(tmp_path, monkeypatch):
    """Against a stand-in: the package is an extra."""

    class Table(list):
        column_names, _fingerprint = ("text", "domain", "n"), "f"

        def select_columns(self, names):
            return Table({name: row.get(name) for name in names} for row in self)

    def load_dataset(name, split):
        if name != "some/name":
            raise RuntimeError("not\nthere")
        return Table(RECORDS if split == "train[:50%]" else RECORDS[:2])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:some/name:train[:50%]", tmp_path / "cache") == EXPECTED
    assert read("hf:some/name", tmp_path / "cache") == {"mine": TEXTS[:1], "odd": TEXTS[1:2]}
    with pytest.raises(ValueError, match=r"data\.sources mine: hf cannot open other: not there"):
        read("hf:other", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets, the extra hf"):
        read("hf:some/name", tmp_path / "cache")
