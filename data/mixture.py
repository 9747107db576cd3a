"""The mixture of domains: shares of the *tokens*, and the endless order in which a domain's documents are read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from data.cache import fingerprint
from data.sources import Source


def token_shares(tokens: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Share of the tokens of every domain, summing to 1.

    `tokens` is each domain's size. Domains that `weights` does not name share what it leaves, by their size.
    """
    check_names("weights", weights, tokens)
    for name, weight in weights.items():
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


def check_names(field: str, given: Iterable[str], domains: Collection[str]) -> None:
    """ValueError where data.`field` names a domain that is not there."""
    for name in given:
        if name not in domains:
            nearest = difflib.get_close_matches(name, domains, n=1, cutoff=0)[0]
            raise ValueError(
                f"data.{field} names no domain with {name!r}; the nearest is {nearest!r} (of {', '.join(domains)})"
            )


def sizes_of_documents(
    source: Source, indices: np.ndarray, count: Callable[[int], tuple[int, int, int]], sample: int = 16 << 20
) -> list[float]:
    """Means of a document: tokens, bos and eos included, those that the loss counts, and tiles. From the exact mean of
    its bytes, and what a sample has of them a byte.

    The sample, `sample` bytes or the whole domain if that is less, is taken in the order of the content hashes, so it
    does not depend on the documents' order; `count` says how many one of them has. Tokenizers leave the interpreter
    free while they encode.
    """
    order = indices[np.argsort(source.hashes[indices], kind="stable")]
    before = np.cumsum(source.sizes[order]) - source.sizes[order]
    order = order[before < sample]
    with ThreadPoolExecutor() as pool:
        found = np.array(list(pool.map(count, order.tolist())), np.int64).reshape(-1, 3)
    ends = np.array([2, 1, 0])  # bos and eos, and that eos is predicted, whatever a document's length
    grows = (found - ends).sum(axis=0) * (source.sizes[indices].mean() / max(source.sizes[order].sum(), 1))
    return (ends + grows).tolist()


class Order:
    """An endless order of a domain's `count` documents, by place at random; every pass over them is shuffled anew.

    It depends on the seed and the domain's name alone, not on what the domain is mixed with. `behind` says what earlier
    stages of a run have read, each as the number of documents that each of its lanes took (`data/lanes.py`): the places
    that they left out come first, then those behind all of them.
    """

    def __init__(self, name: str, count: int, seed: int, behind: Sequence[Sequence[int]] = ()):
        self._count = count
        passes = grain.MapDataset.range(count).seed(int(fingerprint([seed, name])[:8], 16))
        self._shuffled = passes.shuffle().repeat()
        self._levels = [_left_out(np.asarray(taken, np.int64)) for taken in behind]

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(which document, in which pass) of those at `place` in the order."""
        for left, start in reversed(self._levels):
            place = int(left[place]) if place < len(left) else start + place - len(left)
        document = self._shuffled[place]
        assert document is not None  # nothing is filtered
        return int(document), place // self._count


def _left_out(taken: np.ndarray) -> tuple[np.ndarray, int]:
    """Lane i of L took the places i, i + L, ..., `taken[i]` of them: (places left out before the last one, the end)."""
    lanes, most = len(taken), int(taken.max(initial=0))
    unread = np.arange(int(taken.min(initial=most)), most)[:, None] >= taken
    step, lane = np.nonzero(unread)
    return (step + most - len(unread)) * lanes + lane, most * lanes
