"""Decoding with caches is the full forward, batches are their rows, and sampling keeps to its rules."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from llama4_jax.axes import MESH_AXES, Execution, map_params
from llama4_jax.config import scout, tiny_maverick, tiny_scout
from llama4_jax.generate import _generate, bucket, cache_bytes, decode, empty_caches, generate, prefill, sample
from llama4_jax.text import Transformer

CHUNK = 8
SIZES = dict(vocab_size=64, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=32, expert_dim=16,
             num_experts=4, chunk=CHUNK, floor_scale=6, init_std=0.3)  # fmt: skip
CONFIGS = {  # two blocks each; Scout's pattern shortened to one local and one global layer, Maverick's with two choices
    "scout": replace(tiny_scout(), **SIZES, nope_every=2, rope=replace(tiny_scout().rope, original=CHUNK)),
    "maverick": replace(tiny_maverick(), **SIZES, num_layers=8, experts_per_token=2),
}
CONFIGS["biased"] = replace(CONFIGS["scout"], router_bias=True)
ROWS, LENGTH = 6, 45
"""The one shape in which the full forward is compiled."""


@cache
def model_of(name: str) -> Transformer:
    """Random weights, large enough for attention to be far from uniform, and the norms' scales away from one."""
    graphdef, state = nnx.split(Transformer(CONFIGS[name], nnx.Rngs(0)))
    rngs = nnx.Rngs(7)

    def perturb(p):
        value = p.get_value()
        if p.axes == (None,):  # a router's bias, which begins at zero
            return p.replace(jax.random.normal(rngs.params(), value.shape))
        return p.replace(value * jax.random.uniform(rngs.params(), value.shape, minval=0.6, maxval=1.4))

    return nnx.merge(graphdef, map_params(perturb, state))


def random_tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape), jnp.int32)


@jax.jit(static_argnames=("graphdef", "dtype"))
def _full(graphdef, state, tokens_BT, dtype):
    return nnx.merge(graphdef, state).logits(tokens_BT, Execution(compute_dtype=dtype))


def full_logits(model: Transformer, rows, dtype="float32") -> np.ndarray:
    """Logits of the training forward. What pads the rows on the right changes nothing, since the model is causal."""
    tokens_BT = np.zeros((ROWS, LENGTH), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    return np.asarray(_full(*nnx.split(model), jnp.asarray(tokens_BT), dtype))[: len(rows)]


@jax.jit(static_argnames=("graphdef", "max_length", "piece"))
def replay(graphdef, state, prompts_BT, lengths_B, following_BN, max_length, piece=None):
    """Logits of prefill, then of decoding the given tokens: [B, 1 + N, V]."""
    model = nnx.merge(graphdef, state)
    first_BV, caches = prefill(model, prompts_BT, lengths_B, max_length, piece)

    def step(carry, token_B):
        positions_B, caches = carry
        logits_BV, caches = decode(model, token_B, positions_B, caches)
        return (positions_B + 1, caches), logits_BV

    _, rest_NBV = jax.lax.scan(step, (lengths_B, caches), following_BN.T)
    return jnp.concatenate([first_BV[:, None], rest_NBV.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize(("name", "piece"), [*((name, None) for name in CONFIGS), ("maverick", 8), ("scout", 16)])
def test_decoding_equals_the_full_forward_at_every_position(name, piece):
    """Prompts that end before, at, on and behind chunk boundaries, read at once or in pieces of one chunk or two; 25
    more tokens cross three or four each."""
    model = model_of(name)
    lengths = np.array([1, 7, 8, 9, 17, 20], np.int32)
    T, N = 32 if piece else 20, 25
    tokens_BS = np.asarray(random_tokens(1, ROWS, LENGTH))
    prompts_BT = np.where(np.arange(T)[None, :] < lengths[:, None], tokens_BS[:, :T], 63)
    following_BN = np.stack([row[n : n + N] for row, n in zip(tokens_BS, lengths, strict=True)])
    got_BNV = replay(*nnx.split(model), *map(jnp.asarray, (prompts_BT, lengths, following_BN)), T + N, piece)
    full_BSV = full_logits(model, tokens_BS)
    want_BNV = np.stack([row[n - 1 : n + N] for row, n in zip(full_BSV, lengths, strict=True)])
    assert np.abs(got_BNV - want_BNV).max() <= 1e-5 * np.abs(want_BNV).max()


def test_local_caches_hold_one_chunk_and_global_ones_everything():
    slots = [c.k.shape[2] for c in empty_caches(CONFIGS["maverick"], 3, 100, jnp.float32)]
    assert slots == [CHUNK, CHUNK, CHUNK, 100]
    assert [c.k.shape[2] for c in empty_caches(CONFIGS["scout"], 3, 5, jnp.float32)] == [5, 5]
    assert empty_caches(CONFIGS["maverick"], 3, 100, jnp.float32)[0].v.shape == (2, 3, CHUNK, 2, 8)


def test_caches_take_what_the_formula_says():
    for cfg in CONFIGS.values():
        for length in (5, 100):
            arrays = jax.eval_shape(lambda cfg=cfg, length=length: empty_caches(cfg, 3, length, jnp.bfloat16))
            assert cache_bytes(cfg, 3, length) == sum(2 * x.size for x in jax.tree.leaves(arrays))
    # Scout at full size, 10M tokens: 12 of 48 layers keep them all.
    assert cache_bytes(scout(), 1, 10_485_760) == 2 * 2 * 8 * 128 * (12 * 10_485_760 + 36 * 8192)


PROMPTS = [random_tokens(10 + n, n).tolist() for n in (3, 16, 11, 8)]


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_greedy_continues_with_the_argmax_of_the_full_forward(name):
    model = model_of(name)
    new = generate(model, PROMPTS, 16, temperature=0.0)
    full_BTV = full_logits(model, [prompt + tokens for prompt, tokens in zip(PROMPTS, new, strict=True)])
    for prompt, tokens, logits_TV in zip(PROMPTS, new, full_BTV, strict=True):
        assert tokens == logits_TV[len(prompt) - 1 :][:16].argmax(axis=-1).tolist()


def test_a_batch_of_unequal_prompts_equals_each_alone_and_is_deterministic():
    model = model_of("scout")
    together = generate(model, PROMPTS, 12, temperature=0.0)
    assert together == generate(model, PROMPTS, 12, temperature=0.0)
    assert together == [generate(model, [prompt], 12, temperature=0.0)[0] for prompt in PROMPTS]


def test_sampling_follows_its_key():
    model = model_of("maverick")
    first = generate(model, PROMPTS, 12, temperature=1.5, top_p=1.0, key=jax.random.key(1))
    assert first == generate(model, PROMPTS, 12, temperature=1.5, top_p=1.0, key=jax.random.key(1))
    assert first != generate(model, PROMPTS, 12, temperature=1.5, top_p=1.0, key=jax.random.key(2))
    # A nucleus of one token is greedy decoding, whatever the temperature.
    assert generate(model, PROMPTS, 12, temperature=1.5, top_p=1e-6, key=jax.random.key(1)) == generate(
        model, PROMPTS, 12, temperature=0.0
    )


def test_a_row_ends_with_its_first_end_token():
    model = model_of("scout")
    free = generate(model, PROMPTS, 12, temperature=0.0)
    eos_ids = [free[0][4], free[2][0]]
    stopped = generate(model, PROMPTS, 12, temperature=0.0, eos_ids=eos_ids)
    for tokens, all_tokens in zip(stopped, free, strict=True):
        end = next((i + 1 for i, t in enumerate(all_tokens) if t in eos_ids), len(all_tokens))
        assert tokens == all_tokens[:end]
    assert len(stopped[2]) == 1 and len(stopped[0]) <= 5


def test_lengths_within_a_bucket_share_one_compilation():
    assert [bucket(n, 128) for n in (1, 16, 17, 100, 128, 129, 300)] == [16, 16, 32, 128, 128, 256, 384]
    assert [bucket(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    model = model_of("scout")
    generate(model, PROMPTS, 9, temperature=0.0)
    compiled = _generate._cache_size()
    generate(model, [p[:9] for p in PROMPTS], 16, temperature=0.8, top_p=0.5, key=jax.random.key(3))
    assert _generate._cache_size() == compiled


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.3), (0.6, 0.9), (2.0, 0.95), (1.0, 1.0)])
def test_top_p_draws_from_the_nucleus_in_proportion(temperature, top_p):
    """The nucleus is the smallest set of likeliest tokens that holds top_p; draws follow it renormalised."""
    logits_V = np.random.default_rng(3).normal(size=30).astype(np.float32) * 2
    probability_V = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    order = np.argsort(-probability_V)
    nucleus = order[: int(np.argmax(np.cumsum(probability_V[order]) >= min(top_p, 1 - 1e-6))) + 1]
    expected_V = np.zeros(30)
    expected_V[nucleus] = probability_V[nucleus] / probability_V[nucleus].sum()

    draws = 20_000
    drawn = sample(jnp.tile(logits_V[None], (draws, 1)), jax.random.key(0), temperature, top_p)
    counts_V = np.bincount(np.asarray(drawn), minlength=30)
    assert set(np.flatnonzero(counts_V)) <= set(nucleus.tolist())
    assert np.abs(counts_V / draws - expected_V).max() < 5 * 0.5 / np.sqrt(draws)  # five standard deviations


def test_the_limits_of_sampling_are_greedy():
    logits_BV = jnp.asarray(np.random.default_rng(4).normal(size=(5, 40)), jnp.float32) * 100
    greedy = jnp.argmax(logits_BV, axis=-1).tolist()
    for temperature, top_p in [(0.0, 0.9), (1e-30, 1.0), (3.0, 1e-9)]:
        assert sample(logits_BV, jax.random.key(0), temperature, top_p).tolist() == greedy


def test_bfloat16_decodes_as_well_as_the_bfloat16_forward():
    """Both as far from fp32. Token by token they may differ: rounding sends a token near a tie to another expert."""
    model = Execution(compute_dtype="bfloat16").fetch_module(model_of("scout"))
    tokens_BS = random_tokens(5, ROWS, 20)
    decoded_BNV = replay(*nnx.split(model), tokens_BS[:, :4], jnp.full(ROWS, 4), tokens_BS[:, 4:], 20)
    assert decoded_BNV.dtype == jnp.float32
    exact_BNV, forward_BNV = (full_logits(model_of("scout"), tokens_BS, d)[:, 3:20] for d in ("float32", "bfloat16"))

    def typical_error(got_BNV):
        return np.median(np.linalg.norm(got_BNV - exact_BNV, axis=-1) / np.linalg.norm(exact_BNV, axis=-1))

    assert 0 < typical_error(decoded_BNV) < 1.5 * typical_error(forward_BNV) < 0.05


def mesh_of(**sizes: int) -> Mesh:
    """Eight devices on these axes."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def on_mesh(model: Transformer, mesh: Mesh) -> Transformer:
    """The model, its weights spread over a mesh as they are stored."""
    graphdef, state = nnx.split(model)

    def place(p, spec):
        return p.replace(jax.device_put(p.get_value(), NamedSharding(mesh, spec.get_value())))

    return nnx.merge(graphdef, map_params(place, state, Execution().specs(state)))


def test_sharded_weights_generate_the_same():
    model = model_of("scout")
    sharded = on_mesh(model, mesh_of(fsdp=2, expert=2, tensor=2))
    assert len(sharded.embedding.table_VD[...].sharding.device_set) == 8
    assert generate(sharded, PROMPTS, 12, temperature=0.0) == generate(model, PROMPTS, 12, temperature=0.0)


def test_caches_spread_over_the_context_axis_generate_the_same():
    """Pieces and prompts that lie across devices' slots, rows that end on different devices; each holds its share."""
    model, mesh = model_of("scout"), mesh_of(context=4, tensor=2)
    spread = on_mesh(model, mesh)
    assert generate(spread, PROMPTS, 30, temperature=0.0, piece=8, mesh=mesh) == generate(
        model, PROMPTS, 30, temperature=0.0
    )
    cfg, length = model.cfg, 50
    caches = jax.jit(lambda: empty_caches(cfg, 3, length, jnp.bfloat16, mesh))()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(caches))
    assert held == cache_bytes(cfg, 3, length, context=4) < cache_bytes(cfg, 3, length) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1], [2, 64]]), "prompt 1 holds id 64, outside the model's vocabulary of 64"),
        (dict(eos_ids=[-1]), "eos_ids holds id -1"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(piece=0), "piece must be at least 1"),
        (dict(temperature=-0.5), "temperature must not be negative"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\]"),
        (dict(temperature=0.6), "needs a key"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(prompts=[[1]], max_new_tokens=4, temperature=0.0) | change
    with pytest.raises(ValueError, match=message):
        generate(model_of("scout"), arguments.pop("prompts"), arguments.pop("max_new_tokens"), **arguments)
