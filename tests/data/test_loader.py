"""The loader: the same batches after a restart, for any number of processes, and held-out rows that stay put."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from data.batch import FIELDS, Batch
from data.config import DataConfig
from data.lanes import DataEnds
from data.loader import Corpus, _sample, documents_read, ledger, merged, tokens_of_stages
from data.sources import Source

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
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)  # a batch of text has no tiles
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(leaves, others, strict=True))


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


def test_a_tokenizer_is_trained_on_a_sample_however_large_the_corpus():
    """Of 20 and 10 TB: sums of bytes whose products pass 64 bits."""
    sizes = {"a": np.full(20_000, 10**9), "b": np.full(10_000, 10**9)}
    documents = [Source(name, np.arange(len(of), dtype=np.uint64), of, f"{name} {{}}".format)
                 for name, of in sizes.items()]  # fmt: skip
    parts = [np.arange(len(source)) for source in documents]
    assert list(_sample(documents, parts, 9 * 10**9)) == [f"{d} {n}" for d, most in (("a", 6), ("b", 3))
                                                          for n in range(most)]  # fmt: skip


def test_a_tokenizer_may_be_named(cfg, corpus, files, tmp_path):
    corpus.tokenizer.save(tmp_path / "tok")
    named = DataConfig(sources=cfg.sources, tokenizer=str(tmp_path / "tok"))
    assert Corpus.open(named, tmp_path, log=lambda line: None).tokenizer.hash == corpus.tokenizer.hash


def test_unknown_domains_are_refused(cfg, tmp_path):
    with pytest.raises(ValueError, match="'shrt'; the nearest is 'short'"):
        Corpus.open(DataConfig(sources=cfg.sources, vocab_size=330, weights={"shrt": 0.5}), tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_a_restored_iterator_goes_on_bit_identically(corpus, cut):
    """Sixteen steps go through several windows of every lane."""
    unbroken = take(corpus.train(3, **GRID, seed=5), 16)
    iterator = corpus.train(3, **GRID, seed=5)
    for batch in unbroken[:cut]:
        assert same(next(iterator), batch)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert {lane[0] for lane in state["lanes"].values()} == ({0} if cut < 5 else {0, 1} if cut < 11 else {1, 2})
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


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_does_not_depend_on_the_processes(corpus, processes):
    """Nor does going on: the places of all of them together are that of one, and any other number goes on there."""
    whole = corpus.train(4, **GRID, seed=0)
    parts = [corpus.train(4, **GRID, seed=0, process_index=p, process_count=processes) for p in range(processes)]

    def joined() -> Batch:
        of_parts = [next(part) for part in parts]
        return Batch(*(np.concatenate([getattr(part, name) for part in of_parts]) for name in FIELDS))

    for _ in range(6):
        assert same(joined(), next(whole))
    of_many, place = parts, json.loads(json.dumps(merged([part.get_state() for part in parts])))
    assert place == json.loads(json.dumps(whole.get_state()))
    halves = [corpus.train(4, **GRID, seed=0, process_index=p, process_count=2, place=place) for p in range(2)]
    parts, after = halves, next(whole)
    assert same(joined(), after)
    for iterator in (whole, *of_many, *halves):
        iterator.close()


def test_rows_cannot_be_divided_unevenly(corpus):
    with pytest.raises(ValueError, match="batch of 3 rows cannot be divided among 2 processes"):
        corpus.train(3, **GRID, seed=0, process_count=2)
    with pytest.raises(ValueError, match="process_index 2 is not one of 2"):
        corpus.train(4, **GRID, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="nearest is 64"):
        corpus.train(4, seq_len=60, chunk=16, seed=0)


def test_batches_hold_the_training_documents_and_the_token_shares(corpus):
    batches = take(corpus.train(4, **GRID, seed=3), 80)
    real = np.concatenate([b.segment_ids > 0 for b in batches])
    domain = np.concatenate([b.domain for b in batches])[real]
    assert (domain == 0).mean() == pytest.approx(corpus.shares["long"], abs=0.01)
    assert real.mean() > 0.9
    seen = documents_of(batches)
    assert seen <= {(d, i) for d in range(2) for i in corpus._train[d].tolist()}
    first = batches[0]
    document = first.document_id[0, 0]
    text = corpus.tokenizer.decode(first.tokens[0][first.segment_ids[0] == 1])
    assert text and text in corpus.sources[first.domain[0, 0]][int(document)]
    assert first.tokens.shape == (4, 64) and first.first_visit[first.segment_ids > 0].all()
    assert not batches[-1].first_visit.all(), "later passes are no first visits"


def test_the_ledger_lists_what_was_read(corpus):
    """Through two stages of other rows: every document once a pass, what batches held among them, none else."""
    seen, place = set(), None
    for batch, seq_len, steps in ((3, 64, 9), (2, 128, 7)):
        stream = corpus.train(batch, seq_len, 16, 0, 0, 1, place, True)
        seen |= documents_of([next(stream) for _ in range(steps)])
        place = json.loads(json.dumps(stream.get_state()))
        stream.close()
    listed = list(ledger(corpus, place))
    number = {name: n for n, name in enumerate(corpus.domains)}
    pairs = [(number[line["domain"]], line["document"]) for line in listed if line["pass"] == 0]
    assert len(pairs) == len(set(pairs)) and seen <= set(pairs)
    assert {(line["stage"], line["lane"]) for line in listed} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    counted = documents_read(place)[corpus.hash]
    assert len(listed) == sum(sum(map(sum, stages)) for stages in counted.values())


def test_what_a_run_may_read_of_a_domain_is_bounded(cfg, corpus, tmp_path):
    """`repeats` in passes, `caps` in tokens; the others share what is left, and at the end the stream says so."""
    bounded = corpus.of(replace(cfg, repeats={"long": 1.0, "short": 2.0}))
    stream, batches = bounded.train(4, **GRID, seed=0), []
    with pytest.raises(DataEnds, match=r"of long, short everything has been read that data\.repeats"):
        while True:
            batches.append(next(stream))
    place = stream.get_state()
    stream.close()
    visits: dict[tuple[int, int], int] = {}
    for batch in batches:
        for row in range(4):
            at = (batch.segment_ids[row] > 0) & (batch.positions[row] == 0) & (batch.tokens[row] == 1)  # bos
            for d, i in zip(batch.domain[row][at].tolist(), batch.document_id[row][at].tolist(), strict=True):
                visits[d, i] = visits.get((d, i), 0) + 1
    # A lane that is through waits for no other: the stream ends with the first one.
    most = {d: max(n for (domain, _), n in visits.items() if domain == d) for d in range(2)}
    assert most == {0: 1, 1: 2}
    (long,), (short,) = documents_read(place)[corpus.hash].values()
    assert sum(long) <= len(corpus._train[0]) and sum(short) <= 2 * len(corpus._train[1])

    capped = corpus.of(replace(cfg, caps={"long": 2000}))
    real = [b.domain[b.segment_ids > 0] for b in take(capped.train(4, **GRID, seed=0), 60)]
    longest = max(len(corpus.tokenizer.document(corpus.sources[0][int(i)])) for i in corpus._train[0])
    assert 2000 <= (np.concatenate(real) == 0).sum() <= 2000 + 4 * longest
    assert not (real[-1] == 0).any()
    with pytest.raises(ValueError, match=r"data\.caps names no domain with 'lon'; the nearest is 'long'"):
        corpus.of(replace(cfg, caps={"lon": 2000}))


@pytest.mark.parametrize("field", ["caps", "repeats"])
def test_bounds_count_over_all_stages_of_a_run(cfg, corpus, field):
    """A domain that a first stage used up is read no more in the second, of other rows and shares."""
    bound = {"caps": {"long": 3000}, "repeats": {"long": 1.0}}[field]
    first, second = (corpus.of(replace(cfg, weights=w, **{field: bound})) for w in ({"long": 0.9}, {"long": 0.8}))
    stream = first.train(4, **GRID, seed=0)
    tokens = 0
    for _ in range(200):
        batch = next(stream)
        tokens += (here := int((batch.domain[batch.segment_ids > 0] == 0).sum()))
        if tokens > 2000 and not here:
            break
    place = json.loads(json.dumps(stream.get_state()))
    stream.close()
    assert tokens_of_stages(place)["long"] == tokens
    (read,) = documents_read(place)[corpus.hash]["long"]
    left = {"caps": 3000 - tokens <= 0, "repeats": len(corpus._train[0]) - sum(read) < 4}[field]
    assert left, "the stage ends where no lane may read more"
    stream = second.train(2, 128, 16, 0, 0, 1, place, True)
    batches = [next(stream) for _ in range(8)]
    after = json.loads(json.dumps(stream.get_state()))
    stream.close()
    more = sum(int((b.domain[b.segment_ids > 0] == 0).sum()) for b in batches)
    assert tokens_of_stages(after) == {
        "long": tokens + more,
        "short": tokens_of_stages(place)["short"] + sum(int((b.domain[b.segment_ids > 0] == 1).sum()) for b in batches),
    }
    if field == "caps":
        assert not more
    else:
        taken = sum(sum(stage) for stage in documents_read(after)[corpus.hash]["long"])
        assert taken <= len(corpus._train[0]) and all(
            b.first_visit[(b.domain == 0) & (b.segment_ids > 0)].all() for b in batches
        )


def test_a_place_of_an_older_order_is_refused(corpus):
    stream = corpus.train(2, **GRID, seed=1)
    next(stream)
    place = stream.get_state()
    stream.close()
    del place["stream"]["order"]
    with pytest.raises(ValueError, match="another version of this program, which read documents in another order"):
        corpus.train(2, **GRID, seed=1, place=place, crossing=True)


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
