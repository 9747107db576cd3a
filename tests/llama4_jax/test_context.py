"""Attention over a context axis: every exchange gives the unsharded values and gradients, and says what it sends."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import llama4_jax.attention as attention_module
from llama4_jax.attention import Attention
from llama4_jax.axes import CONTEXT, Execution
from llama4_jax.config import tiny_scout
from llama4_jax.kernels.attention import api, blockwise, reference
from training.program import kind_of, nbytes, operands, walk

B, H, CHUNK = 2, 8, 8
CFG = replace(tiny_scout(), chunk=CHUNK, embed_dim=16, head_dim=H, num_heads=4, num_kv_heads=2)
GLOBAL, LOCAL = (nnx.eval_shape(lambda local=local: Attention(CFG, local, nnx.Rngs(0))) for local in (False, True))


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)


def inputs(S: int, N: int, K: int):
    """q, k, v, segment ids and the loss's weights; documents of 20 and 4, then the rest; padding behind row 0."""
    rng = np.random.default_rng(S)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(B, S, n, H)), jnp.float32) for n in (N, K, K, N))
    segments = np.repeat([[1, 2, 3]], B, 0).repeat([20, 4, S - 24], 1).astype(np.int32)
    segments[0, S - 3 :] = 0
    return q, k, v, jnp.asarray(segments), weights


def loss_and_gradients(attend):
    """(q, k, v, segments, weights) -> out and gradients: of this device's share of the loss, inside a shard_map."""

    def run(q, k, v, segments, weights):
        def loss(q, k, v):
            out = attend(q, k, v, segments)
            return jnp.sum(out * weights), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    return run


def sharded(f, c: int):
    mesh = jax.make_mesh((c,), (CONTEXT,), (AxisType.Auto,), devices=jax.devices()[:c])
    return jax.shard_map(f, mesh=mesh, in_specs=P(None, CONTEXT), out_specs=P(None, CONTEXT), check_vma=False)


def attend(layer, exchange: str = "gather", backend: str = "blockwise"):
    execution = Execution(attention=backend, exchange=exchange)
    return lambda *args: layer.attend(*args, execution)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


SHARDS = [
    (1, 48, 4, 2),
    (2, 48, 4, 2),
    (3, 45, 6, 3),  # odd shards, odd halves
    (4, 48, 8, 2),  # more devices than kv heads
    (8, 48, 8, 4),
]


@pytest.mark.parametrize("exchange", ["gather", "mirror", "heads"])
@pytest.mark.parametrize(("c", "S", "N", "K"), SHARDS, ids=[f"context={s[0]}" for s in SHARDS])
def test_global_attention_is_that_of_one_device(exchange, c, S, N, K):
    args = inputs(S, N, K)
    got = jax.jit(sharded(loss_and_gradients(attend(GLOBAL, exchange)), c))(*args)
    want = jax.jit(loss_and_gradients(lambda q, k, v, s: reference.attention(q, k, v, s, s)))(*args)
    assert_equal(got, want)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("c", [2, 3, 4, 8])  # shards of 3, 2, 1.5 and 0.75 chunks
def test_local_attention_is_that_of_one_device(c, backend):
    args = inputs(48, 4, 2)
    got = jax.jit(sharded(loss_and_gradients(attend(LOCAL, backend=backend)), c))(*args)

    def on_one(q, k, v, segments):
        return api.chunked_attention(q, k, v, segments, CHUNK, backend="reference")

    assert_equal(got, jax.jit(loss_and_gradients(on_one))(*args))


# --------------------------------------------------------------------------------------------------- what is sent


def sent(layer, c: int, exchange: str = "gather", gradients: bool = False) -> list[tuple[str, int]]:
    """(primitive, bytes of its operands) of everything that crosses the context axis, loops counted once."""
    f = attend(layer, exchange)
    run = sharded(loss_and_gradients(f), c) if gradients else sharded(lambda q, k, v, s, _: f(q, k, v, s), c)
    found = [one for one in walk(jax.make_jaxpr(run)(*inputs(48, 8, 4)).jaxpr) if kind_of(one) and CONTEXT in one.axes]
    return [(one.name, sum(nbytes(x) for x in operands(one))) for one in found]


def test_local_layers_of_whole_chunks_send_nothing():
    assert sent(LOCAL, 3, gradients=True) == []
    assert sent(LOCAL, 4, gradients=True) != []  # shards of a chunk and a half


@pytest.mark.parametrize("c", [2, 4])
def test_global_layers_send_keys_and_values_and_little_else(c):
    token, T = 4 * H, 48 // c  # bytes of a head, tokens of a shard
    segments = 4 * B * T
    keys = B * T * 4 * token
    assert sorted(sent(GLOBAL, c)) == sorted([("all_gather", keys)] * 2 + [("all_gather", segments)])
    half = B * T // 2 * 8 * token  # of the queries, and of the outputs
    swaps = [n for name, n in sent(GLOBAL, c, "mirror") if name == "ppermute"]
    assert sorted(swaps) == sorted([half, half, segments // 2, 4 * T // 2])
    exchanged = [n for name, n in sent(GLOBAL, c, "heads") if name == "all_to_all"]
    assert sorted(exchanged) == sorted([2 * keys, 2 * keys, keys, keys])


@pytest.mark.parametrize("c", [2, 3, 4, 8])
def test_mirroring_deals_the_causal_work_out_evenly(c, monkeypatch):
    def count(q, k, v, q_segments, kv_segments, positions, backend):
        return jnp.broadcast_to(jnp.sum(positions + 1.0), q.shape)  # keys that this device's queries see

    monkeypatch.setattr(attention_module, "attention", count)

    def work(exchange: str) -> np.ndarray:
        out = sharded(attend(GLOBAL, exchange), c)(*inputs(48, 4, 2)[:4])
        return np.asarray(out)[0, :: 48 // c, 0, 0]  # a device's first query stays with it

    contiguous, mirror = work("gather"), work("mirror")
    assert contiguous.sum() == mirror.sum() == 48 * 49 / 2
    assert mirror.max() / mirror.mean() < 1.001
    assert contiguous.max() / contiguous.mean() > 1.4  # 2 - 1/c for long rows


def test_heads_that_cannot_be_dealt_out_are_refused_in_a_line():
    with pytest.raises(ValueError, match=r"4 query heads and 2 kv heads to mesh.context = 3: the nearest is .* = 2"):
        jax.make_jaxpr(sharded(attend(GLOBAL, "heads"), 3))(*inputs(48, 4, 2)[:4])
