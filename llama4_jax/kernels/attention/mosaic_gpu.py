"""Attention on Hopper GPUs by tokamax's Mosaic kernels (of FlashAttention-3's form), exact for packed rows in O(T + S).

Documents are contiguous runs of a row, so what a query sees is an interval of keys, from the first of its run to its
own, and the kernels take an interval a query. The forward kernel visits the blocks of keys from the first start to the
last end in its block of queries. The backward kernels skip what lies ahead of the queries of whole rows; for queries
that stand elsewhere (a context shard's) they visit every key, twice the work of a causal row, all shards together.

Padding is segment 0 and a run like any other: such a query sees its own run, not the padding behind other documents.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.attention.api import RESIDUALS
from llama4_jax.kernels.tokamax import vendor

BLOCK = 128
"""Queries and keys are padded to a multiple of it: what a kernel's two warpgroups take at once."""
MAX_HEAD_DIM = 128
"""Above it these tiles do not fit into shared memory."""


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v over the keys of the query's own run that are not behind it in the row.

    See `api`. bfloat16 or float16, H <= 128, Hopper; scores, softmax and sums are fp32, weights are rounded to the
    inputs' dtype for the second product. ValueError for anything else.
    """
    _check_device()
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
        raise ValueError(
            f"attention backend 'mosaic_gpu' takes bfloat16 or float16, not {dtypes}: compute in bfloat16, "
            "or use 'blockwise'"
        )
    if q_BTNH.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"attention backend 'mosaic_gpu' takes head dimensions up to {MAX_HEAD_DIM}, not {q_BTNH.shape[-1]}: "
            "use 'blockwise'"
        )
    T = q_BTNH.shape[1]
    starts_BT, ends_T = key_ranges(kv_segments_BS, q_positions_T)
    q_BTNH, k_BSKH, v_BSKH, starts_BT = (_pad(x, axis=1) for x in (q_BTNH, k_BSKH, v_BSKH, starts_BT))
    ends_T = None if ends_T is None else _pad(ends_T, axis=0)
    return _attention(q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T)[:, :T]


def key_ranges(
    kv_segments_BS: Int[Array, "B S"], q_positions_T: Int[Array, "T"] | None
) -> tuple[Int[Array, "B T"], Int[Array, "T"] | None]:
    """The interval of keys each query sees: [first key of the run it stands in, its own position + 1).

    None for the ends where the queries are the keys' own: they are causal as they lie.
    """
    position_S = jnp.arange(kv_segments_BS.shape[1], dtype=jnp.int32)
    before_BS = jnp.pad(kv_segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BS = jax.lax.cummax(jnp.where(kv_segments_BS != before_BS, position_S[None], 0), axis=1)
    if q_positions_T is None:
        return starts_BS, None
    return starts_BS[:, q_positions_T], q_positions_T.astype(jnp.int32) + 1


def _check_device() -> None:
    """The kernels are Hopper's alone. Where no GPU is in this process, one is compiled for that is elsewhere."""
    capability = jax.devices()[0].compute_capability if jax.default_backend() == "gpu" else "9.0"
    if not capability.startswith("9."):
        raise ValueError(
            f"attention backend 'mosaic_gpu' runs on Hopper GPUs (compute capability 9.0), not on {capability}: "
            "use 'cudnn' for whole rows of few documents, or 'blockwise'"
        )


def _pad(x: jax.Array, axis: int) -> jax.Array:
    """To a multiple of BLOCK, by rows like the last: no real query sees the keys, none of them is seen."""
    spare = -x.shape[axis] % BLOCK
    return jnp.pad(x, [(0, spare if a == axis else 0) for a in range(x.ndim)], mode="edge") if spare else x


@jax.custom_vjp
def _attention(q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T):
    return _forward(q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T):
    sm90 = vendor("_src.ops.attention.pallas_mosaic_gpu_kernel_sm90")
    kernel = partial(
        sm90.flash_attention_kernel,
        is_causal=ends_T is None,
        logits_scale=q_BTNH.shape[-1] ** -0.5,
        logits_soft_cap=None,
        out_dtype=q_BTNH.dtype,
        normalize_output=True,
        return_residuals=True,
        use_stable_softmax=True,
        rescale_threshold=1.0,
        config=sm90.Config(block_q=64, block_kv=128, num_stages=2),
    )

    def one_row(q_TNH, k_SKH, v_SKH, starts_T):
        ends_1T = None if ends_T is None else ends_T[None]
        return kernel(q_TNH, k_SKH, v_SKH, None, None, starts_T[None], ends_1T)

    out_BTNH, softmax = checkpoint_name(jax.vmap(one_row)(q_BTNH, k_BSKH, v_BSKH, starts_BT), RESIDUALS)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T, out_BTNH, softmax)


def _backward(residuals, d_out_BTNH):
    q_BTNH, k_BSKH, v_BSKH, starts_BT, ends_T, out_BTNH, softmax = residuals
    sm90 = vendor("_src.ops.attention.pallas_mosaic_gpu_vjp_kernel_sm90")
    kernel = partial(
        sm90.flash_attention_vjp_kernel,
        is_causal=ends_T is None,
        logits_scale=q_BTNH.shape[-1] ** -0.5,
        logits_soft_cap=None,
        ds_dtype=None,
        config=sm90.Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2, compute_wgs=2),
    )

    def one_row(q_TNH, k_SKH, v_SKH, softmax, out_TNH, d_out_TNH, starts_T):
        ends_1T = None if ends_T is None else ends_T[None]
        *grads, _ = kernel(q_TNH, k_SKH, v_SKH, softmax, out_TNH, d_out_TNH, None, None, starts_T[None], ends_1T)
        return grads

    # The kernel writes dk and dv once for every query head and sums afterwards. Against gathered keys, far more than
    # queries, these would be the largest arrays of a step: there a kv head goes at a time.
    groups = 1 if ends_T is None else k_BSKH.shape[2]

    def of_group(g, x, axis):
        size = x.shape[axis] // groups
        return jax.lax.dynamic_slice_in_dim(x, g * size, size, axis)

    def one_group(g, grads):
        q, k, v, out, d_out = (of_group(g, x, 2) for x in (q_BTNH, k_BSKH, v_BSKH, out_BTNH, d_out_BTNH))
        new = jax.vmap(one_row)(q, k, v, tuple(of_group(g, x, 1) for x in softmax), out, d_out, starts_BT)
        return [
            jax.lax.dynamic_update_slice_in_dim(x, part, g * part.shape[2], 2)
            for x, part in zip(grads, new, strict=True)
        ]

    zeros = [jnp.zeros_like(x) for x in (q_BTNH, k_BSKH, v_BSKH)]
    return (*jax.lax.fori_loop(0, groups, one_group, zeros), None, None)


_attention.defvjp(_forward, _backward)
