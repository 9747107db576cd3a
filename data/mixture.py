"""The mixture of domains: an endless stream of documents whose *tokens* come in the chosen shares.

Grain mixes documents. With shares s_d of the tokens and domains whose documents have m_d tokens on average, documents
are drawn in proportion to s_d / m_d. The stream is random access by index, so any place in it can be had again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from data.cache import fingerprint
from data.packing import Document
from data.sources import Source
from data.tokenizer import Tokenizer


def token_shares(tokens: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Share of the tokens of every domain, summing to 1.

    `tokens` is each domain's size. Domains that `weights` does not name share what it leaves, by their size.
    """
    for name, weight in weights.items():
        if name not in tokens:
            nearest = difflib.get_close_matches(name, tokens, n=1, cutoff=0)[0]
            raise ValueError(
                f"data.weights names no domain with {name!r}; the nearest is {nearest!r} (of {', '.join(tokens)})"
            )
        if not weight >= 0:
            raise ValueError(f"data.weights gives {name!r} the share {weight}; it must not be negative")
    rest = {name: size for name, size in tokens.items() if name not in weights}
    left = 1 - sum(weights.values())
    if abs(left) < 1e-6:
        left = 0.0
    if left < 0 or (left > 0 and not rest):
        bound = "at most 1" if rest else "1 when every domain is named"
        raise ValueError(f"data.weights sums to {1 - left:g}; shares of the tokens must sum to {bound}")
    return {
        name: float(weights[name]) if name in weights else left * size / sum(rest.values())
        for name, size in tokens.items()
    }


def tokens_per_document(source: Source, indices: np.ndarray, tokenizer: Tokenizer, sample: int = 16 << 20) -> float:
    """Mean tokens of a document, bos and eos included, from the exact mean of its bytes and a sample's tokens a byte.

    The sample, `sample` bytes or the whole domain if that is less, is taken in the order of the content hashes, so it
    does not depend on the documents' order. Both tokenizers leave the interpreter free while they encode.
    """
    order = indices[np.argsort(source.hashes[indices], kind="stable")]
    before = np.cumsum(source.sizes[order]) - source.sizes[order]
    order = order[before < sample]
    with ThreadPoolExecutor() as pool:
        tokens = sum(pool.map(lambda index: len(tokenizer.encode(source[index])), order.tolist()))
    return 2 + float(source.sizes[indices].mean()) * tokens / max(int(source.sizes[order].sum()), 1)


def stream(
    sources: Sequence[Source],
    indices: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    shares: Mapping[str, float],
    mean_tokens: Mapping[str, float],
    seed: int,
    behind: Mapping[str, int] | None = None,
) -> grain.MapDataset:
    """An endless grain MapDataset of `Document`s, tokenised when read. Every pass over a domain is shuffled anew.

    A domain's order depends on the seed and its name alone, not on what it is mixed with: so another mixture can begin
    `behind` as many documents of each domain as were read before.
    """
    parts, weights = [], []
    for domain, source in enumerate(sources):
        if shares[source.name] == 0:
            continue
        read = _Read(source, indices[domain], tokenizer, domain)
        order = grain.MapDataset.range(len(indices[domain])).seed(int(fingerprint([seed, source.name])[:8], 16))
        parts.append(order.shuffle().repeat().map_with_index(read)[(behind or {}).get(source.name, 0) :])
        weights.append(shares[source.name] / mean_tokens[source.name])
    return grain.MapDataset.mix(parts, weights=weights)


class _Read:
    """Read and tokenise the document at a place of a domain's endless stream."""

    def __init__(self, source: Source, indices: np.ndarray, tokenizer: Tokenizer, domain: int):
        self._source, self._indices, self._tokenizer, self._domain = source, indices, tokenizer, domain

    def __call__(self, place: int, position: int) -> Document:
        index = int(self._indices[position])
        epoch = place // len(self._indices)
        return Document(self._tokenizer.document(self._source[index]), self._domain, index, epoch == 0)
