"""What a run's first batches hold, kept in its folder for the report: counted as they pass through."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from etils import epath

from data.batch import Batch
from data.contents import Counts, DecodedPiece, pieces
from data.images import small_picture
from data.loader import Corpus
from training.target_sources import Batches

FILE = "data.json"
ENOUGH_TOKENS = 2**18  # a single batch of a large run
SAMPLES, SAMPLE_CHARACTERS = 8, 500
PICTURE = 64  # pixels of a side


class FirstBatches:
    """A stream of batches that writes `FILE` into the run's folder once it has seen enough of them, or is closed.

    `data.contents.Counts.facts`, the first step counted, and samples: the first pieces, their texts cut. In a run of
    several processes these are of the rows of the one that counts.
    """

    def __init__(self, stream: Batches, corpus: Corpus, folder: epath.Path, start: int):
        self._stream, self._corpus, self._file, self._step = stream, corpus, folder / FILE, start + 1
        self._counts: Counts | None = Counts(corpus.domains, corpus.shares)
        self._samples: list[dict[str, Any]] = []

    def __next__(self) -> Batch:
        batch = next(self._stream)
        if self._counts:
            if not self._samples:
                first = islice(pieces(batch, self._corpus.tokenizer, self._corpus.domains), SAMPLES)
                self._samples = [self._cut(batch, piece) for piece in first]
            self._counts.add(batch)
            if self._counts.tokens.sum() >= ENOUGH_TOKENS:
                self._write()
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def close(self) -> None:
        self._write()
        self._stream.close()

    def _write(self) -> None:
        if self._counts and self._counts.batches:
            facts = dict(step=self._step, **self._counts.facts(), samples=self._samples)
            self._file.write_text(json.dumps(facts, indent=1) + "\n")
        self._counts = None

    def _cut(self, batch: Batch, piece: DecodedPiece) -> dict[str, Any]:
        """A sample: its first characters, and small pictures of the images among them."""
        spans, left = [], SAMPLE_CHARACTERS
        for text, counted, slot in piece.spans:
            shown = self._corpus.images if slot >= 0 else None
            picture = small_picture(batch.tiles[piece.row, slot // shown.tokens], PICTURE) if shown else ""
            spans, left = [*spans, [text[:left], counted, picture]] if left else spans, max(0, left - len(text))
        return piece._asdict() | dict(text=piece.text[:SAMPLE_CHARACTERS], spans=spans, cut=not left)
