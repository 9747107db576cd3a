"""The mixture: shares of the tokens, not of the documents."""

from __future__ import annotations

import numpy as np
import pytest

from data import mixture
from data.packing import Document
from data.sources import from_texts
from data.tokenizer import from_bytes, train_bpe


@pytest.fixture(scope="module")
def corpus():
    """Two domains whose documents differ in length by a factor of about ten, and in text."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "x = 1"]

    def text(n):
        return " ".join(rng.choice(words, n))

    long = from_texts("long", [text(rng.integers(100, 300)) for _ in range(40)])
    short = from_texts("short", [text(rng.integers(5, 40)) for _ in range(300)])
    return [long, short], from_bytes(train_bpe([long[i] for i in range(40)], 320))


def read(stream, index: int) -> Document:
    return stream[index]


def all_of(source) -> np.ndarray:
    return np.arange(len(source))


def test_mean_tokens_are_close_to_the_count(corpus):
    sources, bpe = corpus
    for source in sources:
        exact = np.mean([len(bpe.document(source[i])) for i in range(len(source))])
        assert mixture.tokens_per_document(source, all_of(source), bpe) == pytest.approx(exact, rel=1e-9)
        assert mixture.tokens_per_document(source, all_of(source), bpe, sample=3000) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_tokens_come_in_the_chosen_shares(corpus, share):
    sources, bpe = corpus
    means = {s.name: mixture.tokens_per_document(s, all_of(s), bpe) for s in sources}
    stream = mixture.stream(sources, [all_of(s) for s in sources], bpe, {"long": share, "short": 1 - share}, means, 0)
    tokens = np.zeros(2)
    for i in range(800):
        document = read(stream, i)
        tokens[document.domain] += len(document.tokens)
    assert tokens[0] / tokens.sum() == pytest.approx(share, abs=0.02)


def test_each_pass_visits_every_document_once_in_a_new_order(corpus):
    sources, bpe = corpus
    parts = [np.arange(10, 40), np.arange(5)]
    stream = mixture.stream(sources, parts, bpe, {"long": 1.0, "short": 0.0}, {"long": 1.0, "short": 1.0}, 7)
    passes = [[read(stream, i + 30 * n) for i in range(30)] for n in range(3)]
    orders = [[document.document_id for document in one] for one in passes]
    assert all(sorted(order) == list(range(10, 40)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [{document.first_visit for document in one} for one in passes] == [{True}, {False}, {False}]
    np.testing.assert_array_equal(passes[0][3].tokens, bpe.document(sources[0][orders[0][3]]))


def test_the_order_of_a_domain_depends_on_the_seed_and_its_name_alone(corpus):
    sources, bpe = corpus

    def order(domain, shares, seed):
        parts = [all_of(s) for s in sources]
        stream = mixture.stream(sources, parts, bpe, shares, {"long": 1.0, "short": 1.0}, seed)
        return [d.document_id for d in (read(stream, i) for i in range(60)) if d.domain == domain][:20]

    alone = order(0, {"long": 1.0, "short": 0.0}, 1)
    assert order(0, {"long": 0.5, "short": 0.5}, 1) == alone
    assert order(0, {"long": 1.0, "short": 0.0}, 2) != alone


def test_shares_follow_weights_and_the_rest_goes_by_size():
    tokens = {"code": 30.0, "prose": 10.0, "maths": 60.0}
    assert mixture.token_shares(tokens, {}) == pytest.approx({"code": 0.3, "prose": 0.1, "maths": 0.6})
    assert mixture.token_shares(tokens, {"maths": 0.2}) == pytest.approx({"code": 0.6, "prose": 0.2, "maths": 0.2})
    assert mixture.token_shares(tokens, {"maths": 1.0}) == pytest.approx({"code": 0, "prose": 0, "maths": 1})


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ({"pros": 0.5}, "no domain with 'pros'; the nearest is 'prose'"),
        ({"code": 0.7, "prose": 0.7}, "sums to 1.4; .* at most 1|sums to 1.4; .* must sum to 1"),
        ({"code": 0.3, "prose": 0.3}, "sums to 0.6; .* must sum to 1 when every domain is named"),
        ({"code": -0.1}, "the share -0.1; it must not be negative"),
        ({"code": float("nan")}, "must not be negative"),
    ],
)
def test_bad_weights_are_refused(weights, what):
    with pytest.raises(ValueError, match=what):
        mixture.token_shares({"code": 1.0, "prose": 2.0}, weights)
