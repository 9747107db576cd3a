"""Key/value caches of global layers spread over the devices of the mesh's `context` axis.

Of S slots and c devices, device i holds slots [i S/c, (i + 1) S/c). Queries, keys and values of new tokens are
everywhere; each device stores what falls into its slots and attends to them alone, with the logarithm L of what its
softmax sums to. Then

    out = sum_i exp(L_i - L) out_i / sum_i exp(L_i - L),   L = max_i L_i

is the attention over all slots: one maximum and two sums over the axis, of one number and of H + 1 numbers a head and
query, whatever the context. A device none of whose slots a query sees has an L so low that it weighs nothing. Only this
runs by hand over `context`; the mesh's other axes are left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.axes import CONTEXT
from llama4_jax.kernels.attention import blockwise


class Cache(NamedTuple):
    """Keys and values of one layer of the pattern, stacked over blocks (the leading L), positions applied."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


SPREAD = P(None, None, CONTEXT)
"""Of a cache's arrays."""


def slots(max_length: int, mesh: Mesh | None) -> int:
    """As many as there are positions, rounded to the same number on every device."""
    ways = 1 if mesh is None else mesh.shape[CONTEXT]
    return -(-max_length // ways) * ways


def placed(zeros: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A new cache's array, over the axis."""
    return zeros if mesh is None else jax.lax.with_sharding_constraint(zeros, NamedSharding(mesh, SPREAD))


def decode(
    mesh: Mesh,
    q_B1NH: Float[Array, "B 1 N H"],
    k_B1KH: Float[Array, "B 1 K H"],
    v_B1KH: Float[Array, "B 1 K H"],
    cache: Cache,
    block: Int[Array, ""],
    positions_B: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """One token a row, at its position: stored, and what it gathers from there back to position 0."""

    def local(q_B1NH, k_B1KH, v_B1KH, cache, block, positions_B):
        B, _, N, H = q_B1NH.shape
        S, K = cache.k.shape[2:4]
        slot_B = positions_B - jax.lax.axis_index(CONTEXT) * S
        own_B = jnp.where((slot_B >= 0) & (slot_B < S), slot_B, S)  # S: another device's, dropped
        rows_B = jnp.arange(B)
        cache = Cache(*(
            c.at[block, rows_B, own_B].set(x[:, 0], mode="drop") for c, x in zip(cache, (k_B1KH, v_B1KH), strict=True)
        ))  # fmt: skip
        q_BKGH = q_B1NH.reshape(B, K, N // K, H)
        scores = jnp.einsum("BKGH,BSKH->BKGS", q_BKGH, cache.k[block], preferred_element_type=jnp.float32) * H**-0.5
        seen_BS = jnp.arange(S)[None, :] <= slot_B[:, None]
        scores = jnp.where(seen_BS[:, None, None], scores, blockwise.NEVER)
        logsumexp_BKG = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - logsumexp_BKG[..., None]).astype(cache.v.dtype)
        out_BKGH = jnp.einsum("BKGS,BSKH->BKGH", weights, cache.v[block], preferred_element_type=jnp.float32)
        out_BNH = _joined(out_BKGH.reshape(B, N, H), logsumexp_BKG.reshape(B, N))
        return out_BNH[:, None].astype(q_B1NH.dtype), cache

    return _over_context(local, mesh)(q_B1NH, k_B1KH, v_B1KH, cache, block, positions_B)


def prefill(
    mesh: Mesh,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: Cache,
    block: Int[Array, ""],
    start: Int[Array, ""],
    lengths_B: Int[Array, "B"],
) -> tuple[Float[Array, "B T N H"], Cache]:
    """Tokens from position `start` on, of rows of `lengths_B` tokens: stored, and what they gather of all before."""

    def local(q_BTNH, k_BTKH, v_BTKH, cache, block, start, lengths_B):
        T, S = q_BTNH.shape[1], cache.k.shape[2]
        first = jax.lax.axis_index(CONTEXT) * S
        at_S = first + jnp.arange(S) - start
        here_S = ((at_S >= 0) & (at_S < T))[None, :, None, None]

        def keep(slots_LBSKH, x_BTKH):
            x_BSKH = jnp.take(x_BTKH, at_S, axis=1, mode="clip")
            return slots_LBSKH.at[block].set(jnp.where(here_S, x_BSKH, slots_LBSKH[block]))

        cache = Cache(keep(cache.k, k_BTKH), keep(cache.v, v_BTKH))
        row_T = start + jnp.arange(T)
        segments_BT = (row_T[None, :] < lengths_B[:, None]).astype(jnp.int32)
        seen_BS = (first + jnp.arange(S)[None, :] < lengths_B[:, None]).astype(jnp.int32)
        out_BTNH, logsumexp_BTN = blockwise.attention_and_logsumexp(
            q_BTNH, cache.k[block], cache.v[block], segments_BT, seen_BS, row_T - first
        )
        return _joined(out_BTNH.astype(jnp.float32), logsumexp_BTN).astype(q_BTNH.dtype), cache

    return _over_context(local, mesh)(q_BTNH, k_BTKH, v_BTKH, cache, block, start, lengths_B)


def _joined(out: Float[Array, "*rows N H"], logsumexp: Float[Array, "*rows N"]) -> Float[Array, "*rows N H"]:
    """The outputs of all devices, each weighed by what its softmax summed to."""
    weight = jnp.exp(logsumexp - jax.lax.pmax(logsumexp, CONTEXT))[..., None]
    return jax.lax.psum(out * weight, CONTEXT) / jax.lax.psum(weight, CONTEXT)


def _over_context(local: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`local(q, k, v, cache, ...)` on each device's slots; all but the cache is the same everywhere."""

    def run(q, k, v, cache: Cache, *rest):
        whole, spread = P(), Cache(SPREAD, SPREAD)  # pyright: ignore[reportArgumentType]
        over = partial(jax.shard_map, mesh=mesh, axis_names={CONTEXT}, check_vma=False)
        specs = (whole, whole, whole, spread, *[whole] * len(rest))
        return over(local, in_specs=specs, out_specs=(whole, spread))(q, k, v, cache, *rest)

    return run
