"""Where a student's soft targets come from when its teacher is no learner of the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

from data.batch import Batch
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training.stream import Stream
from training.targets import Identity, Reader


@runtime_checkable
class TargetSource(Protocol):
    """Finds the targets of batches."""

    @property
    def identity(self) -> Identity:
        """Whose they are."""
        ...

    @property
    def ahead(self) -> int:
        """Batches that it wants to be asked for before they are looked up."""
        ...

    def ask(self, batch: Batch) -> None:
        """`batch` will be looked up, after those that were asked for before it."""
        ...

    def look_up(self, batch: Batch) -> SparseTargets:
        """Of this process's rows, numpy arrays [B, T, K] and [B, T]."""
        ...

    def close(self) -> None: ...


def open_source(
    source: str, tokenizer: str, vocab_size: int, chunk: int, say: Callable[[str], object] = print
) -> TargetSource:
    """Of `Distillation.teacher`: targets:DIR or stream:HOST:PORT. FileNotFoundError, ConnectionError, or ValueError
    naming both sides, where its targets are not there or of another tokenizer or vocabulary, or, of a stream, its rows
    packed for another chunk. `say` takes lines about a teacher that is waited for."""
    kind, _, place = source.partition(":")
    if kind == "targets":
        return Reader(place, tokenizer=tokenizer, vocab_size=vocab_size)
    if kind == "stream":
        return Stream(place, tokenizer, vocab_size, chunk, say=say)
    raise ValueError(f"no targets come from {source!r}: it takes targets:DIR or stream:HOST:PORT")


@runtime_checkable
class Batches(Protocol):
    """What a run trains on, as `data.loader.TrainIterator` has it."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The place behind the batches that were handed out."""
        ...

    def close(self) -> None: ...


class ReadAhead:
    """The next `steps` batches of a run, drawn up to `ahead` before they are handed out, and asked for then.

    Its state is that of the batches handed out: what was drawn beyond them is drawn again by a run that goes on there.
    """

    def __init__(self, stream: Batches, sources: Collection[TargetSource], ahead: int, steps: int):
        self._stream, self._sources, self._ahead, self._left = stream, list(sources), ahead, steps
        self._held: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._place = stream.get_state()

    def __next__(self) -> Batch:
        while self._left and len(self._held) < self._ahead:
            batch = next(self._stream)
            for source in self._sources:
                source.ask(batch)
            self._held.append((batch, self._stream.get_state()))
            self._left -= 1
        if not self._held:
            raise StopIteration
        batch, self._place = self._held.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._place

    def close(self) -> None:
        self._stream.close()


def read_ahead(stream: Batches, sources: Collection[TargetSource], steps: int) -> Batches:
    """The stream as far ahead of the next `steps` steps as the sources want; itself where none does."""
    ahead = max((source.ahead for source in sources), default=0)
    return ReadAhead(stream, sources, ahead, steps) if ahead else stream
