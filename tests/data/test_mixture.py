"""The mixture: shares of the tokens, not of the documents."""

from __future__ import annotations

import numpy as np
import pytest

from data import mixture
from data.mixture import Order
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


def all_of(source) -> np.ndarray:
    return np.arange(len(source))


def test_mean_tokens_are_close_to_the_count(corpus):
    sources, bpe = corpus
    for source in sources:
        exact = np.mean([len(bpe.document(source[i])) for i in range(len(source))])

        def count(index: int, source=source) -> tuple[int, int, int]:
            return (n := len(bpe.document(source[index]))), n - 1, 3

        tokens, counted, tiles = mixture.sizes_of_documents(source, all_of(source), count)
        assert tokens == pytest.approx(exact, rel=1e-9) == counted + 1 and tiles == pytest.approx(3)
        assert mixture.sizes_of_documents(source, all_of(source), count, 3000)[0] == pytest.approx(exact, rel=0.05)


def test_each_pass_visits_every_document_once_in_a_new_order():
    order = Order("long", 30, 7)
    passes = [[order[i + 30 * n] for i in range(30)] for n in range(3)]
    assert all(sorted(document for document, _ in one) == list(range(30)) for one in passes)
    assert [{visit for _, visit in one} for one in passes] == [{0}, {1}, {2}]
    first, second, third = ([document for document, _ in one] for one in passes)
    assert first != second != third


def test_the_order_of_a_domain_depends_on_the_seed_and_its_name_alone():
    def order(name, seed):
        return [Order(name, 30, seed)[i] for i in range(30)]

    assert order("long", 1) == order("long", 1)
    assert order("long", 1) != order("long", 2) and order("long", 1) != order("short", 1)


@pytest.mark.parametrize("behind", [[[3, 5, 4, 3]], [[0, 0]], [[2, 0, 1], [4, 4]], [[7], [1, 3], [0, 2, 9]]])
def test_behind_earlier_stages_comes_what_their_lanes_left_out_and_then_the_rest(behind):
    """Nothing comes twice, and nothing is left out before a pass is through."""
    names: list[tuple[int, int]] = []
    for stage, taken in enumerate(behind):
        order = Order("x", 40, 3, behind[:stage])
        names += [order[lane + len(taken) * k] for lane, count in enumerate(taken) for k in range(count)]
    after = Order("x", 40, 3, behind)
    rest = [after[i] for i in range(40 - len(names))]
    assert sorted(names + rest) == [(document, 0) for document in range(40)]
    assert [visit for _, visit in (after[40 - len(names) + i] for i in range(40))] == [1] * 40


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
