"""Chunk-aligned packing: documents to rows, so that chunks of a row are chunks of its documents.

Local attention is block-diagonal by the *document position's* chunk of C positions; its fast form reshapes the *row*
into chunks. The two are the same exactly when, for every pair of positions of a segment,

    position // C agrees  <=>  row index // C agrees.

So a row of `seq_len` tokens is a list of cells of C tokens. A piece of at most C tokens lies within one cell; a longer
one starts a cell and takes the next ones whole, leaving the tail of its last cell to short pieces. A document longer
than a row is split every `seq_len` tokens, which is on the grid, and each piece restarts at position 0: it attends to
nothing before it, but still predicts the next token of the document across the cut. One with more tiles than a row has
room for is split in front of the image that finds none.

`pack` decides from lengths alone (best fit decreasing); `build_batch` then makes the arrays.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.batch import Batch, ImageShape, padding
from data.content import Images

Key = tuple[int, int]
"""Names a document: its domain, and its place in that domain's order."""


class Document(NamedTuple):
    """A tokenised document: what a row is built from."""

    tokens: np.ndarray  # int32 [n], bos first, eos last
    domain: int
    document_id: int  # its index within its domain
    first_visit: bool
    images: Images | None = None


class Span(NamedTuple):
    """Tokens [start, stop) of a document."""

    key: Key
    start: int
    stop: int


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, at `at` in a row."""

    key: Key
    start: int
    stop: int
    at: int


Row = tuple[Sequence[Piece], Mapping[Key, Document]]
"""The pieces of a row, and the documents they are of."""


class Tiles:
    """How many tiles a row has room for, and how many a span of these documents has."""

    def __init__(self, documents: Mapping[Key, Document], images: ImageShape):
        self._documents, self._tokens, self.most = documents, images.tokens, images.tiles

    def of(self, span: Span) -> int:
        first, stop = tiles_of(span, self._documents, self._tokens)
        return stop - first


def check_grid(seq_len: int, chunk: int) -> None:
    """A row holds whole chunks, or is a part of a single one."""
    if seq_len > chunk and seq_len % chunk:
        nearest = max(1, round(seq_len / chunk)) * chunk
        raise ValueError(
            f"seq_len {seq_len} must be a multiple of the attention chunk {chunk}, or at most one chunk: "
            f"the nearest is {nearest}"
        )


def cut(key: Key, document: Document, seq_len: int, images: ImageShape | None = None) -> list[Span]:
    """A document, split where it is longer than a row or has more tiles than that has room for."""
    spans, start = [], 0
    while start < len(document.tokens):
        spans.append(span_from(key, start, document, seq_len, images))
        start = spans[-1].stop
    return spans


def span_from(key: Key, start: int, document: Document, seq_len: int, images: ImageShape | None = None) -> Span:
    """The most of a document from a token on that a row can hold.

    What has too many tiles ends where the first image that does not fit begins, or, where that is the first image, with
    the last of its tiles that does.
    """
    stop = min(start + seq_len, len(document.tokens))
    if images is None or document.images is None:
        return Span(key, start, stop)
    first, _ = tiles_of(Span(key, start, stop), {key: document}, images.tokens)
    over = document.images.slots[start:stop] >= (first + images.tiles) * images.tokens
    if over.any():
        stop = start + int(over.argmax())
        image = int(document.images.starts[np.searchsorted(document.images.starts, stop) - 1])
        stop = image if image > start else stop
    return Span(key, start, stop)


def pack(
    spans: Sequence[Span], seq_len: int, chunk: int, first: int = 0, tiles: Tiles | None = None
) -> list[list[Piece]]:
    """Rows that hold all the spans, the `first` of them in the first rows: best fit decreasing, twice; deterministic.

    A span takes the cells of C tokens that it needs, one after another, and those of at most a cell share what is left
    of any: they go, the longest first, where the least space stays over. Then such runs of cells go to rows, the
    longest first again, and among single cells the fullest (in steps of 1/64), those of many spans first. `tiles` says
    of how many a row has room for, and how many a span has, at most as many: nothing goes where they find none.
    """
    check_grid(seq_len, chunk)
    has = [tiles.of(span) for span in spans] if tiles else [0] * len(spans)
    most = tiles.most if tiles else 0
    cell = min(chunk, seq_len)
    runs: list[list[Piece]] = []  # at: within the run
    free: list[int] = []  # of each run's last cell
    late: list[bool] = []  # whether a run holds none of the first spans
    seen: list[int] = []  # tiles of each run
    room: list[tuple[int, int]] = []  # (free, run), sorted: runs whose last cell has space
    order = sorted(range(len(spans)), key=lambda i: (i >= first, spans[i].start - spans[i].stop))
    for i in order:
        span = spans[i]
        length = span.stop - span.start
        fit = bisect_left(room, (length, -1)) if length <= cell else len(room)
        while fit < len(room) and seen[room[fit][1]] + has[i] > most:
            fit += 1
        if fit < len(room):
            left, run = room.pop(fit)
            seen[run] += has[i]
            last = -(-(runs[run][0].stop - runs[run][0].start) // cell) * cell
            runs[run].append(Piece(*span, last - left))
        else:
            run, left = len(runs), -(-length // cell) * cell
            runs.append([Piece(*span, 0)])
            free.append(0)
            late.append(i >= first)
            seen.append(has[i])
        free[run] = left - length
        if free[run]:
            insort(room, (free[run], run))
    rows: list[list[Piece]] = []
    used: list[int] = []  # cells of each row
    shown: list[int] = []  # tiles of each row
    room = []  # (cells, row), sorted
    cells = [-(-(run[0].stop - run[0].start) // cell) for run in runs]
    for run in sorted(
        range(len(runs)), key=lambda run: (late[run], -cells[run], free[run] * 64 // cell, -len(runs[run]))
    ):
        fit = bisect_left(room, (cells[run], -1))
        while fit < len(room) and shown[room[fit][1]] + seen[run] > most:
            fit += 1
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = seq_len // cell, len(rows)
            rows.append([])
            used.append(0)
            shown.append(0)
        shown[row] += seen[run]
        rows[row] += [piece._replace(at=piece.at + used[row] * cell) for piece in runs[run]]
        used[row] += cells[run]
        if left > cells[run]:
            insort(room, (left - cells[run], row))
    return rows


def deal(
    rows: Sequence[list[Piece]], seq_len: int, chunk: int, domains: int, tiles: Tiles | None = None
) -> list[list[Piece]]:
    """The same runs of cells, dealt anew to as many rows so that the rows have as much of each domain, about.

    `pack` puts the longest documents together, and so those of a domain. Here a run, the longest first, goes to the row
    that has least of what it is of: of all rows with room that after which the sum of squares of tokens, by row and
    domain, is least. Where one finds no room, only runs of a single cell are dealt; where one of those finds none for
    its tiles, nothing is. Rows of one cell stay.
    """
    cell = min(chunk, seq_len)
    if cell == seq_len:
        return list(rows)
    runs: list[list[Piece]] = []
    was: list[int] = []  # the row of each run
    for n, row in enumerate(rows):
        end = 0
        for piece in sorted(row, key=lambda piece: piece.at):
            if piece.at >= end:
                start, end = piece.at, piece.at - (piece.start - piece.stop) // cell * cell
                runs.append([])
                was.append(n)
            runs[-1].append(piece._replace(at=piece.at - start))
    cells = [-((run[0].start - run[0].stop) // cell) for run in runs]
    tokens, seen = np.zeros((len(runs), domains)), np.zeros(len(runs), int)
    for run, pieces in enumerate(runs):
        for piece in pieces:
            tokens[run, piece.key[0]] += piece.stop - piece.start
            seen[run] += tiles.of(Span(*piece[:3])) if tiles else 0
    order = sorted(range(len(runs)), key=lambda run: -cells[run])
    for fixed in (seq_len, 1):  # longer runs stay where they were
        dealt: list[list[Piece]] = [[] for _ in rows]
        used, held = np.zeros(len(rows), int), np.zeros((len(rows), domains))
        shown = np.zeros(len(rows), int)
        for run in order:
            room = used + cells[run] <= seq_len // cell
            room &= shown + seen[run] <= (tiles.most if tiles else 0)
            if not room.any():
                break
            row = was[run] if cells[run] > fixed else int(np.where(room, held @ tokens[run], np.inf).argmin())
            dealt[row] += [piece._replace(at=piece.at + int(used[row]) * cell) for piece in runs[run]]
            used[row] += cells[run]
            held[row] += tokens[run]
            shown[row] += seen[run]
        else:
            return dealt
    return list(rows)


def tiles_of(piece: Piece | Span, documents: Mapping[Key, Document], tokens: int) -> tuple[int, int]:
    """[first, stop) of the document's tiles, of so many tokens each, that a piece needs: those it has any token of."""
    images = documents[piece.key].images
    slots = images.slots[piece.start : piece.stop] if images else np.empty(0, np.int32)
    slots = slots[slots >= 0]
    return (int(slots[0]) // tokens, int(slots[-1]) // tokens + 1) if len(slots) else (0, 0)


def build_batch(rows: Sequence[Row], seq_len: int, pad_id: int, images: ImageShape | None = None) -> Batch:
    """A batch [B, T] of rows, each of its pieces and the documents they are of; no pieces give a row of padding.

    A document of n tokens has the labels tokens[1:], across its cuts too; its last token has none (loss mask 0), and
    what stands before a token of an image has none either. `images`: the room for tiles, which rows must not exceed.
    """
    batch, places = padding(len(rows), seq_len, pad_id, images), np.arange(seq_len, dtype=np.int32)
    for row, (pieces, documents) in enumerate(rows):
        for segment, piece in enumerate(sorted(pieces, key=lambda piece: piece.at), 1):
            document = documents[piece.key]
            length = piece.stop - piece.start
            span = slice(piece.at, piece.at + length)
            labels = document.tokens[piece.start + 1 : piece.stop + 1]
            batch.tokens[row, span] = document.tokens[piece.start : piece.stop]
            batch.labels[row, piece.at : piece.at + len(labels)] = labels
            batch.loss_mask[row, piece.at : piece.at + len(labels)] = 1
            if document.images is not None:
                inside = document.images.inside[piece.start + 1 : piece.stop + 1]
                batch.loss_mask[row, piece.at : piece.at + len(labels)] = ~inside
            batch.segment_ids[row, span] = segment
            batch.positions[row, span] = places[:length]
            batch.domain[row, span] = document.domain
            batch.first_visit[row, span] = document.first_visit
            batch.document_id[row, span] = document.document_id
        if images is not None:
            _place_tiles(batch, row, sorted(pieces, key=lambda piece: piece.at), documents, images)
    return batch


def _place_tiles(
    batch: Batch, row: int, pieces: Sequence[Piece], documents: Mapping[Key, Document], shape: ImageShape
) -> None:
    """The tiles of a row's pieces, one behind the other, and which of their tokens stand where."""
    used = 0
    for piece in pieces:
        first, stop = tiles_of(piece, documents, shape.tokens)
        if stop == first:
            continue
        if used + stop - first > shape.tiles:
            raise ValueError(f"a row has {used + stop - first} tiles, above train.tiles ({shape.tiles})")
        images = documents[piece.key].images
        assert images is not None
        batch.tiles[row, used : used + stop - first] = images.tiles[first:stop]
        slots = images.slots[piece.start : piece.stop]
        here = slice(piece.at, piece.at + piece.stop - piece.start)
        batch.slots[row, here] = np.where(slots >= 0, slots + (used - first) * shape.tokens, -1)
        used += stop - first
