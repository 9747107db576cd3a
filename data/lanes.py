"""Virtual lanes: row i of every global batch is made by lane i alone, so a batch depends on (seed, config, step) only.

Lane i of L reads the documents i, i + L, i + 2L, ... of every domain's order. It takes them from the domain that is
furthest behind its share of the *tokens*, packs a window of a few rows at a time, and hands those out one a step. What
it is about to do follows from a `LaneState` of some numbers: any host can go on with any lane. Lanes of a process share
one pool of threads (tokenizers leave the interpreter free while they encode); while a window is handed out the
next one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.batch import Batch
from data.packing import Document, Key, Piece, Row, Span, build_batch, cut, pack

WINDOW_TOKENS = 2**16
WINDOW_ROWS = 4  # at least
OF_A_PASS = 8  # windows of a lane's pass over the corpus, where they can be so small: passes mix within a window
SLACK = 16  # a window is packed from a sixteenth more than it holds; what fits least waits for the next one


class DataEnds(ValueError):
    """Every domain has been read as often as it may be."""


@dataclass(frozen=True)
class Domain:
    """What lanes read of a domain."""

    name: str
    share: float  # of the tokens
    read: Callable[[int], Document]  # by its place in the domain's order
    mean_tokens: float  # of a document
    documents: float = float("inf")  # most places that all lanes read of it
    tokens: float = float("inf")  # most tokens


class LaneState(NamedTuple):
    """Where a lane is: at row `given` of its window number `window`, which follows from the rest."""

    window: int
    given: int
    read: tuple[int, ...]  # documents of each domain read before the window
    tokens: tuple[int, ...]  # their tokens
    after: tuple[int, ...]  # documents read when the window was packed; () before
    waiting: tuple[Span, ...]  # what had no room in the window before

    def __deepcopy__(self, memo: dict) -> LaneState:
        return self  # immutable all through; grain copies the state of every batch

    def to_json(self) -> list[Any]:
        return [*self[:-1], [[*span.key, span.start, span.stop] for span in self.waiting]]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> LaneState:
        window, given, read, tokens, after, waiting = values
        spans = tuple(Span((domain, place), start, stop) for domain, place, start, stop in waiting)
        return cls(window, given, tuple(read), tuple(tokens), tuple(after), spans)


class _Window(NamedTuple):
    """Rows to hand out, the documents in them, and the state behind them."""

    rows: list[list[Piece]]
    documents: dict[Key, Document]
    then: LaneState


class Lanes:
    """Some of the `count` lanes of a stream of rows, each with its window; `batch()` gives the next row of each."""

    def __init__(
        self, domains: Sequence[Domain], mine: Iterable[int], count: int, seq_len: int, chunk: int, pad_id: int,
        seed: int, pool: ThreadPoolExecutor, pass_tokens: int,
    ):  # fmt: skip
        """`pass_tokens` is what one pass over the corpus has, about."""
        self._domains, self._mine, self._count = domains, tuple(mine), count
        self._seq_len, self._chunk, self._pad_id, self._seed, self._pool = seq_len, chunk, pad_id, seed, pool
        of_a_pass = int(pass_tokens / (count * seq_len * OF_A_PASS))
        self.window_rows = max(WINDOW_ROWS, min(WINDOW_TOKENS // seq_len, of_a_pass))
        self._phase = {
            lane: np.random.default_rng((seed, lane)).random(len(domains)) * [d.mean_tokens for d in domains]
            for lane in self._mine
        }
        zeros = (0,) * len(domains)
        self._states = [LaneState(0, 0, zeros, zeros, (), ())] * len(self._mine)
        self._windows: list[_Window | None] = [None] * len(self._mine)
        self._next: list[Future[_Window]] = []  # of each lane, once a batch was asked for

    def batch(self) -> Batch:
        """The next row of each lane."""
        if not self._next:
            self._next = [self._pool.submit(self._window, *of, {}) for of in zip(self._mine, self._states, strict=True)]
        return build_batch([self._row(n) for n in range(len(self._mine))], self._seq_len, self._pad_id)

    def _row(self, n: int) -> Row:
        state, window = self._states[n], self._windows[n]
        while window is None or state.given == len(window.rows):
            state = window.then if window else state
            window = self._windows[n] = self._next[n].result()
            self._next[n] = self._pool.submit(self._window, self._mine[n], window.then, window.documents)
            state = state._replace(after=window.then.read)
        self._states[n] = state._replace(given=state.given + 1)
        return window.rows[state.given], window.documents

    @property
    def states(self) -> dict[int, LaneState]:
        return dict(zip(self._mine, self._states, strict=True))

    def restore(self, states: Mapping[int, LaneState]) -> None:
        for waits in self._next:
            waits.cancel()
        self._states, self._next = [states[lane] for lane in self._mine], []
        self._windows = [None] * len(self._mine)

    def _window(self, lane: int, state: LaneState, known: Mapping[Key, Document]) -> _Window:
        """The window that begins at `state`; `known` may hold documents of the one before."""
        rows = self.window_rows if state.window else 1 + lane * self.window_rows // self._count  # they end in turns
        spans = list(state.waiting)
        documents = {key: known.get(key) or self._read(lane, *key) for key in dict.fromkeys(s.key for s in spans)}
        size = sum(span.stop - span.start for span in spans)
        read, tokens = list(state.read), list(state.tokens)
        while size * SLACK < rows * self._seq_len * (SLACK + 1):
            if (domain := self._behind(lane, read, tokens)) is None:
                break
            key = (domain, read[domain])
            document = documents[key] = self._read(lane, *key)
            read[domain] += 1
            tokens[domain] += len(document.tokens)
            size += len(document.tokens)
            spans += cut(key, len(document.tokens), self._seq_len)
        else:
            # A document of many rows makes its window longer, so that little ever waits.
            rows = max(rows, size * SLACK // (self._seq_len * (SLACK + 1)))
            return self._packed(lane, state, spans, rows, documents, read, tokens)
        if not spans:
            names = ", ".join(domain.name for domain in self._domains)
            raise DataEnds(
                f"the data ends: of {names} everything has been read that data.repeats and data.caps let a run read. "
                "Let it read more, or take fewer steps"
            )
        return self._packed(lane, state, spans, len(spans), documents, read, tokens)

    def _packed(
        self, lane: int, state: LaneState, spans: list[Span], rows: int, documents: dict[Key, Document],
        read: list[int], tokens: list[int],
    ) -> _Window:  # fmt: skip
        """The fullest `rows` of what is packed, those with what has waited before all, in random order."""
        first = len(state.waiting)
        packed, waited = pack(spans, self._seq_len, self._chunk, first), set(state.waiting)
        waits = [not any(Span(*piece[:3]) in waited for piece in row) for row in packed]
        fill = [sum(piece.stop - piece.start for piece in row) for row in packed]
        order = sorted(range(len(packed)), key=lambda row: (waits[row], -fill[row]))
        chosen = np.random.default_rng((self._seed, lane, state.window)).permutation(order[:rows])
        waiting = tuple(Span(*piece[:3]) for row in order[rows:] for piece in packed[row])
        then = LaneState(state.window + 1, 0, tuple(read), tuple(tokens), (), waiting)
        return _Window([packed[row] for row in chosen], documents, then)

    def _behind(self, lane: int, read: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The domain that lacks most tokens of its share, among those of which more may be read; None: there is none.

        Lanes begin at random as if they had read up to a document of each, so that they do not all turn to a rare
        domain at once. The domain that is taken was not ahead of its share, so afterwards it is by less than that
        document, those pretended ones left aside.
        """
        open_ = [d for d, domain in enumerate(self._domains)
                 if domain.share and lane + self._count * read[d] < domain.documents
                 and tokens[d] * self._count < domain.tokens]  # fmt: skip
        if not open_:
            return None
        had = {d: tokens[d] + self._phase[lane][d] for d in open_}
        whole, shares = sum(had.values()), sum(self._domains[d].share for d in open_)
        return max(open_, key=lambda d: self._domains[d].share / shares * whole - had[d])

    def _read(self, lane: int, domain: int, place: int) -> Document:
        return self._domains[domain].read(lane + self._count * place)
