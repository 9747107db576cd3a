"""From a data configuration to batches: the corpus with its tokenizer, its held-out rows, and the training stream."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import grain
import numpy as np
import sentencepiece
from etils import epath

from data import mixture, sources, tokenizer
from data.batch import Batch, stack
from data.cache import cached, fingerprint
from data.config import DataConfig
from data.packing import Document, Packer, Piece, build_row, check_grid

BPE_SAMPLE = 6_000_000  # bytes of text on which a tokenizer is trained
READ_THREADS = 4  # documents tokenised at once
READ_AHEAD = 16  # documents
BATCHES_AHEAD = 2
POOL_TOKENS = 2**18  # in packed rows from which batches are drawn


class Corpus:
    """The documents of a run: tokenised, split into training and held-out ones, ready to be packed."""

    def __init__(self, documents: Sequence[sources.Source], train: Sequence[np.ndarray], heldout: Sequence[np.ndarray],
                 tokens: tokenizer.Tokenizer, cfg: DataConfig, cache: epath.Path):  # fmt: skip
        self.sources, self._train, self._heldout = documents, train, heldout
        self._cfg, self._cache = cfg, cache
        self.tokenizer = tokens
        self.domains: tuple[str, ...] = tuple(source.name for source in documents)
        self.hash = _corpus_hash(documents, train)
        counts = cache / f"tokens-{fingerprint([self.hash, tokens.hash])}.json"
        self.mean_tokens: dict[str, float] = json.loads(cached(counts, self._count_tokens))
        sizes = {name: mean * len(part) for (name, mean), part in zip(self.mean_tokens.items(), train, strict=True)}
        self.shares: dict[str, float] = mixture.token_shares(sizes, cfg.weights)
        self.tokens = round(sum(sizes.values()))  # of one pass over the training documents, estimated

    def _count_tokens(self) -> bytes:
        parts = zip(self.sources, self._train, strict=True)
        return json.dumps({s.name: mixture.tokens_per_document(s, part, self.tokenizer) for s, part in parts}).encode()

    @classmethod
    def open(cls, cfg: DataConfig, cache: epath.PathLike, log: Callable[[str], object] = print,
             tokens: tokenizer.Tokenizer | None = None) -> Corpus:  # fmt: skip
        """Read, split and, unless one is given or named, train a tokenizer; what was built before is reused from
        `cache`."""
        started = time.monotonic()
        cache = epath.Path(cache)
        documents = sources.open_sources(cfg.sources, cache, cfg.bad_records, log)
        train, heldout = sources.split(documents, cfg.heldout)
        if tokens is None and cfg.tokenizer:
            tokens = tokenizer.load(cfg.tokenizer)
        elif tokens is None:
            parts = (_corpus_hash(documents, train), cfg.vocab_size, BPE_SAMPLE, sentencepiece.__version__)
            file = cache / f"bpe-{fingerprint(parts)}.model"
            sample = _sample(documents, train, BPE_SAMPLE)
            tokens = tokenizer.from_bytes(cached(file, lambda: tokenizer.train_bpe(sample, cfg.vocab_size)))
        corpus = cls(documents, train, heldout, tokens, cfg, cache)
        parts = ", ".join(f"{s.name} {s.sizes.sum() / 1e6:.1f} MB {corpus.shares[s.name]:.0%}" for s in documents)
        skipped = sum(source.skipped for source in documents)
        bad = f", {skipped:,} bad records skipped" if skipped else ""
        log(
            f"data: {parts}; {sum(map(len, train)):,} documents, {sum(map(len, heldout)):,} held out{bad}, "
            f"{corpus.tokens / 1e6:.1f}M tokens of {tokens.vocab_size:,}; opened in {time.monotonic() - started:.1f} s"
        )
        return corpus

    def of(self, cfg: DataConfig, log: Callable[[str], object] = print) -> Corpus:
        """What another stage of a run reads: `cfg`'s documents in its shares, with this corpus's tokenizer."""
        if cfg == self._cfg:
            return self
        if any(getattr(cfg, name) != getattr(self._cfg, name) for name in ("sources", "bad_records", "heldout")):
            return Corpus.open(cfg, self._cache, log, self.tokenizer)
        return Corpus(self.sources, self._train, self._heldout, self.tokenizer, cfg, self._cache)

    def heldout(self, batch: int, seq_len: int, chunk: int, max_batches: int) -> list[Batch]:
        """At most `max_batches` batches of held-out rows, the same at every call; padding rows complete the last.

        A row holds one domain, domains take turns, and each domain's rows are spread evenly over more text than is
        needed, so that a few long documents do not decide.
        """
        self.check_heldout(batch, max_batches)
        turns = [self._heldout_rows(d, seq_len, chunk, batch * max_batches) for d in range(len(self.domains))]
        rows = [rows[n] for n in range(max(map(len, turns))) for rows in turns if n < len(rows)][: batch * max_batches]
        empty = build_row([], {}, seq_len, self.tokenizer.pad_id)
        rows += [empty] * (-len(rows) % batch)
        return [stack(rows[i : i + batch]) for i in range(0, len(rows), batch)]

    def check_heldout(self, batch: int, max_batches: int) -> None:
        """ValueError where that many held-out rows cannot show every domain."""
        if batch * max_batches < len(self.domains):
            raise ValueError(
                f"held-out rows: {max_batches} batch(es) of {batch} cannot show all {len(self.domains)} domains; "
                f"ask for at least {-(-len(self.domains) // batch)} batch(es)"
            )

    def _heldout_rows(self, domain: int, seq_len: int, chunk: int, most: int) -> list[dict[str, np.ndarray]]:
        packer = Packer(seq_len, chunk)
        documents: dict[int, Document] = {}
        packed: list[list[Piece]] = []
        wanted = -(-most // len(self.domains))
        for index in self._heldout[domain].tolist():
            tokens = self.tokenizer.document(self.sources[domain][index])
            documents[index] = Document(tokens, domain, index, True)
            packed += packer.add(index, len(tokens))
            if len(packed) >= 8 * wanted:
                break
        packed += packer.flush()
        # When other domains run out of rows, this one may have to fill their turns: keep all that may be asked for.
        kept = np.unique(np.linspace(0, len(packed) - 1, min(most, len(packed))).astype(int))
        order = np.argsort(np.arange(len(kept)) * 0.6180339887498949 % 1, kind="stable")  # any first few are spread
        return [build_row(packed[kept[i]], documents, seq_len, self.tokenizer.pad_id) for i in order]

    def train(self, batch: int, seq_len: int, chunk: int, seed: int, process_index: int = 0, process_count: int = 1,
              place: dict[str, Any] | None = None, crossing: bool = False) -> TrainIterator:  # fmt: skip
        """An endless iterator over this process's rows of every global batch of `batch` rows.

        All processes walk one stream of rows and take contiguous slices of it, so what is trained on does not depend
        on how many there are. It goes on from `place`, which `get_state` gave, and ValueError if that is of another
        stream of rows; but `crossing` from one into another, it begins behind the documents that were read there: of
        each domain the next ones, so that none comes twice before its domain is through. (What had been read and lay
        ahead in the pool, at most `POOL_TOKENS`, then waits for the domain's next pass.)
        """
        if batch % process_count:
            raise ValueError(f"a global batch of {batch} rows cannot be divided among {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        check_grid(seq_len, chunk)
        identity: dict[str, Any] = dict(
            corpus=self.hash, tokenizer=self.tokenizer.hash, seed=seed, seq_len=seq_len, chunk=min(chunk, seq_len),
            shares={name: round(share, 9) for name, share in self.shares.items()},
            behind=place["stream"]["behind"] if place else {},
        )  # fmt: skip
        if place and crossing and place["stream"] != identity:
            identity, place = identity | {"behind": place["read"]}, None
        behind = identity["behind"].get(self.hash, dict.fromkeys(self.domains, 0))
        documents = mixture.stream(
            self.sources, self._train, self.tokenizer, self.shares, self.mean_tokens, seed, behind
        )
        rows = batch // process_count
        mine = slice(process_index * rows, (process_index + 1) * rows)
        already = tuple(behind[name] for name in self.domains)
        iterator = TrainIterator(
            _Batches(documents, already, seq_len, chunk, batch, mine, self.tokenizer.pad_id, seed), identity
        )
        if place:
            iterator.set_state(place)
        return iterator


def _corpus_hash(documents: Sequence[sources.Source], train: Sequence[np.ndarray]) -> str:
    """Names the training documents and their order."""
    parts = [(source.name, source.hashes[part].tobytes()) for source, part in zip(documents, train, strict=True)]
    return fingerprint(item for pair in parts for item in pair)


def _sample(documents: Sequence[sources.Source], train: Sequence[np.ndarray], most: int) -> Iterator[str]:
    """Training documents of about `most` bytes in all, every domain by its size, in the order of their hashes."""
    total = sum(int(source.sizes[part].sum()) for source, part in zip(documents, train, strict=True))
    for source, part in zip(documents, train, strict=True):
        order = part[np.argsort(source.hashes[part], kind="stable")]
        before = np.cumsum(source.sizes[order]) - source.sizes[order]
        for index in order[before * total < most * int(source.sizes[part].sum())]:
            yield source[int(index)]


class TrainIterator:
    """Batches [B, T] of packed rows, made ahead by a thread. Its state is that of the batches handed out."""

    def __init__(self, batches: _Batches, identity: dict[str, Any]):
        self._identity = identity
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
        self._live = [iter(prefetched)]
        self._finalizer = weakref.finalize(self, _close, self._live)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._live[0])

    def get_state(self) -> dict[str, Any]:
        """JSON-able, and the same on every process: a run may go on with another number of processes."""
        state = cast(_State, self._live[0].get_state())
        rows = {name: [[list(piece) for piece in row] for row in getattr(state, name)] for name in ("open", "ready")}
        read = dict(zip(self._identity["shares"], state.read, strict=True))  # of each domain
        read = self._identity["behind"] | {self._identity["corpus"]: read}
        return dict(stream=self._identity, drawn=state.drawn, next=state.next, read=read, **rows)

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batches that had been handed out when `state` was taken."""
        saved = state["stream"]
        changed = [name for name in self._identity if self._identity[name] != saved.get(name)]
        if changed:
            raise ValueError(
                f"the saved place is of another data stream: {', '.join(changed)} changed since. Resume with the data "
                "it was saved with, or start a new run"
            )
        rows = [tuple(tuple(Piece(*piece) for piece in row) for row in state[name]) for name in ("open", "ready")]
        read = tuple(state["read"][self._identity["corpus"]][name] for name in self._identity["shares"])
        self._live[0].set_state(cast(Any, _State(state["drawn"], state["next"], read, rows[0], rows[1])))

    def close(self) -> None:
        """Stop the threads; the iterator cannot be used after. Done by itself when the program ends."""
        self._finalizer()


def _close(live: list[grain.DatasetIterator]) -> None:
    """Close and release: grain's iterators cannot be collected once the interpreter has torn its modules down."""
    live.pop().close()


class _State(NamedTuple):
    """A place in the row stream: batches drawn, documents read, rows open in the packer, rows in the pool.

    `read` counts the documents of each domain, those of earlier streams included.

    Rows hold places of the document stream, never tokens: they are read and tokenised again on restore.
    """

    drawn: int
    next: int
    read: tuple[int, ...]
    open: tuple[tuple[Piece, ...], ...]
    ready: tuple[tuple[Piece, ...], ...]

    def __deepcopy__(self, memo: dict) -> _State:
        return self  # immutable all through; grain copies the state of every batch


class _Batches(grain.IterDataset):
    """Batches drawn from a pool of the row stream's next rows, of which the rows `mine` are built.

    The pool keeps the pieces of a long document, which follow one another in the stream, from filling whole batches.
    """

    def __init__(
        self, documents: grain.MapDataset, already: tuple[int, ...], seq_len: int, chunk: int, batch: int, mine: slice,
        pad_id: int, seed: int,
    ):  # fmt: skip
        super().__init__()
        self.documents, self.already, self.seq_len, self.chunk = documents, already, seq_len, chunk
        self.batch_rows, self.mine, self.pad_id, self.draw_seed = batch, mine, pad_id, seed
        self.pool_rows = max(batch, POOL_TOKENS // seq_len)

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, plan: _Batches):
        super().__init__()
        self._plan = plan
        self._packer = Packer(plan.seq_len, plan.chunk)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        self._reader = iter(plan.documents.to_iter_dataset(options))
        self._drawn = self._next = 0
        self._read_of = list(plan.already)
        self._ready: list[tuple[Piece, ...]] = []
        self._held: dict[int, Document] = {}

    def __next__(self) -> Batch:
        plan = self._plan
        while len(self._ready) < plan.pool_rows:
            document = self._held[self._next] = next(self._reader)
            self._ready += map(tuple, self._packer.add(self._next, len(document.tokens)))
            self._next += 1
            self._read_of[document.domain] += 1
        order = np.random.default_rng((plan.draw_seed, self._drawn)).permutation(len(self._ready))
        chosen, rest = order[: plan.batch_rows], np.sort(order[plan.batch_rows :])
        rows, self._ready = [self._ready[i] for i in chosen], [self._ready[i] for i in rest]
        self._drawn += 1
        batch = stack([build_row(row, self._held, plan.seq_len, plan.pad_id) for row in rows[plan.mine]])
        self._held = {key: self._held[key] for key in self._needed()}
        return batch

    def _needed(self) -> set[int]:
        return {piece.key for row in (*self._packer.snapshot(), *self._ready) for piece in row}

    def get_state(self) -> _State:
        return _State(self._drawn, self._next, tuple(self._read_of), self._packer.snapshot(), tuple(self._ready))

    def set_state(self, state: _State) -> None:
        self._drawn, self._next, self._ready = state.drawn, state.next, list(state.ready)
        self._read_of = list(state.read)
        self._packer.restore(state.open)
        self._reader.set_state({"next_index": state.next})
        self._held = {key: self._read(key) for key in sorted(self._needed())}

    def _read(self, key: int) -> Document:
        document = self._plan.documents[key]
        assert document is not None  # the stream filters nothing
        return document

    def close(self) -> None:
        self._reader.close()
        super().close()
