"""Virtual lanes: row i of every global batch is made by lane i alone, so a batch depends on (seed, config, step) only.

Lane i of L reads the documents i, i + L, i + 2L, ... of every domain's order. It always takes the one after which its
*tokens* are closest to their shares, packs a window of a few rows at a time, and hands those out one a step. What it is
about to do follows from a `LaneState` of some numbers: any host can go on with any lane. Lanes of a process share one
pool of threads (tokenizers leave the interpreter free while they encode); while a window is handed out the next one is
made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.batch import Batch, ImageShape
from data.packing import Document, Key, Piece, Row, Span, Tiles, build_batch, cut, deal, pack, span_from

WINDOW_TOKENS = 2**16
WINDOW_ROWS = 4  # at least
OF_A_PASS = 8  # windows of a lane's pass over the corpus, where they can be so small: passes mix within a window
SLACK = 16  # a window is packed from a sixteenth more than it holds; what fits least waits for the next one
SLACK_DOCUMENTS = 16  # or from so many documents more, of its mean length, if that is less
HELD = 16  # spans that are taken out of a window of short documents at most
DEALT = 16  # rows of a window at most that are made alike; of more, any order evens out
FILLS = 64  # rows are told apart by their fill in so many steps


class DataEnds(ValueError):
    """Every domain has been read as often as it may be."""


@dataclass(frozen=True)
class Domain:
    """What lanes read of a domain."""

    name: str
    share: float  # of the tokens
    read: Callable[[int], Document]  # by its place in the domain's order
    size: Callable[[int], float]  # a document's tokens, about, by its place; known without reading it
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
    out: tuple[int, ...]  # tokens of each domain in the rows handed out so far
    waiting: tuple[tuple[Key, int], ...]  # (document, first token) of what had no room in the window before, sorted

    def __deepcopy__(self, memo: dict) -> LaneState:
        return self  # immutable all through; grain copies the state of every batch

    def to_json(self) -> list[Any]:
        """A few hundred bytes: the last two counts as differences from the first two; what waits by domain, from the
        last document that was read back, each by its distance from the one before: {"0": "1*5 3 12+8192"} are five in a
        row, the third behind them, and the part of the twelfth behind that from its token 8,192 on."""
        waiting: dict[int, list[list[int]]] = defaultdict(list)  # distance, how many, start
        before: dict[int, int] = {}
        for (domain, place), start in reversed(self.waiting):
            parts, far = waiting[domain], before.get(domain, self.read[domain]) - place
            before[domain] = place
            if far == 1 and not start and parts and not parts[-1][2]:
                parts[-1][1] += 1
            else:
                parts.append([far, 1, start])
        words = {str(domain): " ".join(f"{far}{f'*{n}' * (n > 1)}{f'+{at}' * (at > 0)}" for far, n, at in parts)
                 for domain, parts in waiting.items()}  # fmt: skip
        after = [a - r for a, r in zip(self.after, self.read, strict=False)]
        out = [t - o for t, o in zip(self.tokens, self.out, strict=True)]
        return [*self[:4], after, out, words]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> LaneState:
        window, given, read, tokens, after, out, words = values
        waiting: list[tuple[Key, int]] = []
        for domain, text in words.items():
            place = read[int(domain)]
            for word in text.split():
                word, _, start = word.partition("+")
                far, _, count = word.partition("*")
                for step in (int(far), *[1] * (int(count or 1) - 1)):
                    place -= step
                    waiting.append(((int(domain), place), int(start or 0)))
        return cls(
            window, given, tuple(read), tuple(tokens), tuple(a + r for a, r in zip(after, read, strict=False)),
            tuple(t - o for t, o in zip(tokens, out, strict=True)), tuple(sorted(waiting)),
        )  # fmt: skip


class _Window(NamedTuple):
    """Rows to hand out, the documents in them, and the state behind them."""

    rows: list[list[Piece]]
    tokens: np.ndarray  # int64 [rows, domains]
    documents: dict[Key, Document]
    then: LaneState


class Lanes:
    """Some of the `count` lanes of a stream of rows, each with its window; `batch()` gives the next row of each."""

    def __init__(
        self, domains: Sequence[Domain], mine: Iterable[int], count: int, seq_len: int, chunk: int, pad_id: int,
        seed: int, pool: ThreadPoolExecutor, pass_tokens: int, images: ImageShape | None = None,
    ):  # fmt: skip
        """`pass_tokens` is what one pass over the corpus has, about."""
        self._domains, self._mine, self._count = domains, tuple(mine), count
        self._images = images
        self._seq_len, self._chunk, self._pad_id, self._seed, self._pool = seq_len, chunk, pad_id, seed, pool
        of_a_pass = int(pass_tokens / (count * seq_len * OF_A_PASS))
        self.window_rows = max(WINDOW_ROWS, min(WINDOW_TOKENS // seq_len, of_a_pass))
        orders = [np.random.default_rng((seed, d)).permutation(count) for d in range(len(domains))]
        self._phase = {
            lane: [((order[lane] + 0.5) / count - 0.5) * domain.mean_tokens
                   for order, domain in zip(orders, domains, strict=True)]
            for lane in self._mine
        }  # fmt: skip
        zeros = (0,) * len(domains)
        self._states = [LaneState(0, 0, zeros, zeros, (), zeros, ())] * len(self._mine)
        self._windows: list[_Window | None] = [None] * len(self._mine)
        self._next: list[Future[_Window]] = []  # of each lane, once a batch was asked for

    def batch(self) -> Batch:
        """The next row of each lane."""
        if not self._next:
            self._next = [self._pool.submit(self._window, *of, {}) for of in zip(self._mine, self._states, strict=True)]
        return build_batch([self._row(n) for n in range(len(self._mine))], self._seq_len, self._pad_id,
                           self._images)  # fmt: skip

    def _row(self, n: int) -> Row:
        state, window = self._states[n], self._windows[n]
        while window is None or state.given == len(window.rows):
            state = window.then._replace(out=state.out) if window else state
            window = self._windows[n] = self._next[n].result()
            self._next[n] = self._pool.submit(self._window, self._mine[n], window.then, window.documents)
            state = state._replace(after=window.then.read)
        out = tuple(a + b for a, b in zip(state.out, window.tokens[state.given].tolist(), strict=True))
        self._states[n] = state._replace(given=state.given + 1, out=out)
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
        keys = dict.fromkeys(key for key, _ in state.waiting)
        documents = {key: known.get(key) or self._read(lane, *key) for key in keys}
        spans = [span_from(key, start, documents[key], self._seq_len, self._images) for key, start in state.waiting]
        size, wanted = sum(span.stop - span.start for span in spans), rows * self._seq_len
        read, tokens, sizes = list(state.read), list(state.tokens), {}
        while size < wanted or (
            size * SLACK < wanted * (SLACK + 1) and (size - wanted) * len(spans) < SLACK_DOCUMENTS * size
        ):
            if (domain := self._next_domain(lane, read, tokens, sizes)) is None:
                break
            key = (domain, read[domain])
            document = documents[key] = self._read(lane, *key)
            del sizes[domain]
            read[domain] += 1
            tokens[domain] += len(document.tokens)
            size += len(document.tokens)
            spans += cut(key, document, self._seq_len, self._images)
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
        """The fullest `rows` of what is packed, those with what has waited before all; with images any of them, since
        rows with many are less full, for want of room for tiles, and would be the ones that wait.

        So that a state is small, a few long spans wait rather than many tiny ones: among rows that are about as full
        those of the fewest pieces, and where documents are so short that they fill rows anyway, what is too much is
        taken out before. Rows are handed out so that their domains come evenly, however the window is cut off.
        """
        first, waited = len(state.waiting), set(state.waiting)
        size, room = sum(span.stop - span.start for span in spans), rows * self._seq_len
        most = min(self._chunk, self._seq_len)  # longer ones may be much of their domain
        held = _held(spans[first:], size - room, most) if 0 < (size - room) * SLACK < room else set()
        tiles = Tiles(documents, self._images) if self._images else None
        packed = pack([span for span in spans if span not in held], self._seq_len, self._chunk, first, tiles)
        waits = [not any(piece[:2] in waited for piece in row) for row in packed]
        fill = [sum(piece.stop - piece.start for piece in row) * FILLS // self._seq_len for row in packed]
        random = np.random.default_rng((self._seed, lane, state.window))
        preferred = random.permutation(len(packed)).tolist() if tiles else fill
        order = sorted(range(len(packed)), key=lambda row: (waits[row], -preferred[row], -len(packed[row])))
        chosen = [packed[row] for row in random.permutation(order[:rows])]
        if rows <= DEALT:
            chosen = deal(chosen, self._seq_len, self._chunk, len(self._domains), tiles)
        counts = np.zeros((len(chosen), len(self._domains)), np.int64)
        for row, pieces in enumerate(chosen):
            for piece in pieces:
                counts[row, piece.key[0]] += piece.stop - piece.start
        even = _evenly(counts)
        waiting = sorted(
            (part.key, part.start) for row in [held, *(packed[row] for row in order[rows:])] for part in row
        )
        then = LaneState(state.window + 1, 0, tuple(read), tuple(tokens), (), (), tuple(waiting))
        return _Window([chosen[row] for row in even], counts[even], documents, then)

    def _next_domain(
        self, lane: int, read: Sequence[int], tokens: Sequence[int], sizes: dict[int, float]
    ) -> int | None:
        """The domain whose next document is due first; None: no more may be read.

        A document of n tokens, behind t of its domain's, is due when t + n/2 are the domain's share of the whole: so
        all domains are within half a document of their shares of one common count, and as often ahead as behind. (That
        count is off the lane's tokens by their sum; with equal documents this is Webster's apportionment.) Lanes begin
        as if they had read up to half a document more or less of each, evenly spread, so that they do not all turn to a
        rare domain at once.

        `sizes` keeps n of the next documents, estimated from their bytes, between calls.
        """
        due: dict[int, float] = {}
        for d, domain in enumerate(self._domains):
            place = lane + self._count * read[d]
            if domain.share and place < domain.documents and tokens[d] * self._count < domain.tokens:
                if d not in sizes:
                    sizes[d] = domain.size(place)
                due[d] = (tokens[d] + self._phase[lane][d] + sizes[d] / 2) / domain.share
        return min(due, key=due.__getitem__, default=None)

    def _read(self, lane: int, domain: int, place: int) -> Document:
        return self._domains[domain].read(lane + self._count * place)


def _held(spans: Sequence[Span], much: int, most: int) -> set[Span]:
    """A few of the spans of at most `most` tokens, the longest that fit, of about so many tokens."""
    held: set[Span] = set()
    for span in sorted(spans, key=lambda span: span.start - span.stop):
        if (length := span.stop - span.start) <= min(much, most) and len(held) < HELD:
            held.add(span)
            much -= length
    return held


def _evenly(counts: np.ndarray) -> np.ndarray:
    """An order of rows in which the sums of `counts` [rows, domains] grow evenly: always the row, of those left, after
    which they are closest (in the sum of distances) to their part of the whole. In whole numbers, the same anywhere."""
    rows, domains = counts.shape
    step = counts * rows - counts.sum(0)
    rest, ahead, order = list(range(rows)), np.zeros(domains, np.int64), []
    while rest:
        after = ahead + step[rest]
        best = int(np.abs(after).sum(1).argmin())
        order.append(rest.pop(best))
        ahead = after[best]
    return np.array(order, np.int64)
