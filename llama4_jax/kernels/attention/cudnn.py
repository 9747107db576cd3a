"""Attention on GPUs by cuDNN's packed layout: documents as (offset, length) lists, exact in O(T) for whole rows.

cuDNN keeps its softmax statistics once a document of the list, [B MAX_DOCUMENTS, N, T] fp32, and its backward pass an
fp32 buffer of the queries' size for each (10.6 GiB for a row of 8,192 and 40 heads), so the list is short and of a
static length. How many documents a row (or a chunk of one) holds is data: where it is more than fit, the row
comes out as NaN, which ends a run at its next step, and never as something else. `mosaic_gpu` takes any number.

jax's public `dot_product_attention` knows packed documents only as a T x T mask; the layout is reached by a private
path. It scales the offsets of keys by the number of query heads (jax 0.10.2), right only if keys have as many: keys
and values are repeated to that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_DOCUMENTS = 64
"""Documents of a row, runs of padding among them; the statistics then weigh as much as queries of head dim 128."""


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_T: Int[Array, "T"] | None = None,
) -> Float[Array, "B T N H"]:
    """See `api`. Whole rows, bfloat16 or float16, H <= 256 in eights; NaN for rows of more than MAX_DOCUMENTS runs.

    Padding (segment 0) is a run like any other: such a query sees its own run, not the padding behind other documents.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    T, N, H = q_BTNH.shape[1:]
    if q_positions_T is not None:
        raise ValueError(
            "attention backend 'cudnn' takes the queries of whole rows: use 'mosaic_gpu' for a part of one"
        )
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention backend 'cudnn' takes bfloat16 or float16, not {q_BTNH.dtype}: use 'blockwise'")
    if H > 256 or H % 8:
        raise ValueError(
            f"attention backend 'cudnn' takes head dimensions up to 256 in eights, not {H}: use 'blockwise'"
        )
    if q_BTNH.size >= 2**31:
        raise ValueError(
            f"attention backend 'cudnn' indexes queries by int32, {q_BTNH.shape} are more: use 'mosaic_gpu'"
        )
    starts_BM, lengths_BM, fits_B = documents(kv_segments_BS, min(MAX_DOCUMENTS, T))
    offsets = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    k_BSNH, v_BSNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    out_BTNH = cudnn.dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=H**-0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    assert isinstance(out_BTNH, jax.Array)
    return jnp.where(fits_B[:, None, None, None], out_BTNH, jnp.nan)


def documents(
    segments_BT: Int[Array, "B T"], most: int
) -> tuple[Int[Array, "B {most}"], Int[Array, "B {most}"], Bool[Array, "B"]]:
    """Starts and lengths of a row's runs of equal segments, -1 where there are no more, and whether `most` hold all."""
    T = segments_BT.shape[1]
    first_BT = segments_BT != jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def starts(first_T):
        return jnp.nonzero(first_T, size=most + 1, fill_value=T)[0].astype(jnp.int32)

    starts_and_end = jax.vmap(starts)(first_BT)
    real_BM = starts_and_end[:, :-1] < T
    lengths_BM = jnp.where(real_BM, jnp.diff(starts_and_end, axis=1), -1)
    return jnp.where(real_BM, starts_and_end[:, :-1], -1), lengths_BM, starts_and_end[:, -1] == T
