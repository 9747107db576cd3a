"""Every backend equals the definition, in value and gradient; chunks of the row are chunks of its documents."""

from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.attention import api, blockwise, reference, splash

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


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("T", [5, 8, 32, 37])
def test_chunks_of_the_row_are_chunks_of_the_documents(T, backend):
    q, k, v, segments, positions = inputs(T)
    got = api.chunked_attention(q, k, v, segments, C, backend=backend)
    want = by_definition(*map(np.asarray, (q, k, v, segments)), positions)
    valid = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=1e-5)


def test_a_shard_of_queries_sees_what_the_whole_row_sees():
    q, k, v, segments, _ = inputs(32)
    whole = reference.attention(q, k, v, segments, segments)
    part = reference.attention(q[:, 16:24], k, v, segments[:, 16:24], segments, jnp.arange(16, 24))
    np.testing.assert_allclose(part, whole[:, 16:24], atol=1e-6)


def test_no_gradient_crosses_documents_or_time():
    q, k, v, segments, _ = inputs(32)
    dk = jax.grad(lambda k: reference.attention(q, k, v, segments, segments)[0, 22].sum())(k)
    assert set(np.flatnonzero(np.abs(np.asarray(dk[0])).sum((1, 2)))) == {20, 21, 22}


# ----------------------------------------------------------------------------------- backends against the reference


def packed(S: int, N: int = N, K: int = K, H: int = H):
    """Rows of a third, a fourth and the rest, with padding; and of two documents."""
    rng = np.random.default_rng(S)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(B, S, n, H)), jnp.float32) for n in (N, K, K, N))
    segments = np.ones((B, S), np.int32)
    segments[0, S // 3 :], segments[0, S // 3 + S // 4 :], segments[0, S - S // 7 :] = 2, 3, 0
    segments[1, S // 2 + 1 :] = 2
    return q, k, v, jnp.asarray(segments), weights


def mirrored(S: int, c: int, i: int) -> np.ndarray:
    T = S // c
    return np.r_[np.arange(T // 2) + i * T, np.arange(T // 2, T) + (c - 1 - i) * T]


def value_and_gradients(attention, S: int, positions: np.ndarray | None, **sizes):
    q, k, v, segments, weights = packed(S, **sizes)
    rows = np.arange(S) if positions is None else positions

    @jax.jit
    def run(q, k, v, positions):
        def loss(q, k, v):
            out = attention(q, k, v, segments[:, rows], segments, positions)
            return jnp.sum(out * weights[:, rows]), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    return run(q[:, rows], k, v, positions)


def assert_equals_reference(attention, S: int, positions: np.ndarray | None, **sizes):
    got = value_and_gradients(attention, S, positions, **sizes)
    want = value_and_gradients(reference.attention, S, positions, **sizes)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize(
    ("S", "positions"),
    [
        (37, None),
        (300, None),
        (5, None),
        (260, np.arange(100, 230)),  # the queries of a shard
        (300, mirrored(300, 2, 1)),
        (300, np.random.default_rng(0).permutation(300)[:140]),
    ],
    ids=["one block", "three blocks", "few", "shard", "mirrored", "anywhere"],
)
def test_blockwise_equals_the_reference(S, positions):
    assert_equals_reference(blockwise.attention, S, positions)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (3, 3)], ids=str)
def test_blockwise_groups_heads_like_the_reference(heads):
    assert_equals_reference(blockwise.attention, 140, None, N=heads[0], K=heads[1])


def test_blockwise_softmax_is_fp32_in_bfloat16():
    q, k, v, segments, _ = packed(300)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    got = jax.jit(blockwise.attention)(q, k, v, segments, segments)
    assert got.dtype == jnp.bfloat16
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want = reference.attention(q, k, v, segments, segments)
    assert np.abs(np.float32(got) - want).max() <= 2**-7 * np.abs(want).max()  # the weights' and the output's rounding


def arrays(jaxpr):
    """Sizes of all values in a jaxpr, those in loops and calls included."""
    for eqn in jaxpr.eqns:
        yield from (x.aval.size for x in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from arrays(getattr(inner, "jaxpr", inner))


def test_blockwise_memory_is_linear():
    def largest(attention, S: int) -> int:
        x = jnp.zeros((1, S, 1, 8))
        ones = jnp.ones((1, S), jnp.int32)
        gradient = jax.grad(lambda q, k, v: attention(q, k, v, ones, ones).sum(), (0, 1, 2))
        return max(arrays(jax.make_jaxpr(gradient)(x, x, x).jaxpr))

    assert largest(reference.attention, 4096) == 4096**2
    assert largest(blockwise.attention, 4096) == 4096 * 8  # the inputs


def test_block_states_hide_nothing_visible():
    S, block = 96, 8
    segments = np.asarray(packed(S)[3])
    for positions in (np.arange(S), mirrored(S, 2, 0)):
        causal = np.greater_equal.outer(positions, np.arange(S))
        visible = causal & (segments[:, positions][:, :, None] == segments[:, None])
        by_block = visible.reshape(B, len(positions) // block, block, S // block, block)
        causal = causal.reshape(by_block.shape[1:])
        states = np.asarray(blockwise.block_states(
            jnp.asarray(positions.reshape(-1, block)),
            jnp.asarray(segments[:, positions].reshape(B, -1, block).swapaxes(0, 1)),
            jnp.asarray(segments.reshape(B, -1, block).swapaxes(0, 1)),
        ))  # fmt: skip
        assert not np.any(by_block, axis=(0, 2, 4))[states == blockwise.HIDDEN].any()
        assert np.all(causal, axis=(1, 3))[states == blockwise.FULL].all()
        assert not np.all(causal, axis=(1, 3))[states == blockwise.PARTIAL].any()
        assert (states == blockwise.HIDDEN).sum() > 0.4 * states.size


def test_documents_cost_the_sum_of_their_squares():
    """Eight documents of four blocks: of 528 causal pairs of blocks, 80 are walked."""
    segments = jnp.repeat(jnp.arange(1, 9), 32).reshape(-1, 1, 8)
    positions = jnp.arange(256).reshape(-1, 8)
    assert int((blockwise.block_states(positions, segments * 0, segments * 0) > 0).sum()) == 32 * 33 // 2
    assert int((blockwise.block_states(positions, segments, segments) > 0).sum()) == 8 * (4 * 5 // 2)


# ------------------------------------------------------------------------------------------------- splash, in a model


@pytest.fixture
def interpreted(monkeypatch):
    """Splash in Pallas's model of a TPU, its memories and copies included, with small blocks."""
    if importlib.util.find_spec("tokamax") is None:
        pytest.skip("splash is tokamax's kernel, and tokamax is not installed")
    from jax.experimental.pallas import tpu

    monkeypatch.setattr(splash, "BLOCKS", (128,))
    return partial(splash.attention, interpret=tpu.InterpretParams())


@pytest.mark.parametrize(
    ("S", "positions", "sizes"),
    [
        (384, None, {}),
        (512, np.arange(128, 256), dict(N=2)),  # keys that no query of the shard sees
        (512, mirrored(512, 2, 0), dict(N=2)),
        (1024, mirrored(1024, 4, 2), dict(N=2, K=1)),
    ],
    ids=["whole", "shard", "mirrored over 2", "mirrored over 4"],
)
def test_splash_equals_the_reference(interpreted, S, positions, sizes):
    assert_equals_reference(interpreted, S, positions, **dict(H=128) | sizes)


# ------------------------------------------------------------------------------------------- what cannot be, in a line


def test_what_a_backend_cannot_do_is_refused_in_a_line():
    q, k, v, segments, _ = packed(100)
    with pytest.raises(ValueError, match="no attention backend 'flash': there are reference, blockwise, splash"):
        api.attention(q, k, v, segments, segments, backend="flash")
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match=r"'splash' runs on tpu, not on .*: use 'blockwise'"):
            api.attention(q, k, v, segments, segments, backend="splash")
    with pytest.raises(ValueError, match="50 queries against 100 keys need q_positions_T"):
        api.attention(q[:, :50], k, v, segments[:, :50], segments, backend="blockwise")
    with pytest.raises(ValueError, match="queries in multiples of 128, not 100: the nearest is 128"):
        splash.attention(q, k, v, segments, segments)
    q, k, v, segments = (jax.ShapeDtypeStruct((1, 2**20, *x.shape[2:]), x.dtype) for x in (q, k, v, segments))
    with pytest.raises(ValueError, match=r"up to 65536 pairs of blocks, not 524800 .* over 9 times as many devices"):
        jax.eval_shape(splash.attention, q, k, v, segments, segments)
