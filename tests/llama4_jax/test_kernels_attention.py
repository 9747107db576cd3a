"""The chunked form of local attention is the definition by document positions, on chunk-aligned rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.attention import api, reference

B, N, K, H, C = 2, 4, 2, 8, 8


def inputs(T: int):
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    # Row 0: a document of 2.5 chunks, its tail filled by another, then two short ones; padding at the end.
    # Row 1: one document throughout.
    for start, end, segment in ((0, 20, 1), (20, 24, 2), (24, 29, 3), (29, 31, 4)):
        end = min(end, T)
        segments[0, start:end], positions[0, start:end] = segment, np.arange(max(0, end - start))
    segments[1], positions[1] = 1, np.arange(T)
    return q, k, v, jnp.asarray(segments), positions


def by_definition(q, k, v, segments, positions):
    """Softmax over the keys of the query's document and position chunk, up to itself, in numpy loops."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        same = (segments[b] == segments[b, t]) & (positions[b] // C == positions[b, t] // C)
        keys = [s for s in range(t + 1) if same[s]]
        scores = np.array([q[b, t, n] @ k[b, s, n // (N // K)] for s in keys]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ np.array([v[b, s, n // (N // K)] for s in keys])
    return out


@pytest.mark.parametrize("T", [5, 8, 32, 37])
def test_chunks_of_the_row_are_chunks_of_the_documents(T):
    q, k, v, segments, positions = inputs(T)
    got = api.chunked_attention(q, k, v, segments, C)
    want = by_definition(*map(np.asarray, (q, k, v, segments)), positions)
    valid = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=1e-5)


def test_a_shard_of_queries_sees_what_the_whole_row_sees():
    q, k, v, segments, _ = inputs(32)
    whole = api.global_attention(q, k, v, segments, segments)
    shard = jax.jit(lambda start: api.global_attention(q[:, 16:24], k, v, segments[:, 16:24], segments, start))(16)
    np.testing.assert_allclose(shard, whole[:, 16:24], atol=1e-6)


def test_no_gradient_crosses_documents_or_time():
    q, k, v, segments, _ = inputs(32)
    dk = jax.grad(lambda k: reference.attention(q, k, v, segments, segments)[0, 22].sum())(k)
    assert set(np.flatnonzero(np.abs(np.asarray(dk[0])).sum((1, 2)))) == {20, 21, 22}
