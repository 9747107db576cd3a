"""TPU: tokamax's splash kernels (flash attention over a list of blocks, fused backward), with a list for every row.

Splash walks a list of (query block, key block) pairs. Its own builder evaluates a static mask, which takes minutes at
256K and knows nothing of the data. Here the list is computed on the device, where it costs nothing next to attention,
from what `blockwise.block_states` says: pairs that causality or the documents rule out are not walked. So rows packed
with documents cost the sum of their squares, and queries may stand anywhere (a shard, a mirrored shard).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.kernels.attention.api import RESIDUALS
from llama4_jax.kernels.attention.blockwise import block_states
from llama4_jax.kernels.tokamax import vendor

BLOCKS = (1024, 512, 256, 128)
"""Rows of a block: the largest that divides the sequence. 2048 does not fit a core's memory."""


PAIRS = 2**16
"""Most pairs of blocks in a list: 13 bytes each, of a core's 1 MiB of scalar memory."""


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """See `api`. T and S are multiples of 128. The gradient of q gathers in three buffers of q's dtype.

    `interpret`: `pallas.tpu.InterpretParams()` runs the kernels in Pallas's model of a TPU, on any platform.
    """
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    bq, bkv = _block(T, "queries"), _block(S, "keys")
    positions_T = jnp.arange(T, dtype=jnp.int32) if q_positions_T is None else q_positions_T.astype(jnp.int32)
    # Lists have a static length; of plain causal attention we know it.
    pairs = sum((i + bq - 1) // bkv + 1 for i in range(0, T, bq)) if q_positions_T is None else (T // bq) * (S // bkv)
    if pairs > PAIRS:
        raise ValueError(
            f"splash attention lists up to {PAIRS} pairs of blocks, not {pairs} ({T} queries against {S} keys): "
            f"exchange 'mirror' or 'gather' over {-(-pairs // PAIRS)} times as many devices or more (mesh.context)"
        )
    splash = vendor("_src.ops.experimental.tpu.splash_attention.splash_attention_kernel")
    config = splash.SplashConfig(
        block_q=bq, block_kv=bkv, block_q_dkv=bq, block_kv_dkv=bkv, dq_reduction_steps=3, interpret=interpret,
        residual_checkpoint_name=RESIDUALS,
    )  # fmt: skip

    def one_row(row):
        q_TNH, k_SKH, v_SKH, q_segments_T, kv_segments_S = row
        states = block_states(
            positions_T.reshape(-1, bq), q_segments_T.reshape(-1, 1, bq), kv_segments_S.reshape(-1, 1, bkv)
        )
        kernel = splash.SplashAttentionKernel(
            _mask_info(states, pairs, positions_T),
            _mask_info(states.T, pairs, positions_T),
            config=config,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.base.DEFAULT_MASK_VALUE,
            mask_function=_causal,
            fwd_mask_sparsity=0.5,  # for the cost estimate alone
            dkv_mask_sparsity=0.5,
        )
        q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q_TNH, k_SKH, v_SKH))
        out_NTH = kernel(q_NTH, k_KSH, v_KSH, splash.SegmentIds(q_segments_T, kv_segments_S))
        return out_NTH.swapaxes(0, 1)

    q_BTNH = (q_BTNH * H**-0.5).astype(q_BTNH.dtype)
    return jax.lax.map(one_row, (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS))


def _mask_info(states, pairs: int, positions_T):
    """Splash's list of a grid of block states: the grid's rows in order, each with the columns to visit."""
    info = vendor("_src.ops.experimental.tpu.splash_attention.splash_attention_mask_info")
    # A row without work (keys that no query sees) is visited all the same, so that its gradients become zeros.
    idle = ~jnp.any(states > 0, axis=1, keepdims=True) & (jnp.arange(states.shape[1]) == 0)[None, :]
    visited = (states > 0) | idle
    rows, columns = jnp.nonzero(visited, size=pairs, fill_value=-1)
    small = jnp.int8 if max(states.shape) <= 127 else jnp.int16  # the lists live in scarce scalar memory
    return info.MaskInfo(
        mask_next=None,
        active_rows=rows.astype(small),
        active_cols=columns.astype(small),
        block_mask=states[rows, columns].astype(jnp.int8),
        num_active_blocks=jnp.sum(visited, dtype=jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=positions_T,
    )


def _causal(q_ids, kv_ids):
    return q_ids >= kv_ids


def _block(length: int, what: str) -> int:
    fitting = [b for b in BLOCKS if length % b == 0]
    if not fitting:
        nearest = max(1, round(length / BLOCKS[-1])) * BLOCKS[-1]
        raise ValueError(
            f"splash attention takes {what} in multiples of {BLOCKS[-1]}, not {length}: the nearest is {nearest}; "
            "'blockwise' takes any number"
        )
    return fitting[0]
