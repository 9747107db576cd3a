"""How often a model names what an image shows, on images that were held out.

A name is the text between an image and the next one, or the document's end. It counts where every token of it is the
likeliest of the whole vocabulary behind the image and the name's own tokens before: what greedy decoding would write.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.batch import Batch
from data.loader import Corpus
from training.config import Learner
from training.state import graphdef

ROWS = 8


class Naming(NamedTuple):
    """Of the images of a domain that were held out."""

    images: int
    named: int  # of those
    commonest: int  # images with the commonest name: what one could score blindly

    def __str__(self) -> str:
        return (
            f"{self.named} of {self.images} held-out images named ({self.named / max(self.images, 1):.0%}; the "
            f"commonest name is of {self.commonest / max(self.images, 1):.0%})"
        )


def naming(learner: Learner, params: nnx.State, corpus: Corpus, domain: str, seq_len: int) -> Naming:
    """Over all held-out documents of a domain of images, on this process's first device."""
    model = graphdef(learner)

    @jax.jit
    def predict(params: nnx.State, batch: Batch) -> jax.Array:
        out = nnx.merge(model, params)(
            batch.tokens, batch.positions, batch.segment_ids, tiles_BJ=batch.tiles, slots_BT=batch.slots
        )
        return jnp.argmax(jnp.einsum("BTD,DV->BTV", out.hidden, out.unembedding), axis=-1)

    names: Counter[tuple[int, ...]] = Counter()
    named = 0
    for batch in corpus.heldout_of(domain, ROWS, seq_len, learner.model.chunk):
        right_BT = np.asarray(predict(params, batch)) == batch.labels
        for row, place in _names(batch, corpus.tokenizer.eos_id):
            names[tuple(batch.labels[row, place].tolist())] += 1
            named += bool(right_BT[row, place].all())
    return Naming(names.total(), named, max(names.values(), default=0))


def _names(batch: Batch, eos_id: int) -> list[tuple[int, np.ndarray]]:
    """(row, positions whose labels are a name's tokens) of every image that has a name behind it."""
    found = []
    for row in range(len(batch.tokens)):
        counts = (batch.loss_mask[row] > 0) & (batch.labels[row] != eos_id)
        starts = np.flatnonzero(counts & ~np.append(False, counts[:-1]))
        for start in starts:
            stop = start + int(np.argmin(np.append(counts[start:], False)))
            # A name begins where an image ends: the token before its first one is no text.
            if start and batch.slots[row, start - 1] >= 0:
                found.append((row, np.arange(start, stop)))
    return found
