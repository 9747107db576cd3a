"""Random tokens in place of documents (`data.synthetic`): to try a run's mechanics or its speed, never a fallback.

They are a corpus like others, of documents whose tokens follow from their number: mixed, packed, held out, resumed and
listed by the same code. What it is made of follows from the vocabulary alone; its order from the run's seed.
"""

from __future__ import annotations

import numpy as np

from data.sources import Source
from data.tokenizer import Tokenizer

NAME = "synthetic"
"""Of the domain."""
COUNT = 2**17
LENGTHS = (6.9, 1.4, 16, 2**17)
"""Documents, and their tokens: log-normal with this mean and deviation of the logarithm, about as prose has, and these
bounds; in all about 340M tokens a pass."""
BYTES = 4  # that a token counts for in sizes


def uniform(vocabulary: int, length: int, *key: int) -> np.ndarray:
    """int32 [length], each id below `vocabulary` as likely as any other; the same for the same key, anywhere."""
    return np.random.default_rng(key).integers(0, vocabulary, length, np.int32)


def source(tokens: Tokenizer) -> Source:
    """The domain of random documents, between bos and eos."""
    mean, deviation, least, most = LENGTHS
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(mean, deviation, COUNT)), least, most).astype(np.int64)
    hashes = rng.integers(0, 2**64, COUNT, np.uint64)

    def document(index: int) -> np.ndarray:
        inside = uniform(tokens.vocab_size, int(lengths[index]), index)
        return np.concatenate(([tokens.bos_id], inside, [tokens.eos_id]), dtype=np.int32)

    def text(index: int) -> str:
        return tokens.decode(document(index))

    return Source(NAME, hashes, BYTES * lengths, text, ids=document)
