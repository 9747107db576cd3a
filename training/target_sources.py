"""Where a student's soft targets come from when its teacher is no learner of the run."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from data.batch import Batch
from llama4_jax.kernels.vocab_loss.sparse import SparseTargets
from training.targets import Identity, Reader


@runtime_checkable
class TargetSource(Protocol):
    """Finds the targets of batches."""

    @property
    def identity(self) -> Identity:
        """Whose they are."""
        ...

    def look_up(self, batch: Batch) -> SparseTargets:
        """Of this process's rows, numpy arrays [B, T, K] and [B, T]."""
        ...

    def close(self) -> None: ...


def open_source(source: str, tokenizer: str, vocab_size: int) -> TargetSource:
    """Of `Distillation.teacher`: targets:DIR. FileNotFoundError, or ValueError naming both sides, where its targets are
    not there or of another tokenizer or vocabulary."""
    kind, _, place = source.partition(":")
    if kind == "targets":
        return Reader(place, tokenizer=tokenizer, vocab_size=vocab_size)
    raise ValueError(f"no targets come from {source!r}: it takes targets:DIR")
