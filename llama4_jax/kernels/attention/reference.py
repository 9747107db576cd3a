"""Attention as the definition reads: one matrix of scores. The truth that other backends are tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v over the keys of the query's own segment that are not behind it in the row.

    Query t stands at row position `q_positions_T[t]` (None: at t), key s at s. Scores and softmax are fp32. O(T S)
    memory.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_positions_T = jnp.arange(T) if q_positions_T is None else q_positions_T
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    causal_TS = q_positions_T[:, None] >= jnp.arange(S)[None, :]
    visible_BTS = causal_TS[None] & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
    scores = jnp.where(visible_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)
