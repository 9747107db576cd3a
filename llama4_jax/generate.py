"""Text generation: key/value caches, prefill of unequal prompts in pieces, a decoding loop in one `jit`, and sampling.

**Caches.** The key of position p lies in slot p mod S of its layer's cache. Global layers have a slot for every
position, so p mod S = p. Local layers have one chunk of slots, S = C: their query at p sees the keys of
[C floor(p/C), p], which are the slots 0 .. p mod C, so at a chunk's first position the cache starts anew by itself,
and whatever the last chunk left behind is masked until it is overwritten. At long context three of four layers
thus cost a chunk of memory instead of the context.

Only the attention's view of the past differs from training: projections, feed-forward parts and norms are the
model's own. Everything here runs outside `shard_map`: on one device, or with weights sharded over a mesh of Auto
axes, where the compiler places the collectives. The exception are the caches of global layers, which a mesh with a
`context` axis spreads over it by hand (`llama4_jax/context_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama4_jax import context_cache
from llama4_jax.attention import Attention
from llama4_jax.axes import CONTEXT, Execution
from llama4_jax.config import ModelConfig
from llama4_jax.context_cache import Cache
from llama4_jax.kernels.attention import reference
from llama4_jax.kernels.attention.api import attention
from llama4_jax.text import Transformer

PORTABLE = Execution()
"""Kernels that run on every device."""


Caches = tuple[Cache, ...]
"""One `Cache` for each layer of a block."""

Attend = Callable[[Attention, jax.Array, jax.Array, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]
"""(attention, q_BTNH, k_BTKH, v_BTKH, cache, block) -> (out_BTNH, the cache with this block's part updated)."""


def cache_bytes(cfg: ModelConfig, batch: int, max_length: int, itemsize: int = 2, context: int = 1) -> int:
    """2 B K H (L_global ceil(S / c) + L_local min(C, S)) numbers: what `empty_caches` takes of each device, c being the
    `context` axis."""
    local = sum(kind.local for kind in cfg.pattern) * cfg.num_blocks
    slots = (cfg.num_layers - local) * -(-max_length // context) + local * min(cfg.chunk, max_length)
    return 2 * batch * cfg.num_kv_heads * cfg.head_dim * slots * itemsize


def empty_caches(cfg: ModelConfig, batch: int, max_length: int, dtype: DTypeLike, mesh: Mesh | None = None) -> Caches:
    """Caches for positions 0 .. max_length-1: that many slots in global layers, spread over the context axis of `mesh`;
    at most a chunk in local ones."""

    def one(local: bool) -> Cache:
        slots = min(cfg.chunk, max_length) if local else context_cache.slots(max_length, mesh)
        zeros = jnp.zeros((cfg.num_blocks, batch, slots, cfg.num_kv_heads, cfg.head_dim), dtype)
        zeros = zeros if local else context_cache.placed(zeros, mesh)
        return Cache(zeros, zeros)

    return tuple(one(kind.local) for kind in cfg.pattern)


def _forward(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    caches: Caches,
    attend: Attend,
) -> tuple[Float[Array, "B T D"], Caches]:
    """The model's layers with attention left to `attend`. Caches ride in the carry, where XLA updates in place."""
    graphdef, stacked = nnx.split(model.blocks)

    def run_block(carry, numbered):
        x_BTD, caches = carry
        block, stored = numbered
        updated = []
        for layer, cache in zip(nnx.merge(graphdef, stored).layers, caches, strict=True):
            q_BTNH, k_BTKH, v_BTKH = layer.attention.project(layer.attention_norm(x_BTD), positions_BT, PORTABLE)
            out_BTNH, cache = attend(layer.attention, q_BTNH, k_BTKH, v_BTKH, cache, block)
            x_BTD += layer.attention.output(out_BTNH, PORTABLE)
            x_BTD += layer.feed_forward(layer.ffn_norm(x_BTD), segment_ids_BT, PORTABLE)[0]
            updated.append(cache)
        return (x_BTD, tuple(updated)), None

    blocks = jnp.arange(model.cfg.num_blocks)
    (x_BTD, caches), _ = jax.lax.scan(run_block, (model.embedding(tokens_BT), caches), (blocks, stacked))
    return x_BTD, caches


def _logits(model: Transformer, x_B1D: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    hidden_BD = model.final_norm(x_B1D)[:, 0]
    return jnp.einsum("BD,DV->BV", hidden_BD, model.unembedding.kernel_DV[...], preferred_element_type=jnp.float32)


def prefill(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    max_length: int,
    piece: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B V"], Caches]:
    """Read prompts, right-padded to T: fp32 logits of each one's next token, and the caches.

    `model` holds weights in the compute dtype (`Execution.fetch_module`). Row b decodes on at position
    `lengths_B[b]`; `max_length` bounds the positions ever decoded, and every length lies below it. `piece`: so many
    tokens go through the layers at a time, whole chunks of which T is a multiple; by default all. `mesh`: over whose
    context axis the caches of global layers are spread.
    """
    B, T = tokens_BT.shape
    piece = piece or T
    if piece < T and (T % piece or piece % model.cfg.chunk):
        raise ValueError(f"prefill: a piece of {piece} is not whole chunks of {model.cfg.chunk} that divide {T}")
    caches = empty_caches(model.cfg, B, max_length, model.embedding.table_VD[...].dtype, mesh)
    last_B1D = jnp.zeros((B, 1, model.cfg.embed_dim), model.embedding.table_VD[...].dtype)

    def read(carry, numbered):
        number, part_BT = numbered
        last_B1D, caches = carry
        x_BTD, caches = _prefill_piece(model, part_BT, number * piece, lengths_B, caches, mesh)
        at_B = lengths_B - 1 - number * piece
        here_BTD = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1, mode="clip")
        inside_B = (at_B >= 0) & (at_B < piece)
        return (jnp.where(inside_B[:, None, None], here_BTD, last_B1D), caches), None

    parts = tokens_BT.reshape(B, -1, min(piece, T)).swapaxes(0, 1)
    (last_B1D, caches), _ = jax.lax.scan(read, (last_B1D, caches), (jnp.arange(len(parts)), parts))
    return _logits(model, last_B1D), caches


def _prefill_piece(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    start,
    lengths_B: Int[Array, "B"],
    caches: Caches,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Caches]:
    """Tokens of positions from `start`, a chunk's first, through the layers. Local layers see what is here; global ones
    what the caches hold of before, too."""
    T = tokens_BT.shape[1]
    row_BT = start + jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    segment_ids_BT = (row_BT < lengths_B[:, None]).astype(jnp.int32)

    def attend(layer, q_BTNH, k_BTKH, v_BTKH, cache, block):
        slots = cache.k.shape[2]
        if not layer.local and mesh is not None:
            return context_cache.prefill(mesh, q_BTNH, k_BTKH, v_BTKH, cache, block, start, lengths_B)
        if not layer.local:
            cache = Cache(*(
                jax.lax.dynamic_update_slice(c, x[None], (block, 0, start, 0, 0))
                for c, x in zip(cache, (k_BTKH, v_BTKH), strict=True)
            ))  # fmt: skip
            seen_BS = (jnp.arange(slots)[None, :] < lengths_B[:, None]).astype(jnp.int32)
            out_BTNH = attention(
                q_BTNH, cache.k[block], cache.v[block], segment_ids_BT, seen_BS, row_BT[0], backend=PORTABLE.attention
            )
            return out_BTNH, cache
        out_BTNH = layer.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, PORTABLE)
        # The slots belong to the chunk that the next position lies in; those not reached yet hold anything.
        position_BS = (lengths_B // slots * slots)[:, None] + jnp.arange(slots)[None, :] - start
        here_BS = (position_BS >= 0) & (position_BS < T)

        def keep(slots_LBSKH, x_BTKH):
            x_BSKH = jnp.take_along_axis(x_BTKH, position_BS[:, :, None, None], axis=1, mode="clip")
            x_BSKH = jnp.where(here_BS[:, :, None, None], x_BSKH, slots_LBSKH[block])
            return slots_LBSKH.at[block].set(x_BSKH)

        return out_BTNH, Cache(keep(cache.k, k_BTKH), keep(cache.v, v_BTKH))

    return _forward(model, tokens_BT, row_BT, segment_ids_BT, caches, attend)


def decode(
    model: Transformer,
    tokens_B: Int[Array, "B"],
    positions_B: Int[Array, "B"],
    caches: Caches,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B V"], Caches]:
    """One more token a row, each at its own position: fp32 logits of the next, and the caches with this one."""
    one_B1 = jnp.ones_like(tokens_B)[:, None]
    rows_B = jnp.arange(tokens_B.shape[0])

    def attend(layer, q_B1NH, k_B1KH, v_B1KH, cache, block):
        if not layer.local and mesh is not None:
            return context_cache.decode(mesh, q_B1NH, k_B1KH, v_B1KH, cache, block, positions_B)
        slots = cache.k.shape[2]
        slot_B = positions_B % slots
        cache = Cache(*(c.at[block, rows_B, slot_B].set(x[:, 0]) for c, x in zip(cache, (k_B1KH, v_B1KH), strict=True)))
        # The query stands behind all slots, and those filled in its chunk are of its segment.
        seen_BS = (jnp.arange(slots)[None, :] <= slot_B[:, None]).astype(jnp.int32)
        behind_1 = jnp.array([slots - 1])
        return reference.attention(q_B1NH, cache.k[block], cache.v[block], one_B1, seen_BS, behind_1), cache

    x_B1D, caches = _forward(model, tokens_B[:, None], positions_B[:, None], one_B1, caches, attend)
    return _logits(model, x_B1D), caches


def sample(
    logits_BV: Float[Array, "B V"],
    key: jax.Array,
    temperature: float | Float[Array, ""],
    top_p: float | Float[Array, ""],
) -> Int[Array, "B"]:
    """Draw from softmax(logits / temperature) cut to its nucleus; temperature 0 takes the largest logit.

    The nucleus (arXiv 1904.09751) is the smallest set of most likely tokens whose probability reaches `top_p`:
    a token belongs to it if those likelier than it sum to less.
    """

    def draw():
        centred_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # so that no temperature overflows
        sorted_BV, ids_BV = jax.lax.top_k(centred_BV / temperature, logits_BV.shape[1])
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        likelier_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        nucleus_BV = (likelier_BV < top_p).at[:, 0].set(True)
        choice_B = jax.random.categorical(key, jnp.where(nucleus_BV, sorted_BV, -jnp.inf), axis=-1)
        return jnp.take_along_axis(ids_BV, choice_B[:, None], axis=1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))


NONE = -1
"""What rows hold in place of a token once they have stopped."""


@partial(jax.jit, static_argnames=("graphdef", "room", "piece", "mesh"))
def _generate(
    graphdef, state, tokens_BT, lengths_B, room, max_new_tokens, temperature, top_p, key, eos_ids, piece, mesh
):
    """New tokens [B, room], `NONE` behind a row's end. All but shapes and `room` may change without compiling."""
    model: Transformer = nnx.merge(graphdef, state)
    B, T = tokens_BT.shape

    def emit(logits_BV, step, new_BN, done_B: Bool[Array, "B"]):
        tokens_B = sample(logits_BV, jax.random.fold_in(key, step), temperature, top_p)
        new_BN = new_BN.at[:, step].set(jnp.where(done_B, NONE, tokens_B))
        return tokens_B, new_BN, done_B | jnp.isin(tokens_B, eos_ids)

    def going_on(carry):
        step, _, _, _, done_B = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def body(carry):
        step, tokens_B, caches, new_BN, done_B = carry
        logits_BV, caches = decode(model, tokens_B, lengths_B + step - 1, caches, mesh)
        tokens_B, new_BN, done_B = emit(logits_BV, step, new_BN, done_B)
        return step + 1, tokens_B, caches, new_BN, done_B

    logits_BV, caches = prefill(model, tokens_BT, lengths_B, T + room, piece, mesh)
    first = emit(logits_BV, 0, jnp.full((B, room), NONE, jnp.int32), jnp.zeros(B, bool))
    *_, new_BN, _ = jax.lax.while_loop(going_on, body, (jnp.int32(1), first[0], caches, *first[1:]))
    return new_BN


def bucket(length: int, chunk: int) -> int:
    """Lengths are padded to powers of two from 16 on, and to whole chunks from one chunk on: few compilations."""
    if length >= chunk:
        return -(-length // chunk) * chunk
    return min(chunk, max(16, 1 << (length - 1).bit_length()))


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    piece: int | None = None,
    mesh: Mesh | None = None,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; returns the new tokens, an end token included.

    `prompts`: token ids, each beginning with the tokenizer's begin-of-text; lengths may differ.
    `temperature`, `top_p`: see `sample`; the defaults are those published with Llama 4. Temperature 0 is greedy.
    `key`: `jax.random.key(seed)`; the same key, prompts and weights give the same text. Greedy decoding needs none.
    `eos_ids`: a row ends with the first of these it produces.
    `piece`: prompts are read so many tokens at a time, rounded to whole chunks; by default at least a chunk and 8192.
    `mesh`: the caches of global layers are spread over its context axis; the weights lie on its devices, too.

    Compiles once for each batch size and bucket of lengths (`bucket`). Raises ValueError for an empty batch or
    prompt, ids outside the vocabulary, and settings outside their range.
    """
    lengths, chunk = [len(prompt) for prompt in prompts], model.cfg.chunk
    piece = max(chunk, 8192) if piece is None else piece
    _check(model.cfg.vocab_size, prompts, max_new_tokens, temperature, top_p, key, eos_ids, piece)
    width, piece = bucket(max(lengths), chunk), max(chunk, piece // chunk * chunk)
    width = width if width <= piece else -(-width // piece) * piece
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, state = nnx.split(execution.fetch_module(model))
    new_BN = _generate(
        graphdef, state, jnp.asarray(tokens_BT), jnp.asarray(lengths, jnp.int32),
        bucket(max_new_tokens, model.cfg.chunk), jnp.int32(max_new_tokens), jnp.float32(temperature),
        jnp.float32(top_p), jax.random.key(0) if key is None else key, jnp.asarray(eos_ids, jnp.int32),
        min(piece, width), None if mesh is None or mesh.shape[CONTEXT] == 1 else mesh,
    )  # fmt: skip
    return [[int(token) for token in row if token != NONE] for row in np.asarray(new_BN)]


def _check(
    vocab_size: int,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: jax.Array | None,
    eos_ids: Sequence[int],
    piece: int,
) -> None:
    def check(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(f"generate: {message}")

    check(len(prompts) > 0, "no prompts were given")
    for name, ids in [*((f"prompt {i}", p) for i, p in enumerate(prompts)), ("eos_ids", list(eos_ids))]:
        check(name == "eos_ids" or len(ids) > 0, f"{name} is empty; it needs at least a begin-of-text token")
        wrong = next((t for t in ids if not 0 <= t < vocab_size), None)
        check(wrong is None, f"{name} holds id {wrong}, outside the model's vocabulary of {vocab_size}")
    check(max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check(piece >= 1, f"piece must be at least 1, not {piece}")
    check(temperature >= 0, f"temperature must not be negative (0 is greedy), not {temperature}")
    check(0 < top_p <= 1, f"top_p must lie in (0, 1], not {top_p}")
    check(
        temperature == 0 or key is not None,
        f"sampling at temperature {temperature} needs a key, jax.random.key(seed); temperature 0 is greedy",
    )
