"""Lanes: nothing is lost between windows, tokens come in their shares, rows are full, and a state is small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.lanes import DataEnds, Domain, Lanes, LaneState
from data.mixture import Order
from data.packing import Document


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def domain(number: int, lengths: np.ndarray, share: float, documents: float = float("inf")) -> Domain:
    """Documents of these lengths, whose tokens say where they are: 1,000 times the document plus the token's place."""

    order = Order(f"d{number}", len(lengths), 0)

    def read(place: int) -> Document:
        document, visit = order[place]
        tokens = (document * 1000 + np.arange(lengths[document]) % 1000).astype(np.int32)
        return Document(tokens, number, document, visit == 0)

    def size(place: int) -> float:
        return float(lengths[order[place][0]])

    return Domain(f"d{number}", share, read, size, float(lengths.mean()), documents)


def log_normal(rng: np.random.Generator, mean: float, sigma: float, count: int, most: int = 10**7) -> np.ndarray:
    return np.clip(np.exp(rng.normal(mean, sigma, count)), 2, most).astype(int)


def test_every_token_of_every_document_comes_once_a_pass(pool):
    """Of two domains that may be read once, through windows with what waited, until the data ends."""
    rng = np.random.default_rng(0)
    lengths = [log_normal(rng, 4.0, 1.2, 150, 600), log_normal(rng, 2.5, 0.5, 90, 600)]
    domains = [domain(d, of, (0.7, 0.3)[d], float(len(of))) for d, of in enumerate(lengths)]
    seen = [np.zeros((len(of), of.max()), int) for of in lengths]
    for lane in range(3):  # one after another: no lane waits for another
        lanes = Lanes(domains, [lane], 3, 128, 32, 0, 0, pool, sum(int(of.sum()) for of in lengths))
        assert lanes.window_rows > 1
        with pytest.raises(DataEnds):
            while True:
                row = {name: field[0] for name, field in lanes.batch()._asdict().items() if field is not None}
                for segment in range(1, row["segment_ids"].max() + 1):
                    (at,) = np.nonzero(row["segment_ids"] == segment)
                    d, document, places = row["domain"][at[0]], row["document_id"][at[0]], row["tokens"][at] % 1000
                    assert (row["tokens"][at] // 1000 == document).all() and (np.diff(places) == 1).all()
                    assert places[0] % 128 == 0, "cut on the grid of rows"
                    seen[d][document, places] += 1
    for counts, of in zip(seen, lengths, strict=True):
        assert (counts == (np.arange(of.max()) < of[:, None])).all()


def test_tokens_are_within_one_longest_document_of_their_shares(pool):
    """After every window of every lane, for documents whose lengths differ by a thousand between domains."""
    rng = np.random.default_rng(1)
    means, shares = (3.0, 5.0, 7.0, 9.0, 4.0), np.array([0.4, 0.05, 0.3, 0.2, 0.05])
    domains = [domain(d, log_normal(rng, mean, 1.0, 3000, 20_000), shares[d]) for d, mean in enumerate(means)]
    longest = max(int(of.read(i).tokens.size) for of in domains for i in range(3000))
    lanes = Lanes(domains, range(4), 4, 2048, 512, 0, 0, pool, 10**9)
    worst, ends = 0.0, set()
    for _ in range(120):
        lanes.batch()
        tokens = np.array([state.tokens for state in lanes.states.values()])
        ends.add(tuple(state.window for state in lanes.states.values()))
        worst = max(worst, np.abs(tokens - tokens.sum(1, keepdims=True) * shares).max())
    assert 0.1 * longest < worst < 0.75 * longest, "due at their middle, documents are as often early as late"
    assert len(ends) > 8, "lanes' windows end in turns, so that their work is spread over the steps"
    alone = np.array([state.tokens for state in lanes.states.values()])[0]
    assert np.abs(alone / alone.sum() - shares).max() < 0.15


@pytest.mark.parametrize(("seq_len", "chunk"), [(8192, 8192), (262144, 8192)])
@pytest.mark.parametrize(("mean", "sigma"), [(7.64, 1.53), (6.3, 1.0)], ids=["code", "prose"])
def test_rows_are_full(pool, seq_len, chunk, mean, sigma):
    """98% at least, of documents as long as those of the embedded corpora, of code and of web pages."""
    lengths = log_normal(np.random.default_rng(2), mean, sigma, 20000)
    lanes = Lanes([domain(0, lengths, 1.0)], range(2), 2, seq_len, chunk, 0, 0, pool, 10**10)
    steps = 6 * lanes.window_rows
    full = [np.mean(lanes.batch().segment_ids > 0) for _ in range(steps)]
    assert np.mean(full[lanes.window_rows :]) > 0.98


def test_a_state_is_some_numbers(pool):
    lengths = log_normal(np.random.default_rng(3), 7.0, 1.3, 3000)
    lanes = Lanes([domain(d, lengths, 0.25) for d in range(4)], [5], 64, 8192, 8192, 0, 0, pool, 10**10)
    sizes = []
    for _ in range(60):
        lanes.batch()
        text = json.dumps(lanes.states[5].to_json(), separators=(",", ":"))
        assert LaneState.from_json(json.loads(text)) == lanes.states[5]
        sizes.append(len(text))
    assert max(sizes) < 1000 and np.mean(sizes) < 500


@given(st.data())
def test_a_state_is_written_and_read_again(data):
    """Whatever waits: documents in a row, with gaps, and later parts of them, of several domains."""
    read = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    places = [(d, place) for d, n in enumerate(read) for place in range(n)]
    keys = data.draw(st.sets(st.sampled_from(places))) if places else set()
    waiting = sorted((key, start * 64) for key in keys for start in data.draw(st.sets(st.integers(0, 3), min_size=1)))
    after = data.draw(st.sampled_from([(), tuple(n + 5 for n in read)]))
    counts = tuple(100 * n for n in read)
    state = LaneState(3, 2, tuple(read), counts, after, tuple(n // 2 for n in counts), tuple(waiting))
    assert LaneState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_state_stays_small_where_tiny_documents_lie_beside_long_ones(pool):
    """At 256K, where thousands of captions go into a window; and what it says was handed out, was."""
    rng = np.random.default_rng(4)
    means, shares = (2.7, 8.0, 6.0), np.array([0.05, 0.65, 0.3])
    domains = [domain(d, log_normal(rng, mean, 0.8, 40_000), shares[d]) for d, mean in enumerate(means)]
    lanes = Lanes(domains, [0], 2, 262_144, 8192, 0, 0, pool, 10**10)
    sizes, waiting, out = [], 0, np.zeros(3, int)
    for step in range(12):
        batch = lanes.batch()
        out += np.bincount(batch.domain[batch.segment_ids > 0], minlength=3)
        state = lanes.states[0]
        assert state.out == tuple(out), step
        assert np.abs(out - out.sum() * shares).max() < 60_000, "rows of a window are alike"
        sizes.append(len(text := json.dumps(state.to_json(), separators=(",", ":"))))
        assert LaneState.from_json(json.loads(text)) == state
        waiting = max(waiting, len(state.waiting))
    assert waiting > 5 and max(sizes) < 400


def test_a_document_of_many_rows_leaves_little_waiting(pool):
    """It makes its window longer: what waits is never more than a sixteenth of a window and a row."""
    lengths = np.array([100] * 50 + [300_000])
    lanes = Lanes([domain(0, lengths, 1.0)], [0], 1, 1024, 256, 0, 0, pool, 10**10)
    for _ in range(700):
        lanes.batch()
        waiting = sum(min(1024, lengths[key[1] % 51] - start) for key, start in lanes.states[0].waiting)
        assert waiting < 70_000 / 16 + 300_000 / 16 + 1024
    assert lanes.states[0].window < 9
