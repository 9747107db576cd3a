"""What a run's first batches hold is written once, and the stream passes through as it is."""

from __future__ import annotations

import json

import numpy as np
from etils import epath

from data.config import DataConfig
from data.loader import Corpus
from training import first_batches


def test_the_stream_is_left_as_it_is_and_counted(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    lines = [
        json.dumps({"text": f"line {n} " + "word and more " * (n % 40), "domain": "ab"[n % 2]}) for n in range(300)
    ]
    file.write_text("\n".join(lines))
    corpus = Corpus.open(
        DataConfig(sources=dict(text=str(file)), vocab_size=300), tmp_path / "cache", lambda line: None
    )
    monkeypatch.setattr(first_batches, "ENOUGH_TOKENS", 1000)
    plain = corpus.train(4, 128, 64, 0)
    seen = first_batches.FirstBatches(corpus.train(4, 128, 64, 0), corpus, epath.Path(tmp_path), 0)
    there, batches = [], []
    for _ in range(4):
        batch = next(seen)
        for ours, theirs in zip(batch, next(plain), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert seen.get_state() == plain.get_state()
        batches.append(batch)
        there.append((tmp_path / "data.json").exists())
    tokens = np.cumsum([(batch.segment_ids > 0).sum() for batch in batches])
    assert there == (tokens >= 1000).tolist() and True in there, "written when enough was seen"
    counted = there.index(True) + 1
    facts = json.loads((tmp_path / "data.json").read_text())
    assert (facts["step"], facts["batches"], facts["tokens"]) == (1, counted, tokens[counted - 1])
    assert facts["counted"] == sum(int(batch.loss_mask.sum()) for batch in batches[:counted])
    assert (
        sum(n for _, n in facts["lengths"])
        == facts["pieces"]
        == sum(int(batch.segment_ids.max(axis=1).sum()) for batch in batches[:counted])
    )
    assert sum(d["tokens"] for d in facts["mixture"].values()) == facts["tokens"]
    for sample in facts["samples"]:
        assert sum(len(text) for text, *_ in sample["spans"]) <= first_batches.SAMPLE_CHARACTERS
        assert sample["counted"] == sample["tokens"] - sample["ends"], "a document's last token has no label"
    seen.close()
    assert json.loads((tmp_path / "data.json").read_text()) == facts
    plain.close()
