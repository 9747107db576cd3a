"""Chunk-aligned packing: documents to rows, so that chunks of a row are chunks of its documents.

Local attention is block-diagonal by the *document position's* chunk of C positions; its fast form reshapes the *row*
into chunks. The two are the same exactly when, for every pair of positions of a segment,

    position // C agrees  <=>  row index // C agrees.

So a row of `seq_len` tokens is a list of cells of C tokens. A piece of at most C tokens lies within one cell; a longer
one starts a cell and takes the next ones whole, leaving the tail of its last cell to short pieces. A document longer
than a row is split every `seq_len` tokens, which is on the grid, and each piece restarts at position 0: it attends to
nothing before it, but still predicts the next token of the document across the cut.

`Packer` decides from lengths alone (best fit over a few open rows); `build_row` then makes the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.batch import DTYPES

OPEN_ROWS = 16  # rows a piece may choose among; more of them pad less and mix documents over a longer stretch


class Document(NamedTuple):
    """A tokenised document: what a row is built from."""

    tokens: np.ndarray  # int32 [n], bos first, eos last
    domain: int
    document_id: int  # its index within its domain
    first_visit: bool


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, at `at` in a row."""

    key: int  # the document's place in the stream
    start: int
    stop: int
    at: int


class _Row:
    """An open row: its pieces, and how much of each cell they use. Used cells come first."""

    def __init__(self, cells: int, cell: int, pieces: Iterable[Piece] = ()):
        self.cell = cell
        self.used = [0] * cells
        self.untouched = cells
        self.pieces: list[Piece] = []
        for piece in pieces:
            self.put(piece)

    def put(self, piece: Piece) -> None:
        end = piece.at + piece.stop - piece.start
        for cell in range(piece.at // self.cell, -(-end // self.cell)):
            self.used[cell] = min(self.cell, end - cell * self.cell)
        self.untouched = self.used.count(0)
        self.pieces.append(piece)

    @property
    def free(self) -> int:
        return len(self.used) * self.cell - sum(self.used)


def check_grid(seq_len: int, chunk: int) -> None:
    """A row holds whole chunks, or is a part of a single one."""
    if seq_len > chunk and seq_len % chunk:
        nearest = max(1, round(seq_len / chunk)) * chunk
        raise ValueError(
            f"seq_len {seq_len} must be a multiple of the attention chunk {chunk}, or at most one chunk: "
            f"the nearest is {nearest}"
        )


class Packer:
    """Places documents into rows, from their lengths alone; deterministic, with at most `open_rows` rows open."""

    def __init__(self, seq_len: int, chunk: int, open_rows: int = OPEN_ROWS):
        check_grid(seq_len, chunk)
        self.seq_len = seq_len
        self.cell = min(chunk, seq_len)
        self.open_rows = open_rows
        self._rows: list[_Row] = []

    def add(self, key: int, length: int) -> list[list[Piece]]:
        """Place a document of `length` tokens; returns the rows that this closed, each a list of pieces."""
        closed = []
        for start in range(0, length, self.seq_len):
            closed += self._place(key, start, min(start + self.seq_len, length))
        return closed

    def flush(self) -> list[list[Piece]]:
        """Close every open row, oldest first."""
        closed, self._rows = [row.pieces for row in self._rows], []
        return closed

    def snapshot(self) -> tuple[tuple[Piece, ...], ...]:
        """The open rows, from which `restore` goes on exactly."""
        return tuple(tuple(row.pieces) for row in self._rows)

    def restore(self, rows: Iterable[Iterable[Piece]]) -> None:
        self._rows = [_Row(self.seq_len // self.cell, self.cell, pieces) for pieces in rows]

    def _place(self, key: int, start: int, stop: int) -> list[list[Piece]]:
        row, at = self._best_fit(stop - start)
        row.put(Piece(key, start, stop, at))
        if row.free == 0:
            full = row
        elif len(self._rows) > self.open_rows:
            full = min(self._rows, key=lambda row: row.free)  # ties: the oldest
        else:
            return []
        self._rows.remove(full)
        return [full.pieces]

    def _best_fit(self, length: int) -> tuple[_Row, int]:
        """The row and index that leave the least space over: a tail first, then untouched cells, then a new row."""
        if length <= self.cell:
            tails = (
                (self.cell - used - length, n, cell)
                for n, row in enumerate(self._rows)
                for cell, used in enumerate(row.used)
                if 0 < used <= self.cell - length
            )
            if (best := min(tails, default=None)) is not None:
                _, n, cell = best
                return self._rows[n], cell * self.cell + self._rows[n].used[cell]
        cells = -(-length // self.cell)
        fits = [row for row in self._rows if row.untouched >= cells]
        row = min(fits, key=lambda row: row.untouched, default=None)
        if row is None:
            row = _Row(self.seq_len // self.cell, self.cell)
            self._rows.append(row)
        return row, (len(row.used) - row.untouched) * self.cell


def build_row(
    pieces: Sequence[Piece], documents: Mapping[int, Document], seq_len: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The fields of `data.batch.Batch` for one row, each [T]; no pieces give a row of padding.

    A document of n tokens has the labels tokens[1:], across its cuts too; only its last token has none (loss mask 0).
    """
    padding = dict(tokens=pad_id, labels=pad_id, document_id=-1)
    row = {name: np.full(seq_len, padding.get(name, 0), dtype) for name, dtype in DTYPES.items()}
    for segment, piece in enumerate(sorted(pieces, key=lambda piece: piece.at), 1):
        document = documents[piece.key]
        length = piece.stop - piece.start
        span = slice(piece.at, piece.at + length)
        labels = document.tokens[piece.start + 1 : piece.stop + 1]
        row["tokens"][span] = document.tokens[piece.start : piece.stop]
        row["labels"][piece.at : piece.at + len(labels)] = labels
        row["loss_mask"][piece.at : piece.at + len(labels)] = 1
        row["segment_ids"][span] = segment
        row["positions"][span] = np.arange(length)
        row["domain"][span] = document.domain
        row["first_visit"][span] = document.first_visit
        row["document_id"][span] = document.document_id
    return row
