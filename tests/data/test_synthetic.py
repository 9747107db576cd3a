"""Synthetic tokens: asked for, never a fallback; a corpus like others, the same for the same seed and step."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data import tokenizer
from data.config import DataConfig
from data.loader import Corpus, ledger

CFG = DataConfig(synthetic=True, vocab_size=500)


def open_corpus(cache, cfg: DataConfig = CFG) -> Corpus:
    return Corpus.open(cfg, cache, lambda line: None)


def test_batches_follow_from_seed_and_step(tmp_path):
    corpus = open_corpus(tmp_path)
    assert corpus.domains == ("synthetic",) and corpus.tokenizer.vocab_size == 500
    stream = corpus.train(4, 256, 64, 7)
    batches = [next(stream) for _ in range(4)]
    place = json.loads(json.dumps(stream.get_state()))
    following = next(stream)
    stream.close()
    again = open_corpus(tmp_path / "other")
    stream = again.train(4, 256, 64, 7, place=place)
    assert all(np.array_equal(a, b) for a, b in zip(next(stream), following, strict=True))
    stream.close()
    stream = again.train(4, 256, 64, 8)
    assert not np.array_equal(next(stream).tokens, batches[0].tokens)
    stream.close()
    tokens = np.concatenate([b.tokens[b.segment_ids > 0] for b in batches])
    assert tokens.min() >= 0 and tokens.max() < 500 and len(np.unique(tokens)) > 490
    assert np.mean([b.segment_ids > 0 for b in batches]) > 0.9
    seen = {int(i) for b in batches for i in np.unique(b.document_id[b.segment_ids > 0])}
    assert seen <= {line["document"] for line in ledger(again, place)}
    for batch in corpus.heldout(2, 256, 64, 2):
        assert not seen & {int(i) for i in np.unique(batch.document_id[batch.segment_ids > 0])}


def test_a_named_tokenizer_gives_the_vocabulary(tmp_path):
    named = tokenizer.from_bytes(tokenizer.train_bpe(["some text of no weight " * 20, "and more\n"], 300))
    named.save(tmp_path / "tok")
    corpus = open_corpus(tmp_path, DataConfig(synthetic=True, tokenizer=str(tmp_path / "tok")))
    assert corpus.tokenizer.hash == named.hash
    stream = corpus.train(2, 256, 64, 0)
    batch = next(stream)
    stream.close()
    assert batch.tokens.max() < 300 and corpus.tokenizer.bos_id in batch.tokens


def test_the_tokenizer_is_kept_and_spells_ids(tmp_path):
    made = open_corpus(tmp_path).tokenizer
    made.save(tmp_path / "run")
    kept = tokenizer.load(tmp_path / "run")
    assert (kept.hash, kept.vocab_size, kept.pad_id) == (made.hash, 500, made.pad_id)
    assert kept.encode("17 499 4") == [17, 499, 4] and kept.decode([1, 17, 499, 2]) == "17 499"
    for text, what in (("a word", "'a'"), ("4 500", "'500'")):
        with pytest.raises(ValueError, match=f"synthetic tokens are their ids, 0 to 499, not {what}"):
            kept.ids(text)


def test_it_goes_with_no_sources(tmp_path):
    with pytest.raises(ValueError, match=r"data\.synthetic takes the place of documents, and data\.sources names some"):
        DataConfig(synthetic=True, sources={"web": "somewhere"})
    with pytest.raises(ValueError, match="no domain with 'code'; the nearest is 'synthetic'"):
        open_corpus(tmp_path, DataConfig(synthetic=True, vocab_size=500, weights={"code": 1.0}))
