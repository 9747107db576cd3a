"""The two attentions of iRoPE on one device, for rows whose documents are packed chunk-aligned (`data/packing.py`).

Both call the reference, which holds a matrix of scores a head: [C, C] for each chunk, [T, S] for global layers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.attention import reference


def global_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document of a row; query t stands at row position `q_start + t`."""
    return reference.attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_start)


def chunked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document's chunks of `chunk` positions, from the start of a row or a chunk on.

    Documents are chunk-aligned, so the chunks of the row are the chunks of its documents: the row is cut into
    chunks and each is plain causal attention.
    """
    B, T = segment_ids_BT.shape
    C = min(chunk, T)
    padding = -T % C  # a last chunk that is cut short (evaluation of odd lengths) is filled with segment 0

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B * (T + padding) // C, C, *x.shape[2:])

    segments = cut(segment_ids_BT)
    out = reference.attention(cut(q_BTNH), cut(k_BTKH), cut(v_BTKH), segments, segments)
    return out.reshape(B, T + padding, *out.shape[2:])[:, :T]
