"""Chunk-aligned packing: nothing is lost, chunks of rows are chunks of documents, and little is padded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import DTYPES, FIELDS
from data.packing import Document, Key, Piece, Span, build_batch, cut, deal, pack

GRIDS = [(64, 16), (64, 64), (48, 64), (96, 8), (32, 32), (16, 1000)]
PAD = 999


def random_documents(seed: int, count: int = 200, longest: int = 300) -> dict[Key, Document]:
    """Lengths from two tokens (an empty text) to several rows, with the grid's own multiples among them."""
    rng = np.random.default_rng(seed)
    multiples = [2, 8, 15, 16, 17, 32, 63, 64, 65, 128, 129]
    lengths = [*multiples, *np.exp(rng.uniform(0.7, np.log(longest), count)).astype(int)]
    return {
        (n % 3, n): Document(rng.integers(1, 900, length).astype(np.int32), n % 3, n + 100, n % 2 == 0)
        for n, length in enumerate(np.maximum(lengths, 2).tolist())
    }


def spans_of(documents: dict[Key, Document], seq_len: int) -> list[Span]:
    return [span for key, document in documents.items() for span in cut(key, document, seq_len)]


def of_length(length: int) -> Document:
    return Document(np.zeros(length, np.int32), 0, 0, True)


def row_of(pieces, documents, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """The fields of a batch of one row, each [T]."""
    batch = build_batch([(pieces, documents)], seq_len, pad_id)
    return {name: getattr(batch, name)[0] for name in FIELDS}


@pytest.mark.parametrize(("seq_len", "chunk"), GRIDS)
def test_chunks_of_a_row_are_chunks_of_its_documents(seq_len, chunk):
    documents = random_documents(seq_len)
    for pieces in pack(spans_of(documents, seq_len), seq_len, chunk):
        row = row_of(pieces, documents, seq_len, PAD)
        real = row["segment_ids"] > 0
        segment, position, index = row["segment_ids"][real], row["positions"][real], np.arange(seq_len)[real]
        by_document = (segment[:, None] == segment) & (position[:, None] // chunk == position // chunk)
        by_row = (segment[:, None] == segment) & (index[:, None] // chunk == index // chunk)
        np.testing.assert_array_equal(by_document, by_row)


@pytest.mark.parametrize(("seq_len", "chunk"), GRIDS)
def test_rows_reassemble_to_the_documents_and_their_labels(seq_len, chunk):
    documents = random_documents(seq_len + 1)
    pieces: dict[Key, list[tuple[int, dict[str, np.ndarray]]]] = {key: [] for key in documents}
    for placed in pack(spans_of(documents, seq_len), seq_len, chunk):
        row = row_of(placed, documents, seq_len, PAD)
        assert {name: array.dtype for name, array in row.items()} == {name: np.dtype(t) for name, t in DTYPES.items()}
        for segment, piece in enumerate(sorted(placed, key=lambda piece: piece.at), 1):
            (where,) = np.nonzero(row["segment_ids"] == segment)
            np.testing.assert_array_equal(where, piece.at + np.arange(piece.stop - piece.start))
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
            pieces[piece.key].append((piece.start, {name: row[name][where] for name in FIELDS}))
        empty = row["segment_ids"] == 0
        assert set(row["tokens"][empty]) | set(row["labels"][empty]) <= {PAD}
        assert not any(row[name][empty].any() for name in ("loss_mask", "positions", "domain", "first_visit"))
        assert (row["document_id"][empty] == -1).all()
    for key, document in documents.items():
        whole = [fields for _, fields in sorted(pieces[key], key=lambda item: item[0])]
        joined = {name: np.concatenate([fields[name] for fields in whole]) for name in FIELDS}
        np.testing.assert_array_equal(joined["tokens"], document.tokens)
        np.testing.assert_array_equal(joined["labels"][:-1], document.tokens[1:])  # across the cuts too
        np.testing.assert_array_equal(joined["loss_mask"], np.arange(len(document.tokens)) < len(document.tokens) - 1)
        assert set(joined["domain"]) == {document.domain} and set(joined["document_id"]) == {document.document_id}
        assert set(joined["first_visit"]) == {document.first_visit}
        cuts = {start for start, _ in pieces[key]}
        assert cuts == set(range(0, len(document.tokens), seq_len)), "only what is longer than a row is split"


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=60), cells=st.integers(1, 5), cell=st.integers(1, 40),
    first=st.integers(0, 60),
)  # fmt: skip
def test_pack_loses_nothing_overlaps_nothing_and_stays_on_the_grid(lengths, cells, cell, first):
    seq_len = cells * cell
    spans = [span for n, length in enumerate(lengths) for span in cut((0, n), of_length(length), seq_len)]
    rows = pack(spans, seq_len, cell, first)
    check(rows, spans, seq_len, cell)
    check(deal(rows, seq_len, cell, 1), spans, seq_len, cell)


def check(rows: list[list[Piece]], spans: list[Span], seq_len: int, cell: int) -> None:
    pieces = [piece for row in rows for piece in row]
    assert sorted(Span(*piece[:3]) for piece in pieces) == sorted(spans), "each span once, whole"
    taken = [np.zeros(seq_len, int) for _ in rows]
    for row, used in zip(rows, taken, strict=True):
        for piece in row:
            end = piece.at + piece.stop - piece.start
            used[piece.at : end] += 1
            assert end <= seq_len and (piece.at // cell == (end - 1) // cell or piece.at % cell == 0)
    assert all(used.max(initial=0) <= 1 for used in taken)
    assert all(rows), "no row is empty"


def test_dealt_rows_hold_as_much_of_each_domain():
    """Three domains whose documents differ in length tenfold; packed alone, rows are of one or two of them."""
    rng = np.random.default_rng(0)
    spans = [span for d, mean in enumerate((20, 60, 250)) for n in range(6000 // mean)
             for span in cut((d, n), of_length(int(mean * rng.uniform(0.5, 1.5))), 2048)]  # fmt: skip

    def spread(rows: list[list[Piece]]) -> float:
        """The largest difference of a domain's share between two rows."""
        tokens = np.zeros((len(rows), 3))
        for row, pieces in enumerate(rows):
            for piece in pieces:
                tokens[row, piece.key[0]] += piece.stop - piece.start
        return float(np.ptp(tokens / tokens.sum(1, keepdims=True), 0).max())

    rows = pack(spans, 2048, 64)
    full = [row for row in rows if sum(piece.stop - piece.start for piece in row) > 1900]
    assert len(full) >= 6
    dealt = deal(full, 2048, 64, 3)
    check(dealt, [Span(*piece[:3]) for row in full for piece in row], 2048, 64)
    assert spread(full) > 0.5 and spread(dealt) < 0.1


def test_golden_rows():
    """Two cells of four: the longest first, then what fits into the tails that are left; rows of more pieces first."""
    tokens = [[1, 10, 11, 12, 13, 2], [1, 2], [1, 20, 2], [1, 30, 31, 32, 33, 34, 35, 36, 37, 2]]
    documents = {(n % 2, n): Document(np.array(t, np.int32), n % 2, n, n < 2) for n, t in enumerate(tokens)}
    rows = [row_of(row, documents, 8, 0) for row in pack(spans_of(documents, 8), 8, 4)]
    expected = [
        dict(
            tokens=[1, 10, 11, 12, 13, 2, 1, 2], labels=[10, 11, 12, 13, 2, 0, 2, 0],
            segment_ids=[1, 1, 1, 1, 1, 1, 2, 2], positions=[0, 1, 2, 3, 4, 5, 0, 1],
            loss_mask=[1, 1, 1, 1, 1, 0, 1, 0],
            domain=[0, 0, 0, 0, 0, 0, 1, 1], first_visit=[1] * 8, document_id=[0, 0, 0, 0, 0, 0, 1, 1],
        ),
        dict(
            tokens=[1, 30, 31, 32, 33, 34, 35, 36], labels=[30, 31, 32, 33, 34, 35, 36, 37], segment_ids=[1] * 8,
            positions=range(8), loss_mask=[1] * 8, domain=[1] * 8, first_visit=[0] * 8, document_id=[3] * 8,
        ),
        dict(
            tokens=[1, 20, 2, 0, 37, 2, 0, 0], labels=[20, 2, 0, 0, 2, 0, 0, 0], segment_ids=[1, 1, 1, 0, 2, 2, 0, 0],
            positions=[0, 1, 2, 0, 0, 1, 0, 0], loss_mask=[1, 1, 0, 0, 1, 0, 0, 0], domain=[0, 0, 0, 0, 1, 1, 0, 0],
            first_visit=[0] * 8, document_id=[2, 2, 2, -1, 3, 3, -1, -1],
        ),
    ]  # fmt: skip
    assert len(rows) == len(expected)
    for row, golden in zip(rows, expected, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(row[name], np.array(golden[name], DTYPES[name]), err_msg=name)


def test_a_row_of_no_pieces_is_padding():
    row = row_of([], {}, 8, PAD)
    assert (row["tokens"] == PAD).all() and not row["segment_ids"].any() and not row["loss_mask"].any()


@pytest.mark.parametrize(("seq_len", "chunk"), GRIDS)
def test_what_waited_lies_in_the_first_rows(seq_len, chunk):
    """And no later row could have taken any of it: the rows with it are those it needs alone, filled up."""
    spans = spans_of(random_documents(5), seq_len)
    first = spans[-9:]
    alone, rows = pack(first, seq_len, chunk), pack([*first, *spans[:-9]], seq_len, chunk, first=9)
    with_first = [n for n, row in enumerate(rows) if any(Span(*piece[:3]) in first for piece in row)]
    assert with_first == list(range(len(alone)))
    assert sorted(Span(*piece[:3]) for row in rows for piece in row) == sorted(spans)


def test_little_is_padded():
    """Lengths distributed as the embedded corpora's are (log-normal, measured), rows of 1,024 with chunks of 256."""
    rng = np.random.default_rng(0)
    logs = np.where(rng.random(2000) < 0.31, rng.normal(7.64, 1.53, 2000), rng.normal(6.91, 1.45, 2000))
    lengths = np.exp(logs).astype(int) + 2
    spans = [span for n, length in enumerate(lengths.tolist()) for span in cut((0, n), of_length(length), 1024)]
    rows = pack(spans, 1024, 256)
    assert 1 - lengths.sum() / (1024 * len(rows)) < 0.03


def test_rows_that_are_not_whole_chunks_are_refused():
    with pytest.raises(ValueError, match=r"seq_len 1000 must be a multiple .* 256.*: the nearest is 1024"):
        pack([], 1000, 256)
