"""Documents and cache in an object store, which knows neither rename nor append nor a second write to an open file."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest
from etils import epath

from data import sources
from data.array_record import ArrayRecords
from data.config import DataConfig
from data.loader import Corpus
from tools import fuzz_sources as fuzz


def put(file, store) -> str:
    for beside in file.parent.iterdir():
        (store / "in" / beside.name).write_bytes(beside.read_bytes())
    return str(store / "in" / file.name)


def test_the_store_is_one(store):
    (store / "a").write_text("1")
    with pytest.raises(NotImplementedError, match="rename"):
        (store / "a").rename(store / "b")
    with pytest.raises(NotImplementedError, match="'ab'"):
        fsspec.filesystem("s3").open("s3://bucket/a", "ab")


@pytest.mark.parametrize("kind", fuzz.FORMATS)
@pytest.mark.parametrize("as_folder", [False, True])
def test_every_format_is_read_from_a_store(tmp_path, store, kind, as_folder):
    texts = fuzz.documents()
    place = put(fuzz.write(tmp_path / "in", kind, texts), store)
    opened = sources.open_sources({"x": place.rpartition("/")[0] if as_folder else place}, epath.Path(tmp_path / "c"))
    assert {source[i] for source in opened for i in range(len(source))} == set(texts)
    assert [source.name for source in opened] == ["a", "b"]


def test_text_and_what_is_missing(tmp_path, store):
    (store / "docs" / "a.txt").write_text("one")
    (store / "docs" / "deep" / "b.md").write_text("two")
    (found,) = sources.open_sources({"x": "text:s3://bucket/docs"}, epath.Path(tmp_path))
    assert [found[0], found[1]] == ["one", "two"]
    with pytest.raises(FileNotFoundError, match=r"data\.sources x: nothing at s3://bucket/gone"):
        sources.open_sources({"x": "s3://bucket/gone"}, epath.Path(tmp_path))


def test_a_remote_shard_is_copied_once_and_only_to_a_local_cache(tmp_path, store, monkeypatch):
    place = put(fuzz.write(tmp_path / "in", "manifest", fuzz.documents()), store)
    cache = epath.Path(tmp_path / "cache")
    opened = sources.open_sources({"x": place}, cache)
    assert not (cache / "shards").exists(), "the index beside the shard is enough until a document is read"
    assert opened[0][0] in fuzz.documents()
    (copy,) = (cache / "shards").iterdir()
    written = copy.stat().mtime
    assert sources.open_sources({"x": place}, cache)[1][3] in fuzz.documents()
    assert [f.stat().mtime for f in (cache / "shards").iterdir()] == [written]
    with pytest.raises(ValueError, match="has to be copied, and the cache s3://bucket/cache is no local folder"):
        ArrayRecords(place, store / "cache").read(0, 0, 1)


def test_a_corpus_with_its_cache_in_a_store(tmp_path, store):
    place = put(fuzz.write(tmp_path / "in", "jsonl", fuzz.documents()), store)
    cfg = DataConfig({"x": place}, vocab_size=300, heldout=0.1)
    first = Corpus.open(cfg, store / "cache", log=lambda line: None)
    again = Corpus.open(cfg, "s3://bucket/cache", log=lambda line: None)
    assert first.hash == again.hash and first.tokenizer.hash == again.tokenizer.hash
    rows = [next(corpus.train(2, 64, 64, 0)).tokens for corpus in (first, again)]
    assert np.array_equal(*rows)
