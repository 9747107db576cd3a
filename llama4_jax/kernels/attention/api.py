"""Causal attention within packed documents on one device, by the backend that is asked for.

A backend is a module with

    attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_positions_T=None) -> out_BTNH

which returns softmax(q k / sqrt(H)) v over the keys of the query's own segment that are not behind it in the row; key
s stands at row position s, query t at `q_positions_T[t]`, or at t where that is None (and T = S). Positions may be
traced: a context shard's queries stand wherever its place on the mesh says. Every query sees at least its own key.
Kv head j serves query heads jG .. jG+G-1. Softmax and sums are fp32. A backend that cannot do what is asked raises a
ValueError that names the nearest that can: nothing is ever silently plain-causal.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

RESIDUALS = "attention"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of what a backend's forward pass keeps for its backward pass: the output
and the softmax's statistics. Where they are saved, nothing of attention is computed twice. cuDNN's go unnamed."""

PLATFORMS = {
    "reference": (),
    "blockwise": (),
    "splash": ("tpu",),
    "cudnn": ("gpu", "cuda"),
    "mosaic_gpu": ("gpu", "cuda"),
}
"""Backends, and the platforms each is made for; () for all."""


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
    *,
    backend: str,
) -> Float[Array, "B T N H"]:
    """Attention as this module's docstring defines it."""
    if backend not in PLATFORMS:
        raise ValueError(f"no attention backend {backend!r}: there are {', '.join(PLATFORMS)}")
    if q_positions_T is None and q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(f"{q_BTNH.shape[1]} queries against {k_BSKH.shape[1]} keys need q_positions_T")
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device else jax.default_backend()
    if PLATFORMS[backend] and platform not in PLATFORMS[backend]:
        raise ValueError(
            f"attention backend {backend!r} runs on {PLATFORMS[backend][0]}, not on {platform}: use 'blockwise' there"
        )
    module = importlib.import_module(f"llama4_jax.kernels.attention.{backend}")  # tokamax only where it is used
    return module.attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_positions_T)


def chunked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    chunk: int,
    *,
    backend: str,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document's chunks of `chunk` positions, from the start of a row or a chunk on.

    Documents are packed chunk-aligned (`data/packing.py`), so the chunks of the row are the chunks of its documents:
    the row is cut into chunks and each is plain causal attention.
    """
    B, T = segment_ids_BT.shape
    C = min(chunk, T)
    padding = -T % C  # a last chunk that is cut short (evaluation of odd lengths) is filled with segment 0

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B * (T + padding) // C, C, *x.shape[2:])

    segments = cut(segment_ids_BT)
    out = attention(cut(q_BTNH), cut(k_BTKH), cut(v_BTKH), segments, segments, backend=backend)
    return out.reshape(B, T + padding, *out.shape[2:])[:, :T]
