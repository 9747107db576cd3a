"""From a data configuration to batches: the corpus with its tokenizer, its held-out rows, and the training stream."""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, cast

import grain
import numpy as np
import sentencepiece
from etils import epath

from data import mixture, sources, synthetic, tokenizer
from data.batch import Batch, ImageShape
from data.cache import cached, fingerprint
from data.config import DataConfig
from data.content import MARK, Illustrated, tokenise
from data.lanes import Domain, Lanes, LaneState
from data.packing import Document, Key, Row, Tiles, build_batch, check_grid, cut, pack

BPE_SAMPLE = 6_000_000  # bytes of text on which a tokenizer is trained
THREADS = min(8, os.cpu_count() or 1)  # in which windows of lanes are read, tokenised and packed
BATCHES_AHEAD = 2
FULL = 0.9  # of the room for tiles, on average: where more is needed, documents with images would wait ever longer
PLACES = 4096  # of each domain's order that are remembered
ORDER = 2  # of what rows hold: raised where a version of this package reads, packs or deals documents otherwise


class Corpus:
    """The documents of a run: tokenised, split into training and held-out ones, ready to be packed."""

    def __init__(self, documents: Sequence[sources.Source], train: Sequence[np.ndarray], heldout: Sequence[np.ndarray],
                 tokens: tokenizer.Tokenizer, cfg: DataConfig, cache: epath.Path,
                 images: ImageShape | None = None):  # fmt: skip
        self.sources, self._train, self._heldout = documents, train, heldout
        self._cfg, self._cache, self.images = cfg, cache, images
        self.tokenizer = tokens
        self.domains: tuple[str, ...] = tuple(source.name for source in documents)
        self.training_sizes: tuple[int, ...] = tuple(map(len, train))  # documents of each domain
        self.heldout_sizes: tuple[int, ...] = tuple(map(len, heldout))
        self.hash = _corpus_hash(documents, train)
        shape = [images.size, images.tokens, cfg.image_tiles] if images else []
        counts = cache / f"means-{fingerprint([self.hash, tokens.hash, *shape])}.json"
        means: dict[str, list[float]] = json.loads(cached(counts, self._count_sizes))
        self.mean_tokens = {name: mean for name, (mean, _, _) in means.items()}  # of a document
        self.mean_tiles = {name: mean for name, (_, _, mean) in means.items()}
        sizes = {name: mean * len(part) for (name, mean), part in zip(self.mean_tokens.items(), train, strict=True)}
        self.shares: dict[str, float] = mixture.token_shares(sizes, cfg.weights)
        mixture.check_names("repeats", cfg.repeats, self.domains)
        mixture.check_names("caps", cfg.caps, self.domains)
        self.pass_tokens = sizes  # by domain: of one pass over its training documents, estimated
        counted = zip(means.items(), train, strict=True)  # those of them that the loss counts
        self.pass_counted = {name: mean * len(part) for (name, (_, mean, _)), part in counted}
        self.tokens = round(sum(sizes.values()))

    def _count_sizes(self) -> bytes:
        counts = {}
        for domain, (source, part) in enumerate(zip(self.sources, self._train, strict=True)):
            counts[source.name] = mixture.sizes_of_documents(source, part, partial(self._size, domain))
        return json.dumps(counts).encode()

    def _size(self, domain: int, index: int) -> tuple[int, int, int]:
        """A document's tokens, those that the loss counts, and tiles."""
        tokens, images = (document := self._document(domain, index, 0)).tokens, document.images
        inside = int(images.inside[1:].sum()) if images else 0
        return len(tokens), len(tokens) - 1 - inside, len(images.tiles) if images else 0

    @classmethod
    def open(cls, cfg: DataConfig, cache: epath.PathLike, log: Callable[[str], object] = print,
             tokens: tokenizer.Tokenizer | None = None,
             images: tuple[int, int, int] | None = None) -> Corpus:  # fmt: skip
        """Read, split and, unless one is given or named, train a tokenizer; what was built before is reused from
        `cache`. `images`: the room for them in a row (`ImageShape`); None for text alone."""
        started = time.monotonic()
        images = ImageShape(*images) if images else None
        cache = epath.Path(cache)
        if tokens is None and cfg.tokenizer:
            tokens = tokenizer.load(cfg.tokenizer)
        if cfg.synthetic:
            tokens = tokens or tokenizer.SyntheticTokenizer.of(cfg.vocab_size)
            documents = [synthetic.source(tokens)]
        else:
            documents = sources.open_sources(cfg.sources, cache, cfg.bad_records, log)
        train, heldout = sources.split(documents, cfg.heldout)
        if tokens is None:
            parts = (_corpus_hash(documents, train), cfg.vocab_size, BPE_SAMPLE, sentencepiece.__version__)
            file = cache / f"bpe-{fingerprint(parts)}{'-images' * bool(images)}.model"
            sample = _sample(documents, train, BPE_SAMPLE)
            bpe = cached(file, lambda: tokenizer.train_bpe(sample, cfg.vocab_size, bool(images)))
            tokens = tokenizer.from_bytes(bpe)
        corpus = cls(documents, train, heldout, tokens, cfg, cache, images)
        parts = ", ".join(f"{s.name} {s.sizes.sum() / 1e6:.1f} MB {corpus.shares[s.name]:.0%}" for s in documents)
        skipped = sum(source.skipped for source in documents)
        bad = f", {skipped:,} bad records skipped" if skipped else ""
        log(
            f"data: {parts}; {sum(map(len, train)):,} documents, {sum(map(len, heldout)):,} held out{bad}, "
            f"{corpus.tokens / 1e6:.1f}M tokens of {tokens.vocab_size:,}; opened in {time.monotonic() - started:.1f} s"
        )
        return corpus

    def of(self, cfg: DataConfig, log: Callable[[str], object] = print,
           images: tuple[int, int, int] | None = None) -> Corpus:  # fmt: skip
        """What another stage of a run reads: `cfg`'s documents in its shares, with this corpus's tokenizer."""
        images = ImageShape(*images) if images else None
        if cfg == self._cfg and images == self.images:
            return self
        documents = ("sources", "synthetic", "bad_records", "heldout")
        if any(getattr(cfg, name) != getattr(self._cfg, name) for name in documents):
            return Corpus.open(cfg, self._cache, log, self.tokenizer, images)
        return Corpus(self.sources, self._train, self._heldout, self.tokenizer, cfg, self._cache, images)

    def heldout(self, batch: int, seq_len: int, chunk: int, max_batches: int) -> list[Batch]:
        """At most `max_batches` batches of held-out rows, the same at every call; padding rows complete the last.

        A row holds one domain, domains take turns, and each domain's rows are spread evenly over more text than is
        needed, so that a few long documents do not decide.
        """
        self.check_heldout(batch, max_batches)
        turns = [self._heldout_rows(d, seq_len, chunk, batch * max_batches) for d in range(len(self.domains))]
        rows = [rows[n] for n in range(max(map(len, turns))) for rows in turns if n < len(rows)][: batch * max_batches]
        rows += [([], {})] * (-len(rows) % batch)
        pad_id = self.tokenizer.pad_id
        return [build_batch(rows[i : i + batch], seq_len, pad_id, self.images) for i in range(0, len(rows), batch)]

    def heldout_of(self, domain: str, batch: int, seq_len: int, chunk: int) -> Iterator[Batch]:
        """All held-out documents of a domain, in batches of so many rows, the last one filled with padding."""
        d = self.domains.index(domain)
        rows = self._heldout_rows(d, seq_len, chunk, 2**31)
        for i in range(0, len(rows), batch):
            some = rows[i : i + batch] + [([], {})] * max(0, i + batch - len(rows))
            yield build_batch(some, seq_len, self.tokenizer.pad_id, self.images)

    def check_heldout(self, batch: int, max_batches: int) -> None:
        """ValueError where that many held-out rows cannot show every domain."""
        if batch * max_batches < len(self.domains):
            raise ValueError(
                f"held-out rows: {max_batches} batch(es) of {batch} cannot show all {len(self.domains)} domains; "
                f"ask for at least {-(-len(self.domains) // batch)} batch(es)"
            )

    def _heldout_rows(self, domain: int, seq_len: int, chunk: int, most: int) -> list[Row]:
        check_grid(seq_len, chunk)
        documents: dict[Key, Document] = {}
        wanted, tokens, spans = -(-most // len(self.domains)), 0, []
        for index in self._heldout[domain].tolist():
            document = documents[domain, index] = self._document(domain, index, 0)
            spans += cut((domain, index), document, seq_len, self.images)
            tokens += len(document.tokens)
            if tokens >= 8 * wanted * seq_len:
                break
        packed = pack(spans, seq_len, chunk, tiles=Tiles(documents, self.images) if self.images else None)
        # When other domains run out of rows, this one may have to fill their turns: keep all that may be asked for.
        kept = np.unique(np.linspace(0, len(packed) - 1, min(most, len(packed))).astype(int))
        order = np.argsort(np.arange(len(kept)) * 0.6180339887498949 % 1, kind="stable")  # any first few are spread
        return [(packed[kept[i]], documents) for i in order]

    def _document(self, domain: int, index: int, visit: int) -> Document:
        """ValueError names a document with images where there is no room for any."""
        source = self.sources[domain]
        if source.ids is not None:
            return Document(source.ids(index), domain, index, visit == 0)
        text = source[index]
        try:
            tokens, images = tokenise(text, self.tokenizer, self.images, self._cfg.image_tiles)
        except ValueError as error:
            raise ValueError(f"document {index} of {self.domains[domain]}: {error}") from error
        return Document(tokens, domain, index, visit == 0, images)

    def train(self, batch: int, seq_len: int, chunk: int, seed: int, process_index: int = 0, process_count: int = 1,
              place: Mapping[str, Any] | None = None, crossing: bool = False) -> TrainIterator:  # fmt: skip
        """An endless iterator over this process's rows of every global batch of `batch` rows.

        Row i is of lane i (`data/lanes.py`), and a process has the lanes of its rows, so what is trained on does not
        depend on how many there are. It goes on from `place`, which holds the lanes of all processes (`merged`), and
        ValueError if that is of another stream of rows; but `crossing` from one into another, it begins behind the
        documents that were read there: of each domain the next ones, so that none comes twice before its domain is
        through. (What lanes had read into the windows they were at then waits for the domain's next pass.)
        """
        if batch % process_count:
            raise ValueError(f"a global batch of {batch} rows cannot be divided among {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        check_grid(seq_len, chunk)
        self._check_tiles(seq_len)
        if place and place["stream"].get("order") != ORDER:
            raise ValueError(
                "the saved place is one of another version of this program, which read documents in another order: "
                "finish the run with that one, or begin a new run with its weights (--init run:RUN)"
            )
        identity: dict[str, Any] = dict(
            order=ORDER, corpus=self.hash, tokenizer=self.tokenizer.hash, seed=seed, lanes=batch, seq_len=seq_len,
            chunk=min(chunk, seq_len), shares={name: round(share, 9) for name, share in self.shares.items()},
            repeats=self._cfg.repeats, caps=self._cfg.caps, behind=place["stream"]["behind"] if place else {},
            spent=place["stream"]["spent"] if place else {},
        )  # fmt: skip
        if self.images:
            identity["images"] = [*self.images, self._cfg.image_tiles]
        if place and crossing and place["stream"] != identity:
            identity |= {"behind": documents_read(place), "spent": tokens_of_stages(place)}
            place = None
        rows = batch // process_count
        mine = range(process_index * rows, (process_index + 1) * rows)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="documents")

        def lanes() -> Lanes:
            behind, spent = identity["behind"].get(self.hash, {}), identity["spent"]
            domains = [self._domain(d, seed, behind, spent) for d in range(len(self.domains))]
            return Lanes(domains, mine, batch, seq_len, chunk, self.tokenizer.pad_id, seed, pool, self.tokens,
                         self.images)  # fmt: skip

        iterator = TrainIterator(_Batches(lanes), identity, pool)
        if place:
            iterator.set_state(place)
        return iterator

    def _check_tiles(self, seq_len: int) -> None:
        """ValueError where rows have more tiles on average than room for them: ever more of them would wait."""
        of_rows = {name: seq_len * share * self.mean_tiles[name] / self.mean_tokens[name]
                   for name, share in self.shares.items()}  # fmt: skip
        if self.images and (need := sum(of_rows.values())) > FULL * self.images.tiles:
            most = max(of_rows, key=lambda name: of_rows[name])
            raise ValueError(
                f"a row of {seq_len:,} tokens has {need:.1f} tiles on average, {of_rows[most]:.1f} of them of {most}, "
                f"for which train.tiles ({self.images.tiles}) leaves too little room: set it to "
                f"{math.ceil(1.25 * need)}, or data.weights {most} to "
                f"{self.shares[most] * FULL * self.images.tiles / need:.2g}"
            )

    def training_order(
        self, domain: int, seed: int, behind: Sequence[Sequence[int]] = ()
    ) -> Callable[[int], tuple[int, int]]:
        """Place in the domain's order (`data.mixture.Order`) to (the document's index in the domain, pass)."""
        indices = self._train[domain]
        order = mixture.Order(self.domains[domain], len(indices), seed, behind)

        def at(place: int) -> tuple[int, int]:
            document, visit = order[place]
            return int(indices[document]), visit

        return at

    def _domain(
        self, domain: int, seed: int, behind: Mapping[str, Sequence[Sequence[int]]], spent: Mapping[str, int]
    ) -> Domain:
        """What lanes read of it; `behind` says by domain what documents the lanes of earlier stages read, `spent` how
        many tokens they handed out: passes and tokens are bounded over the whole run."""
        name, taken = self.domains[domain], behind.get(self.domains[domain], ())
        # A document's size is asked for before it is read, and the place of a shuffled one is a small search.
        at, sizes = lru_cache(PLACES)(self.training_order(domain, seed, taken)), self.sources[domain].sizes
        mean = self.mean_tokens[name]
        a_byte = (mean - 2) / float(sizes[self._train[domain]].mean())
        return Domain(
            name, self.shares[name], lambda place: self._document(domain, *at(place)),
            lambda place: 2 + a_byte * int(sizes[at(place)[0]]), mean,
            self._cfg.repeats.get(name, float("inf")) * len(self._train[domain]) - sum(map(sum, taken)),
            float(self._cfg.caps.get(name, "inf")) - spent.get(name, 0),
        )  # fmt: skip


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
        share = -(-most * int(source.sizes[part].sum()) // total)  # in Python's integers: 64 bits are too few
        for index in order[before < share]:
            text = source[int(index)]
            yield text.replace(MARK, "") if isinstance(text, Illustrated) else text


def documents_read(place: Mapping[str, Any]) -> dict[str, dict[str, list[list[int]]]]:
    """By corpus and domain: of each stage of the run up to `place`, the documents that each of its lanes read."""
    stream = place["stream"]
    states = [LaneState.from_json(place["lanes"][str(lane)]) for lane in range(stream["lanes"])]
    before = stream["behind"].get(stream["corpus"], {})
    here = {name: [*before.get(name, []), [(state.after or state.read)[d] for state in states]]
            for d, name in enumerate(stream["shares"])}  # fmt: skip
    return stream["behind"] | {stream["corpus"]: before | here}


def tokens_of_stages(place: Mapping[str, Any]) -> dict[str, int]:
    """By domain: the tokens in the rows that were handed out in all of a run up to `place`, of whatever corpus."""
    stream, total = place["stream"], dict(place["stream"]["spent"])
    for d, name in enumerate(stream["shares"]):
        here = sum(LaneState.from_json(values).out[d] for values in place["lanes"].values())
        total[name] = total.get(name, 0) + here
    return total


def ledger(corpus: Corpus, place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every document of `corpus` that a run has read up to `place`: domain, its index there, pass (from 0), and which
    stage (those of this corpus alone) and lane read it. By domain and stage, each lane's in the order of reading."""
    read, seed = documents_read(place).get(corpus.hash, {}), place["stream"]["seed"]
    for domain, name in enumerate(corpus.domains):
        stages = read.get(name, [])
        for stage, taken in enumerate(stages):
            of = corpus.training_order(domain, seed, stages[:stage])
            for lane, count in enumerate(taken):
                for k in range(count):
                    index, visit = of(lane + len(taken) * k)
                    yield {"domain": name, "document": index, "pass": visit, "stage": stage, "lane": lane}


def merged(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The place of a whole program: what `TrainIterator.get_state` gave on each of its processes, with all lanes."""
    lanes = {lane: state for place in places for lane, state in place["lanes"].items()}
    return {**places[0], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


class TrainIterator:
    """Batches [B, T] of packed rows, made ahead by a thread. Its state is that of the batches handed out."""

    def __init__(self, batches: _Batches, identity: dict[str, Any], pool: ThreadPoolExecutor):
        self._identity = identity
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
        self._live = [iter(prefetched)]
        self._finalizer = weakref.finalize(self, _close, self._live, pool)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._live[0])

    def get_state(self) -> dict[str, Any]:
        """JSON-able: what names the stream, and where each lane of this process is."""
        states = cast(dict[int, LaneState], self._live[0].get_state())
        return dict(stream=self._identity, lanes={str(lane): state.to_json() for lane, state in states.items()})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on exactly after the batches that had been handed out when `state` was taken (`merged`, of all lanes)."""
        saved = state["stream"]
        changed = [name for name in self._identity if self._identity[name] != saved.get(name)]
        if changed:
            raise ValueError(
                f"the saved place is of another data stream: {', '.join(changed)} changed since. Resume with the data "
                "it was saved with, or start a new run"
            )
        lanes = {int(lane): LaneState.from_json(values) for lane, values in state["lanes"].items()}
        self._live[0].set_state(cast(Any, lanes))

    def close(self) -> None:
        """Stop the threads; the iterator cannot be used after. Done by itself when the program ends."""
        self._finalizer()


def _close(live: list[grain.DatasetIterator], pool: ThreadPoolExecutor) -> None:
    """Close and release: grain's iterators cannot be collected once the interpreter has torn its modules down."""
    live.pop().close()
    pool.shutdown(cancel_futures=True)


class _Batches(grain.IterDataset):
    """The next row of each lane, again and again."""

    def __init__(self, lanes: Callable[[], Lanes]):
        super().__init__()
        self.lanes = lanes

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(self.lanes())


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, lanes: Lanes):
        super().__init__()
        self._lanes = lanes

    def __next__(self) -> Batch:
        return self._lanes.batch()

    def get_state(self) -> dict[int, LaneState]:
        return self._lanes.states

    def set_state(self, state: dict[int, LaneState]) -> None:
        self._lanes.restore(state)
