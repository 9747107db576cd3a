"""What batches hold, in numbers and in words: for `llama4 data inspect` and for the report of a run.

Everything is counted from the batches alone, so that it is what is trained on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data.batch import Batch
from data.content import MARK
from data.tokenizer import Tokenizer

JOINERS = "\u200c\u200d"  # which Persian and emoji are written with; they move nothing


def printable(text: str) -> str:
    """The text with what may move a cursor or turn the writing's direction spelled as \\x1b or \\u202e.

    That is every control, format, surrogate and separator character but newlines, tabs and the joiners.
    """

    def spell(character: str) -> str:
        if character in "\n\t" + JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return "".join(map(spell, text))


class DecodedSpan(NamedTuple):
    """Neighbouring tokens of a piece: predicted from those before them for the loss, or only read; or an image."""

    text: str  # of an image <|image|>
    counted: bool
    slot: int = -1  # of an image, the last of the row's tile tokens in it: of the tile that shows it whole


class DecodedPiece(NamedTuple):
    """A document, or a part of one, as it lies in a row."""

    row: int
    at: int  # its first token's place in the row
    tokens: int
    counted: int  # places whose label counts in the loss; the last one's is a token of the piece after, if it goes on
    domain: str
    document: int  # its index within the domain
    begins: bool  # with bos: it is no later part of a longer document
    ends: bool  # with eos
    text: str  # without bos and eos
    spans: list[DecodedSpan]


def pieces(batch: Batch, tokenizer: Tokenizer, domains: tuple[str, ...]) -> Iterator[DecodedPiece]:
    """The pieces of a batch [B, T], row by row in their order.

    The label at place t is the token at t + 1, so a token is predicted for the loss where the mask of the place before
    it is 1. The first one of a piece is only read there; where it goes on from before, the piece before predicts it.
    """
    for row, segments in enumerate(batch.segment_ids):
        starts = np.flatnonzero(np.diff(segments, prepend=0) * (segments > 0))
        for at in starts.tolist():
            inside = slice(at, at + int((segments == segments[at]).sum()))
            tokens, counts = batch.tokens[row, inside], batch.loss_mask[row, inside] > 0
            predicted = np.concatenate([[False], counts[:-1]])
            images = np.isin(tokens, tokenizer.image_ids or ())
            starts = tokens == tokenizer.image_ids.start if tokenizer.image_ids else images
            new = (np.diff(predicted) & ~images[1:]) | np.diff(images) | starts[1:]
            edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(tokens)]
            slots = np.full(len(tokens), -1) if batch.slots is None else batch.slots[row, inside]
            spans = [
                DecodedSpan(MARK, False, int(slots[a:b].max()))
                if images[a]
                else DecodedSpan(tokenizer.decode(tokens[a:b]), bool(predicted[a]))
                for a, b in pairwise(edges)
            ]
            yield DecodedPiece(
                row, at, len(tokens), int(counts.sum()), domains[int(batch.domain[row, at])],
                int(batch.document_id[row, at]), bool(tokens[0] == tokenizer.bos_id),
                bool(tokens[-1] == tokenizer.eos_id), tokenizer.decode(tokens), spans,
            )  # fmt: skip


class Counts:
    """Sums over batches: `add` each, then `facts`."""

    def __init__(self, domains: tuple[str, ...], shares: Mapping[str, float]):
        """`shares`: of the tokens, by domain, that the mixture aims at."""
        self.domains, self.shares = domains, shares
        self.batches = self.rows = self.pieces = self.places = self.counted = 0
        self.tokens = np.zeros(len(domains), np.int64)  # of each domain
        self.lengths = np.zeros(64, np.int64)  # pieces of 2^(i-1) < length <= 2^i tokens

    def add(self, batch: Batch) -> None:
        inside = batch.segment_ids > 0
        self.batches += 1
        self.rows += len(inside)
        self.places += inside.size
        self.counted += int((batch.loss_mask > 0).sum())
        self.tokens += np.bincount(batch.domain[inside], minlength=len(self.domains))
        row = np.arange(len(inside), dtype=np.int64)[:, None]
        piece = (row * (1 + int(batch.segment_ids.max(initial=0))) + batch.segment_ids)[inside]
        lengths = np.unique(piece, return_counts=True)[1]
        self.pieces += len(lengths)
        self.lengths += np.bincount(np.ceil(np.log2(lengths)).astype(int), minlength=len(self.lengths))

    def facts(self) -> dict[str, Any]:
        """JSON-able. tokens: all but padding; counted: those in the loss; fill: share of the places that hold tokens;
        lengths: (at most so many tokens, pieces), the bounds being powers of two."""
        total, there = int(self.tokens.sum()), np.flatnonzero(self.lengths)
        bounds = range(there[0], there[-1] + 1) if len(there) else ()
        return dict(
            batches=self.batches, rows=self.rows, tokens=total, counted=self.counted, pieces=self.pieces,
            fill=round(total / max(self.places, 1), 4), pieces_per_row=round(self.pieces / max(self.rows, 1), 2),
            mixture={
                name: dict(target=round(self.shares[name], 4), read=round(int(n) / max(total, 1), 4), tokens=int(n))
                for name, n in zip(self.domains, self.tokens, strict=True)
            },
            lengths=[[2**i, int(self.lengths[i])] for i in bounds],
        )  # fmt: skip
