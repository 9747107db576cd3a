"""The loader: the same batches after a restart, for any number of processes, and held-out rows that stay put."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.batch import FIELDS, Batch
from data.config import DataConfig
from data.loader import Corpus

GRID = dict(seq_len=64, chunk=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "x = 1", "\n"]
    folder = tmp_path_factory.mktemp("documents")
    with (folder / "d.jsonl").open("w") as file:
        for n in range(300):
            domain, longest = ("long", 120) if n % 3 == 0 else ("short", 20)
            text = f"{n} " + " ".join(rng.choice(words, rng.integers(1, longest)))
            file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return folder


@pytest.fixture(scope="module")
def cfg(files) -> DataConfig:
    return DataConfig(sources={"text": str(files)}, vocab_size=330, heldout=0.1)


@pytest.fixture(scope="module")
def corpus(cfg, tmp_path_factory) -> Corpus:
    return Corpus.open(cfg, tmp_path_factory.mktemp("cache"), log=lambda line: None)


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def take(iterator, count: int) -> list[Batch]:
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def documents_of(batches: list[Batch]) -> set[tuple[int, int]]:
    pairs = (np.stack([b.domain, b.document_id], -1)[b.segment_ids > 0] for b in batches)
    return {(int(d), int(i)) for b in pairs for d, i in b}


def test_opening_again_reuses_the_tokenizer(cfg, tmp_path, monkeypatch):
    lines: list[str] = []
    first = Corpus.open(cfg, tmp_path, log=lines.append)
    monkeypatch.setattr("data.tokenizer.train_bpe", None)
    second = Corpus.open(cfg, str(tmp_path), log=lines.append)
    assert (first.tokenizer.hash, first.hash, first.shares) == (second.tokenizer.hash, second.hash, second.shares)
    assert first.domains == ("long", "short") and sum(first.shares.values()) == pytest.approx(1)
    assert len(lines) == 2 and "long" in lines[0] and "held out" in lines[0]


def test_a_tokenizer_may_be_named(cfg, corpus, files, tmp_path):
    corpus.tokenizer.save(tmp_path / "tok")
    named = DataConfig(sources=cfg.sources, tokenizer=str(tmp_path / "tok"))
    assert Corpus.open(named, tmp_path, log=lambda line: None).tokenizer.hash == corpus.tokenizer.hash


def test_unknown_domains_are_refused(cfg, tmp_path):
    with pytest.raises(ValueError, match="'shrt'; the nearest is 'short'"):
        Corpus.open(DataConfig(sources=cfg.sources, vocab_size=330, weights={"shrt": 0.5}), tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 11])
def test_a_restored_iterator_goes_on_bit_identically(corpus, cut):
    """Batches of 3 rows cut the stream in the middle of what the packer had closed and held open."""
    unbroken = take(corpus.train(3, **GRID, seed=5), 16)
    iterator = corpus.train(3, **GRID, seed=5)
    for batch in unbroken[:cut]:
        assert same(next(iterator), batch)
    state = json.loads(json.dumps(iterator.get_state()))
    assert (cut == 0) == (not state["open"]), "taken with rows half full"
    iterator.close()
    resumed = corpus.train(3, **GRID, seed=5)
    next(resumed)  # whatever was read before is forgotten
    resumed.set_state(state)
    assert json.loads(json.dumps(resumed.get_state())) == state
    assert all(same(a, b) for a, b in zip(take(resumed, 16 - cut), unbroken[cut:], strict=True))


def test_a_state_of_another_stream_is_refused(corpus):
    iterator, other = corpus.train(2, **GRID, seed=1), corpus.train(2, seq_len=32, chunk=16, seed=2)
    with pytest.raises(ValueError, match="another data stream: seed, seq_len changed"):
        other.set_state(iterator.get_state())
    iterator.close()
    other.close()


def test_the_global_batch_does_not_depend_on_the_processes(corpus):
    whole = take(corpus.train(4, **GRID, seed=0), 6)
    parts = [take(corpus.train(4, **GRID, seed=0, process_index=p, process_count=2), 6) for p in range(2)]
    for n, batch in enumerate(whole):
        joined = Batch(*(np.concatenate([getattr(part[n], name) for part in parts]) for name in FIELDS))
        assert same(joined, batch)


def test_a_state_may_be_resumed_by_another_number_of_processes(corpus):
    iterator = corpus.train(4, **GRID, seed=0, process_index=1, process_count=2)
    next(iterator)
    next(iterator)
    state, third = iterator.get_state(), next(iterator)
    iterator.close()
    alone = corpus.train(4, **GRID, seed=0)
    alone.set_state(state)
    (batch,) = take(alone, 1)
    assert same(Batch(*(field[2:] for field in batch)), third)


def test_rows_cannot_be_divided_unevenly(corpus):
    with pytest.raises(ValueError, match="batch of 3 rows cannot be divided among 2 processes"):
        corpus.train(3, **GRID, seed=0, process_count=2)
    with pytest.raises(ValueError, match="process_index 2 is not one of 2"):
        corpus.train(4, **GRID, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="nearest is 64"):
        corpus.train(4, seq_len=60, chunk=16, seed=0)


def test_a_long_document_does_not_fill_batches(corpus, monkeypatch):
    """Rows that follow one another in the stream are spread over batches by the pool they are drawn from."""

    def of_one_document() -> int:
        batches = take(corpus.train(2, seq_len=16, chunk=16, seed=3), 200)
        return sum(len(documents_of([batch])) == 1 for batch in batches)

    spread = of_one_document()
    monkeypatch.setattr("data.loader.POOL_TOKENS", 0)
    assert spread < 10 < 50 < of_one_document()


def test_batches_hold_the_training_documents_and_the_token_shares(corpus, monkeypatch):
    monkeypatch.setattr("data.loader.POOL_TOKENS", 0)  # the first batch is the stream's first rows
    batches = take(corpus.train(4, **GRID, seed=3), 80)
    real = np.concatenate([b.segment_ids > 0 for b in batches])
    domain = np.concatenate([b.domain for b in batches])[real]
    assert (domain == 0).mean() == pytest.approx(corpus.shares["long"], abs=0.04)
    assert real.mean() > 0.9
    seen = documents_of(batches)
    assert seen <= {(d, i) for d in range(2) for i in corpus._train[d].tolist()}
    first = batches[0]
    document = first.document_id[0, 0]
    text = corpus.tokenizer.decode(first.tokens[0][first.segment_ids[0] == 1])
    assert corpus.sources[first.domain[0, 0]][int(document)].startswith(text) and text
    assert first.tokens.shape == (4, 64) and first.first_visit[first.segment_ids > 0].all()
    assert not batches[-1].first_visit.all(), "later passes are no first visits"


def test_heldout_rows_are_fixed_show_every_domain_and_never_train(corpus):
    batches = corpus.heldout(3, **GRID, max_batches=4)
    again = corpus.heldout(3, **GRID, max_batches=4)
    assert len(batches) == 4 and all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert {int(d) for d in np.unique(batches[0].domain[batches[0].segment_ids > 0])} == {0, 1}
    seen = documents_of(batches)
    assert len(seen) > 4 and not seen & {(d, i) for d in range(2) for i in corpus._train[d].tolist()}


def test_the_last_heldout_batch_is_completed_with_padding(corpus):
    batches = corpus.heldout(7, **GRID, max_batches=1000)
    rows = np.concatenate([b.segment_ids.max(axis=1) > 0 for b in batches])
    assert rows.sum() % 7 and len(rows) % 7 == 0 and rows[: rows.sum()].all()
    assert batches[-1].loss_mask[rows[-7:].sum() :].sum() == 0
    tokens = sum(int((b.segment_ids > 0).sum()) for b in batches)
    whole = [corpus.tokenizer.document(corpus.sources[d][int(i)]) for d in range(2) for i in corpus._heldout[d]]
    assert tokens == sum(map(len, whole)), "given room, every held-out token is there"
    with pytest.raises(ValueError, match=r"1 batch\(es\) of 1 cannot show all 2 domains; ask for at least 2"):
        corpus.heldout(1, **GRID, max_batches=1)


def test_a_program_ends_quietly_with_the_iterator_open(cfg, tmp_path):
    program = (
        "import sys; from data.loader import Corpus; from data.config import DataConfig\n"
        "corpus = Corpus.open(DataConfig(sources={'text': sys.argv[1]}, vocab_size=330, heldout=0.1), sys.argv[2])\n"
        "iterator = corpus.train(2, 64, 16, 0); next(iterator)\n"
    )
    run = [sys.executable, "-c", program, cfg.sources["text"], str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
